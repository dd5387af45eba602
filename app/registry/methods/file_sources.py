"""Where the files of a tree are read from: the script root, a kept tree, a commit."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from app.domain.definition import RepositoryConfig
from app.domain.plain_text import shown
from app.registry.methods.trees import MAX_BYTES, Files
from app.registry.scripts.git_commits import CommitUnreadable, GitCommit
from app.registry.scripts.names import SUFFIX
from app.registry.scripts.root import FileDigest, ScriptRoot, ScriptTooLarge, digest_of
from app.registry.scripts.versions import Tree, TreeFile, VersionStore


class ReadableFiles(Files, Protocol):
    """Files whose bytes can be read too."""

    def read(self, path: str) -> bytes:
        """Return the bytes of a file that is there."""


class KeptFiles:
    """The files of a tree that is kept."""

    def __init__(self, versions: VersionStore, tree: Tree) -> None:
        self._versions = versions
        self._tree = tree

    def digest(self, path: str, *, most: int) -> TreeFile | None:
        """Return what pins the file, `None` if there is none."""
        del most
        return self._tree.get(path)

    def read(self, path: str) -> bytes:
        """Return the bytes of a file that is there."""
        return self._versions.get(self._tree[path].sha256)

    def below(self, folder: str) -> Iterator[tuple[str, bool]]:
        """Yield every file below a folder; there are no links."""
        start = f"{folder}/" if folder else ""
        yield from ((path, False) for path in self._tree if path.startswith(start))


class RootFiles:
    """The script root as a tree is taken from it: with files that are to be written, and pinned ones for gone ones."""

    def __init__(self, root: ScriptRoot, versions: VersionStore, pinned: Tree, instead: Mapping[str, bytes]) -> None:
        self._root = root
        self._versions = versions
        self._pinned = pinned
        self._instead = instead

    def digest(self, path: str, *, most: int) -> TreeFile | None:
        """Return what pins the file, `None` if there is none."""
        if path.endswith(SUFFIX):
            most = min(most, self._root.max_bytes)
        if path in self._instead:
            found: FileDigest | None = digest_of(self._instead[path])
        else:
            found = self._root.digest(path, most=most)
        if found is None:
            return self._pinned.get(path)
        if found.size > most:
            raise ScriptTooLarge(file=path, size=found.size, limit=most)
        return tree_file(path, found)

    def read(self, path: str) -> bytes:
        """Return the bytes of a file that is there."""
        content = self._instead.get(path)
        if content is None:
            content = self._root.read(path, most=MAX_BYTES)
        return self._versions.get(self._pinned[path].sha256) if content is None else content

    def below(self, folder: str) -> Iterator[tuple[str, bool]]:
        """Yield every file below a folder, and whether it is a link."""
        found = dict(self._root.below(folder))
        start = f"{folder}/" if folder else ""
        for path in self._pinned:
            if path.startswith(start):
                found.setdefault(path, False)
        yield from found.items()


def tree_file(path: str, digest: FileDigest) -> TreeFile:
    """Return what pins a file of the script root."""
    # Python does not ask whether a script is executable
    return TreeFile(digest.sha256, digest.size, digest.executable and not path.endswith(SUFFIX))


def commit_of(repository: RepositoryConfig) -> GitCommit:
    """Return the commit of a local repository; `CommitUnreadable` for any other address."""
    git, commit = repository.git or "", repository.commit or ""
    if not git.removeprefix("file://").startswith("/") or not commit.isalnum():
        raise CommitUnreadable(git=shown(git), commit=shown(commit), detail="no local repository")
    return GitCommit(Path(git.removeprefix("file://")), commit)
