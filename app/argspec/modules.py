"""Modules that stand beside a script: their sources, as far as they were handed over, and those that are missing.

The process that walks a script opens no files. It names the modules whose sources would help, and its caller, who knows
where a script finds its modules, asks again with them.
"""

import ast
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from app.argspec.source import NotPython, parse

MAX_MODULES = 64
MAX_BYTES = 2 * 2**20
MAX_WANTED = 256

_LENGTH = struct.Struct("!I")


@dataclass(frozen=True)
class Source:
    """The source of a module."""

    content: bytes
    is_package: bool = False


@dataclass(frozen=True)
class ParsedSource:
    """A module that can be walked."""

    tree: ast.Module
    is_package: bool


class Modules:
    """The modules that a reading may look into."""

    def __init__(self, sources: Mapping[str, Source | None] | None = None, *, package: str = "") -> None:
        self.package = package
        """The package that relative imports of what is read start from; empty for a script."""
        self._sources = sources or {}
        self._wanted: dict[str, None] = {}

    @property
    def wanted(self) -> tuple[str, ...]:
        """Return the modules that were looked for and of which it is not known yet whether they exist."""
        return tuple(self._wanted)

    def find(self, name: str) -> ParsedSource | None:
        """Return the module of this name, `None` if there is none, or none that is Python."""
        if name not in self._sources:
            if len(self._wanted) < MAX_WANTED:
                self._wanted[name] = None
            return None
        source = self._sources[name]
        if source is None:
            return None
        try:
            return ParsedSource(parse(source.content), source.is_package)
        except NotPython:
            return None


def packed(script: bytes, sources: Mapping[str, Source | None], package: str = "") -> bytes:
    """Return a script with the modules beside it as one text of bytes, and the package that it is in."""
    listed = [[name, one and len(one.content), one and one.is_package] for name, one in sources.items()]
    head = json.dumps([package, listed]).encode()
    return b"".join((_LENGTH.pack(len(head)), head, *(one.content for one in sources.values() if one), script))


def unpacked(request: bytes) -> tuple[bytes, dict[str, Source | None], str]:
    """Return what `packed` made one of."""
    (length,) = _LENGTH.unpack_from(request)
    at = _LENGTH.size + length
    sources: dict[str, Source | None] = {}
    package, listed = json.loads(request[_LENGTH.size : at])
    for name, size, is_package in listed:
        sources[name] = None if size is None else Source(request[at : at + size], is_package)
        at += size or 0
    return request[at:], sources, package
