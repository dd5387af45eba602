"""Containers: one compressed file, archives with one file of rows, archives of a data folder with pictures.

Nothing of an archive leaves its folder: names are relative, links and devices are refused, number and sizes of files
are bounded before and while they are written.
"""

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final

from app.formats.base import SUFFIXES, FormatProblem, Limits

PICTURES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_JUNK_NAMES: Final = frozenset({"thumbs.db", "desktop.ini", ".ds_store"})
_MAX_RATIO: Final = 200
_RATIO_FROM: Final = 64 * 1024 * 1024
_MAX_NAME_BYTES: Final = 255
_MAX_DEPTH: Final = 16
_BLOCK: Final = 1024 * 1024
_BROKEN: Final = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, NotImplementedError, ValueError)


@dataclass(frozen=True)
class Member:
    """A file of an archive."""

    name: str
    size: int
    handle: zipfile.ZipInfo | tarfile.TarInfo

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()


@dataclass(frozen=True)
class Contents:
    """The files of an archive, sorted by what they are for."""

    rows: Member
    others: tuple[Member, ...]
    pictures: bool


class Archive:
    """An open zip or tar file."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        self._limits = limits
        self._zip = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
        self._tar = None if self._zip is not None else tarfile.open(path, "r:")  # noqa: SIM115

    def close(self) -> None:
        (self._zip or self._tar).close()  # type: ignore[union-attr]

    def members(self) -> list[Member]:
        """Return the files of the archive; a problem if it is unsafe or too large."""
        members = [member for member in self._members() if not _is_junk(member.name)]
        total = sum(member.size for member in members)
        if total > self._limits.output_bytes:
            raise FormatProblem("archive_too_large", size=total // 2**20, limit=self._limits.output_bytes // 2**20)
        if total > _RATIO_FROM and total > _MAX_RATIO * max(self._path.stat().st_size, 1):
            raise FormatProblem("archive_bomb", ratio=_MAX_RATIO)
        names = [member.name.lower() for member in members]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise FormatProblem("archive_name_twice", name=twice[:80])
        return members

    def contents(self) -> Contents:
        """Return what is in the archive; a problem if it is unsafe, too large, or has not one file of rows."""
        members = self.members()
        found = [member for member in members if member.suffix in SUFFIXES]
        jsonl = [member for member in found if member.suffix == ".jsonl"]
        rows = jsonl if len(jsonl) == 1 else found
        if len(rows) != 1:
            listed = ", ".join(member.name[:60] for member in found[:5])
            raise FormatProblem("archive_several_files" if rows else "archive_no_rows", files=listed)
        others = tuple(member for member in members if member is not rows[0])
        return Contents(rows[0], others, any(member.suffix in PICTURES for member in others))

    def write(self, member: Member, target: Path) -> None:
        """Write a file of the archive; never more than it says it has."""
        with self._opened(member) as stream, target.open("xb") as output:
            _copy(stream, output, member.size)

    def extract(self, contents: Contents, folder: Path) -> None:
        """Write all files below `folder`, without the one folder that they may all lie in."""
        self.extract_members([contents.rows, *contents.others], folder)

    def extract_members(self, members: Sequence[Member], folder: Path) -> None:
        """Write files below `folder`, without the one folder that they may all lie in."""
        base = _common_folder(members)
        for member in members:
            target = folder / PurePosixPath(member.name).relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.write(member, target)
            except OSError as error:
                raise FormatProblem("archive_broken", problem=error.strerror or "") from error

    def _members(self) -> Iterator[Member]:
        for count, (entry, name, size, is_folder) in enumerate(self._entries()):
            if count >= self._limits.files:
                raise FormatProblem("archive_too_many", limit=self._limits.files)
            _require_plain(entry, name)
            if not is_folder:
                yield Member(_relative(name), size, entry)

    def _entries(self) -> Iterator[tuple[zipfile.ZipInfo | tarfile.TarInfo, str, int, bool]]:
        if self._zip is not None:
            for entry in self._zip.infolist():
                yield entry, _zip_name(entry), entry.file_size, entry.is_dir()
        if self._tar is not None:
            for one in self._tar:
                yield one, one.name, one.size, one.isdir()

    @contextmanager
    def _opened(self, member: Member) -> Iterator[IO[bytes]]:
        if self._zip is not None:
            assert isinstance(member.handle, zipfile.ZipInfo)
            with self._zip.open(member.handle) as stream:
                yield stream
            return
        assert self._tar is not None
        assert isinstance(member.handle, tarfile.TarInfo)
        found = self._tar.extractfile(member.handle)
        assert found is not None
        with found:
            yield found


@contextmanager
def opened_archive(path: Path, limits: Limits) -> Iterator[Archive]:
    """Open an archive; what is broken or encrypted in it is a problem."""
    archive = None
    try:
        archive = Archive(path, limits)
        yield archive
    except RuntimeError as error:  # zipfile: a password is needed
        raise FormatProblem("archive_encrypted") from error
    except _BROKEN as error:
        raise FormatProblem("archive_broken", problem=str(error)[:100]) from error
    finally:
        if archive is not None:
            archive.close()


def unpacked(path: Path, target: Path, limits: Limits) -> Path:
    """Write the file in a gzip file to `target`, and return it."""
    try:
        with gzip.open(path) as stream, target.open("xb") as output:
            _copy(stream, output, limits.output_bytes)
    except _BROKEN as error:
        raise FormatProblem("archive_broken", problem=str(error)[:100]) from error
    size = target.stat().st_size
    if size > _RATIO_FROM and size > _MAX_RATIO * path.stat().st_size:
        raise FormatProblem("archive_bomb", ratio=_MAX_RATIO)
    return target


def is_workbook(path: Path) -> bool:
    """Return whether a zip file is an Excel workbook; a problem names another document."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist()[:10_000])
            kind = archive.read("mimetype")[:80] if "mimetype" in names else b""
    except (*_BROKEN, RuntimeError, KeyError) as error:
        raise FormatProblem("archive_broken", problem=str(error)[:100]) from error
    for name, format_name in (
        ("word/document.xml", "Word (.docx)"),
        ("ppt/presentation.xml", "PowerPoint (.pptx)"),
        ("xl/workbook.bin", "Excel (.xlsb)"),
        ("META-INF/MANIFEST.MF", "Java (.jar)"),
    ):
        if name in names:
            raise FormatProblem("file_is_other", format=format_name)
    if kind.startswith(b"application/vnd.oasis"):
        raise FormatProblem("file_is_other", format="OpenDocument (.ods / .odt)")
    return "xl/workbook.xml" in names


def _copy(stream: IO[bytes] | gzip.GzipFile, output: IO[bytes], limit: int) -> None:
    written = 0
    while block := stream.read(_BLOCK):
        written += len(block)
        if written > limit:
            raise FormatProblem("archive_too_large", size=written // 2**20, limit=limit // 2**20)
        output.write(block)


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """Return the name as it was meant: Windows writes names in its own encoding and does not say which."""
    if entry.flag_bits & 0x800 or entry.filename.isascii():
        return entry.filename
    raw = entry.filename.encode("cp437", "replace")
    for encoding in ("utf-8", "gb18030"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return entry.filename


def _require_plain(entry: zipfile.ZipInfo | tarfile.TarInfo, name: str) -> None:
    if isinstance(entry, zipfile.ZipInfo):
        kind = entry.external_attr >> 28  # the file type of Unix; 0 from other systems
        plain = kind in (0, 0x8) or (kind == 0x4 and entry.is_dir())
        if entry.flag_bits & 0x1:
            raise FormatProblem("archive_encrypted")
    else:
        plain = entry.isreg() or entry.isdir()
    if not plain:
        raise FormatProblem("archive_odd_file", name=name[:80])


def _relative(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    odd = (
        name.startswith("/")
        or "\\" in name
        or name[1:2] == ":"
        or ".." in parts
        or not parts
        or len(parts) > _MAX_DEPTH
        or any(len(part.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES for part in parts)
        or any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name)
    )
    if odd:
        raise FormatProblem("archive_odd_name", name=name[:80].encode("utf-8", "backslashreplace").decode())
    return "/".join(parts)


def _is_junk(name: str) -> bool:
    parts = name.lower().split("/")
    return parts[-1] in _JUNK_NAMES or parts[-1].startswith("._") or "__macosx" in parts


def _common_folder(members: Sequence[Member]) -> PurePosixPath:
    tops = {member.name.partition("/")[0] for member in members}
    if len(tops) == 1 and all("/" in member.name for member in members):
        return PurePosixPath(tops.pop())
    return PurePosixPath()
