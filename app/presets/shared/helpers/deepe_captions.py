"""Pictures and what they show, for models that draw. Only reading a picture needs pillow.

A data set is JSONL rows that name a picture each (`images`, `image` or `file_name`) and hold its caption (`caption`,
`text` or `prompt`); or a folder of pictures alone. A caption may also stand in a `.txt` file beside its picture. What
is wrong with one is a `Refused` that names it.
"""

import argparse
import random
from pathlib import Path
from typing import Any, NamedTuple

from deepe_log import remark
from deepe_pictures import locate, open_picture, picture_folders
from deepe_rows import (
    CAPTION,
    PICTURE_COLUMNS,
    SENTENCES,
    Reader,
    Refused,
    RowProblem,
    Wanted,
    column_of,
    data_file,
    enumerated_rows,
    names_in,
    notes_of,
)

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
    count = min(int(len(pictures) * args.eval_fraction), args.eval_samples)
    held_out = set(random.Random(args.seed).sample(pictures, count))
    return [one for one in found if one.picture not in held_out], [one for one in found if one.picture in held_out]


def read_square(picture: Path, side: int) -> Any:
    """Return the middle of a picture as a square of `side` pixels."""
    from PIL import Image, ImageOps

    return ImageOps.fit(open_picture(picture, 0), (side, side), Image.Resampling.LANCZOS)


def check_readable(found: list[Captioned], args: argparse.Namespace) -> dict[Path, float]:
    """Look at the beginning of every picture: a file that is none ends a training now and not after hours.

    Returns the aspect ratio of each, rounded as SimpleTuner's buckets are.
    """
    from PIL import Image, UnidentifiedImageError

    pictures = {one.picture: 1.0 for one in found}
    for picture in pictures:
        try:
            with Image.open(picture) as file:
                pictures[picture] = round(file.width / file.height, 2)
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise Refused(f"{picture} cannot be read as a picture; remove it or save it anew") from error
    cut = [picture.name for picture, ratio in pictures.items() if ratio != 1]
    if cut and not args.aspect_ratio_buckets:
        remark(
            f"{len(cut)} of {len(pictures)} pictures are no squares, such as {cut[0]}: only their middle is learned",
            args,
        )
    return pictures


def _of_rows(args: argparse.Namespace, path: Path) -> list[Captioned]:
    folders = picture_folders(args, path)
    file = data_file(path)
    named = (args.input_train_name,) if args.input_train_name else None
    reader = Reader(Wanted(kinds=frozenset({CAPTION}), pictures=True, columns=named), file.name)
    found = []
    for number, raw in enumerated_rows(file):
        if 0 < args.max_samples <= reader.report.rows:
            break
        place = f"{file.name}, line {number}"
        try:
            one = reader.read(_with_caption(raw, folders, args, place), number)
        except RowProblem as problem:
            raise Refused(f"{place}: {problem.sentence()}") from problem
        if one is not None:
            found.append(Captioned(Path(locate(one.picture, folders, place)), one.text))
    if not found:
        reasons = "".join(f": {SENTENCES[code]}" for code in reader.report.left_out)
        raise Refused(f"{file.name} has no rows to learn from{reasons}")
    for note in notes_of(reader.report, file.name):
        remark(note, args)
    return found


def _with_caption(raw: Any, folders: list[Path], args: argparse.Namespace, place: str) -> Any:
    """Return a row with its caption: if no column has one, it is what lies beside the picture."""
    if not isinstance(raw, dict) or args.input_train_name or any(raw.get(name) is not None for name in CAPTIONS):
        return raw
    column = column_of(raw)
    if column is None:
        raise RowProblem("picture_missing", columns=", ".join(PICTURE_COLUMNS))
    (name,) = names_in(raw[column], f"/{column}")[:1]
    return raw | {"caption": _written_beside(Path(locate(name, folders, place)), place)}


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
