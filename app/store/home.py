"""The folders of `DEEPE_HOME` (shared between nodes) and of `DEEPE_NODE_HOME` (local disk of one node).

A home that the service makes is closed to other accounts (0700). One that exists keeps its mode: a group or another
service may share it on purpose, and `deepe doctor` says so. Files with secrets are closed in either case.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.domain.projects import DEFAULT_PROJECT, is_project_id

PRIVATE_FOLDER: Final = 0o700
PRIVATE_FILE: Final = 0o600
_BESIDE_SQLITE: Final = ("", "-wal", "-shm", "-journal")
FOLDERS_OF_PROJECT: Final = ("scripts", "models", "datasets", "logs", "images", "multimodal", "knowledgeBase")
FOLDERS: Final = ("runs", "versions", *FOLDERS_OF_PROJECT)
PROJECTS: Final = "projects"


@dataclass(frozen=True)
class Home:
    """Where everything lives. Scripts reach the siblings of `scripts` with `../`, so the names are a contract.

    A project has folders of its own below `projects/`; those of the first are the home itself. Jobs' folders, versions
    of scripts and what nodes share belong to no project. The database keeps every path relative to `root`.
    """

    root: Path
    project: str = DEFAULT_PROJECT

    def of(self, project: str) -> "Home":
        """Return the home of a project."""
        return self if project == self.project else Home(self.root, project)

    def of_every_project(self) -> Iterator["Home"]:
        """Yield the homes of the projects that have folders."""
        yield self.of(DEFAULT_PROJECT)
        with contextlib.suppress(FileNotFoundError):
            for folder in sorted((self.root / PROJECTS).iterdir()):
                if is_project_id(folder.name) and folder.is_dir():
                    yield Home(self.root, folder.name)

    @property
    def base(self) -> Path:
        """Folder of the project: what its scripts reach with `../`."""
        return self.root if self.project == DEFAULT_PROJECT else self.root / PROJECTS / self.project

    @property
    def scripts(self) -> Path:
        """Script root: working directory of every stage."""
        return self.base / "scripts"

    @property
    def models(self) -> Path:
        """Base models, one folder each."""
        return self.base / "models"

    @property
    def datasets(self) -> Path:
        return self.base / "datasets"

    @property
    def runs(self) -> Path:
        """Output of jobs: `runs/<job>/<attempt number>/`."""
        return self.root / "runs"

    @property
    def logs(self) -> Path:
        """Where helpers of scripts write, a file a day."""
        return self.base / "logs"

    @property
    def images(self) -> Path:
        """Pictures that models generate."""
        return self.base / "images"

    @property
    def versions(self) -> Path:
        """Bytes of every script version, by sha256."""
        return self.root / "versions"

    @property
    def environments(self) -> Path:
        """What nodes share of environments: locks and packs (`app.executor.environments.environment_archive`)."""
        return self.root / "environments"

    @property
    def notify_file(self) -> Path:
        """The file that is touched to notify nodes on other machines where there is no Redis."""
        return self.root / ".notify"

    @property
    def wakeup_fifos(self) -> Path:
        """One FIFO for each node on this machine, where there is no Redis."""
        return self.root / ".wakeup_fifos"

    @property
    def licence(self) -> Path:
        return self.root / "license.json"

    @property
    def secrets_key(self) -> Path:
        """The file of the keys that encrypt secrets. No backup holds it."""
        return self.root / "secrets.key"

    def run_folder(self, job_id: str, attempt: int) -> Path:
        """Return the folder of one attempt: `output.log`, `events.jsonl`, `output/`, `result.json`."""
        return self.runs / job_id / str(attempt)

    def seen_by_scripts(self, path: str) -> Path:
        """Return what a stage means by `path`: its working directory is the script root, which may be a link."""
        return Path(os.path.normpath(Path(os.path.realpath(self.scripts)) / path))

    def relative(self, path: Path) -> str:
        """Return `path` relative to the home, as the database keeps it."""
        return path.relative_to(self.root).as_posix()

    def absolute(self, relative: str) -> Path:
        """Return the path that the database keeps as `relative`."""
        return self.root / relative

    def create(self) -> None:
        """Make all folders; helpers of user scripts write to `../logs` without creating it."""
        make_private_folder(self.root)
        for name in FOLDERS_OF_PROJECT:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name in FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # there is none, or it is another account's to change
            close_to_others(self.licence)


@dataclass(frozen=True)
class NodeHome:
    """Local disk of one node: control folders (locks do not work on network disks) and environments."""

    root: Path

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def wakeup_fifo(self) -> Path:
        """The FIFO through which supervisors notify the worker that there is something new in their folder."""
        return self.root / ".bell"  # the name that supervisors of earlier releases write to

    @property
    def environments(self) -> Path:
        return self.root / "envs"

    @property
    def node_id(self) -> Path:
        """The file with the random id that this home is known by."""
        return self.root / "node-id"

    def create(self) -> None:
        """Make all folders; only the owner may read them, specs hold the scripts' environment."""
        make_private_folder(self.root)
        for folder in (self.attempts, self.environments):
            folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)


def make_private_folder(folder: Path) -> None:
    """Make `folder` for its owner alone, whatever the umask; one that exists keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=PRIVATE_FOLDER)


def keep_sqlite_private(database: Path) -> None:
    """Make the database's file before SQLite does, with `PRIVATE_FILE`, and close it and its neighbours to others.

    SQLite gives `-wal`, `-shm` and `-journal` the mode of the database. SQLite itself reports errors of the disk.
    A file that is there is never opened: closing it would drop the locks that this process's connections hold on it,
    and another process could then delete the log that they write.
    """
    with contextlib.suppress(OSError):
        os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE))
    for file in files_of_sqlite(database):
        with contextlib.suppress(OSError):
            close_to_others(file)


def files_of_sqlite(database: Path) -> tuple[Path, ...]:
    """Return the files that an SQLite database may consist of."""
    return tuple(database.with_name(database.name + suffix) for suffix in _BESIDE_SQLITE)


def close_to_others(path: Path) -> None:
    """Take from `path` the rights of other accounts. A group keeps its own where the folder is shared with it."""
    mode = stat.S_IMODE(path.stat().st_mode)
    shared = mode & stat.S_IWGRP or is_shared(path.parent)
    closed = mode & (stat.S_IRWXU | (stat.S_IRWXG if shared else 0))
    if closed != mode:
        path.chmod(closed)


def is_shared(folder: Path) -> bool:
    """Say whether a folder is shared with its group on purpose: the group may write, others may not."""
    return folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) == stat.S_IWGRP


def is_open_to_others(path: Path) -> bool:
    """Say whether accounts outside of the owner and the group have any right on `path`."""
    return bool(path.stat().st_mode & stat.S_IRWXO)
