"""How many tokens the rows of a file have: counted by a tokenizer, for a sample of a large file.

Counting takes a bounded time, so the sample is drawn first and counted in a random order: whatever was counted when
the time is over is a random sample as well. A row is short if its longest sequence is, so that is what percentiles are
about: a conversation is as long as the sequence of its last answer.
"""

import heapq
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from .files import enumerated_lines, parsed_line
from .problems import RowProblem
from .profile import percentiles
from .reading import Reader
from .telling import Wanted
from .values import Conversation, Example

LIMITS = ("max_input_length", "max_content_length", "max_seq_length")
"""Parameters that bound the tokens of the prompt, of the answer, and of both together."""

SAMPLED_ROWS = 1000
SAMPLED_CHARACTERS = 64 * 1024 * 1024
"""Of the sampled lines, which are held in memory; fewer of longer ones are sampled."""
FEWEST_ROWS = 20
SECONDS = 3.0
LISTED_LINES = 5
SEED = 0


class RowLength(NamedTuple):
    """The tokens of one row; `given` and `tokens` of all its sequences together, the others of the longest."""

    sequences: int
    given: int
    tokens: int
    longest_given: int
    longest_answer: int
    longest: int
    split: bool = False
    """It is a text: a long one is learned in pieces, not left out."""


LengthsOf = Callable[[Example], RowLength | None]


def row_length(sequences: Sequence[tuple[int, int]], *, split: bool = False) -> RowLength | None:
    """Return the length of a row by the tokens of its sequences: (only given, all); None without any."""
    if not sequences:
        return None
    return RowLength(
        sequences=len(sequences),
        given=sum(given for given, _ in sequences),
        tokens=sum(tokens for _, tokens in sequences),
        longest_given=max(given for given, _ in sequences),
        longest_answer=max(tokens - given for given, tokens in sequences),
        longest=max(tokens for _, tokens in sequences),
        split=split,
    )


def measure(path: Path, wanted: Wanted, lengths_of: LengthsOf, *, limit: int = -1) -> dict[str, Any]:
    """Return the lengths of rows, as JSON can say it; see `Lengths`. `limit`: rows that are used, if it is positive.

    `lengths_of` may raise `RowProblem`. Raises `Refused` for a file that cannot be read.
    """
    reader = Reader(wanted)
    rows: list[RowLength] = []
    refused: list[int] = []
    pictures = 0
    drawn, total = _drawn(path, limit)
    until = time.monotonic() + SECONDS
    measured = 0
    for number, line in drawn:
        if measured >= FEWEST_ROWS and time.monotonic() > until:
            break
        measured += 1
        try:
            example = reader.read(parsed_line(path, number, line), number)
            length = None if example is None else lengths_of(example)
        except RowProblem:
            refused.append(number)
            continue
        if length is not None:
            rows.append(length)
            pictures += isinstance(example, Conversation) and bool(example.pictures)
    return {
        "rows": rows,
        "measured": measured,
        "total": total,
        "refused": len(refused),
        "refused_lines": sorted(refused)[:LISTED_LINES],
        "pictures": pictures,
    }


def _drawn(path: Path, limit: int) -> tuple[list[tuple[int, str]], int]:
    """Return a random sample of the lines in a random order, with their numbers, and how many lines there are."""
    draw = random.Random(SEED).random
    kept: list[tuple[float, int, str]] = []  # a heap of the highest draws; the lowest of them goes first
    most, characters, total = SAMPLED_ROWS, 0, 0
    lines: Iterable[tuple[int, str]] = enumerated_lines(path)
    for number, line in islice(lines, limit) if limit > 0 else lines:
        total += 1
        drawn = draw()
        if len(kept) >= most and drawn < kept[0][0]:
            continue
        heapq.heappush(kept, (drawn, number, line))
        characters += len(line)
        if len(kept) > most:
            characters -= len(heapq.heappop(kept)[2])
        while characters > SAMPLED_CHARACTERS and len(kept) > FEWEST_ROWS:
            characters -= len(heapq.heappop(kept)[2])
            most = len(kept)
    return [(number, line) for _, number, line in sorted(kept)], total


@dataclass(frozen=True)
class Lengths:
    """What was measured. `measured` of `total` rows were looked at; `refused` of them a training would refuse."""

    rows: Sequence[RowLength]
    measured: int
    total: int
    refused: int
    refused_lines: Sequence[int]
    pictures: int
    """Rows whose pictures are not counted."""

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Lengths":
        """Return what `measure` found."""
        return cls(**{**document, "rows": [RowLength(*row) for row in document["rows"]]})

    @property
    def percentiles(self) -> dict[str, int] | None:
        """The tokens that so many percent of the rows do not exceed."""
        return percentiles(Counter(row.longest for row in self.rows))

    def learned_share(self, parameters: Mapping[str, Any]) -> float | None:
        """Return the share of the tokens that is learned, the others are only given."""
        tokens = sum(row.tokens for row in self.rows)
        given = 0 if parameters.get("mask_prompt") is False else sum(row.given for row in self.rows)
        return round(1 - given / tokens, 4) if tokens else None

    def beyond(self, parameters: Mapping[str, Any]) -> dict[str, int]:
        """Return how many rows have a sequence over a limit, for each limit that some row is over."""
        return dict(Counter(name for row in self.rows for name in _exceeded(row, parameters)))

    def learned_from(self, parameters: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return how many sequences a training makes of one that is in the rows, and the tokens of each.

        A row over a limit is left out, a text is split. None if there are no rows.
        """
        made = tokens = 0
        for row in self.rows:
            exceeded = _exceeded(row, parameters)
            if exceeded and not row.split:
                continue
            made += -(-row.tokens // _longest_text(parameters)) if exceeded else row.sequences
            tokens += row.tokens
        given = sum(row.sequences for row in self.rows)
        return (made / given, tokens / made if made else 0.0) if given else None


def _exceeded(row: RowLength, parameters: Mapping[str, Any]) -> list[str]:
    """Return the limits that a sequence of the row is over."""
    if row.split:
        name = LIMITS[2] if _limit(parameters, LIMITS[2]) is not None else LIMITS[1]
        return [name] if row.longest > _longest_text(parameters) else []
    lengths = (row.longest_given, row.longest_answer, row.longest)
    limits = (_limit(parameters, name) for name in LIMITS)
    return [
        name for name, length, most in zip(LIMITS, lengths, limits, strict=True) if most is not None and length > most
    ]


def _longest_text(parameters: Mapping[str, Any]) -> int:
    """Return how many tokens a piece of a text has at most; see `deepe_examples.longest_of`."""
    given, answer, both = (_limit(parameters, name) for name in LIMITS)
    if both is not None:
        return both
    return sys.maxsize if given is None or answer is None else given + answer


def _limit(parameters: Mapping[str, Any], name: str) -> int | None:
    most = parameters.get(name)
    return most if isinstance(most, int) and most > 0 else None
