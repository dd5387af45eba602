"""Names of files in the script root: which are accepted, and the one form in which they are kept."""

import unicodedata
from pathlib import PurePosixPath

from app.domain.errors import Invalid
from app.domain.plain_text import shown

SUFFIX = ".py"
CACHE = "__pycache__"
MAX_COMPONENT_BYTES = 255
MAX_PATH_BYTES = 1000

_FORBIDDEN = frozenset('<>:"|?*')
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))})


class FileOutsideRoot(Invalid):
    """The path is absolute, climbs with `..`, or a link on it leaves the script root."""

    code = "file_outside_root"


class InvalidFilePath(Invalid):
    """The path has a character or name that some file system, shell or reader would misread."""

    code = "invalid_file_path"


class FilePathTooLong(Invalid):
    """The path or one of its parts is longer than file systems accept."""

    code = "file_path_too_long"


def script_path(file: str) -> str:
    """Return the path, relative to the script root, that the stage file `file` means; raise what is wrong with it.

    The suffix may be left out: DeepExtension names saving and inference files without it.
    """
    path = unicodedata.normalize("NFC", file)
    _check_characters(path)
    if path.startswith("/") or ".." in path.split("/"):
        raise FileOutsideRoot(file=shown(file))
    parts = [part for part in path.split("/") if part != "."]
    if not parts[-1:] or not all(parts):
        raise InvalidFilePath(file=shown(file), found="//")
    if not parts[-1].endswith(SUFFIX):
        parts[-1] += SUFFIX
    for part in parts:
        _check_part(part, file)
    path = "/".join(parts)
    if len(path.encode()) > MAX_PATH_BYTES:
        raise FilePathTooLong(file=shown(file), limit=MAX_PATH_BYTES)
    return path


def file_path(file: str) -> str:
    """Return the path, relative to the script root, of a file of any type; a name without suffix means a script."""
    name = file.rpartition("/")[2]
    return (
        script_path(file)
        if name.endswith(SUFFIX) or "." not in name
        else script_path(f"{file}{SUFFIX}")[: -len(SUFFIX)]
    )


def check_tree_path(path: str) -> None:
    """Raise what is wrong with the path of a file that is pinned beside a script; it keeps its name, whatever it is."""
    _check_characters(path)
    for part in path.split("/"):
        _check_part(part, path)
    if len(path.encode()) > MAX_PATH_BYTES:
        raise FilePathTooLong(file=shown(path), limit=MAX_PATH_BYTES)


def stem(path: str) -> str:
    """Return the name of the file without folders and suffix."""
    return PurePosixPath(path).name.removesuffix(SUFFIX)


def _check_characters(path: str) -> None:
    if path.startswith("\\") or path[1:3] in (":\\", ":/"):
        raise FileOutsideRoot(file=shown(path))
    for character in path:
        # controls, invisible marks that reorder or hide text, surrogates, unassigned, and every space but the plain one
        odd = unicodedata.category(character)[0] in "CZ" and character != " "
        if odd or character in _FORBIDDEN or character == "\\":
            found = character if character.isprintable() else f"U+{ord(character):04X}"
            raise InvalidFilePath(file=shown(path), found=found)


def _check_part(part: str, file: str) -> None:
    if len(part.encode()) > MAX_COMPONENT_BYTES:
        raise FilePathTooLong(file=shown(file), limit=MAX_COMPONENT_BYTES)
    # a leading hyphen would be read as an option of the interpreter; hidden files are not part of a method
    misread = part[0] in "-. " or part[-1] in ". " or part.removesuffix(SUFFIX)[-1:] in ("", " ", ".")
    # Python's cache is in no listing, and dots in full width look like the way out of a folder
    misread = misread or part == CACHE or not unicodedata.normalize("NFKC", part).strip(".")
    if misread or part.split(".")[0].strip().casefold() in _DEVICES:
        raise InvalidFilePath(file=shown(file), found=shown(part))
