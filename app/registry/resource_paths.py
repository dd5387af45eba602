"""Paths that a caller names inside one of the home's folders: they must not lead out of it."""

import os
import unicodedata
from pathlib import Path

from app.domain.errors import Invalid
from app.domain.plain_text import shown

MAX_PATH_BYTES = 900
MAX_PART_BYTES = 255


class PathOutsideFolder(Invalid):
    """The path is absolute, climbs with `..`, or a link on it leaves the folder."""

    code = "path_outside_folder"


class InvalidPath(Invalid):
    """The path is empty, too long, or has a character that would be misread."""

    code = "invalid_path"


class PathNotFound(Invalid):
    """There is nothing at the path."""

    code = "path_not_found"


def resolve_inside(folder: Path, given: str, *, pointer: str = "/path") -> Path:
    """Return the existing path that `given` means in `folder`; links may be used as long as they stay inside.

    The path is returned as written, not as resolved: people know the name, not where a link leads.
    """
    parts = safe_parts(folder, given, pointer)
    path = folder.joinpath(*parts)
    if not stays_inside(folder, path):
        raise PathOutsideFolder(path=shown(given), folder=folder.name, pointer=pointer)
    if not path.exists():
        raise PathNotFound(path=shown(given), folder=folder.name, pointer=pointer)
    return path


def safe_parts(folder: Path, given: str, pointer: str) -> list[str]:
    """Return the parts of a path that a caller names in `folder`, whether it is there or not."""
    if given.startswith(("/", "\\", "~")) or given[1:3] in (":\\", ":/") or ".." in given.split("/"):
        raise PathOutsideFolder(path=shown(given), folder=folder.name, pointer=pointer)
    parts = [part for part in given.split("/") if part not in ("", ".")]
    too_long = len(given.encode("utf-8", "replace")) > MAX_PATH_BYTES or any(
        len(part.encode("utf-8", "replace")) > MAX_PART_BYTES for part in parts
    )
    if not parts or too_long or "\\" in given or any(_is_odd(character) for character in given):
        raise InvalidPath(path=shown(given), pointer=pointer)
    if any(part.startswith((".", "-")) for part in parts):  # uploads in progress, caches; options of some tool
        raise InvalidPath(path=shown(given), pointer=pointer)
    return parts


def stays_inside(folder: Path, path: Path) -> bool:
    """Return whether `path`, all links followed, is below `folder`."""
    root, real = os.path.realpath(folder), os.path.realpath(path)
    return real.startswith(root + os.sep)


def _is_odd(character: str) -> bool:
    """Controls, marks that hide or reorder text, surrogates, and every space but the plain one."""
    return unicodedata.category(character)[0] in "CZ" and character != " "
