"""Text from outside (names of files, arguments, environment, output of scripts) in a form that can be kept and shown.

Python holds bytes that are not UTF-8 as lone surrogates (PEP 383). UTF-8 has no place for those, Postgres none for NUL,
and JSON none for NaN. Such characters are escaped, never dropped: the byte FC of a name becomes `\\xfc`.
"""

import math
import re
from typing import Any, Final

MAX_PATH_LENGTH: Final = 4096  # of a path that is shown whole; no system takes longer ones
MAX_DEPTH: Final = 64  # of a document; serializers give up at about 250 levels
_CUT: Final = "…"
_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")
# C0, DEL, C1, marks that change the direction of writing, lone surrogates
_CONTROLS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_INTEGER_BITS: Final = 14_000  # Python refuses to write integers of more than 4,300 digits


def shown(value: str, *, limit: int = 80) -> str:
    """Return `value` as it may stand in a sentence: one line, printable, at most `limit` characters."""
    # cut before as well: a long text is not escaped only to be thrown away
    plain = "".join(c if c.isprintable() else _escaped(c) for c in value[: limit + 1])
    return plain if len(plain) <= limit else plain[: limit - 1] + _CUT


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Return `text` as it may be written to a terminal: what a terminal would obey, or shows reversed, by its code."""
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def storable(text: str) -> str:
    """Return `text` with escapes for what databases and encoders refuse: NUL and lone surrogates."""
    return _UNSTORABLE.sub(lambda match: _escaped(match[0]), text)


def storable_document(document: Any, *, depth: int = MAX_DEPTH) -> Any:
    """Return a JSON document that every database and encoder accepts.

    Texts become `storable`, numbers that JSON lacks null, and what is nested deeper than `depth` an ellipsis.
    """
    match document:
        case str():
            return storable(document)
        case bool() | None:
            return document
        case float():
            return document if math.isfinite(document) else None
        case int():
            return document if document.bit_length() <= _LONGEST_INTEGER_BITS else _CUT
        case dict() | list() | tuple() if depth == 0:
            return _CUT
        case dict():
            return {storable(str(key)): storable_document(value, depth=depth - 1) for key, value in document.items()}
        case list() | tuple():
            return [storable_document(value, depth=depth - 1) for value in document]
        case _:
            return document


def _escaped(character: str) -> str:
    code = ord(character)
    # a byte that is not UTF-8, as Python holds it
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else repr(character)[1:-1]
