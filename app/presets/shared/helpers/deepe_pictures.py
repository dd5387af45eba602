"""Rows of pictures and words: where the pictures lie, whether they can be read, how a model is given both.

`load_rows` gives `{"prompt": [turns], "completion": [one turn], "pictures": [paths], "where": place}`. The content of a
turn is a list of parts, `{"type": "image"}` or `{"type": "text", "text": ...}`. What is wrong with a row or a picture
is a `Refused` that names both. Only what reads pictures or makes tokens needs pillow, torch and transformers.
"""

import argparse
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from deepe_rows import QUESTION_FORMS, Form, Refused, Row, examples, find_form, lines, named_form

COLUMNS = ("images", "image", "file_name")
MARK = "<image>"
"""Stands in a text where a picture belongs; without any, all pictures come before the first question."""

FILE = "deepe-pictures.json"
"""Beside an adapter or a model: how large its pictures are, so that questions are asked as it was trained."""

PLAIN_TEMPLATE = (  # for a base model that was never taught a chat format
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' }}"
    "{% for part in message['content'] %}"
    "{{ 'IMAGE\\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}"
    "{{ 'EOS\\n' if message['role'] == 'assistant' else '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)

Part = dict[str, Any]
Turn = dict[str, Any]
Size = tuple[int, int]


# --- rows -----------------------------------------------------------------------------------------------------------


def load_rows(args: argparse.Namespace, path: Path) -> list[Row]:
    """Return the examples of a file, or of the one file in a folder; a conversation has one for each answer."""
    folders = picture_folders(args, path)
    form: Form | None = None
    found: list[Row] = []
    for raw, where in lines(path, args.max_samples):
        pictures = [locate(name, folders, where) for name in names_of(raw, where)]
        marked = {column: with_marks(value) for column, value in raw.items()}
        form = form or named_form(args) or find_form(marked, QUESTION_FORMS, where)
        found += rows_of(examples(form, marked, where), pictures, where)
    if not any(row["pictures"] for row in found):
        raise Refused("no row has a picture; give their files in one of these columns: " + ", ".join(COLUMNS))
    return found


def picture_folders(args: argparse.Namespace, path: Path) -> list[Path]:
    """Return where pictures are looked for: the folder that was given, else `images` and the folder of the rows."""
    beside = path if path.is_dir() else path.parent
    if not args.pic_relative_path:
        return [folder for folder in (beside / "images", beside) if folder.is_dir()]
    for folder in (Path(args.pic_relative_path), beside / args.pic_relative_path):
        if folder.is_dir():
            return [folder]
    raise Refused(f"pic_relative_path: there is no folder {args.pic_relative_path}, here or in {beside}")


def names_of(raw: Row, where: str) -> list[str]:
    """Return the files that a row names; none is allowed, as long as others have some."""
    column = next((name for name in COLUMNS if name in raw), None)
    if column is None:
        there = ", ".join(raw) or "none"
        raise Refused(
            f"{where}: no column names the pictures; there are: {there}. Use one of these: {_listed(COLUMNS)}"
        )
    value = raw[column]
    if value in (None, ""):
        return []
    entries = value if isinstance(value, list) else [value]
    names = [entry.get("imageId") if isinstance(entry, dict) else entry for entry in entries]
    if not all(isinstance(name, str) and name for name in names):
        raise Refused(f'{where}: {column} must name a file, or several as [{{"imageId": "name.png"}}]')
    return names


def locate(name: str, folders: Sequence[Path], where: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise Refused(f"{where}: the picture {name} must lie in the folder of the data set")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    empty = ", which is empty" if not any(folders[0].iterdir()) else ""
    raise Refused(f"{where}: there is no picture {name} in {folders[0]}{empty}")


def with_marks(value: Any) -> Any:
    """Write content that is a list of parts as text with marks, so that every form of rows is read the same way."""
    if not isinstance(value, list):
        return value
    return [
        turn | {"content": "".join(_marked(part) for part in turn["content"])}
        if isinstance(turn, dict) and isinstance(turn.get("content"), list)
        else turn
        for turn in value
    ]


def rows_of(found: list[Row], pictures: list[Path], where: str) -> list[Row]:
    """Put the pictures of one line into its examples; an early answer may come before a later picture."""
    marks = sum(turn["content"].count(MARK) for turn in found[-1]["prompt"])
    if marks not in (0, len(pictures)):
        raise Refused(f"{where}: {marks} times {MARK}, but {len(pictures)} pictures")
    rows = []
    for row in found:
        if MARK in row["completion"][0]["content"]:
            raise Refused(f"{where}: {MARK} stands in an answer; the model can only be shown pictures")
        seen = sum(turn["content"].count(MARK) for turn in row["prompt"])
        shown = pictures[:seen] if marks else pictures
        prompt = with_parts(row["prompt"], 0 if marks else len(shown))
        if shown and not any(part["type"] == "image" for turn in prompt for part in turn["content"]):
            raise Refused(f"{where}: nothing that the user says, for the pictures to belong to")
        completion = with_parts(row["completion"], 0)
        rows.append({"prompt": prompt, "completion": completion, "pictures": shown, "where": where})
    return rows


def with_parts(turns: list[dict[str, str]], unmarked: int) -> list[Turn]:
    """Cut texts at their marks; `unmarked` pictures come before the first thing that the user says."""
    found: list[Turn] = []
    for turn in turns:
        parts = list(_parts(turn["content"]))
        if turn["role"] == "user" and unmarked:
            parts, unmarked = [*({"type": "image"} for _ in range(unmarked)), *parts], 0
        found.append({"role": turn["role"], "content": parts})
    return found


def text_of(turn: Turn) -> str:
    return "".join(part.get("text", "") for part in turn["content"])


def _parts(content: str) -> Iterator[Part]:
    for number, text in enumerate(content.split(MARK)):
        if number:
            yield {"type": "image"}
        if text.strip("\n"):
            yield {"type": "text", "text": text.strip("\n") if MARK in content else text}


def _marked(part: Any) -> str:
    if not isinstance(part, dict):
        return str(part)
    return MARK if part.get("type") == "image" else str(part.get("text", ""))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


# --- pictures -------------------------------------------------------------------------------------------------------


def open_picture(path: Path, most: int) -> Any:
    """Return a picture in three colours, no side longer than `most` pixels (0: as it is)."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError as error:
        raise Refused(f"there is no picture {path}") from error
    except UnidentifiedImageError as error:
        raise Refused(f"{path} is no picture of a known kind") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(f"the picture {path} cannot be read: {error}") from error
    if most:
        picture.thumbnail((most, most))
    return picture


def sizes_of(rows: list[Row], most: int) -> dict[Path, Size]:
    """Read every picture once and return its size; a broken one ends a training now and not after hours."""
    places = {path: row["where"] for row in reversed(rows) for path in row["pictures"]}

    def size(path: Path) -> Size | Refused:
        try:
            return open_picture(path, most).size
        except Refused as error:
            return error

    with ThreadPoolExecutor() as threads:  # decoding lets go of Python's lock
        sizes = dict(zip(places, threads.map(size, places), strict=True))
    for row in rows:
        for path in row["pictures"]:
            if isinstance(sizes[path], Refused):
                raise Refused(f"{row['where']}: {sizes[path]}")
    return sizes


def pictures_of(row: Row, most: int) -> list[Any]:
    return [open_picture(path, most) for path in row["pictures"]]


def dataset_of(rows: list[Row], most: int) -> Any:
    """Return what a trainer is given: the pictures of a row are read when its turn comes."""
    from datasets import Dataset

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [rows[place] for place in batch["row"]]
        return {
            "images": [pictures_of(row, most) for row in chosen],
            "prompt": [row["prompt"] for row in chosen],
            "completion": [row["completion"] for row in chosen],
        }

    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(read)


# --- model ----------------------------------------------------------------------------------------------------------


def load_processor(path: Path) -> Any:
    """Return what makes tokens and pixels; it has a chat template afterwards."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path)
    except (ImportError, AttributeError) as error:  # what is said differs from processor to processor
        if importlib.util.find_spec("torchvision") is None:
            raise Refused(
                f"the processor of {path} needs the package torchvision, which the environment has not; "
                f"add the version that fits torch"
            ) from error
        raise
    except (OSError, ValueError) as error:
        raise Refused(f"the model in {path} has no processor that can be loaded: {error}") from error
    if not hasattr(processor, "image_processor"):
        raise Refused(f"the model in {path} cannot be shown pictures: it has no image processor")
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if processor.chat_template is None:
        image = getattr(processor, "image_token", MARK)
        processor.chat_template = PLAIN_TEMPLATE.replace("IMAGE", image).replace("EOS", tokenizer.eos_token)
    return processor


def language_layers(model: Any) -> str:
    """Return the expression that names the linear layers of the language model, and none of what sees."""
    import torch

    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    linear = {key.rpartition(".")[2] for key, part in decoder.named_modules() if isinstance(part, torch.nn.Linear)}
    return rf"{re.escape(name)}\..*\.({'|'.join(sorted(linear))})" if name else "all-linear"


def encode(processor: Any, conversations: list[list[Turn]], pictures: list[list[Any]]) -> Any:
    """Return the tokens and pixels of questions, padded on the left; they are made as in training."""
    texts = [prompt_text(processor, turns) for turns in conversations]
    return processor(
        images=pictures if any(pictures) else None,
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )


def prompt_text(processor: Any, turns: list[Turn]) -> str:
    return str(processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def tokens_of(row: Row, sizes: dict[Path, Size], processor: Any) -> tuple[int, int]:
    """Return how many tokens the question with its pictures has, and how many the answer."""
    head = prompt_text(processor, row["prompt"])
    whole = str(processor.apply_chat_template(row["prompt"] + row["completion"], tokenize=False))
    shown = sum(_picture_tokens(processor, sizes[path]) for path in row["pictures"])
    asked, both = (len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (head, whole))
    return asked + shown, both - asked


@cache
def _picture_tokens(processor: Any, size: Size) -> int:
    """Return by how many tokens a picture of this size is more than its mark."""
    from PIL import Image

    text = prompt_text(processor, [{"role": "user", "content": [{"type": "image"}]}])
    encoded = processor(images=[[Image.new("RGB", size)]], text=[text], add_special_tokens=False)
    bare = processor.tokenizer(text, add_special_tokens=False)
    return len(encoded["input_ids"][0]) - len(bare["input_ids"])


def within_limits(
    rows: list[Row], sizes: dict[Path, Size], processor: Any, args: argparse.Namespace
) -> tuple[list[Row], int]:
    """Leave out rows that are too long: cut off, a picture would be half there and an answer would not end.

    Returns the others, and how many tokens the longest of them has.
    """
    counts = [tokens_of(row, sizes, processor) for row in rows]
    fits = [asked <= args.max_input_length and answered <= args.max_content_length for asked, answered in counts]
    kept = [row for row, fit in zip(rows, fits, strict=True) if fit]
    if not kept:
        raise Refused(
            f"all {len(rows)} rows are longer than allowed, with {min(asked for asked, _ in counts)} tokens or more "
            f"before the answer; raise max_input_length ({args.max_input_length}) or max_content_length "
            f"({args.max_content_length}), or lower max_image_side ({args.max_image_side})"
        )
    return kept, max(sum(count) for count, fit in zip(counts, fits, strict=True) if fit)


def write_size(folder: Path, most: int) -> None:
    (folder / FILE).write_text(json.dumps({"max_image_side": most}), "utf-8")


def read_size(folder: Path) -> int:
    """Return the longest side of pictures that a model was trained with; 0 if it does not matter."""
    try:
        return int(json.loads((folder / FILE).read_text("utf-8"))["max_image_side"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
