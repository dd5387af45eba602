"""CSV and its relatives: fields between commas, semicolons, tabs or bars; the first record names the columns."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from app.formats.base import FormatProblem, Row, line_of
from app.formats.text import bounded_lines

DELIMITERS: Final = (",", ";", "\t", "|")
NAMES: Final = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|"}
MAX_NAME: Final = 200
SEPARATOR_LINE: Final = re.compile(r"sep=([,;\t|])\r?\n", re.IGNORECASE)
"""What Excel takes from and writes into the first line."""
_SAMPLE_RECORDS: Final = 200
_NAME: Final = re.compile(r'"?[^\W\d][\w-]{0,40}"?')


def named_delimiter(name: str) -> str:
    """Return the delimiter that a caller named."""
    found = NAMES.get(name.lower(), name)
    if found not in DELIMITERS:
        raise FormatProblem("delimiter_unknown", pointer="/delimiter", delimiter=name[:20])
    return found


def find_delimiter(sample: str, *, whole: bool, table: bool) -> str | None:
    """Return the delimiter of a text by its first records; None if it is no table.

    One that splits the first record is judged by how many of the others have as many fields; if few have, the first
    must consist of names. `table` says that the text is a table in any case: it may have one column.
    """
    found: list[tuple[float, int, str]] = []
    for delimiter in DELIMITERS:
        counts = _field_counts(sample, delimiter, whole=whole)
        if len(counts) > (0 if table else 1) and counts[0] > 1:
            alike = sum(count == counts[0] for count in counts) / len(counts)
            if alike >= 0.5 or table or _names_columns(sample, delimiter):
                found.append((alike, counts[0], delimiter))
    found.sort(reverse=True)
    if len(found) > 1 and found[0][:2] == found[1][:2]:
        raise FormatProblem("delimiter_unclear", pointer="/delimiter", first=found[0][2], second=found[1][2])
    if found:
        return found[0][2]
    return "," if table else None


def _names_columns(sample: str, delimiter: str) -> bool:
    return all(_NAME.fullmatch(field.strip()) for field in sample.lstrip().split("\n", 1)[0].split(delimiter))


def _field_counts(sample: str, delimiter: str, *, whole: bool) -> list[int]:
    counts: list[int] = []
    try:
        for record in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter):
            if any(record):
                counts.append(len(record))
            if len(counts) > _SAMPLE_RECORDS:
                break
        else:
            if not whole and len(counts) > 1:
                counts.pop()  # cut off
    except csv.Error:
        counts += counts[:1]  # reading the table says what is wrong with this record
    return counts


def table_rows(text: io.TextIOWrapper, delimiter: str, *, max_characters: int) -> Iterator[Row]:
    """Yield the records with the lines in which they begin; an empty field is null."""
    csv.field_size_limit(max_characters)
    lines = bounded_lines(text, max_characters=max_characters)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    for line, record in _records(reader):
        if names is None:
            if line == 1 and record and record[0].lower() == "sep=" and not any(record[1:]):
                continue
            if any(map(str.strip, record)):
                names = header(record, [f"line {line}, column {number}" for number in range(1, len(record) + 1)])
            continue
        yield line, record_line(names, [field if field else None for field in record], line)
    if names is None:
        raise FormatProblem("dataset_empty", pointer="/lines")


def _records(reader: Iterable[list[str]]) -> Iterator[tuple[int, list[str]]]:
    begins = 1
    records = iter(reader)
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            raise FormatProblem("table_quotes", line=begins, problem=str(error)) from None
        yield begins, record
        begins = reader.line_num + 1  # type: ignore[attr-defined]


def header(cells: Sequence[object], places: Sequence[str]) -> list[str]:
    """Return the names of the columns; "" for columns without one, which must be empty below.

    `places` say where each cell stands.
    """
    names: list[str] = []
    for cell, place in zip(cells, places, strict=True):
        name = "" if cell is None else str(cell).strip()
        if name and (not isinstance(cell, str) or _is_number(name) or len(name) > MAX_NAME or "\n" in name):
            raise FormatProblem("header_not_names", place=place, value=name[:40])
        if name and name in names:
            raise FormatProblem("header_repeats", place=place, first=places[names.index(name)], name=name[:40])
        names.append(name)
    return names


def record_line(names: Sequence[str], values: Sequence[object], row: int) -> bytes:
    """Return a record as a line of JSON, an empty line if it has no value at all."""
    if all(value is None for value in values):
        return b""
    extra = values[len(names) :]
    if len(values) < len(names) or any(value is not None for value in extra):
        raise FormatProblem("table_field_count", line=row, fields=len(values), header=len(names))
    found: dict[str, object] = {}
    for number, (name, value) in enumerate(zip(names, values, strict=False), start=1):
        if name:
            found[name] = value
        elif value is not None:
            raise FormatProblem("header_missing", line=row, column=number)
    return line_of(found)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
