"""References to secrets: `secret://NAME` stands for a value that only the process of a stage gets.

A reference is a whole value. One inside of a longer text is refused, because a value is put in where programs read it,
never into what was quoted or escaped around it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

SCHEME: Final = "secret://"
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{43}=")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_secret_name(text: str) -> bool:
    """Say whether a secret can have this name."""
    return _NAME.fullmatch(text) is not None


def referred_name(value: object) -> str | None:
    """Return the name of the secret that `value` refers to; None if it is no reference."""
    if not isinstance(value, str) or not value.startswith(SCHEME):
        return None
    name = value.removeprefix(SCHEME)
    return name if is_secret_name(name) else None


def references(document: Any) -> Iterator[str]:
    """Yield the name of each secret that a JSON document refers to; members' names are no values."""
    match document:
        case str():
            if (name := referred_name(document)) is not None:
                yield name
        case Mapping():
            for value in document.values():
                yield from references(value)
        case list() | tuple():
            for value in document:
                yield from references(value)


def broken_references(document: Any) -> Iterator[str]:
    """Yield each text of a JSON document that holds `secret://` and is no reference."""
    match document:
        case str():
            if SCHEME in document and referred_name(document) is None:
                yield document
        case Mapping():
            for value in document.values():
                yield from broken_references(value)
        case list() | tuple():
            for value in document:
                yield from broken_references(value)


def with_values(document: Any, values: Mapping[str, str]) -> Any:
    """Return a JSON document whose references are replaced by the secrets' values, by name."""
    match document:
        case str():
            name = referred_name(document)
            return document if name is None else values[name]
        case Mapping():
            return {key: with_values(value, values) for key, value in document.items()}
        case list() | tuple():
            return [with_values(value, values) for value in document]
        case _:
            return document


def parse_keys(text: str) -> tuple[str, ...]:
    """Return the keys in `text`, one a line or separated by commas; raise ValueError if one is none, or none is there.

    The text of the error shows no key.
    """
    keys = tuple(re.split(r"[\s,]+", text.strip()))
    if not all(_KEY.fullmatch(key) for key in keys):
        raise ValueError("a key is 44 characters: 32 random bytes in URL-safe Base64")
    return keys
