"""Excel workbooks (.xlsx): one sheet, whose first row with a value names the columns.

Texts, numbers and truth values stay what they are. Dates become ISO 8601, with the time if the cell's format shows one;
times and durations `HH:MM:SS`. A formula gives the value that Excel stored with it. An empty cell is null. Merged
cells, cells with an error and formulas without a stored value have no certain value: they are problems with their
place. Number formats are not applied: a 7 that is shown as 007 is 7.
"""

import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Final

from openpyxl import load_workbook
from openpyxl.utils import get_column_letter

from app.formats.base import FormatProblem, Limits, Row, Source
from app.formats.delimited import header, record_line

_BLOCK: Final = 1024 * 1024
_OVERLAP: Final = 256
_MERGED: Final = re.compile(rb'<(?:\w+:)?mergeCell\s[^>]{0,100}?ref="([A-Z0-9:]{2,40})"')
_FORMULA: Final = re.compile(rb"<(?:\w+:)?f[\s/>]")
_MAX_RATIO: Final = 200
_RATIO_FROM: Final = 64 * 1024 * 1024
_SHOWN_SHEETS: Final = 20


def workbook_rows(path: Path, source: Source, sheet: str | None, limits: Limits) -> Iterator[Row]:
    """Yield the rows of the sheet, which is named unless only one has values."""
    _require_bounded(path, limits)
    warnings.simplefilter("ignore")  # openpyxl: about parts that hold no values
    with path.open("rb") as stream, path.open("rb") as again:
        try:
            values = load_workbook(stream, read_only=True, data_only=True, keep_links=False)
            with closing(values):
                chosen = _chosen(values, sheet, source)
                source.sheet = chosen.title
                if not _look_for(chosen):
                    yield from _table(chosen.title, chosen.iter_rows(), None)
                    return
                written = load_workbook(again, read_only=True, data_only=False, keep_links=False)
                with closing(written):
                    formulas = written[chosen.title]
                    formulas.reset_dimensions()
                    yield from _table(chosen.title, chosen.iter_rows(), formulas.iter_rows())
        except (FormatProblem, MemoryError):
            raise
        except Exception as error:  # whatever a broken file makes of a parser
            raise FormatProblem("workbook_broken", problem=f"{type(error).__name__}: {error}"[:120]) from error


def _require_bounded(path: Path, limits: Limits) -> None:
    with zipfile.ZipFile(path) as archive:
        total = sum(entry.file_size for entry in archive.infolist())
        if any(entry.flag_bits & 0x1 for entry in archive.infolist()):
            raise FormatProblem("archive_encrypted")
    if total > limits.output_bytes:
        raise FormatProblem("archive_too_large", size=total // 2**20, limit=limits.output_bytes // 2**20)
    if total > _RATIO_FROM and total > _MAX_RATIO * path.stat().st_size:
        raise FormatProblem("archive_bomb", ratio=_MAX_RATIO)


def _chosen(workbook: Any, wanted: str | None, source: Source) -> Any:
    """Return the sheet with the rows; the others that have values are named in the source."""
    filled = []
    for one in workbook.worksheets:
        if hasattr(one, "reset_dimensions"):
            one.reset_dimensions()
            if one.title == wanted or any(cell.value is not None for row in one.iter_rows() for cell in row):
                filled.append(one)
    listed = ", ".join(one.title for one in filled[:_SHOWN_SHEETS])
    if wanted is not None:
        chosen = next((one for one in filled if one.title == wanted), None)
        if chosen is None:
            raise FormatProblem("sheet_unknown", pointer="/sheet", sheet=wanted[:40], sheets=listed)
    else:
        visible = [one for one in filled if one.sheet_state == "visible"] or filled
        if not visible:
            raise FormatProblem("dataset_empty", pointer="/lines")
        if len(visible) > 1:
            raise FormatProblem("sheet_needed", pointer="/sheet", sheets=listed, first=visible[0].title)
        chosen = visible[0]
    source.left_out += [one.title for one in filled if one is not chosen][:100]
    return chosen


def _look_for(sheet: Any) -> bool:
    """Return whether the sheet has formulas; merged cells, which openpyxl does not tell of here, are a problem."""
    formulas, kept = False, b""
    with sheet._get_source() as stream:
        while block := stream.read(_BLOCK):
            text = kept + block
            if merged := _MERGED.search(text):
                raise FormatProblem("cells_merged", cell=f"{sheet.title}!{merged[1].decode()}")
            formulas = formulas or _FORMULA.search(text) is not None
            kept = text[-_OVERLAP:]
    return formulas


def _table(title: str, rows: Iterator[Sequence[Any]], written: Iterator[Sequence[Any]] | None) -> Iterator[Row]:
    names: list[str] | None = None
    for number, cells in enumerate(rows, start=1):
        as_written = next(written, ()) if written is not None else ()
        places = [f"{title}!{get_column_letter(column)}{number}" for column in range(1, len(cells) + 1)]
        values = [
            _value(cell, as_written[index] if index < len(as_written) else None, places[index])
            for index, cell in enumerate(cells)
        ]
        if names is None:
            if any(value is not None for value in values):
                names = header(values, places)
            continue
        values += [None] * (len(names) - len(values))
        for place, value in zip(places[len(names) :], values[len(names) :], strict=False):
            if value is not None:
                raise FormatProblem("cell_without_header", cell=place)
        for name, place, value in zip(names, places, values, strict=False):
            if not name and value is not None:
                raise FormatProblem("cell_without_header", cell=place)
        yield number, record_line(names, values[: len(names)], number)


def _value(cell: Any, written: Any, place: str) -> object:
    value = cell.value
    if value is None:
        if written is not None and written.data_type == "f":
            raise FormatProblem("cell_not_computed", cell=place)
        return None
    if cell.data_type == "e":
        raise FormatProblem("cell_has_error", cell=place, error=str(value)[:20])
    match value:
        case str():
            return value or None
        case datetime():
            return value.isoformat() if "h" in str(cell.number_format).lower() else value.date().isoformat()
        case date() | time():
            return value.isoformat()
        case timedelta():
            seconds = round(value.total_seconds())
            return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        case bool() | int() | float():
            return value
        case _:
            raise FormatProblem("cell_has_error", cell=place, error=type(value).__name__)
