"""Folders of models: what is in them, and how they are removed. Everything here blocks; call it in a thread."""

import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from app.domain.plain_text import MAX_PATH_LENGTH, shown
from app.registry.resource_paths import stays_inside

MAX_FILES: Final = 10_000


@dataclass(frozen=True)
class ModelFile:
    """One file of a model; `path` is relative to the model's folder, in a printable form."""

    path: str
    size_bytes: int


def list_files(folder: Path) -> list[ModelFile]:
    """Return the files of a model by path; none if the folder is gone."""
    return sorted(_files(folder), key=lambda file: file.path)


def remove_folder(folder: Path, *, root: Path, keep: Collection[Path]) -> bool:
    """Remove `folder` if it is below `root`, except for the folders `keep` inside it; return whether it was allowed.

    A model that a training made complete at once stands in a folder of its adapter's folder. Safe to run again.
    """
    if not stays_inside(root, folder):
        return False
    inside = [path for path in keep if path.is_relative_to(folder) and path != folder]
    if folder in keep:
        return False
    if not inside:
        _remove(folder)
        return True
    for entry in folder.iterdir():
        if any(path == entry for path in inside):
            continue
        if any(path.is_relative_to(entry) for path in inside):
            remove_folder(entry, root=root, keep=inside)
        else:
            _remove(entry)
    return True


def _files(folder: Path) -> Iterator[ModelFile]:
    for path in islice(folder.rglob("*"), MAX_FILES):
        if path.is_file() and not path.is_symlink():
            name = shown(path.relative_to(folder).as_posix(), limit=MAX_PATH_LENGTH)
            yield ModelFile(path=name, size_bytes=path.stat().st_size)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
