"""Images of an inference request: files of the home, or data URLs that are stored as files. Scripts get paths."""

import base64
import binascii
import os
import re
from pathlib import Path
from typing import Final

from app.domain.errors import Invalid
from app.domain.plain_text import shown
from app.registry.resource_paths import resolve_inside
from app.store.home import Home

FOLDERS: Final = ("multimodal", "images", "datasets")
KINDS: Final = ("png", "jpeg", "jpg", "webp", "gif", "bmp")
_URL = re.compile(r"data:image/([a-z]+);base64,(.*)", re.DOTALL)


class PictureElsewhere(Invalid):
    """The path is in no folder that may hold images."""

    code = "picture_elsewhere"


class PictureNotReadable(Invalid):
    """The data URL is not an image of a supported kind, or is truncated."""

    code = "picture_not_readable"


def place_image(data: str, pointer: str, *, home: Home, kept_as: Path) -> str:
    """Return the image's path from the script root. Store a data URL as `kept_as.<kind>`."""
    if data.startswith("data:"):
        path = _keep(data, pointer, kept_as)
    else:
        folder, _, rest = data.partition("/")
        if folder not in FOLDERS:
            raise PictureElsewhere(path=shown(data), folders=", ".join(FOLDERS), pointer=pointer)
        path = resolve_inside(home.base / folder, rest, pointer=pointer)
    return os.path.relpath(path, home.scripts)


def _keep(data: str, pointer: str, kept_as: Path) -> Path:
    match = _URL.fullmatch(data)
    if match is None or match[1] not in KINDS:
        raise PictureNotReadable(kinds=", ".join(KINDS), pointer=pointer)
    try:
        content = base64.b64decode(match[2], validate=True)
    except binascii.Error:
        raise PictureNotReadable(kinds=", ".join(KINDS), pointer=pointer) from None
    path = kept_as.with_suffix(f".{match[1]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
