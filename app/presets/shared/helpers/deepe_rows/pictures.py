"""The pictures of a row: where it names them, and where in its texts they belong."""

from collections.abc import Mapping, Sequence
from typing import Any

from .problems import RowProblem

COLUMNS = ("images", "image", "file_name")
"""Where a row names its pictures."""

MARK = "<image>"
"""Stands in a text where a picture belongs."""


def column_of(raw: Mapping[str, Any]) -> str | None:
    """Return the column in which a row names its pictures."""
    return next((name for name in COLUMNS if raw.get(name) not in (None, "", [])), None)


def names_in(value: Any, pointer: str) -> list[str]:
    """Return the files that a value names: one of them, a list, or objects with `imageId` or `path`."""
    entries = value if isinstance(value, list) else [value]
    return [_name(entry, pointer) for entry in entries]


def name_of_part(part: Mapping[str, Any], pointer: str) -> list[str]:
    """Return the file that a part of a turn names; a bare `{"type": "image"}` takes the next one of the column."""
    value = next((part[key] for key in ("image", "image_url", "path", "url", "imageId") if part.get(key)), None)
    if isinstance(value, dict):
        value = value.get("url") or value.get("path")
    return [] if value is None else [_name(value, pointer).removeprefix("file://")]


def check_places(turns: Sequence[Mapping[str, Any]], pictures: Sequence[str]) -> None:
    """Raise `RowProblem` unless every picture has its place: at a mark, or before the first question."""
    marks = 0
    for place, turn in enumerate(turns):
        found = turn["content"].count(MARK)
        if found and turn["role"] == "assistant":
            raise RowProblem("picture_in_answer", f"/{place}")
        marks += found
    if marks not in (0, len(pictures)):
        raise RowProblem("pictures_marks_differ", marks=marks, mark=MARK, pictures=len(pictures))
    if not marks and not any(turn["role"] == "user" for turn in turns):
        raise RowProblem("picture_without_question")


def _name(entry: Any, pointer: str) -> str:
    name = entry.get("imageId") or entry.get("path") if isinstance(entry, dict) else entry
    if not isinstance(name, str) or not name or name.startswith(("data:", "http://", "https://")):
        raise RowProblem("pictures_invalid", pointer)
    return name
