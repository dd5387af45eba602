"""Excel, Parquet and Arrow files: every type by its rule, and what has no rule with its place."""

import datetime as dt
import io
import sys
import zipfile
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import openpyxl
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from app.formats.base import Limits
from app.formats.columnar import COMMAND
from tests.formats.files import problem_of, read, rows_of

MOMENT = dt.datetime(2024, 5, 1, 10, 30)  # noqa: DTZ001 (tables have no time zone)


def workbook(
    *rows: Sequence[Any], sheets: dict[str, Sequence[Sequence[Any]]] | None = None, change: Any = None
) -> bytes:
    book = openpyxl.Workbook()
    first = book.worksheets[0]
    for row in rows:
        first.append(list(row))
    for title, more in (sheets or {}).items():
        sheet = book.create_sheet(title)
        for row in more:
            sheet.append(list(row))
    if change is not None:
        change(book)
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream, **options)
    return stream.getvalue()


class TestWorkbooks:
    def test_every_kind_of_cell(self) -> None:
        values = ["你好", 7, 1.5, True, dt.date(2024, 5, 1), MOMENT, dt.time(8, 5), None]
        names = ["text", "int", "float", "bool", "date", "datetime", "time", "empty"]

        rows, source = read(workbook(names, values, [None] * 8, ["b"]))

        assert rows[0] == (
            2,
            {
                "text": "你好",
                "int": 7,
                "float": 1.5,
                "bool": True,
                "date": "2024-05-01",
                "datetime": "2024-05-01T10:30:00",
                "time": "08:05:00",
                "empty": None,
            },
        )
        assert rows[1] == (4, {"text": "b", **dict.fromkeys(names[1:])})
        assert (source.format, source.sheet, source.left_out) == ("xlsx", "Sheet", [])

    def test_a_duration_is_hours_and_minutes(self) -> None:
        def change(book: openpyxl.Workbook) -> None:
            book.worksheets[0]["A2"].number_format = "[h]:mm:ss"

        assert rows_of(workbook(["a"], [dt.timedelta(hours=30, minutes=5)], change=change)) == [{"a": "30:05:00"}]

    def test_blank_rows_before_the_header_and_columns_without_anything(self) -> None:
        assert read(workbook([], [None, "q", None, "a"], [None, 1, None, 2]))[0] == [(3, {"q": 1, "a": 2})]

    def test_the_only_sheet_with_values_is_taken_else_it_is_asked_for(self) -> None:
        one = workbook(["q"], [1], sheets={"empty": []})
        two = workbook(["q"], [1], sheets={"数据": [["q"], [2]]})

        assert rows_of(one) == [{"q": 1}]
        assert problem_of(two) == ("sheet_needed", {"sheets": "Sheet, 数据", "first": "Sheet"})
        assert rows_of(two, sheet="数据") == [{"q": 2}]
        assert read(two, sheet="数据")[1].left_out == ["Sheet"]
        assert problem_of(two, sheet="data") == ("sheet_unknown", {"sheet": "data", "sheets": "Sheet, 数据"})

    def test_a_hidden_sheet_is_left_out_and_named(self) -> None:
        def change(book: openpyxl.Workbook) -> None:
            book["old"].sheet_state = "hidden"

        rows, source = read(workbook(["q"], [1], sheets={"old": [["q"], [2]]}, change=change))

        assert ([row for _, row in rows], source.left_out) == ([{"q": 1}], ["old"])

    def test_a_formula_gives_its_stored_value(self) -> None:
        content = workbook(["a"], ["=1+1"])
        with_value = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(with_value, "w") as new:
            for entry in old.infolist():
                new.writestr(entry, old.read(entry).replace(b"<v></v>", b"<v>2</v>").replace(b"<v />", b"<v>2</v>"))

        assert rows_of(with_value.getvalue()) == [{"a": 2}]
        assert problem_of(content) == ("cell_not_computed", {"cell": "Sheet!A2"})

    def merge(self, book: openpyxl.Workbook) -> None:
        book.worksheets[0].merge_cells("A2:A3")

    @pytest.mark.parametrize(
        ("content", "code", "params"),
        [
            (workbook(["a", "b"], [1, "#DIV/0!"]), "cell_has_error", {"cell": "Sheet!B2", "error": "#DIV/0!"}),
            (workbook(["a"], [1, 2]), "cell_without_header", {"cell": "Sheet!B2"}),
            (workbook(["a", None, "c"], [1, 2, 3]), "cell_without_header", {"cell": "Sheet!B2"}),
            (workbook(["a", "b", "a"], [1, 2, 3]), "header_repeats", {"first": "Sheet!A1", "place": "Sheet!C1"}),
            (workbook([1, 2], [3, 4]), "header_not_names", {"place": "Sheet!A1", "value": "1"}),
            (workbook(["My data"], ["q", "a"], [1, 2]), "cell_without_header", {"cell": "Sheet!B2"}),
            (workbook(), "dataset_empty", {}),
        ],
        ids=["error", "outside", "gap", "twice", "numbers", "title", "empty"],
    )
    def test_what_is_wrong_is_said_with_its_cell(self, content: bytes, code: str, params: dict[str, Any]) -> None:
        found, values = problem_of(content)

        assert (found, {name: values[name] for name in params}) == (code, params)

    def test_merged_cells_have_no_certain_value(self) -> None:
        content = workbook(["a"], [1], [None], change=self.merge)

        assert problem_of(content) == ("cells_merged", {"cell": "Sheet!A2:A3"})

    def test_other_documents_of_office_are_named(self) -> None:
        for part, name in (("word/document.xml", "Word (.docx)"), ("ppt/presentation.xml", "PowerPoint (.pptx)")):
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w") as archive:
                archive.writestr(part, "")
            assert problem_of(stream.getvalue()) == ("file_is_other", {"format": name})

    def test_a_broken_workbook_is_one_sentence(self) -> None:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("xl/workbook.xml", "<a")

        assert problem_of(stream.getvalue())[0] == "workbook_broken"

    def test_a_workbook_that_swells_is_refused(self) -> None:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("xl/workbook.xml", "<a/>")
            archive.writestr("xl/sharedStrings.xml", b" " * 80_000_000)

        assert problem_of(stream.getvalue())[0] == "archive_too_large"
        limits = Limits(row_characters=1000, output_bytes=10**9)
        assert problem_of(stream.getvalue(), limits=limits)[0] == "archive_bomb"


class TestColumnar:
    def test_every_type_by_its_rule(self) -> None:
        columns = {
            "text": ["你好", None],
            "number": [1, 2],
            "float": [0.5, float("nan")],
            "flag": [True, False],
            "day": [dt.date(2024, 5, 1), None],
            "time": [MOMENT, None],
            "money": [Decimal("1.10"), None],
            "turns": [[{"role": "user", "content": "a"}], []],
            "map": pyarrow.array([[("k", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
            "label": pyarrow.array(["x", "y"]).dictionary_encode(),
        }
        expected = [
            {
                "text": "你好",
                "number": 1,
                "float": 0.5,
                "flag": True,
                "day": "2024-05-01",
                "time": "2024-05-01T10:30:00",
                "money": "1.10",
                "turns": [{"role": "user", "content": "a"}],
                "map": {"k": 1},
                "label": "x",
            },
            {
                **dict.fromkeys(["text", "float", "day", "time", "money", "map"]),
                "number": 2,
                "flag": False,
                "turns": [],
                "label": "y",
            },
        ]
        feather = io.BytesIO()
        pyarrow.feather.write_feather(pyarrow.table(columns), feather)

        assert rows_of(parquet(columns)) == expected
        assert rows_of(feather.getvalue()) == expected
        assert read(feather.getvalue())[1].format == "arrow"

    def test_rows_are_numbered_over_groups(self) -> None:
        rows, _ = read(parquet({"n": list(range(1000))}, row_group_size=300))

        assert rows[0] == (1, {"n": 0})
        assert rows[-1] == (1000, {"n": 999})

    @pytest.mark.parametrize(
        ("content", "code"),
        [
            (parquet({"image": [{"bytes": b"x", "path": "a.png"}]}), "columnar_bytes"),
            (parquet({"n": [float("inf")]}), "columnar_infinite"),
            (parquet({"n": [1]})[:-20], "columnar_broken"),
            (b"PAR1" + b"\0" * 100 + b"PAR1", "columnar_broken"),
            (b"ARROW1\0\0" + b"\xff" * 100, "columnar_broken"),
        ],
        ids=["bytes", "infinite", "cut", "zeros", "arrow"],
    )
    def test_one_sentence_says_what_is_wrong(self, content: bytes, code: str) -> None:
        assert problem_of(content)[0] == code

    def test_a_large_row_group_is_refused(self) -> None:
        limits = Limits(row_characters=10_000, output_bytes=10**9, memory_bytes=100_000)

        found, params = problem_of(parquet({"n": list(range(100_000))}), limits=limits)

        assert (found, params["group"]) == ("columnar_group_large", 1)

    def test_without_the_library_the_command_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        content = parquet({"n": [1]})
        monkeypatch.setitem(sys.modules, "pyarrow", None)

        assert problem_of(content) == ("reader_missing", {"format": "parquet", "command": COMMAND})
