"""Data sets on disk: which file is meant, one pass that checks and hashes JSONL, uploads that are whole or not there.

Everything here blocks; call it in a thread.
"""

import functools
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Final

from app.domain.errors import AppError, Conflict, Invalid
from app.domain.plain_text import shown
from app.formats.base import SUFFIXES
from app.formats.text import cut_lines
from app.registry.datasets.check import DatasetReport, PictureProblem, check_lines

SUFFIX: Final = ".jsonl"
IMAGES_FOLDER: Final = "images"
UPLOAD_PREFIX: Final = ".upload-"
READING_PREFIX: Final = ".reading-"
_PARTS: Final = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "valid"),
    "test": "test",
}
_ABANDONED: Final = (f"{UPLOAD_PREFIX}*", f".{UPLOAD_PREFIX}*", f"{READING_PREFIX}*")  # the second: made of an upload
_ABANDONED_SECONDS: Final = 24 * 3600
_SHOWN_FILES: Final = 5
_REMEMBERED_PICTURES: Final = 100_000
_MAX_READ: Final = 32 * 1024 * 1024


class NotADataset(Invalid):
    """Neither a regular file nor a folder with exactly one file of rows."""

    code = "not_a_dataset"


class SeveralDatasets(Invalid):
    """The folder holds several files of rows."""

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
    """What one pass over a data set found; `key` changes when the file that was brought does."""

    jsonl: Path
    """What scripts read: the file that was brought, or what became of it."""
    digest: str
    size_bytes: int
    report: DatasetReport
    key: FileKey
    source: dict[str, Any] | None = None
    """How the file was read, and the archive that it came in; None for JSONL that scripts read as it is."""
    converted: bool = False
    """`jsonl` was made of the file that was brought."""


@dataclass(frozen=True)
class Located:
    """The file of a data set's rows, and its folder of images, if there is one."""

    rows: Path
    images: Path | None
    parts: Mapping[str, Path] = field(default_factory=dict)
    """Files of a folder that is split: train, and valid and test as far as they are there."""


def locate(path: Path) -> Located:
    """Return the files of the data set at `path`: a file, or a folder with one `.jsonl` or else one file of rows.

    A folder may be split into files called train, valid (or validation, val, dev, eval) and test: then the rows are
    those of train.
    """
    if not path.is_dir():
        return Located(rows=path, images=None)
    found = sorted(entry for entry in path.iterdir() if _holds_rows(entry))
    files = [entry for entry in found if entry.suffix.lower() == SUFFIX] or found
    if not files:
        raise NotADataset(path=shown(path.name), pointer="/path")
    if parts := _splits(files):
        files = [parts["train"]]
    if len(files) > 1:
        names = ", ".join(shown(file.name) for file in files[:_SHOWN_FILES])
        raise SeveralDatasets(path=shown(path.name), files=names, pointer="/path")
    images = path / IMAGES_FOLDER
    return Located(rows=files[0], images=images if images.is_dir() else None, parts=parts)


def _splits(files: Sequence[Path]) -> dict[str, Path]:
    """Return the files by their part, if they are the parts of one split and nothing else."""
    by_part: dict[str, list[Path]] = {}
    for file in files:
        by_part.setdefault(_PARTS.get(file.stem.lower(), ""), []).append(file)
    if len(files) < 2 or "train" not in by_part or "" in by_part or any(len(of) > 1 for of in by_part.values()):
        return {}
    return {part: of[0] for part, of in by_part.items()}


def held_out_parts(path: Path) -> dict[str, Path]:
    """Return the JSONL files of a folder's rows for validation (`valid`) and for tests, if it is split."""
    try:
        parts = locate(path).parts
    except (AppError, OSError):
        return {}
    return {part: file for part, file in parts.items() if part != "train" and file.suffix.lower() == SUFFIX}


def inspect(path: Path, *, max_characters: int) -> Inspection:
    """Check and hash the data set at `path`, whose rows are JSONL, in one pass."""
    located = locate(path)
    return _inspected(located, located.rows, path.is_dir(), max_characters)


def inspect_part(folder: Path, part: Path, *, max_characters: int) -> Inspection:
    """Check and hash another part of the rows in a folder; what was not touched since is not read again."""
    key = file_key(part)
    return _part(folder, part, key, max_characters) if is_settled(key) else _read_part(folder, part, max_characters)


def _read_part(folder: Path, part: Path, max_characters: int) -> Inspection:
    return _inspected(locate(folder), part, True, max_characters)


@functools.lru_cache(maxsize=64)
def _part(folder: Path, part: Path, _key: FileKey, max_characters: int) -> Inspection:
    return _read_part(folder, part, max_characters)


def _inspected(located: Located, rows: Path, in_folder: bool, max_characters: int) -> Inspection:
    pictures = picture_check(located) if in_folder else None
    with opened(rows) as (stream, key):
        lines = BoundedLines(stream, max_bytes=4 * max_characters + 2)
        report = check_lines(enumerate(lines, start=1), max_characters=max_characters, picture_problem=pictures)
        return Inspection(jsonl=rows, digest=lines.digest, size_bytes=lines.size, report=report, key=key)


def digest_of(jsonl: Path) -> tuple[str, FileKey]:
    """Return the sha256 of the file and the key under which it can be remembered."""
    with opened(jsonl) as (stream, key):
        return hashlib.file_digest(stream, "sha256").hexdigest(), key


def require_regular(path: Path) -> None:
    """Refuse what is no regular file or cannot be read, before anything waits for it."""
    with opened(path, whole=False):
        pass


def file_key(path: Path) -> FileKey:
    """Return what changes when the file is written to; cheap."""
    return _key(path.stat())


def is_settled(key: FileKey) -> bool:
    """Return whether the file is old enough that another write would show in its key."""
    return time.time_ns() - max(key[3:]) > 2_000_000_000


def read_rows(jsonl: Path, *, offset: int, limit: int, max_characters: int) -> list[tuple[int, bytes]]:
    """Return up to `limit` lines after the first `offset` rows, each with its number; fewer if they are large."""
    with opened(jsonl, whole=False) as (stream, _):
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
    _sync_folder(target.parent)


def place_folder(folder: Path, target: Path) -> None:
    """Give an unpacked archive its name; what is there already is kept."""
    if target.exists() or target.is_symlink():
        raise DatasetFileExists(file=shown(target.name))
    folder.rename(target)
    _sync_folder(target.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_abandoned_uploads(datasets: Path) -> int:
    """Remove what crashed uploads left, a day after; return how many."""
    removed = 0
    for pattern in _ABANDONED:
        for entry in datasets.glob(pattern):
            if time.time() - entry.lstat().st_mtime > _ABANDONED_SECONDS:
                remove(entry)
                removed += 1
    return removed


def remove(path: Path) -> None:
    """Remove a file or a folder with everything in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
        yield from cut_lines(self._read, self._max_bytes)

    def _read(self, limit: int) -> bytes:
        piece = self._stream.readline(limit)
        self._hash.update(piece)
        self.size += len(piece)
        return piece


@contextmanager
def opened(path: Path, *, whole: bool = True) -> Iterator[tuple[BufferedReader, FileKey]]:
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


def picture_check(located: Located) -> PictureProblem:
    """Return the check of the pictures in `images/` or beside the rows, where scripts look for them."""
    beside = located.rows.parent
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


def _holds_rows(entry: Path) -> bool:
    return entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".") and entry.is_file()
