"""What a data set must be: UTF-8, one JSON object a line, each with fields, pictures that are there.

Streaming: one pass over an iterator of lines, memory for one line. Every problem names its line; the first hundred are
kept, all are counted. Rows may differ in their fields: the report says how many rows have a value in each column.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NoReturn, TypeAlias

from app.domain.errors import Violation
from app.domain.plain_text import shown

MAX_PROBLEMS: Final = 100
MAX_COLUMNS: Final = 1000
MAX_COLUMN_CHARACTERS: Final = 100_000
BOM: Final = b"\xef\xbb\xbf"

_COMMENTS: Final = ("#", "//", "/*")
_MAX_DEPTH: Final = 64  # what writes JSON has limits of its own
PICTURE_COLUMNS: Final = frozenset({"images", "image", "file_name"})
_PICTURE_KEYS: Final = ("imageId", "path", "image", "file_name")
_MAX_SHAPES: Final = 256
URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

PictureProblem: TypeAlias = Callable[[str], str | None]
"""Returns the code of what is wrong with the picture of this name; None if it can be used."""


@dataclass(frozen=True)
class Column:
    """A field of the rows: how many have a value there, and the line of the first that has none. Null is no value."""

    name: str
    rows: int
    first_missing: int | None = None


@dataclass(frozen=True)
class DatasetReport:
    """What one pass over the lines found; the data set can be used if `problem_count` is 0."""

    rows: int
    columns: tuple[Column, ...]
    problems: tuple[Violation, ...]
    problem_count: int
    blank_lines: int = 0

    @property
    def column_names(self) -> list[str]:
        """Return the columns in the order in which they first appear."""
        return [column.name for column in self.columns]

    def document(self) -> dict[str, Any]:
        """Return what is kept of a report without problems."""
        return {"blank_lines": self.blank_lines, "columns": [asdict(column) for column in self.columns]}


def columns_of(names: Sequence[str], rows: int, document: Mapping[str, Any] | None) -> tuple[Column, ...]:
    """Return the columns of a kept report; without one (rows of an older service), all are in every row."""
    if document is None:
        return tuple(Column(name, rows) for name in names)
    return tuple(Column(**column) for column in document["columns"])


class LineProblem(Exception):
    """What is wrong with one line, as a code with the values of its text."""

    def __init__(self, code: str, **params: Any) -> None:
        super().__init__(code)
        self.code = code
        self.params = params


class ColumnCounts:
    """Counts in how many rows each column has a value. Sees each row once; memory does not grow with the rows."""

    def __init__(self) -> None:
        self._present: dict[str, int] = {}
        self._first_missing: dict[str, int] = {}
        self._first_line: int | None = None
        self._characters = 0
        # rows with the same columns are counted together: one look-up for each
        self._shapes: dict[tuple[str, ...], list[int]] = {}

    def see(self, row: Mapping[str, Any], line: int) -> None:
        """Count a row; raises `LineProblem` for columns without end."""
        shape = tuple(row)
        if None in row.values():
            self._register(shape)
            shape = tuple(name for name in shape if row[name] is not None)
        known = self._shapes.get(shape)
        if known is not None:
            known[0] += 1
            return
        self._register(shape)
        if self._first_line is None:
            self._first_line = line
        if len(self._shapes) >= _MAX_SHAPES:
            self._fold()
        self._shapes[shape] = [1, line]

    def columns(self) -> tuple[Column, ...]:
        """Return what was counted."""
        self._fold()
        return tuple(Column(name, rows, self._first_missing.get(name)) for name, rows in self._present.items())

    def _register(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._present:
                continue
            self._characters += len(name)
            if len(self._present) >= MAX_COLUMNS or self._characters > MAX_COLUMN_CHARACTERS:
                raise LineProblem("line_too_many_columns", field=shown(name), limit=MAX_COLUMNS)
            self._present[name] = 0
            if self._first_line is not None:
                self._first_missing[name] = self._first_line

    def _fold(self) -> None:
        for shape, (rows, line) in self._shapes.items():
            names = set(shape)
            for name in self._present:
                if name in names:
                    self._present[name] += rows
                else:
                    self._first_missing[name] = min(line, self._first_missing.get(name, line))
        self._shapes.clear()


def check_lines(
    rows: Iterable[tuple[int, bytes]], *, max_characters: int, picture_problem: PictureProblem | None = None
) -> DatasetReport:
    """Check all lines, which come with their numbers.

    `picture_problem` judges the pictures that rows name; None for data without pictures.

    A line of more than `4 * max_characters + 2` bytes may be cut off by the reader of the file.
    """
    columns = ColumnCounts()
    problems: list[Violation] = []
    count = lines = blank = 0
    for number, line in rows:
        lines += 1
        try:
            row = parse_line(line, first=number == 1, max_characters=max_characters)
            if row is None:
                blank += 1
                continue
            if picture_problem is not None:
                _check_pictures(row, picture_problem)
            columns.see(row, number)
        except LineProblem as problem:
            count += 1
            if count <= MAX_PROBLEMS:
                problems.append(Violation(f"/lines/{number}", problem.code, {**problem.params, "line": number}))
    if lines == blank:
        count += 1
        problems.append(Violation("/lines", "dataset_empty"))
    return DatasetReport(
        rows=lines - blank,
        columns=columns.columns(),
        problems=tuple(problems),
        problem_count=count,
        blank_lines=blank,
    )


def parse_line(line: bytes, *, first: bool, max_characters: int) -> dict[str, Any] | None:
    """Return the object that `line` is, None if it is blank, or raise what is wrong with it."""
    if first:
        line = line.removeprefix(BOM)
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
        if not text.strip():
            return None
        raise _json_problem(text, error) from None
    except RecursionError:
        raise LineProblem("line_not_json", column=1, problem="nested too deeply") from None
    if not isinstance(row, dict):
        raise LineProblem("line_not_object", found=_KINDS[type(row)])
    if not row:
        raise LineProblem("line_without_fields")
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


def _check_pictures(row: dict[str, Any], problem_of: PictureProblem) -> None:
    for _holder, _key, name in picture_places(row):
        if not URL.match(name) and (code := problem_of(name)) is not None:
            raise LineProblem(code, image=shown(name))


def picture_places(row: dict[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """Yield where a row names pictures, as (holder, key, name): in a column of its own or in the parts of turns.

    `holder[key]` is the name: a list or an object of the row. Raises `LineProblem` for a column without names.
    """
    for column, value in row.items():
        if column in PICTURE_COLUMNS:
            if isinstance(value, list):
                for number in range(len(value)):
                    yield _named_picture(value, number)
            elif value not in (None, ""):
                yield _named_picture(row, column)
        elif isinstance(value, list):
            for turn in value:
                parts = turn.get("content") if isinstance(turn, dict) else None
                for part in parts if isinstance(parts, list) else ():
                    if isinstance(part, dict) and (place := _picture_of_part(part)):
                        yield place


def _named_picture(holder: Any, key: Any) -> tuple[Any, Any, str]:
    """Return the name that an entry of a picture column is or holds."""
    if isinstance(holder[key], dict):
        holder = holder[key]
        key = next((one for one in _PICTURE_KEYS if one in holder), None)
    name = holder.get(key) if isinstance(holder, dict) else holder[key]
    if not isinstance(name, str) or not name:
        raise LineProblem("line_images_invalid")
    return holder, key, name


def _picture_of_part(part: dict[str, Any]) -> tuple[Any, Any, str] | None:
    """Return the picture that a part of a turn names; None if it only marks a place."""
    holder: dict[str, Any] = part
    key: str | None = None
    match part.get("type"):
        case "image":
            key = next((one for one in (*_PICTURE_KEYS, "url") if one in part), None)
        case "image_url":
            given = part.get("image_url")
            holder, key = (given, "url") if isinstance(given, dict) else (part, "image_url")
    name = None if key is None else holder.get(key)
    return (holder, key, name) if isinstance(name, str) else None


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
_KINDS: Final = {list: "[…]", str: '"…"', int: "123", float: "1.5", bool: "true/false", type(None): "null"}
