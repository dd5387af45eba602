"""Texts with placeholders in the definition of a method.

`{NAME}` is a value of the platform, `{param:NAME}` a parameter of the job, `{flag:NAME}` the option of a parameter that
is true, `{parameters}` all parameters that are placed nowhere else. `{{` and `}}` are braces.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

_TOKEN = re.compile(r"\{\{|\}\}|\{(?P<inside>[^{}]*)\}|[{}]")
_PLATFORM = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PARAMETER = re.compile(r"[^\W\d][\w.-]{0,99}")
_ALL_OTHERS = "parameters"


class PlaceholderKind(StrEnum):
    """What a placeholder stands for; the value is what is written before its colon."""

    PLATFORM = ""
    PARAMETER = "param"
    FLAG = "flag"
    OTHERS = "parameters"


@dataclass(frozen=True)
class Placeholder:
    """A placeholder; `name` is empty for `{parameters}`."""

    kind: PlaceholderKind
    name: str = ""

    def __str__(self) -> str:
        match self.kind:
            case PlaceholderKind.PLATFORM:
                return f"{{{self.name}}}"
            case PlaceholderKind.OTHERS:
                return f"{{{_ALL_OTHERS}}}"
            case _:
                return f"{{{self.kind}:{self.name}}}"

    @property
    def stands_alone(self) -> bool:
        """Whether it has to be the whole text: it becomes any number of words."""
        return self.kind in (PlaceholderKind.FLAG, PlaceholderKind.OTHERS)


Template = tuple[str | Placeholder, ...]
"""A text as its literal parts and placeholders, in order."""


class MalformedTemplate(ValueError):
    """The text has a brace that belongs to no placeholder; the message is the part that is wrong."""


@lru_cache(maxsize=10_000)
def parse(text: str) -> Template:
    """Return the parts of `text`. Raise `MalformedTemplate` for a brace that is neither doubled nor a placeholder's."""
    parts: list[str | Placeholder] = []
    literal, position = "", 0
    for token in _TOKEN.finditer(text):
        literal += text[position : token.start()]
        position = token.end()
        if token[0] in ("{{", "}}"):
            literal += token[0][0]
            continue
        placeholder = None if token["inside"] is None else _placeholder(token["inside"])
        if placeholder is None:
            raise MalformedTemplate(token[0])
        parts += [literal, placeholder] if literal else [placeholder]
        literal = ""
    literal += text[position:]
    return (*parts, literal) if literal else tuple(parts)


def placeholders(text: str) -> tuple[Placeholder, ...]:
    """Return the placeholders of a text that is well formed."""
    return tuple(part for part in parse(text) if isinstance(part, Placeholder))


def only_placeholder(text: str) -> Placeholder | None:
    """Return the placeholder that is the whole text, None if there is more or none."""
    match parse(text):
        case (Placeholder() as placeholder,):
            return placeholder
        case _:
            return None


def _placeholder(inside: str) -> Placeholder | None:
    if inside == _ALL_OTHERS:
        return Placeholder(PlaceholderKind.OTHERS)
    kind, colon, name = inside.partition(":")
    if not colon:
        return Placeholder(PlaceholderKind.PLATFORM, inside) if _PLATFORM.fullmatch(inside) else None
    if kind in (PlaceholderKind.PARAMETER, PlaceholderKind.FLAG) and _PARAMETER.fullmatch(name):
        return Placeholder(PlaceholderKind(kind), name)
    return None
