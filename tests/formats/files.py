"""Read bytes as a data set's file would be read."""

import json
import tempfile
from pathlib import Path
from typing import Any

from app.formats.base import FormatProblem, Limits, Options, Source
from app.formats.reading import open_rows

LIMITS = Limits(row_characters=10_000, output_bytes=50_000_000)


def read(content: bytes, *, limits: Limits = LIMITS, **options: Any) -> tuple[list[tuple[int, Any]], Source]:
    """Return the rows with their places, those without a value left out, and how the file was read."""
    with tempfile.TemporaryDirectory() as folder:
        file, scratch = Path(folder, "file"), Path(folder, "scratch")
        file.write_bytes(content)
        scratch.mkdir()
        reading = open_rows(file, Options(**options), limits, scratch=scratch)
        rows = [(place, json.loads(line)) for place, line in reading.rows if line.strip()]
    return rows, reading.source


def rows_of(content: bytes, **options: Any) -> list[Any]:
    return [row for _, row in read(content, **options)[0]]


def problem_of(content: bytes, **options: Any) -> tuple[str, dict[str, Any]]:
    try:
        rows, source = read(content, **options)
    except FormatProblem as problem:
        return problem.code, problem.params
    raise AssertionError(f"was read as {source.format}: {rows[:3]}")
