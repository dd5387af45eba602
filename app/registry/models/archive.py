"""A model's folder as one uncompressed tar, made while it is sent: no temporary file, no limit of size, flat memory."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.registry.models.files import UnusableFile, open_regular
from app.registry.models.folders import walk

_BLOCK: Final = tarfile.BLOCKSIZE
_PIECE: Final = 1024 * 1024
_MODE: Final = 0o644


@dataclass(frozen=True)
class Archive:
    """A tar to be: the header and the path of every file in it."""

    entries: Sequence[tuple[bytes, Path, int]]

    @property
    def size_bytes(self) -> int:
        """Return the size of the whole tar."""
        return sum(len(head) + size + _padding(size) for head, _, size in self.entries) + 2 * _BLOCK

    def pieces(self) -> Iterator[bytes]:
        """Yield the tar; raises `UnusableFile` if a file changed its size meanwhile. Blocks."""
        for head, path, size in self.entries:
            yield head
            left = size
            with open_regular(path) as stream:
                while left and (piece := stream.read(min(left, _PIECE))):
                    left -= len(piece)
                    yield piece
            if left:
                raise UnusableFile("model_file_changing", path)
            yield bytes(_padding(size))
        yield bytes(2 * _BLOCK)


def archive_of(folder: Path, name: str, *, roots: Sequence[Path] = ()) -> Archive:
    """Return the model in `folder` as a tar with one folder `name`. Reads no file; blocks."""
    return Archive([_entry(folder, path, name) for path in walk(folder, roots=roots).files])


def _entry(folder: Path, path: Path, name: str) -> tuple[bytes, Path, int]:
    status = path.stat()
    member = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
    member.size, member.mtime, member.mode = status.st_size, int(status.st_mtime), _MODE
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"), path, status.st_size


def _padding(size: int) -> int:
    return -size % _BLOCK
