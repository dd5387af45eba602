"""Folders of models: one walk that says which files a model has, and how they are removed.

What is checked, listed, counted, hashed and sent is what `walk` returns. A link to a file is one of the model's files
only if it stays inside the folders that are allowed; a link to a folder never is. Everything here blocks: call it in a
thread.
"""

import hashlib
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.domain.errors import NotFound
from app.domain.plain_text import MAX_PATH_LENGTH, shown
from app.registry.models.files import UnusableFile
from app.registry.resource_paths import stays_inside

MAX_FILES: Final = 100_000
CHECKPOINT: Final = "checkpoint-"
_NO_PART: Final = frozenset({".git", ".cache"})  # of a clone, of a download into a folder
_LOADED: Final = frozenset({".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".gguf"})


class ModelFileNotFound(NotFound):
    """The model has no file of this name here."""

    code = "model_file_not_found"


@dataclass(frozen=True)
class ModelFile:
    """One file of a model; `path` is relative to the model's folder, in a printable form."""

    path: str
    size_bytes: int


@dataclass(frozen=True)
class Walk:
    """The files of a model by path, and the links in its folder that are none of them."""

    files: Sequence[Path]
    leaving: Sequence[Path]
    """Links to files that lead out of the allowed folders."""
    broken: Sequence[Path]
    """Links that lead nowhere."""
    folders: Sequence[Path]
    """Links to folders, except those to a folder of the model itself."""


def walk(folder: Path, *, roots: Sequence[Path] = ()) -> Walk:
    """Return the files below `folder`; links may lead to files below `folder` and `roots`.

    Checkpoints, and what a clone or a download keeps beside the model, are no part of it. Raises `UnusableFile` if
    there are too many files.
    """
    files: list[Path] = []
    leaving: list[Path] = []
    broken: list[Path] = []
    linked: list[Path] = []
    allowed = (folder, *roots)
    for directory, names, entries in os.walk(folder):
        here = Path(directory)
        linked += [
            here / name for name in names if (here / name).is_symlink() and not stays_inside(folder, here / name)
        ]
        names[:] = [name for name in names if _belongs(here / name)]
        for name in entries:
            path = here / name
            if not path.is_symlink():
                files += [path] if path.is_file() else []
            elif not path.exists():
                broken.append(path)
            elif path.is_file():
                (files if any(stays_inside(root, path) for root in allowed) else leaving).append(path)
        if len(files) > MAX_FILES:
            raise UnusableFile("model_too_many_files", folder, limit=MAX_FILES)
    return Walk(files=sorted(files), leaving=sorted(leaving), broken=sorted(broken), folders=sorted(linked))


def list_files(folder: Path, *, roots: Sequence[Path] = ()) -> list[ModelFile]:
    """Return the files of a model by path; none if the folder is gone."""
    files = [
        ModelFile(path=relative_name(folder, path), size_bytes=path.stat().st_size)
        for path in walk(folder, roots=roots).files
    ]
    return sorted(files, key=lambda file: file.path)


def existing_folder(folder: Path | None, model: str) -> Path:
    """Return the folder of a model. Raises `ModelFileNotFound` if it has none, or it is gone."""
    if folder is None or not folder.is_dir():
        raise ModelFileNotFound(model=model, path="")
    return folder


def existing_file(folder: Path | None, model: str, name: str, *, roots: Sequence[Path] = ()) -> Path:
    """Return the file that `list_files` calls `name`, which can be no other. Raises `ModelFileNotFound`."""
    folder = existing_folder(folder, model)
    for path in walk(folder, roots=roots).files:
        if relative_name(folder, path) == name:
            return path
    raise ModelFileNotFound(model=model, path=shown(name))


def relative_name(folder: Path, path: Path) -> str:
    """Return the path of a model's file in the printable form in which it is listed and recorded."""
    return shown(path.relative_to(folder).as_posix(), limit=MAX_PATH_LENGTH)


def link_target(path: Path) -> str:
    """Return where a link leads, as a sentence shows it."""
    return shown(str(path.readlink()), limit=300)


def copy_links_in(folder: Path) -> None:
    """Put copies in the place of the links to files, so that the model holds its bytes itself. Safe to run again.

    Raises `UnusableFile` for a link that is not copied: to a folder outside of the model, or to a weight or a
    configuration that is not there.
    """
    found = walk(folder)
    for path in found.folders:
        raise UnusableFile("model_link_to_folder", relative_name(folder, path), target=link_target(path))
    for path in found.broken:
        if path.suffix in _LOADED:
            raise UnusableFile("model_link_broken", relative_name(folder, path), target=link_target(path))
    for path in (*found.leaving, *(path for path in found.files if path.is_symlink())):
        # a name that a second try overwrites, after a crash
        copy = path.with_name(f".copying-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}")
        try:
            shutil.copyfile(path, copy)
            copy.replace(path)
        except PermissionError as exc:
            name = relative_name(folder, path)
            raise UnusableFile("model_file_unreadable", name, problem=exc.strerror or "") from exc
        finally:
            copy.unlink(missing_ok=True)


def remove_folder(folder: Path, *, root: Path, keep: Collection[Path] = ()) -> bool:
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


def _belongs(folder: Path) -> bool:
    return not folder.name.startswith(CHECKPOINT) and folder.name not in _NO_PART and not folder.is_symlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
