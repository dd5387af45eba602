"""Bytes of every script version, by digest: `versions/<aa>/<sha256>/`.

`content` holds the bytes; beside it stands a copy under the script's own name once a stage had to run it from here.
A tree is a manifest, kept by its own digest: the files that a stage runs, each where it stands in the script root.
Beside the manifest, `home/scripts` holds the tree once a stage ran it, read-only, and links to what lies beside the
script root. Nothing is ever changed or removed, so that a job of years ago can run again.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from app.domain.errors import Unavailable
from app.registry.scripts.names import SUFFIX, stem

_CONTENT = "content"
_HOME, _SCRIPTS = "home", "scripts"
_BESIDE_SCRIPTS = ("models", "datasets", "logs", "images", "multimodal", "knowledgeBase")
"""What scripts reach from the script root with `../`."""
_REMEMBERED_TREES = 256


class VersionLost(Unavailable):
    """The stored bytes of a pinned file are gone or damaged: the folder `versions` was changed."""

    code = "version_lost"


@dataclass(frozen=True)
class TreeFile:
    """A file of a tree."""

    sha256: str
    size: int
    executable: bool = False


Tree = Mapping[str, TreeFile]
"""The files that a stage runs, by their paths in the script root."""


def manifest(tree: Tree) -> bytes:
    """Return a tree as it is kept; equal trees are equal bytes."""
    files = {path: [file.sha256, file.size, *(["x"] if file.executable else [])] for path, file in tree.items()}
    return json.dumps(files, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


class VersionStore:
    """Keeps bytes by their sha256. All methods block; threads and processes may share a store.

    `beside`: the folder whose entries a running tree finds beside itself; by default the one that holds the store.
    """

    def __init__(self, root: Path, *, beside: Path | None = None) -> None:
        self._root = root
        self._beside = beside or root.parent
        # trees are kept for each project: they differ in what lies beside them
        self._home = _HOME if self._beside == root.parent else f"{_HOME}-{self._beside.name}"
        self._trees: OrderedDict[str, Tree] = OrderedDict()
        self._verified: dict[Path, tuple[int, ...]] = {}

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

    def tree(self, digest: str) -> Tree:
        """Return the tree whose manifest has this digest."""
        tree = self._trees.get(digest)
        if tree is None:
            files = json.loads(self.get(digest))
            tree = {path: TreeFile(sha256, size, bool(mode)) for path, (sha256, size, *mode) in files.items()}
            self._trees[digest] = tree
            while len(self._trees) > _REMEMBERED_TREES:
                with contextlib.suppress(KeyError):  # another thread was quicker
                    self._trees.popitem(last=False)
        return tree

    def materialise(self, sha256: str, path: str) -> Path:
        """Return a Python file that holds the bytes and is called as the script `path` is."""
        file = self._folder(sha256) / (stem(path) + SUFFIX)
        if not _holds(file, sha256):
            _write(file, self.get(sha256))
        return file

    def materialise_tree(self, digest: str) -> Path:
        """Return a folder that holds the tree as the script root holds its files; damaged ones are replaced.

        The files are copies: a script that runs as root could write through a link into the stored bytes.
        """
        home, tree = self._folder(digest) / self._home, self.tree(digest)
        if not home.is_dir():
            self._make(home, tree)
        root = home / _SCRIPTS
        for path, file in tree.items():
            self._repair(root / path, file)
        return root

    def _make(self, home: Path, tree: Tree) -> None:
        """Make the folder `home`, whole or not at all; of several that do so at once one wins."""
        temporary = home.with_name(f".{uuid4().hex}.tmp")
        root = temporary / _SCRIPTS
        try:
            root.mkdir(parents=True)
            for path, file in tree.items():
                place = root / path
                place.parent.mkdir(parents=True, exist_ok=True)
                _copy(self.get(file.sha256), place, executable=file.executable)
            for name in _BESIDE_SCRIPTS:
                (temporary / name).symlink_to(os.path.relpath(self._beside / name, home))
            for folder, _, _ in os.walk(root, topdown=False):
                Path(folder).chmod(0o555)
            try:
                temporary.rename(home)
            except OSError:
                if not home.is_dir():
                    raise
        finally:
            _remove(temporary)

    def _repair(self, place: Path, file: TreeFile) -> None:
        """Put the stored bytes in the place of a file that has others, such as after a power cut."""
        signature = _signature(place)
        if signature is not None and self._verified.get(place) == signature:
            return
        if signature is None or not _holds(place, file.sha256):
            content, folder = self.get(file.sha256), place.parent
            temporary = folder / f".{uuid4().hex}.tmp"
            folder.chmod(0o755)
            try:
                _copy(content, temporary, executable=file.executable)
                temporary.replace(place)
            finally:
                temporary.unlink(missing_ok=True)
                folder.chmod(0o555)
            signature = _signature(place)
        if len(self._verified) > 100 * _REMEMBERED_TREES:
            self._verified.clear()
        if signature is not None:
            self._verified[place] = signature

    def _folder(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256


def _signature(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.lstat()
    except OSError:
        return None
    return (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _copy(content: bytes, place: Path, *, executable: bool) -> None:
    with place.open("xb") as stream:
        stream.write(content)
    place.chmod(0o555 if executable else 0o444)


def _remove(folder: Path) -> None:
    for here, _, _ in os.walk(folder):
        Path(here).chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


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
