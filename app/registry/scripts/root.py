"""The script root: the folder with every Python file that stages run.

Scripts reach each other with relative paths, people edit them in place, so the files stand under their own names.
A link may be used as long as it stays inside: the path is resolved first, and the resolved one is opened part by part
without following links, so that a link put there in between is refused instead of followed.
"""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from app.domain.audit import note_file
from app.domain.errors import Invalid
from app.registry.scripts.names import CACHE, SUFFIX, FileOutsideRoot, FilePathTooLong, file_path

MAX_SCRIPT_BYTES = 1024 * 1024
MOST_RECORDED = 64 * 1024 * 1024
_CACHED_FILES = 4096
_SETTLED_NS = 2_000_000_000


class NotARegularFile(Invalid):
    """The name is a folder, device or pipe."""

    code = "not_a_regular_file"


class FileUnreadable(Invalid):
    """The service's user may not read the file."""

    code = "file_unreadable"


class ScriptTooLarge(Invalid):
    """The file is over the limit for scripts."""

    code = "script_too_large"


@dataclass(frozen=True)
class FileDigest:
    """What pins a file: the digest of its bytes, and their number."""

    sha256: str
    size: int
    executable: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class ScriptEntry:
    """One file of the root as a listing shows it."""

    path: str
    size: int
    modified_at: datetime


@dataclass(frozen=True)
class _Cached:
    key: tuple[int, ...]
    digest: FileDigest


class ScriptRoot:
    """Reads and writes the files of one script root. All methods block; paths are those of `script_path`."""

    def __init__(self, root: Path, *, max_bytes: int = MAX_SCRIPT_BYTES) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._digests: dict[str, _Cached] = {}

    def absolute(self, path: str) -> Path:
        """Return where `path` stands."""
        return self.root / path

    def same(self, path: str, other: str) -> bool:
        """Return whether both paths are one file: by a link, or on a file system that ignores case."""
        try:
            return path == other or self.absolute(path).samefile(self.absolute(other))
        except OSError:
            return False

    def entries(self, *, every_type: bool = False) -> list[ScriptEntry]:
        """Return all Python files inside the root, or all files, by path; links and hidden ones are left out."""
        suffix = "" if every_type else SUFFIX
        return sorted(_walk(self.root, "", suffix), key=lambda entry: entry.path)

    def digest(self, path: str, *, most: int = 0) -> FileDigest | None:
        """Return the digest of the file, `None` if there is none. A file that did not change is not read again.

        `most` is the limit of its size where that is not that of scripts.
        """
        with self._opened(path) as file:
            if file is None:
                return None
            status = os.fstat(file)
            key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            cached = self._digests.get(path)
            if cached is not None and cached.key == key:
                return cached.digest
            digest = digest_of(self._content(file, path, most or self.max_bytes))
            if status.st_mode & stat.S_IXUSR:
                digest = replace(digest, executable=True)
        # a file written a moment ago may change again within the same tick of the file system's clock
        if digest.size == status.st_size and time.time_ns() - max(key[-2:]) > _SETTLED_NS:
            if len(self._digests) >= _CACHED_FILES:
                self._digests.clear()
            self._digests[path] = _Cached(key=key, digest=digest)
        return digest

    def read(self, path: str, *, most: int = 0) -> bytes | None:
        """Return the bytes of the file, `None` if there is none; see `digest` for `most`."""
        with self._opened(path) as file:
            return None if file is None else self._content(file, path, most or self.max_bytes)

    def below(self, folder: str) -> Iterator[tuple[str, bool]]:
        """Yield every file below a folder by path, and whether it is a link; hidden ones and caches are left out."""
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            try:
                entries = sorted(os.scandir(self.root / here), key=lambda entry: entry.name)
            except OSError:
                continue
            for entry in entries:
                if entry.name.startswith(".") or entry.name == CACHE:
                    continue
                path = f"{here}/{entry.name}" if here else entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif entry.is_symlink() or entry.is_file():
                    yield path, entry.is_symlink()

    def create(self, path: str, content: bytes, *, most: int = 0, executable: bool = False) -> bool:
        """Write a new file; return `False` and leave everything alone if something stands under the name."""
        return self._put(path, content, replace=False, most=most, executable=executable)

    def write(self, path: str, content: bytes, *, most: int = 0, executable: bool = False) -> None:
        """Write the file or replace it, atomically; see `digest` for `most`."""
        self._put(path, content, replace=True, most=most, executable=executable)

    def remove(self, path: str) -> None:
        """Remove the file if it is there; of a link the link, not what it leads to."""
        *_, name = path.split("/")
        folders = self._resolved_parts(str(Path(path).parent)) if "/" in path else []
        before = self._sha256(path)
        with self._folder(folders, path, make=False) as folder, _ignored(FileNotFoundError):
            if folder is not None:
                os.unlink(name, dir_fd=folder)
                os.fsync(folder)
                note_file(f"scripts/{path}", before=before, after=None)

    def _sha256(self, path: str) -> str | None:
        """Return the digest of a file for the record of its change, None if there is none that can be read."""
        try:
            present = self.digest(path, most=MOST_RECORDED)
        except Invalid:
            return None
        return present.sha256 if present is not None else None

    def _put(self, path: str, content: bytes, *, replace: bool, most: int, executable: bool) -> bool:
        most = most or self.max_bytes
        if len(content) > most:
            raise ScriptTooLarge(file=path, size=len(content), limit=most)
        *folders, name = self._resolved_parts(path)
        before = self._sha256(path)
        with self._folder(folders, path, make=True) as folder:
            assert folder is not None
            if _kind(name, folder) not in (None, stat.S_IFREG):
                raise NotARegularFile(file=path)
            temporary = f".{uuid4().hex}.tmp"
            try:
                _write_new(temporary, content, folder=folder, mode=0o755 if executable else 0o644)
                if replace:
                    os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                else:
                    os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                return False
            finally:
                with _ignored(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
            os.fsync(folder)
        note_file(f"scripts/{path}", before=before, after=digest_of(content).sha256)
        return True

    def _content(self, file: int, path: str, most: int) -> bytes:
        with open(os.dup(file), "rb") as stream:  # noqa: PTH123 (a descriptor, not a path)
            content = stream.read(most + 1)
        if len(content) > most:
            raise ScriptTooLarge(file=path, size=os.fstat(file).st_size, limit=most)
        return content

    @contextmanager
    def _opened(self, path: str) -> Iterator[int | None]:
        """Yield a descriptor of the regular file at `path`, `None` if nothing is there."""
        *folders, name = self._resolved_parts(path)
        with self._folder(folders, path, make=False) as folder:
            # not to block: opening a pipe would wait for its writer
            file = None if folder is None else _open(name, os.O_RDONLY | os.O_NONBLOCK, path, folder=folder)
            if file is None:
                yield None
                return
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise NotARegularFile(file=path)
                yield file
            finally:
                os.close(file)

    @contextmanager
    def _folder(self, folders: list[str], path: str, *, make: bool) -> Iterator[int | None]:
        """Yield a descriptor of the folder that holds `path`, `None` if it is not there and not to be made."""
        current = os.open(os.path.realpath(self.root), os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in folders:
                if make:
                    with _ignored(FileExistsError):
                        os.mkdir(name, dir_fd=current)
                following = _open(name, os.O_RDONLY | os.O_DIRECTORY, path, folder=current)
                if following is None:
                    if make:
                        raise NotARegularFile(file=path)
                    yield None
                    return
                os.close(current)
                current = following
            yield current
        finally:
            os.close(current)

    def _resolved_parts(self, path: str) -> list[str]:
        root, parts = os.path.realpath(self.root), path.split("/")
        if _is_resolved(root, parts):
            return parts
        try:
            resolved = os.path.realpath(os.path.join(root, path))  # noqa: PTH118 (a `Path` costs ten times as much)
        except OSError as exc:
            raise FilePathTooLong(file=path, limit=len(path)) from exc
        if not resolved.startswith(f"{root}/"):
            raise FileOutsideRoot(file=path)
        return resolved[len(root) + 1 :].split("/")


def _is_resolved(root: str, parts: list[str]) -> bool:
    """Whether no part is a link or leads elsewhere: the common case, found at a fraction of what resolving costs."""
    at = root
    for part in parts:
        at = f"{at}/{part}"
        if part in ("", ".", "..") or os.path.islink(at):  # noqa: PTH114 (a `Path` costs ten times as much)
            return False
    return True


def digest_of(content: bytes) -> FileDigest:
    """Return what pins `content`."""
    return FileDigest(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def _open(name: str, flags: int, path: str, *, folder: int) -> int | None:
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        # a link where a folder was a moment ago is distinguished from a file where a folder is wanted
        if _kind(name, folder) == stat.S_IFLNK:
            raise FileOutsideRoot(file=path) from None
        return None
    except PermissionError as exc:
        raise FileUnreadable(file=path) from exc
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise FileOutsideRoot(file=path) from exc
        if exc.errno == errno.ENXIO:
            raise NotARegularFile(file=path) from exc
        raise


def _kind(name: str, folder: int) -> int | None:
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return None


def _write_new(name: str, content: bytes, *, folder: int, mode: int) -> None:
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=folder)
    with open(file, "wb") as stream:  # noqa: PTH123 (a descriptor, not a path)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _walk(folder: Path, prefix: str, suffix: str) -> Iterator[ScriptEntry]:
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith(".") or entry.name == CACHE:
                continue
            path = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(folder / entry.name, path + "/", suffix)
            elif entry.name.endswith(suffix) and entry.is_file(follow_symlinks=False) and _usable(path):
                status = entry.stat(follow_symlinks=False)
                yield ScriptEntry(path, status.st_size, datetime.fromtimestamp(status.st_mtime, tz=UTC))


def _usable(path: str) -> bool:
    try:
        return file_path(path) == path
    except Invalid:
        return False


@contextmanager
def _ignored(error: type[OSError]) -> Iterator[None]:
    try:
        yield
    except error:
        return
