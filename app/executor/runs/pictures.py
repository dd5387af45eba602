"""Find the images of a job: `images/<job>.png`, or `<job>_001.png`, `<job>_002.png` and so on for several."""

import re
from pathlib import Path
from typing import Final

from app.domain.errors import NotFound
from app.domain.plain_text import shown

URL: Final = "/images/{name}"
MEDIA_TYPES: Final = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.[a-z]+")


class PictureNotFound(NotFound):
    """The image does not exist or was removed."""

    code = "picture_not_found"


def pictures_of(folder: Path, job_id: str) -> list[str]:
    """Return the names of the images that a job generated, in order. Blocks."""
    numbered = re.compile(rf"{re.escape(job_id)}(_\d+)?\.png")
    return sorted(entry.name for entry in folder.glob(f"{job_id}*.png") if numbered.fullmatch(entry.name))


def picture_path(folder: Path, name: str) -> Path:
    """Return the file of a picture; nothing else of the folder can be read, and nothing outside of it. Blocks."""
    path = folder / name
    if not _NAME.fullmatch(name) or path.suffix not in MEDIA_TYPES or path.is_symlink() or not path.is_file():
        raise PictureNotFound(name=shown(name))
    return path
