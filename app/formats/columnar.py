"""Parquet and Arrow (Feather 2) files, a few rows at a time.

Lists, structs and maps become arrays and objects. Dates and times become ISO 8601, decimals a text with their digits,
durations seconds. A float that is no number is null: that is how tables mark a value that is missing. Bytes and
infinite numbers have no form in JSON: they are problems with their column.
"""

import json
import math
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from app.formats.base import Format, FormatProblem, Limits, Row, Source

COMMAND: Final = "pip install 'deepextension[parquet]'"
_ROWS_AT_ONCE: Final = 256


def columnar_rows(path: Path, source: Source, limits: Limits) -> Iterator[Row]:
    """Yield the rows of a Parquet or Arrow file with their numbers."""
    try:
        import pyarrow
    except ImportError as error:
        raise FormatProblem("reader_missing", format=source.format.value, command=COMMAND) from error
    try:
        batches = _parquet(path, limits) if source.format is Format.PARQUET else _arrow(path, limits)
        number = 0
        for batch in batches:
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield number, _line(row, number)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, pyarrow.ArrowMemoryError):
            raise MemoryError from error
        raise FormatProblem("columnar_broken", format=source.format.value, problem=str(error)[:200]) from error


def _parquet(path: Path, limits: Limits) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        _require_rows(file.schema_arrow)
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).total_byte_size
            if size > limits.memory_bytes // 4:
                limit = limits.memory_bytes // 4 // 2**20
                raise FormatProblem("columnar_group_large", group=group + 1, size=size // 2**20, limit=limit)
        yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False)


def _arrow(path: Path, limits: Limits) -> Iterator[Any]:
    import pyarrow as arrow

    with arrow.memory_map(str(path)) as stream, arrow.ipc.open_file(stream) as file:
        _require_rows(file.schema)
        for index in range(file.num_record_batches):
            batch = file.get_batch(index)
            if batch.nbytes > limits.memory_bytes // 4:
                size, limit = batch.nbytes // 2**20, limits.memory_bytes // 4 // 2**20
                raise FormatProblem("columnar_group_large", group=index + 1, size=size, limit=limit)
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield batch.slice(start, _ROWS_AT_ONCE)


def _require_rows(schema: Any) -> None:
    names = list(schema.names)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FormatProblem("columnar_repeats", name=twice[:80])
    for column in schema:
        if _has_bytes(column.type):
            raise FormatProblem("columnar_bytes", name=column.name[:80])


def _has_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _has_bytes(kind.value_type)
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
        or any(_has_bytes(kind.field(index).type) for index in range(kind.num_fields))
    )


def _line(row: dict[str, Any], number: int) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_text).encode()
    except ValueError:  # a number that JSON does not have
        plain = {name: _finite(value, name, number) for name, value in row.items()}
        return json.dumps(plain, ensure_ascii=False, default=_text).encode()


def _finite(value: Any, name: str, number: int) -> Any:
    match value:
        case float() if math.isnan(value):
            return None
        case float() if math.isinf(value):
            raise FormatProblem("columnar_infinite", name=name[:80], row=number)
        case list():
            return [_finite(one, name, number) for one in value]
        case dict():
            return {key: _finite(one, name, number) for key, one in value.items()}
        case _:
            return value


def _text(value: object) -> object:
    match value:
        case date() | time():  # datetime is a date
            return value.isoformat()
        case Decimal() | UUID():
            return str(value)
        case timedelta():
            return value.total_seconds()
        case _:
            raise FormatProblem("columnar_value", type=type(value).__name__)
