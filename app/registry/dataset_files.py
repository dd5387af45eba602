"""Data sets on disk: which file is meant, one pass that checks and hashes it, uploads that are whole or not there.

Everything here blocks; call it in a thread.
"""

import functools
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Final

from app.domain.errors import Conflict, Invalid
from app.domain.plain_text import shown
from app.registry.dataset_check import DatasetReport, PictureProblem, check_lines

SUFFIX: Final = ".jsonl"
IMAGES_FOLDER: Final = "images"
UPLOAD_PREFIX: Final = ".upload-"
_BUFFER: Final = 1024 * 1024
_ABANDONED_SECONDS: Final = 24 * 3600
_SHOWN_FILES: Final = 5
_REMEMBERED_PICTURES: Final = 100_000
_MAX_READ: Final = 32 * 1024 * 1024


class NotADataset(Invalid):
    """Neither a `.jsonl` file nor a folder with exactly one."""

    code = "not_a_dataset"


class SeveralDatasets(Invalid):
    """The folder holds several `.jsonl` files."""

    code = "several_datasets"


class DatasetUnreadable(Invalid):
    """The service's user may not read the file."""

    code = "dataset_unreadable"


class DatasetFileExists(Conflict):
    """An upload meets another file under its name."""

    code = "dataset_file_exists"


class DatasetChanging(Conflict):
    """The file is written to while it is read."""

    code = "dataset_changing"


FileKey = tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """What one pass over a data set found; `key` changes when the file does."""

    jsonl: Path
    images: Path | None
    digest: str
    size_bytes: int
    report: DatasetReport
    key: FileKey


@dataclass(frozen=True)
class Located:
    """The JSONL file of a data set, and its folder of images, if there is one."""

    jsonl: Path
    images: Path | None


def locate(path: Path) -> Located:
    """Return the files of the data set at `path`, which is a `.jsonl` file or a folder with exactly one."""
    if not path.is_dir():
        if path.suffix.lower() != SUFFIX:
            raise NotADataset(path=shown(path.name), pointer="/path")
        return Located(jsonl=path, images=None)
    files = sorted(entry for entry in path.iterdir() if _is_jsonl(entry))
    if not files:
        raise NotADataset(path=shown(path.name), pointer="/path")
    if len(files) > 1:
        names = ", ".join(shown(file.name) for file in files[:_SHOWN_FILES])
        raise SeveralDatasets(path=shown(path.name), files=names, pointer="/path")
    images = path / IMAGES_FOLDER
    return Located(jsonl=files[0], images=images if images.is_dir() else None)


def inspect(path: Path, *, max_characters: int) -> Inspection:
    """Check and hash the data set at `path` in one pass."""
    located = locate(path)
    pictures = _picture_check(located) if path.is_dir() else None
    with _opened(located.jsonl) as (stream, key):
        lines = BoundedLines(stream, max_bytes=4 * max_characters + 2)
        report = check_lines(lines, max_characters=max_characters, picture_problem=pictures)
        return Inspection(
            jsonl=located.jsonl,
            images=located.images,
            digest=lines.digest,
            size_bytes=lines.size,
            report=report,
            key=key,
        )


def digest_of(jsonl: Path) -> tuple[str, FileKey]:
    """Return the sha256 of the file and the key under which it can be remembered."""
    with _opened(jsonl) as (stream, key):
        return hashlib.file_digest(stream, "sha256").hexdigest(), key


def file_key(path: Path) -> FileKey:
    """Return what changes when the file is written to; cheap."""
    return _key(path.stat())


def is_settled(key: FileKey) -> bool:
    """Return whether the file is old enough that another write would show in its key."""
    return time.time_ns() - max(key[3:]) > 2_000_000_000


def read_rows(jsonl: Path, *, offset: int, limit: int, max_characters: int) -> list[tuple[int, bytes]]:
    """Return up to `limit` lines after the first `offset` rows, each with its number; fewer if they are large."""
    with _opened(jsonl, whole=False) as (stream, _):
        rows: list[tuple[int, bytes]] = []
        row = size = 0
        for number, line in enumerate(BoundedLines(stream, max_bytes=4 * max_characters + 2), start=1):
            if line.isspace():
                continue
            if row >= offset:
                size += len(line)
                if rows and size > _MAX_READ:
                    break
                rows.append((number, line))
            row += 1
            if len(rows) == limit:
                break
        return rows


def place(upload: Path, target: Path, *, digest: str) -> None:
    """Give the finished upload its name; a file that is there already is kept, and must have the same bytes."""
    try:
        os.link(upload, target, follow_symlinks=False)
    except FileExistsError:
        if target.is_symlink() or not target.is_file() or digest_of(target)[0] != digest:
            raise DatasetFileExists(file=shown(target.name)) from None
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_abandoned_uploads(datasets: Path) -> int:
    """Remove what crashed uploads left, a day after; return how many."""
    removed = 0
    for entry in datasets.glob(f"{UPLOAD_PREFIX}*"):
        if time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
            entry.unlink(missing_ok=True)
            removed += 1
    return removed


class BoundedLines:
    """The lines of a stream, hashed and counted as they pass; what is beyond `max_bytes` of a line is cut off."""

    def __init__(self, stream: IO[bytes], *, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def digest(self) -> str:
        """The sha256 of all bytes that were read so far."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[bytes]:
        # two bytes more: a line of exactly the limit still has its line end
        while line := self._read(self._max_bytes + 2):
            rest = line
            while not rest.endswith(b"\n") and (rest := self._read(_BUFFER)):
                pass
            yield line

    def _read(self, limit: int) -> bytes:
        piece = self._stream.readline(limit)
        self._hash.update(piece)
        self.size += len(piece)
        return piece


@contextmanager
def _opened(path: Path, *, whole: bool = True) -> Iterator[tuple[BufferedReader, FileKey]]:
    try:
        # not to block: opening a pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as exc:
        raise DatasetUnreadable(path=shown(path.name), pointer="/path") from exc
    with open(descriptor, "rb") as stream:  # noqa: PTH123 (a descriptor, not a path)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotADataset(path=shown(path.name), pointer="/path")
        yield stream, _key(status)
        if whole and _key(os.fstat(descriptor)) != _key(status):
            raise DatasetChanging(path=shown(path.name))


def _key(status: os.stat_result) -> FileKey:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _picture_check(located: Located) -> PictureProblem:
    """Return the check of the pictures in `images/` or beside the rows, where scripts look for them."""
    beside = located.jsonl.parent
    folders = [folder for folder in (located.images, beside) if folder is not None]

    @functools.lru_cache(maxsize=_REMEMBERED_PICTURES)
    def problem(name: str) -> str | None:
        if name.startswith("/") or ".." in name.split("/"):
            return "line_image_missing"
        found = [status for folder in folders if (status := _status(folder / name)) is not None]
        if not found:
            return "line_image_missing"
        regular = [status for status in found if stat.S_ISREG(status.st_mode)]
        if not regular:
            return "line_image_not_file"
        return None if regular[0].st_size else "line_image_empty"

    return problem


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):  # a name too long, or with NUL
        return None


def _is_jsonl(entry: Path) -> bool:
    return entry.suffix.lower() == SUFFIX and not entry.name.startswith(".") and entry.is_file()
