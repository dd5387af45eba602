"""Pictures and what they show, for models that draw. Only reading a picture needs pillow.

A data set is JSONL rows that name a picture each (`images`, `image` or `file_name`) and hold its caption (`caption`,
`text` or `prompt`); or a folder of pictures alone. A caption may also stand in a `.txt` file beside its picture. What
is wrong with one is a `Refused` that names it.
"""

import argparse
import random
from pathlib import Path
from typing import Any, NamedTuple

from deepe_pictures import locate, names_of, open_picture, picture_folders
from deepe_rows import Refused, lines

CAPTIONS = ("caption", "text", "prompt")
KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Captioned(NamedTuple):
    """A picture and what it shows."""

    picture: Path
    caption: str


def load_captioned(args: argparse.Namespace) -> list[Captioned]:
    """Return all pictures of the data set with their captions; every complaint names the line or the file."""
    path = Path(args.dataset_path)
    if path.is_dir() and not any(path.glob("*.jsonl")):
        return _of_folder(args, path)
    return _of_rows(args, path)


def split(found: list[Captioned], args: argparse.Namespace) -> tuple[list[Captioned], list[Captioned]]:
    """Return what is learned from, and what is held out for the score; no picture is in both."""
    pictures = sorted({one.picture for one in found})
    count = int(len(pictures) * args.eval_fraction)
    held_out = set(random.Random(args.seed).sample(pictures, min(count, args.eval_samples)))
    return [one for one in found if one.picture not in held_out], [one for one in found if one.picture in held_out]


def read_square(picture: Path, side: int) -> Any:
    """Return the middle of a picture as a square of `side` pixels."""
    from PIL import Image, ImageOps

    return ImageOps.fit(open_picture(picture, 0), (side, side), Image.Resampling.LANCZOS)


def check_readable(found: list[Captioned]) -> None:
    """Look at the beginning of every picture: a file that is none ends a training now and not after hours."""
    from PIL import Image, UnidentifiedImageError

    for picture in dict.fromkeys(one.picture for one in found):
        try:
            with Image.open(picture):
                pass
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise Refused(f"{picture} cannot be read as a picture; remove it or save it anew") from error


def _of_rows(args: argparse.Namespace, path: Path) -> list[Captioned]:
    folders = picture_folders(args, path)
    found = []
    for raw, where in lines(path, args.max_samples):
        names = names_of(raw, where)
        if len(names) != 1:
            raise Refused(f"{where}: a row must name one picture, this one names {len(names)}")
        picture = locate(names[0], folders, where)
        found.append(Captioned(picture, _caption(raw, picture, args, where)))
    return found


def _of_folder(args: argparse.Namespace, path: Path) -> list[Captioned]:
    folder = path / args.pic_relative_path if args.pic_relative_path else path
    if not folder.is_dir():
        raise Refused(f"pic_relative_path: there is no folder {args.pic_relative_path} in {path}")
    pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in KINDS and file.is_file())
    if not pictures:
        raise Refused(f"{folder} holds no pictures ({', '.join(KINDS)}) and no .jsonl file that names some")
    if args.max_samples > 0:
        pictures = pictures[: args.max_samples]
    return [Captioned(picture, _written_beside(picture, str(picture))) for picture in pictures]


def _caption(raw: dict[str, Any], picture: Path, args: argparse.Namespace, where: str) -> str:
    column = args.input_train_name or next((name for name in CAPTIONS if name in raw), None)
    if column is None:
        return _written_beside(picture, where)
    caption = raw.get(column)
    if not isinstance(caption, str) or not caption.strip():
        there = ", ".join(raw) or "none"
        raise Refused(f"{where}: column '{column}' must hold the caption, a text; there are: {there}")
    return caption.strip()


def _written_beside(picture: Path, where: str) -> str:
    beside = picture.with_suffix(".txt")
    try:
        caption = beside.read_text("utf-8").strip()
    except FileNotFoundError as error:
        raise Refused(
            f"{where}: the picture has no caption; give one in a column ({', '.join(CAPTIONS)}, or the one named by "
            f"input_train_name) or in {beside.name} beside it"
        ) from error
    except UnicodeDecodeError as error:
        raise Refused(f"{beside} is not written in UTF-8") from error
    if not caption:
        raise Refused(f"{beside} is empty; write down what {picture.name} shows")
    return caption
