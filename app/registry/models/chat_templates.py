"""Find out which token ends an assistant's turn in a chat template, without rendering it.

A template is another author's program, so that it is read and never run. Its literals, its outputs of content and the
roles that its conditions name are followed in the order in which they stand. What several branches contradict each
other on stays unknown.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final, Literal

EOS: Final = "eos_token"
MAX_TEMPLATE_CHARACTERS: Final = 200_000
_MAX_DEPTH: Final = 100
_OPENING: Final = re.compile(r"\{[{%#]")
_CLOSING: Final = {"{{": "}}", "{%": "%}", "{#": "#}"}
# a text that is not closed ends with the expression: trying again at each of its characters would take forever
_PART: Final = re.compile(
    r"""(?P<text>'(?:\\.|[^'\\])*(?:'|\\?\Z)|"(?:\\.|[^"\\])*(?:"|\\?\Z))|(?P<name>[A-Za-z_]\w*)""", re.DOTALL
)
_TOKEN: Final = re.compile(r"<\|[^|<>\s]{1,60}\|>|<｜[^｜<>\s]{1,60}｜>|</?[A-Za-z_]{1,40}>|\[/?[A-Z_]{2,40}\]")
# what stands in a turn or before it, but never is its end
_NO_END: Final = re.compile(
    "start|begin|bos|image|video|audio|tool|think|user|assistant|system|header|role|python|pad", re.I
)
_ROLES: Final = ("assistant", "user", "system", "tool", "developer", "function", "ipython", "observation")

Role = Literal["assistant", "other"]


@dataclass(frozen=True)
class _Event:
    """Content that is written, or a token behind it; `role` is whose turn it is as far as conditions say."""

    token: str | None
    role: Role | None


def turn_end(template: str, special: Collection[str] = ()) -> str | None:
    """Return the token that ends an assistant's turn, `eos_token` if the template names that variable.

    `special` are the tokenizer's special tokens; without any, what looks like one counts. None: it cannot be told.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        return None
    ends: dict[Role | None, set[str]] = {"assistant": set(), "other": set(), None: set()}
    open_role: Role | None = None
    waiting = False
    for event in _events(template, frozenset(special)):
        if event.token is None:
            waiting, open_role = True, event.role
        elif waiting:
            ends[open_role].add(event.token)
            waiting = False
    for candidates in (ends["assistant"], ends[None]):
        if candidates:
            return candidates.pop() if len(candidates) == 1 else None
    return None


def _events(template: str, special: frozenset[str]) -> Iterator[_Event]:
    conditions: list[Role | None] = []

    def role() -> Role | None:
        return next((one for one in reversed(conditions) if one is not None), None)

    for opening, inside in _blocks(template):
        if opening == "":
            yield from _tokens(inside, special, role())
        elif opening == "{{":
            yield from _of_expression(inside, special, role())
        elif opening == "{%":
            word, _, rest = inside.partition(" ")
            match word:
                case "if":
                    conditions.append(_role_of(rest))
                    if len(conditions) > _MAX_DEPTH:
                        return
                case "elif" if conditions:
                    conditions[-1] = _role_of(rest)
                case "else" if conditions:
                    conditions[-1] = None
                case "endif" if conditions:
                    conditions.pop()
                case "set":
                    found = list(_of_expression(rest.partition("=")[2], special, role()))
                    if found and found[-1].token is not None:  # a turn that is put together before it is written
                        yield from found


def _blocks(template: str) -> Iterator[tuple[str, str]]:
    """Yield the text outside of blocks, each with an empty mark, and what stands in blocks, with what opens them."""
    position = 0
    while opening := _OPENING.search(template, position):
        yield "", template[position : opening.start()]
        end = template.find(_CLOSING[opening[0]], opening.end())
        if end < 0:
            return
        yield opening[0], template[opening.end() : end].strip("- \t\r\n")
        position = end + 2
    yield "", template[position:]


def _of_expression(expression: str, special: frozenset[str], role: Role | None) -> Iterator[_Event]:
    for part in _PART.finditer(expression):
        if part["name"] is not None:
            if part["name"] == EOS:
                yield _Event(EOS, role)
            elif "content" in part["name"]:
                yield _Event(None, role)
        elif part["text"][1:-1] == "content":
            yield _Event(None, role)
        else:
            yield from _tokens(part["text"][1:-1], special, role)


def _tokens(text: str, special: frozenset[str], role: Role | None) -> Iterator[_Event]:
    for found in _TOKEN.finditer(text):
        token = found[0]
        if not _NO_END.search(token) and (not special or token in special):
            yield _Event(token, role)


def _role_of(condition: str) -> Role | None:
    """Return whose turn a condition asks for; None if it asks for something else, or for what a turn is not."""
    if "!=" in condition or re.search(r"\bnot\b(?!\s+none)", condition, re.I):
        return None
    named = [name for name in _ROLES if re.search(f"['\"]{name}['\"]", condition)]
    if not named:
        return None
    return "assistant" if named == ["assistant"] else "other" if "assistant" not in named else None
