"""Bytes of every script version, by digest: `versions/<aa>/<sha256>/`.

`content` holds the bytes; beside it stands a copy under the script's own name once a stage had to run it from here.
Nothing is ever changed or removed, so that a job of years ago can run again.
"""

import hashlib
import os
from pathlib import Path
from uuid import uuid4

from app.domain.errors import Unavailable
from app.registry.scripts.names import SUFFIX, stem

_CONTENT = "content"


class VersionLost(Unavailable):
    """The stored bytes of a pinned file are gone or damaged: the folder `versions` was changed."""

    code = "version_lost"


class VersionStore:
    """Keeps bytes by their sha256. All methods block."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, content: bytes) -> str:
        """Keep `content` and return its sha256. Putting the same bytes again changes nothing."""
        sha256 = hashlib.sha256(content).hexdigest()
        file = self._folder(sha256) / _CONTENT
        if not _holds(file, sha256):
            _write(file, content)
        return sha256

    def get(self, sha256: str) -> bytes:
        """Return the bytes with the digest `sha256`."""
        try:
            content = (self._folder(sha256) / _CONTENT).read_bytes()
        except FileNotFoundError as exc:
            raise VersionLost(sha256=sha256) from exc
        if hashlib.sha256(content).hexdigest() != sha256:
            raise VersionLost(sha256=sha256)
        return content

    def materialise(self, sha256: str, path: str) -> Path:
        """Return a Python file that holds the bytes and is called as the script `path` is."""
        file = self._folder(sha256) / (stem(path) + SUFFIX)
        if not _holds(file, sha256):
            _write(file, self.get(sha256))
        return file

    def _folder(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256


def _holds(file: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() == sha256
    except FileNotFoundError:
        return False


def _write(file: Path, content: bytes) -> None:
    """Write `file` so that it is there whole or not at all, also after a power cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o444)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
