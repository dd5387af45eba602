"""Find, measure and remove old files. Everything here blocks: call it in a thread.

Links are never followed and never counted, because they may lead anywhere.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path

from app.registry.models.folders import remove_folder

CHECKPOINT = "checkpoint-"


def job_folders(runs: Path, *, at_once: int) -> Iterator[Sequence[str]]:
    """Yield the names of the folders in `runs` in batches of at most `at_once`."""
    with os.scandir(runs) as entries:
        names = (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        while batch := list(islice(names, at_once)):
            yield batch


def checkpoints(run: Path, *, keep: Collection[Path]) -> list[Path]:
    """Return the checkpoints below the attempts' outputs, except those that are or hold a folder of `keep`."""
    found = []
    for here, folders, _ in os.walk(run):
        root = Path(here)
        mine = [root / name for name in folders if name.startswith(CHECKPOINT) and not (root / name).is_symlink()]
        found += [path for path in mine if not any(kept.is_relative_to(path) for kept in keep)]
        folders[:] = [name for name in folders if not name.startswith(CHECKPOINT)]
    return found


def old_logs(logs: Path, before: datetime) -> list[Path]:
    """Return the log files of scripts that were last written to before `before`."""
    with os.scandir(logs) as entries:
        return [
            Path(entry.path)
            for entry in entries
            if entry.name.endswith(".jsonl")
            and entry.is_file(follow_symlinks=False)
            and entry.stat(follow_symlinks=False).st_mtime < before.timestamp()
        ]


def size_of(path: Path) -> int:
    """Return the size of a file, or of the files below a folder, in bytes."""
    if not path.is_dir():
        return path.lstat().st_size if path.exists() else 0
    total = 0
    for here, _, files in os.walk(path):
        for name in files:
            try:
                total += (Path(here) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def remove(path: Path, *, root: Path) -> bool:
    """Remove a folder or file below `root`. Return `False` if it must be kept."""
    if path.is_dir():
        return remove_folder(path, root=root)
    path.unlink(missing_ok=True)
    return True
