"""The difference of two files as a person reads it, within bounds."""

import difflib
import struct
from dataclasses import dataclass

_LENGTH = struct.Struct("!I")
_MAX_LINE = 2000
_MAX_CHARACTERS = 200_000
_CONTEXT = 5


@dataclass(frozen=True)
class Difference:
    """A unified difference. `cut`: it goes on, or some line does; `binary`: one of the files is no text."""

    text: str = ""
    cut: bool = False
    binary: bool = False


def packed_pair(before: bytes, after: bytes) -> bytes:
    """Return two files as one request."""
    return _LENGTH.pack(len(before)) + before + after


def read_difference(request: bytes) -> Difference:
    """Return the difference of a packed pair; control characters, and what hides text, are written as escapes."""
    (length,) = _LENGTH.unpack(request[: _LENGTH.size])
    before, after = request[_LENGTH.size : _LENGTH.size + length], request[_LENGTH.size + length :]
    if b"\0" in before or b"\0" in after:
        return Difference(binary=True)
    old, new = _lines(before), _lines(after)
    size, kept, cut = 0, [], False
    for line in difflib.unified_diff(old, new, n=_CONTEXT, lineterm=""):
        if line in ("--- ", "+++ "):
            continue
        shown = line if len(line) <= _MAX_LINE else line[: _MAX_LINE - 1] + "…"
        cut = cut or shown is not line
        size += len(shown) + 1
        if size > _MAX_CHARACTERS:
            cut = True
            break
        kept.append(shown)
    return Difference(text="\n".join(kept), cut=cut)


def _lines(content: bytes) -> list[str]:
    text = content.decode("utf-8", "backslashreplace")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return ["".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line) for line in lines]
