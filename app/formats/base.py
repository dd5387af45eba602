"""What all readers of files share: options, limits, what is known of a source, and what can be wrong with it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeAlias

Row: TypeAlias = tuple[int, bytes]
"""Where a row stands (line of a text, row of a table) and the row as one line of JSON without its line end."""


class Format(StrEnum):
    """A format that rows are read from."""

    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    XLSX = "xlsx"
    PARQUET = "parquet"
    ARROW = "arrow"


MEDIA_TYPES: Final = {
    Format.JSONL: "application/jsonl",
    Format.JSON: "application/json",
    Format.CSV: "text/csv",
    Format.XLSX: "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    Format.PARQUET: "application/vnd.apache.parquet",
    Format.ARROW: "application/vnd.apache.arrow.file",
}
SUFFIXES: Final = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".json": Format.JSON,
    ".csv": Format.CSV,
    ".tsv": Format.CSV,
    ".xlsx": Format.XLSX,
    ".parquet": Format.PARQUET,
    ".arrow": Format.ARROW,
    ".feather": Format.ARROW,
}
TEXTS: Final = frozenset({Format.JSONL, Format.JSON, Format.CSV})


class FormatProblem(Exception):
    """What is wrong with a file, as a code with the values of its text; one for a file."""

    def __init__(self, code: str, *, pointer: str = "/file", **params: Any) -> None:
        super().__init__(code)
        self.code = code
        self.pointer = pointer
        self.params = params


@dataclass(frozen=True)
class Options:
    """What the caller says about a file. What is not said is found by its content."""

    encoding: str | None = None
    delimiter: str | None = None
    sheet: str | None = None
    table: bool = False
    """The text is delimited, also if it has one column only."""


@dataclass(frozen=True)
class Limits:
    """What reading one file may take."""

    row_characters: int
    output_bytes: int
    memory_bytes: int = 2 * 1024**3
    files: int = 200_000
    """Of an archive."""


@dataclass
class Source:
    """How a file was read."""

    format: Format
    compression: str | None = None
    member: str | None = None
    """The file in an archive, or the member of a JSON object, that holds the rows."""
    encoding: str | None = None
    delimiter: str | None = None
    sheet: str | None = None
    left_out: list[str] = field(default_factory=list)
    """Parts of the file that hold no rows of the data set: other members, sheets, files."""


@dataclass
class Reading:
    """An open file: what it is, and its rows. Rows without any value come as an empty line."""

    source: Source
    rows: Iterator[Row]


def line_of(row: dict[str, Any]) -> bytes:
    """Return a row as one line of JSON; lone surrogates stay escaped, for the check to name them."""
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(row).encode()
