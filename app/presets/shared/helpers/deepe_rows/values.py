"""What a row is once it was read: one of these values, whatever form it was written in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Turn = Mapping[str, Any]
"""A turn as chat templates take it: role, content; where given tool_calls, tool_call_id, name, reasoning_content."""

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, and which of them the model learns to say: answers of the assistant whose weight is not 0."""

    turns: Sequence[Turn]
    learned: frozenset[int]
    tools: Sequence[Any] | None = None
    pictures: Sequence[str] = ()
    place: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    """The columns that no form knows."""

    def answers(self) -> list["Answer"]:
        """Return every learned turn with all that comes before it."""
        return [
            Answer(
                prompt=list(self.turns[:place]),
                completion=self.turns[place],
                tools=self.tools,
                pictures=self.pictures,
                place=self.place,
                more=self.more,
            )
            for place in sorted(self.learned)
        ]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to learn, with the turns before it: what is given and what is learned."""

    prompt: Sequence[Turn]
    completion: Turn
    tools: Sequence[Any] | None = None
    pictures: Sequence[str] = ()
    place: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of it learned."""

    text: str
    place: str = ""


@dataclass(frozen=True, slots=True)
class Preference:
    """A better and a worse answer to the same turns."""

    prompt: Sequence[Turn]
    chosen: Turn
    rejected: Turn
    tools: Sequence[Any] | None = None
    place: str = ""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One answer, and whether it is a good one."""

    prompt: Sequence[Turn]
    completion: Turn
    label: bool
    tools: Sequence[Any] | None = None
    place: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """A text, one that belongs to it, and some that do not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()
    place: str = ""


@dataclass(frozen=True, slots=True)
class Graded:
    """A query and a document, and how well it answers the query: 0 not at all, the more the better."""

    query: str
    document: str
    grade: float
    place: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that the model answers by itself; `reference` is the right answer, where there is one."""

    prompt: Sequence[Turn]
    reference: str | None = None
    tools: Sequence[Any] | None = None
    place: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    """The columns that no form knows: a reward may need them (tests, a solution)."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A picture, and what it shows."""

    text: str
    picture: str
    place: str = ""


Example = Conversation | Text | Preference | Labelled | Pair | Graded | Question | Caption
