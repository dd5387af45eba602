"""Files of a commit of a repository on this machine, read without running anything that belongs to the repository.

Git reads the repository's objects only, from an empty repository of ours that borrows them: no configuration, hook,
filter or remote of theirs takes part, and nothing is fetched. The process is ended when its time is over.
"""

import os
import posixpath
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from app.domain.errors import Invalid
from app.domain.plain_text import shown
from app.registry.scripts.names import SUFFIX
from app.registry.scripts.root import ScriptTooLarge, digest_of
from app.registry.scripts.versions import TreeFile

WALL_SECONDS = 60.0
MAX_LISTING = 32 * 2**20
_LINK, _EXECUTABLE, _BLOB = "120000", "100755", b"blob"
_MAX_LINKS = 10


class CommitUnreadable(Invalid):
    """There is no such repository or commit, or git is not there or too slow."""

    code = "commit_unreadable"


@dataclass(frozen=True)
class _Entry:
    mode: str
    blob: str
    size: int


class GitCommit:
    """The files of one commit, while it is open. All methods block."""

    def __init__(self, repository: Path, commit: str) -> None:
        self._repository = repository
        self._commit = commit
        self._entries: dict[str, _Entry] = {}
        self._contents: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        objects = next(
            (one for one in (self._repository / ".git", self._repository) if (one / "objects").is_dir()), None
        )
        if objects is None:
            raise self._unreadable("no repository")
        self._folder = tempfile.TemporaryDirectory(prefix="deepe-git-")
        try:
            self._environment = _borrowing(Path(self._folder.name), objects / "objects", self._commit)
            self._process = self._start("cat-file", "--batch")
            self._timer = threading.Timer(WALL_SECONDS, self._process.kill)
            self._timer.daemon = True
            self._timer.start()
            try:
                self._list()
            except BaseException:
                self._end()
                raise
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._folder.cleanup()

    def digest(self, path: str, *, most: int) -> TreeFile | None:
        """Return what pins the file, `None` if the commit has none there."""
        entry = self._entry(path)
        if entry is None:
            return None
        if entry.size > most:
            raise ScriptTooLarge(file=path, size=entry.size, limit=most)
        digest = digest_of(self.read(path))
        return TreeFile(digest.sha256, digest.size, entry.mode == _EXECUTABLE and not path.endswith(SUFFIX))

    def read(self, path: str) -> bytes:
        """Return the bytes of a file that the commit has."""
        entry = self._entry(path)
        assert entry is not None
        return self._blob(entry)

    def below(self, folder: str) -> Iterator[tuple[str, bool]]:
        """Yield every file below a folder, and whether it is a link that leads to no file of the commit."""
        start = f"{folder}/" if folder else ""
        for path in self._entries:
            if path.startswith(start) and not any(part.startswith(".") for part in path.split("/")):
                yield path, self._entry(path) is None

    def _entry(self, path: str) -> _Entry | None:
        """Return the file at `path`, links followed."""
        for _ in range(_MAX_LINKS):
            entry = self._entries.get(path)
            if entry is None or entry.mode != _LINK:
                return entry
            target = self._blob(entry).decode("utf-8", "surrogateescape")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        return None

    def _blob(self, entry: _Entry) -> bytes:
        if entry.blob not in self._contents:
            requests, answers = self._process.stdin, self._process.stdout
            assert requests is not None
            assert answers is not None
            try:
                requests.write(f"{entry.blob}\n".encode())
                requests.flush()
                head = answers.readline().split()
                content = answers.read(entry.size + 1)
            except OSError as error:
                raise self._unreadable(str(error)) from error
            if head[1:] != [_BLOB, str(entry.size).encode()] or len(content) != entry.size + 1:
                raise self._unreadable("an object is missing")
            self._contents[entry.blob] = content[:-1]
        return self._contents[entry.blob]

    def _list(self) -> None:
        listing = self._start("ls-tree", "-r", "-z", "-l", "--full-tree", self._commit)
        timer = threading.Timer(WALL_SECONDS, listing.kill)
        timer.start()
        try:
            assert listing.stdout is not None
            lines = listing.stdout.read(MAX_LISTING + 1)
            if len(lines) > MAX_LISTING:
                listing.kill()
                raise self._unreadable("too many files")
        finally:
            listing.communicate()
            timer.cancel()
        if listing.returncode != 0:
            raise self._unreadable("no such commit")
        for line in lines.split(b"\0")[:-1]:
            about, _, name = line.partition(b"\t")
            mode, kind, blob, size = about.decode("ascii").split()
            if kind == "blob":
                if not size.isdecimal():
                    raise self._unreadable("an object is missing")
                self._entries[os.fsdecode(name)] = _Entry(mode, blob, int(size))

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        try:
            return subprocess.Popen(
                ("git", *arguments),
                cwd=self._folder.name,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise self._unreadable(f"git: {error.strerror}") from error

    def _end(self) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()

    def _unreadable(self, detail: str) -> CommitUnreadable:
        return CommitUnreadable(git=shown(str(self._repository)), commit=self._commit, detail=detail)


def _borrowing(folder: Path, objects: Path, commit: str) -> dict[str, str]:
    """Make an empty repository that has the objects of another; return the environment in which git uses it."""
    own = folder / "own.git"
    (own / "objects" / "info").mkdir(parents=True)
    (own / "refs").mkdir()
    (own / "HEAD").write_text("ref: refs/heads/none\n")
    (own / "objects" / "info" / "alternates").write_bytes(os.fsencode(objects.resolve()) + b"\n")
    version, extension = ("1", "[extensions]\n\tobjectformat = sha256\n") if len(commit) == 64 else ("0", "")
    (own / "config").write_text(f"[core]\n\trepositoryformatversion = {version}\n\tbare = true\n{extension}")
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(folder),
        "GIT_DIR": str(own),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "LC_ALL": "C",
    }
