"""Rows of pictures and words: where the pictures lie, whether they can be read, how a model is given both.

The content of a turn is a list of parts here, `{"type": "image"}` or `{"type": "text", "text": ...}`; pictures are
paths. What is wrong with a row or a picture is a `Refused` that names both. Only what reads pictures or makes tokens
needs pillow, torch and transformers.
"""

import argparse
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import deepe_chat as chat
import deepe_llm as llm
import deepe_loading as loading
from deepe_preparation import Preparation
from deepe_recipes import EXAMPLE, Recipe, Row, read_value, written_value
from deepe_rows import (
    CONVERSATION,
    MARK,
    PICTURE_COLUMNS,
    Answer,
    Conversation,
    Refused,
    Rendered,
    Turn,
    Wanted,
    asked,
    render_answer,
)
from deepe_tokens import add_tokens

FILE = "deepe-pictures.json"
"""Beside an adapter or a model: how large its pictures are, so that questions are asked as it was trained."""

PLAIN_TEMPLATE = (  # for a base model that was never taught a chat format
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' }}"
    "{% for part in message['content'] %}"
    "{{ 'IMAGE\\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}"
    "{{ eos_token + '\\n' if message['role'] == 'assistant' else '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
CONTENT_TEMPLATE = (  # `chat_template=none`: a prompt and its completion as they are
    "{% for message in messages %}"
    "{% for part in message['content'] %}"
    "{{ 'IMAGE\\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n\\n' if message['role'] == 'system' else '' }}"
    "{% endfor %}"
)

Part = dict[str, Any]
Size = tuple[int, int]


# --- rows -----------------------------------------------------------------------------------------------------------


LEARNS = Wanted(kinds=frozenset({CONVERSATION}), tools=False, pictures=True)


def recipes(args: argparse.Namespace, sizes: Mapping[str, Size]) -> tuple[Recipe, Recipe]:
    """Return what is made of a row to learn from, and of one for the score: answers; pictures stay where they are."""
    learned, measured = folders_of(args)
    recipe = Recipe(
        EXAMPLE,
        kept_answer,
        split=partial(answers_of, folders=learned),
        sequences=partial(with_pictures, sizes=sizes),
        advice=f", or lower max_image_side ({args.max_image_side})",
    )
    return recipe, replace(recipe, split=partial(answers_of, folders=measured))


def kept_answer(_answer: Answer, found: Sequence[Rendered]) -> Iterator[Row]:
    for one in found:
        yield {"example": written_value(one.example)}


def folders_of(args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Return where the pictures of the rows to learn from lie, and those of the rows for the score."""
    learned = picture_folders(args, Path(args.dataset_path))
    own = args.validation_path
    return learned, picture_folders(args, Path(own)) if own else learned


def picture_folders(args: argparse.Namespace, path: Path) -> list[Path]:
    """Return where pictures are looked for: the folder that was given, else `images` and the folder of the rows."""
    beside = path if path.is_dir() else path.parent
    if not args.pic_relative_path:
        return [folder for folder in (beside / "images", beside) if folder.is_dir()]
    for folder in (Path(args.pic_relative_path), beside / args.pic_relative_path):
        if folder.is_dir():
            return [folder]
    raise Refused(f"pic_relative_path: there is no folder {args.pic_relative_path}, here or in {beside}")


def locate(name: str, folders: Sequence[Path], place: str) -> str:
    """Return the path of a picture."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise Refused(f"{place}: the picture {name} must lie in the folder of the data set")
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    empty = ", which is empty" if not any(folders[0].iterdir()) else ""
    raise Refused(f"{place}: there is no picture {name} in {folders[0]}{empty}")


def answers_of(row: Conversation, folders: Sequence[Path]) -> list[Answer]:
    """Return the answers of a row with their turns in parts; an early one may come before a later picture."""
    pictures = [locate(name, folders, row.place) for name in row.pictures]
    marked = any(MARK in turn["content"] for turn in row.turns)
    found = []
    for answer in row.answers():
        shown = pictures[: sum(turn["content"].count(MARK) for turn in answer.prompt)] if marked else pictures
        prompt = with_parts(answer.prompt, 0 if marked else len(shown))
        (completion,) = with_parts([answer.completion], 0)
        found.append(replace(answer, prompt=prompt, completion=completion, pictures=shown))
    return found


def with_parts(turns: Sequence[Turn], unmarked: int) -> list[Turn]:
    """Cut texts at their marks; `unmarked` pictures come before the first thing that the user says."""
    found: list[Turn] = []
    for turn in turns:
        parts = list(_parts(turn["content"]))
        if turn["role"] == "user" and unmarked:
            parts, unmarked = [*({"type": "image"} for _ in range(unmarked)), *parts], 0
        found.append({**turn, "content": parts})
    return found


def _parts(content: str) -> Iterator[Part]:
    for number, text in enumerate(content.split(MARK)):
        if number:
            yield {"type": "image"}
        if text.strip("\n"):
            yield {"type": "text", "text": text.strip("\n") if MARK in content else text}


# --- pictures -------------------------------------------------------------------------------------------------------


def open_picture(path: str | Path, most: int) -> Any:
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


def sizes_of(preparation: Preparation, args: argparse.Namespace) -> dict[str, Size]:
    """Read every picture once and return its size; a broken one ends a training now and not after hours.

    Nothing is read if the rows were prepared before.
    """
    places: dict[str, str] = {}
    for rows, folders in zip(preparation.examples(), folders_of(args), strict=True):
        several = False
        for row in rows:
            several = True
            for answer in answers_of(row, folders):
                places.update((path, answer.place) for path in answer.pictures if path not in places)
        if several and not places:
            known = ", ".join(PICTURE_COLUMNS)
            raise Refused(f"no row has a picture; give their files in one of these columns: {known}")

    def size(path: str) -> Size | Refused:
        try:
            return open_picture(path, args.max_image_side).size
        except Refused as error:
            return error

    with ThreadPoolExecutor() as threads:  # decoding lets go of Python's lock
        sizes = dict(zip(places, threads.map(size, places), strict=True))
    for path, place in places.items():
        if isinstance(sizes[path], Refused):
            raise Refused(f"{place}: {sizes[path]}")
    return sizes


def pictures_of(answer: Answer, most: int) -> list[Any]:
    return [open_picture(path, most) for path in answer.pictures]


def rows_for_trl(batch: Mapping[str, list[str]], *, most: int) -> dict[str, list[Any]]:
    """Return rows as a trainer is given them; the pictures of a row are read when its turn comes."""
    answers = [read_value(text) for text in batch["example"]]
    return {
        "images": [pictures_of(answer, most) for answer in answers],
        "prompt": [answer.prompt for answer in answers],
        "completion": [[answer.completion] for answer in answers],
    }


# --- model ----------------------------------------------------------------------------------------------------------


def load_processor(path: Path, args: argparse.Namespace) -> Any:
    """Return what makes tokens and pixels, with the chat template that is asked for."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, **loading.code(path))
    except (ImportError, AttributeError) as error:  # what is said differs from processor to processor
        if importlib.util.find_spec("torchvision") is None:
            raise Refused(
                f"the processor of {path} needs the package torchvision, which the environment has not; "
                f"add the version that fits torch"
            ) from error
        if isinstance(error, ImportError):  # another package, which the library names with its remedy
            raise Refused(f"the processor of {path} cannot be loaded in this environment: {error}") from error
        raise
    except (OSError, ValueError) as error:
        raise Refused(f"the model in {path} has no processor that can be loaded: {error}") from error
    if not hasattr(processor, "image_processor"):
        raise Refused(f"the model in {path} cannot be shown pictures: it has no image processor")
    add_tokens(processor.tokenizer, args)
    choose_template(processor.tokenizer, path, args, processor, image=getattr(processor, "image_token", MARK))
    return processor


def choose_template(tokenizer: Any, path: Path, args: argparse.Namespace, writer: Any, *, image: str) -> None:
    """Give the writer the template that the arguments ask for; `image` is the mark of a picture in a text."""
    plain, contents = (template.replace("IMAGE", image) for template in (PLAIN_TEMPLATE, CONTENT_TEMPLATE))
    chat.choose_template(tokenizer, path, args, writer, plain=plain, contents=contents)


def language_layers(model: Any) -> str:
    """Return the expression that names the linear layers of the language model, and none of what sees."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    linear = llm.names_of_linear(decoder)
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
    return asked(turns, processor)


def with_pictures(
    answer: Answer, processor: Any, args: argparse.Namespace, *, sizes: Mapping[str, Size]
) -> list[Rendered]:
    """Return an answer as tokens; those of the pictures come first, as zeros.

    What is too long is left out: cut off, a picture would be half there and an answer would not end.
    """
    found = render_answer(answer, processor.tokenizer, writer=processor)
    shown = sum(_picture_tokens(processor, sizes[path]) for path in answer.pictures)
    return [replace(found, tokens=[*[0] * shown, *found.tokens], start=found.start + shown)]


@cache
def _picture_tokens(processor: Any, size: Size) -> int:
    """Return by how many tokens a picture of this size is more than its mark."""
    from PIL import Image

    text = prompt_text(processor, [{"role": "user", "content": [{"type": "image"}]}])
    encoded = processor(images=[[Image.new("RGB", size)]], text=[text], add_special_tokens=False)
    bare = processor.tokenizer(text, add_special_tokens=False)
    return len(encoded["input_ids"][0]) - len(bare["input_ids"])


def write_size(folder: Path, most: int) -> None:
    (folder / FILE).write_text(json.dumps({"max_image_side": most}), "utf-8")


def read_size(folder: Path) -> int:
    """Return the longest side of pictures that a model was trained with; 0 if it does not matter."""
    try:
        return int(json.loads((folder / FILE).read_text("utf-8"))["max_image_side"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
