"""What a data set must be: UTF-8, one JSON object a line, the same fields as the first line, images that are there.

Pure and streaming: one pass over an iterator of lines, memory for one line. Every problem names its line; the first
hundred are kept, all are counted.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from app.domain.errors import Violation
from app.domain.plain_text import shown

MAX_PROBLEMS: Final = 100
IMAGES_FIELD: Final = "images"
IMAGE_ID_FIELD: Final = "imageId"

_BOM: Final = b"\xef\xbb\xbf"
_COMMENTS: Final = ("#", "//", "/*")
_SHOWN_FIELDS: Final = 10
_MAX_DEPTH: Final = 64  # what writes JSON has limits of its own


@dataclass(frozen=True)
class DatasetReport:
    """What one pass over the lines found; the data set can be used if `problem_count` is 0."""

    rows: int
    columns: tuple[str, ...]
    problems: tuple[Violation, ...]
    problem_count: int


class LineProblem(Exception):
    """What is wrong with one line, as a code with the values of its text."""

    def __init__(self, code: str, **params: Any) -> None:
        super().__init__(code)
        self.code = code
        self.params = params


def check_lines(lines: Iterable[bytes], *, max_characters: int, images: Collection[str] | None = None) -> DatasetReport:
    """Check all lines; `images` are the names in the folder `images/`, None if there is no such folder.

    A line of more than `4 * max_characters + 2` bytes may be cut off by the reader of the file.
    """
    columns: dict[str, None] | None = None
    problems: list[Violation] = []
    count = number = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_line(line, first=number == 1, max_characters=max_characters)
            if columns is None:
                columns = dict.fromkeys(row)
            elif row.keys() != columns.keys():
                _refuse_fields(row, columns)
            if images is not None and IMAGES_FIELD in row:
                _check_images(row[IMAGES_FIELD], images)
        except LineProblem as problem:
            count += 1
            if count <= MAX_PROBLEMS:
                problems.append(Violation(f"/lines/{number}", problem.code, {**problem.params, "line": number}))
    if number == 0:
        count += 1
        problems.append(Violation("/lines", "dataset_empty"))
    return DatasetReport(rows=number, columns=tuple(columns or ()), problems=tuple(problems), problem_count=count)


def parse_line(line: bytes, *, first: bool, max_characters: int) -> dict[str, Any]:
    """Return the object that `line` is or raise what is wrong with it."""
    if first and line.startswith(_BOM):
        raise LineProblem("line_has_bom")
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        if len(line) > 4 * max_characters:  # cut off in the middle of a character
            raise LineProblem("line_too_long", limit=max_characters) from None
        raise LineProblem("line_not_utf8", byte=error.start + 1) from None
    if len(text) > max_characters:
        raise LineProblem("line_too_long", limit=max_characters)
    try:
        row = _DECODER.decode(text)
    except ValueError as error:
        raise _json_problem(text, error) from None
    except RecursionError:
        raise LineProblem("line_not_json", column=1, problem="nested too deeply") from None
    if not isinstance(row, dict):
        raise LineProblem("line_not_object", found=_KINDS[type(row)])
    if text.count("[") + text.count("{") > _MAX_DEPTH and _depth(row) > _MAX_DEPTH:
        raise LineProblem("line_not_json", column=1, problem="nested too deeply")
    if "\\u" in text:
        _check_characters(row)
    return row


def _depth(row: dict[str, Any]) -> int:
    """Return how deeply containers are nested; stops soon after the limit."""
    depth = 0
    level: list[Any] = [row]
    while level and depth <= _MAX_DEPTH:
        depth += 1
        values = (value for item in level for value in (item.values() if isinstance(item, dict) else item))
        level = [value for value in values if isinstance(value, (dict, list))]
    return depth


def _json_problem(text: str, error: ValueError) -> LineProblem:
    stripped = text.strip()
    if not stripped:
        return LineProblem("line_blank")
    if stripped.startswith(_COMMENTS):
        return LineProblem("line_is_comment")
    if isinstance(error, json.JSONDecodeError):
        if error.msg == "Extra data" and stripped.startswith("{"):
            return LineProblem("line_has_more", column=error.pos + 1)
        return LineProblem("line_not_json", column=error.pos + 1, problem=error.msg)
    return LineProblem("line_not_json", column=1, problem="a number with too many digits")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise LineProblem("line_duplicate_key", field=shown(twice))
    return row


def _refuse_constant(constant: str) -> NoReturn:
    raise LineProblem("line_bad_number", number=constant)


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise LineProblem("line_bad_number", number=shown(number))
    return value


def _check_characters(row: dict[str, Any]) -> None:
    """Refuse half a surrogate pair: no tokenizer and no database accepts it."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(error.object[error.start]):04X}"
        raise LineProblem("line_bad_character", character=found) from None


def _refuse_fields(row: dict[str, Any], columns: dict[str, None]) -> NoReturn:
    missing = [name for name in columns if name not in row]
    extra = [name for name in row if name not in columns]
    if missing and extra:
        raise LineProblem("line_fields_differ", missing=_names(missing), extra=_names(extra))
    if missing:
        raise LineProblem("line_fields_missing", missing=_names(missing))
    raise LineProblem("line_fields_extra", extra=_names(extra))


def _check_images(value: Any, images: Collection[str]) -> None:
    if value in (None, ""):
        return
    if not isinstance(value, list):
        raise LineProblem("line_images_invalid")
    for image in value:
        name = image.get(IMAGE_ID_FIELD) if isinstance(image, dict) else None
        if not isinstance(name, str) or not name:
            raise LineProblem("line_images_invalid")
        if name not in images:
            raise LineProblem("line_image_missing", image=shown(name))


def _names(names: list[str]) -> str:
    more = ", …" if len(names) > _SHOWN_FIELDS else ""
    return ", ".join(shown(name) for name in names[:_SHOWN_FIELDS]) + more


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
_KINDS: Final = {list: "[…]", str: '"…"', int: "123", float: "1.5", bool: "true/false", type(None): "null"}
