"""Pictures of a mix: those that its rows name, gathered in one folder under names that do not clash.

A picture of part N keeps its name behind a folder `N/`. Two pictures with the same content (and the same caption in a
`.txt` file beside them) get one name, so that rows that are equal but for the name of their picture stay on one side
when rows are held out. Files are linked; where the file system takes no links, they are copied.
"""

import contextlib
import hashlib
import json
import os
import posixpath
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from app.registry.datasets.check import URL, picture_places
from app.registry.datasets.files import IMAGES_FOLDER

_CAPTION: Final = ".txt"

Content = tuple[bytes, bytes]


class NamesAFile(Exception):
    """A row names a file that is no picture of it, as far as we can tell: the mix would not have it."""

    def __init__(self, part: int, name: str, column: str) -> None:
        self.part = part
        self.name = name
        self.column = column
        super().__init__(name)


class MixedPictures:
    """Links pictures into `folder` and renames them in rows. `rows` are the files of the parts."""

    def __init__(self, folder: Path, rows: Sequence[Path], *, alone: Sequence[bool]) -> None:
        self._folder = folder
        self._folders = [(file.parent / IMAGES_FOLDER, file.parent) for file in rows]
        # other files in `datasets/` are no files of a part
        self._files = [_files(file) if own else frozenset() for file, own in zip(rows, alone, strict=True)]
        self._names: dict[tuple[int, str], str] = {}
        self._first_of_size: dict[int, tuple[Path, str]] = {}
        self._of_content: dict[Content, str] = {}
        self.count = 0
        self.copied_bytes = 0

    def renamed(self, part: int, line: bytes) -> bytes:
        """Return a row of a part with the names that its pictures have in the mix. Raises `NamesAFile`, `OSError`."""
        row = json.loads(line)
        names, changed = set(), False
        for holder, key, name in list(picture_places(row)):
            names.add(name)
            local = name.removeprefix("file://")
            new = name if URL.match(local) else self._name(part, local)
            changed |= new != name
            holder[key] = new
        if self._files[part]:
            for column, value in row.items():
                for text in _strings(value):
                    if text in self._files[part] and text not in names:
                        raise NamesAFile(part, text, column)
        return json.dumps(row, ensure_ascii=False).encode() if changed else line

    def _name(self, part: int, name: str) -> str:
        if (part, name) not in self._names:
            self._names[part, name] = self._taken(part, name)
        return self._names[part, name]

    def _taken(self, part: int, name: str) -> str:
        """Return the name of a picture in the mix, where it is now; of one that is nowhere the name that it has."""
        picture = next((folder / name for folder in self._folders[part] if _is_file(folder / name)), None)
        if picture is None or name.startswith("/") or ".." in name.split("/"):
            return name
        new = f"{part}/{posixpath.normpath(name)}"
        if (known := self._known(picture, new)) != new:
            return known
        self._link(picture, new)
        self.count += 1
        caption = picture.with_suffix(_CAPTION)
        if _is_file(caption):
            self._link(caption, posixpath.splitext(new)[0] + _CAPTION)
        return new

    def _known(self, picture: Path, new: str) -> str:
        """Return the name of the first picture with this content, `new` if it is the first. Few contents are read."""
        size = picture.stat().st_size
        if size not in self._first_of_size:
            self._first_of_size[size] = (picture, new)
            return new
        first, name = self._first_of_size[size]
        if name:
            self._of_content[_content(first)] = name
            self._first_of_size[size] = (first, "")
        return self._of_content.setdefault(_content(picture), new)

    def _link(self, file: Path, name: str) -> None:
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # one caption of several pictures
            try:
                os.link(os.path.realpath(file), target)
            except FileExistsError:
                raise
            except OSError:  # another file system, too many links, a file of another user
                shutil.copyfile(file, target)
                self.copied_bytes += target.stat().st_size


def _files(rows: Path) -> frozenset[str]:
    """Return the files beside rows, by the names that rows may have for them."""
    found: set[str] = set()
    for folder, _, files in os.walk(rows.parent):
        inside = Path(folder).relative_to(rows.parent)
        for file in files:
            if file.startswith("."):
                continue
            name = (inside / file).as_posix()
            found.update((name, name.removeprefix(f"{IMAGES_FOLDER}/")))
    return frozenset(found)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _content(picture: Path) -> Content:
    """Return what tells a picture from others, and its caption."""
    with picture.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    caption = picture.with_suffix(_CAPTION)
    return digest, caption.read_bytes() if _is_file(caption) else b""


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # a name too long, or with NUL
        return False
