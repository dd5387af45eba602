"""Uploads of base models: files are received one by one into a folder of their own, and continued where they broke off.

A file that is not whole yet has a suffix; it gets its name when its last byte is on the disk. What is uploaded under a
name stays invisible until it was checked and registered, and is removed when nothing was added to it for some days.
"""

import asyncio
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.domain.errors import Conflict, Invalid, InvalidRequest, TooLarge, Violation
from app.domain.names import name_key, name_violations, normal_name
from app.domain.plain_text import shown
from app.formats.archives import opened_archive, unpacked
from app.formats.base import FormatProblem, Limits
from app.registry.models.folders import CHECKPOINT, MAX_FILES, relative_name, walk
from app.registry.resource_paths import InvalidPath, safe_parts
from app.store.home import Home

FOLDER: Final = ".uploads"
ARCHIVE: Final = "archive"
UNFINISHED: Final = ".incomplete"
_GZIP: Final = b"\x1f\x8b"
ABANDONED_DAYS: Final = 7
_WRITE_BYTES: Final = 1024 * 1024
_DAY: Final = 24 * 3600


class UploadOffsetWrong(Conflict):
    """A part of a file does not begin where the bytes that are there end."""

    code = "upload_offset_wrong"


class UploadBusy(Conflict):
    """Another request sends the same file."""

    code = "upload_busy"


class UploadTooLarge(TooLarge):
    """The files of one base model are larger than allowed."""

    code = "upload_too_large"


class UploadPartWrong(Invalid):
    """The body is longer or shorter than its header says."""

    code = "upload_part_wrong"


class UploadUnfinished(Conflict):
    """A file is not whole yet."""

    code = "upload_unfinished"


class NothingUploaded(Invalid):
    """No file was uploaded under the name."""

    code = "nothing_uploaded"


@dataclass(frozen=True)
class Part:
    """Which bytes of a file a request sends. `total` None: the length of the file is not known yet."""

    start: int
    total: int | None


@dataclass(frozen=True)
class Uploaded:
    """How much of a file is there."""

    path: str
    size_bytes: int
    complete: bool
    place: Path


class BaseModelUploads:
    """Receives the files of base models that are not registered yet."""

    def __init__(self, *, home: Home, max_bytes: int) -> None:
        self._home = home
        self._max_bytes = max_bytes

    def folder(self, name: str) -> Path:
        """Return where the files for a base model of this name are gathered."""
        return self._home.models / FOLDER / hashlib.sha256(name_key(name).encode()).hexdigest()[:32]

    async def receive(self, name: str, path: str, chunks: AsyncIterable[bytes], part: Part) -> Uploaded:
        """Write a file or the next part of it; what was received stays there, whatever breaks the request off."""
        return await self._receive(self.folder(name), path, chunks, part, name)

    async def _receive(self, folder: Path, path: str, chunks: AsyncIterable[bytes], part: Part, name: str) -> Uploaded:
        if found := name_violations(name, "{base_model}"):
            raise InvalidRequest(found)
        target = _target(folder, path)
        others = await asyncio.to_thread(_size_of_others, folder, target)
        descriptor = await asyncio.to_thread(_open_draft, target)
        try:
            there = os.fstat(descriptor).st_size
            if part.start not in (0, there):
                raise UploadOffsetWrong(path=path, offset=there, start=part.start)
            os.ftruncate(descriptor, part.start)
            end = await self._write(descriptor, chunks, part, others)
            if part.total is not None and end < part.total:
                return Uploaded(path=path, size_bytes=end, complete=False, place=_draft_of(target))
            await asyncio.to_thread(os.fsync, descriptor)
            _draft_of(target).replace(target)
            return Uploaded(path=path, size_bytes=end, complete=True, place=target)
        finally:
            _close_draft(descriptor, target)

    async def _write(self, descriptor: int, chunks: AsyncIterable[bytes], part: Part, others: int) -> int:
        """Write all chunks behind `part.start` and return where they end."""
        position, gathered = part.start, bytearray()
        try:
            async for chunk in chunks:
                end = position + len(gathered) + len(chunk)
                if part.total is not None and end > part.total:
                    raise UploadPartWrong(total=part.total)
                if others + end > self._max_bytes:
                    raise UploadTooLarge(limit=self._max_bytes)
                gathered += chunk
                if len(gathered) >= _WRITE_BYTES:
                    position += await asyncio.to_thread(_write_all, descriptor, bytes(gathered), position)
                    gathered.clear()
        finally:  # what came before the connection broke off is kept; less than a piece is left
            position += _write_all(descriptor, bytes(gathered), position)
        return position

    async def receive_archive(self, name: str, chunks: AsyncIterable[bytes], part: Part) -> Uploaded:
        """Write an archive or the next part of it; once it is whole, its files take the place of what is there."""
        archive = await self._receive(self._archive(name), ARCHIVE, chunks, part, name)
        if archive.complete:
            try:
                await asyncio.to_thread(self._unpack, name, archive.place)
            finally:
                await asyncio.to_thread(shutil.rmtree, archive.place.parent, ignore_errors=True)
        return archive

    def archive_offset(self, name: str) -> int | None:
        """Return how many bytes of an archive are there. None: none is being uploaded. Blocks."""
        draft = _draft_of(self._archive(name) / ARCHIVE)
        return draft.stat().st_size if draft.is_file() else None

    def _archive(self, name: str) -> Path:
        folder = self.folder(name)
        return folder.with_name(f"{folder.name}-archive")

    def _unpack(self, name: str, archive: Path) -> None:
        folder, draft = self.folder(name), archive.parent / "unpacked"
        limits = Limits(row_characters=0, output_bytes=self._max_bytes, files=MAX_FILES)
        try:
            with archive.open("rb") as stream:
                packed = stream.read(len(_GZIP)) == _GZIP
            source = unpacked(archive, archive.with_name("tar"), limits) if packed else archive
            with opened_archive(source, limits) as opened:
                opened.extract_members(opened.members(), draft)
        except FormatProblem as problem:
            if problem.code == "archive_too_large":
                raise UploadTooLarge(limit=self._max_bytes) from problem
            raise InvalidRequest([Violation("/archive", problem.code, problem.params)]) from problem
        draft.mkdir(exist_ok=True)  # an archive without a file
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)

    def list(self, name: str) -> list[Uploaded]:
        """Return what is there of every file. Blocks."""
        folder = self.folder(name)
        return [_uploaded(folder, path) for path in walk(folder).files]

    def find(self, name: str, path: str) -> Uploaded | None:
        """Return what is there of a file. Blocks."""
        return next((one for one in self.list(name) if one.path == path), None)

    def require_whole(self, name: str) -> Path:
        """Return the folder with the files of a base model to be, all of them whole. Blocks."""
        files = self.list(name)
        if not files:
            raise NothingUploaded(name=normal_name(name), pointer="/path")
        for file in files:
            if not file.complete:
                raise UploadUnfinished(path=file.path, offset=file.size_bytes)
        return self.folder(name)

    def discard(self, name: str) -> None:
        """Remove what was uploaded under the name; nothing there is fine. Blocks."""
        shutil.rmtree(self.folder(name), ignore_errors=True)
        shutil.rmtree(self._archive(name), ignore_errors=True)

    def remove_abandoned(self) -> int:
        """Remove uploads to which nothing was added for days; return how many. Blocks; called at start."""
        root = self._home.models / FOLDER
        abandoned = [entry for entry in root.glob("*") if time.time() - _touched(entry) > ABANDONED_DAYS * _DAY]
        for entry in abandoned:
            shutil.rmtree(entry, ignore_errors=True)
        return len(abandoned)


def _target(folder: Path, path: str) -> Path:
    parts = safe_parts(folder, path, "{path}")
    # checkpoints are no part of a model
    if "/".join(parts) != path or path.endswith(UNFINISHED) or any(part.startswith(CHECKPOINT) for part in parts[:-1]):
        raise InvalidPath(path=shown(path), pointer="{path}")
    return folder.joinpath(*parts)


def _draft_of(target: Path) -> Path:
    return target.with_name(target.name + UNFINISHED)


def _open_draft(target: Path) -> int:
    """Open the file that becomes `target`, for one request at a time."""
    draft = _draft_of(target)
    if target.is_dir():
        raise InvalidPath(path=shown(target.name), pointer="{path}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as exc:  # a file where another path has a folder
        raise InvalidPath(path=shown(target.name), pointer="{path}") from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the one who had the lock may have finished the file meanwhile: it must not be written to any more
        mine = draft.exists() and os.path.samestat(draft.stat(), os.fstat(descriptor))
    except BlockingIOError:
        mine = False
    if not mine:
        os.close(descriptor)
        raise UploadBusy(path=shown(target.name))
    return descriptor


def _close_draft(descriptor: int, target: Path) -> None:
    """Close the file, which frees it for others; one without a byte is removed."""
    if os.fstat(descriptor).st_size == 0:
        _draft_of(target).unlink(missing_ok=True)
    os.close(descriptor)


def _write_all(descriptor: int, content: bytes, position: int) -> int:
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], position + written)
    return written


def _uploaded(folder: Path, path: Path) -> Uploaded:
    name = relative_name(folder, path)
    complete = not name.endswith(UNFINISHED)
    return Uploaded(name.removesuffix(UNFINISHED), path.stat().st_size, complete, path)


def _size_of_others(folder: Path, target: Path) -> int:
    mine = (target, _draft_of(target))
    return sum(path.stat().st_size for path in walk(folder).files if path not in mine)


def _touched(folder: Path) -> float:
    return max((path.stat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)
