"""Every way in which a line of a data set can be wrong, each with its number."""

import json
from typing import Any

import pytest

from app.domain.texts import Language
from app.registry.datasets.check import (
    MAX_COLUMNS,
    MAX_PROBLEMS,
    Column,
    DatasetReport,
    PictureProblem,
    check_lines,
    columns_of,
)

GOOD = b'{"prompt": "a", "completion": ""}\n'


def check(*lines: bytes, limit: int = 100, pictures: PictureProblem | None = None) -> DatasetReport:
    return check_lines(enumerate(lines, start=1), max_characters=limit, picture_problem=pictures)


def found(report: DatasetReport) -> list[tuple[str, str]]:
    return [(problem.pointer, problem.code) for problem in report.problems]


class TestCheckLines:
    def test_accepts_fields_in_any_order_and_line_ends_of_windows(self) -> None:
        report = check(GOOD, b'{"completion": "", "prompt": 1}\r\n', '{"prompt": "é你", "completion": "x"}'.encode())

        columns = (Column("prompt", 3), Column("completion", 3))
        assert report == DatasetReport(rows=3, columns=columns, problems=(), problem_count=0)

    def test_leaves_out_a_byte_order_mark_and_blank_lines_and_counts_them(self) -> None:
        report = check(b"\xef\xbb\xbf" + GOOD, b"\n", GOOD, b" \t\r\n", GOOD, b"\n")

        assert (report.rows, report.blank_lines, report.problem_count) == (3, 3, 0)
        assert report.column_names == ["prompt", "completion"]

    @pytest.mark.parametrize("lines", [[], [b"\n", b" \n"], [b"\xef\xbb\xbf"]])
    def test_reports_lines_without_a_row_as_an_empty_data_set(self, lines: list[bytes]) -> None:
        assert found(check(*lines)) == [("/lines", "dataset_empty")]

    def test_reports_bad_json_on_line_7(self) -> None:
        report = check(*[GOOD] * 6, b'{"prompt": "a", "completion": }\n', GOOD)

        assert found(report) == [("/lines/7", "line_not_json")]
        assert report.problems[0].params == {"line": 7, "column": 31, "problem": "Expecting value"}
        assert "Line 7" in report.problems[0].detail()
        assert "第 7 行" in report.problems[0].detail(Language.ZH)
        assert report.rows == 8

    @pytest.mark.parametrize(
        ("line", "code"),
        [
            (b"# hello\n", "line_is_comment"),
            (b"// hello\n", "line_is_comment"),
            (GOOD.strip() + GOOD, "line_has_more"),
            (b'["prompt"]\n', "line_not_object"),
            (b'"prompt"\n', "line_not_object"),
            (b"null\n", "line_not_object"),
            (b"true\n", "line_not_object"),
            (b"{'prompt': 1}\n", "line_not_json"),
            (b'{"prompt": "a", "completion": "b"\n', "line_not_json"),
            (b'{"prompt": ' + b"[" * 5000 + b"\n", "line_not_json"),
            (b'{"prompt": ' + b"1" * 5000 + b', "completion": 1}\n', "line_not_json"),
            (b'{"prompt": NaN, "completion": 1}\n', "line_bad_number"),
            (b'{"prompt": [-Infinity], "completion": 1}\n', "line_bad_number"),
            (b'{"prompt": 1e999, "completion": 1}\n', "line_bad_number"),
            (b'{"prompt": 1, "prompt": 2, "completion": 1}\n', "line_duplicate_key"),
            (b'{"prompt": {"a": 1, "a": 2}, "completion": 1}\n', "line_duplicate_key"),
            (b'{"prompt": "\\ud83d", "completion": 1}\n', "line_bad_character"),
            (b'{"prompt": "\xe9", "completion": 1}\n', "line_not_utf8"),
            (b"{}\n", "line_without_fields"),
            (b" { } \n", "line_without_fields"),
            (b"\xef\xbb\xbf" + GOOD, "line_not_json"),
        ],
    )
    def test_reports_what_is_wrong_with_a_line(self, line: bytes, code: str) -> None:
        report = check(GOOD, line, GOOD, limit=10_000)

        assert found(report) == [("/lines/2", code)]
        assert "{" not in report.problems[0].detail().replace('{"', "")

    def test_names_the_byte_that_is_not_utf8(self) -> None:
        report = check(GOOD, b'{"prompt": "\xff"}\n')

        assert report.problems[0].params == {"line": 2, "byte": 13}

    def test_counts_characters_not_bytes(self) -> None:
        line = json.dumps({"prompt": "你" * 50}, ensure_ascii=False)

        assert check(line.encode() + b"\r\n", limit=len(line)).problem_count == 0
        assert found(check(line.encode(), limit=len(line) - 1)) == [("/lines/1", "line_too_long")]

    def test_lists_a_hundred_problems_and_counts_all(self) -> None:
        report = check(*[b"x\n"] * 250)

        assert len(report.problems) == MAX_PROBLEMS
        assert (report.problem_count, report.rows) == (250, 250)


class TestColumns:
    def test_counts_rows_with_a_value_and_names_the_first_without(self) -> None:
        report = check(
            b'{"a": 1, "b": 1}\n',
            b"\n",
            b'{"a": 1, "c": 0}\n',
            b'{"a": 1, "b": null, "c": ""}\n',
            b'{"a": 1, "b": 2}\n',
        )

        assert report.columns == (Column("a", 4), Column("b", 2, first_missing=3), Column("c", 2, first_missing=1))

    def test_null_is_no_value_but_a_column(self) -> None:
        report = check(b'{"a": 1, "b": null}\n', b'{"a": null, "b": null}\n')

        assert report.columns == (Column("a", 1, first_missing=2), Column("b", 0, first_missing=1))

    def test_counts_the_same_however_many_shapes_rows_have(self) -> None:
        names = [f"n{bit}" for bit in range(10)]
        rows = [{"id": n, **{name: 1 for bit, name in enumerate(names) if n >> bit & 1}} for n in range(1024)]

        report = check(*[json.dumps(row).encode() + b"\n" for row in rows], limit=1000)

        counted = {column.name: (column.rows, column.first_missing) for column in report.columns}
        assert counted == {"id": (1024, None), **dict.fromkeys(names, (512, 1))}

    def test_refuses_columns_without_end(self) -> None:
        rows = [b'{"q": 1, "id-%d": 1}\n' % n for n in range(MAX_COLUMNS + 5)]

        report = check(*rows)

        assert (report.problem_count, len(report.columns)) == (6, MAX_COLUMNS)
        assert found(report)[0] == (f"/lines/{MAX_COLUMNS}", "line_too_many_columns")

    def test_a_report_is_read_back(self) -> None:
        report = check(GOOD, b'{"prompt": 1}\n')

        assert columns_of(report.column_names, report.rows, report.document()) == report.columns
        assert columns_of(["a"], 3, None) == (Column("a", 3),)


class TestPictures:
    def problem(self, name: str) -> str | None:
        return None if name in ("a.png", "b.png") else "line_image_missing"

    @pytest.mark.parametrize(
        "row",
        [
            {"images": [{"imageId": "a.png"}, {"imageId": "%"}]},
            {"images": ["a.png", "%"]},
            {"image": "%"},
            {"image": {"path": "%", "bytes": None}},
            {"file_name": "%"},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image", "image": "%"}]}
                ]
            },
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "%"}]}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "%"}}]}]},
            {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "%"}]}]},
        ],
    )
    def test_every_place_that_can_name_a_picture_is_looked_at(self, row: dict[str, Any]) -> None:
        text = json.dumps(row)
        right, wrong = (text.replace("%", name).encode() for name in ("b.png", "c.png"))

        report = check(right, wrong, limit=1000, pictures=self.problem)

        assert found(report) == [("/lines/2", "line_image_missing")]
        assert report.problems[0].params["image"] == "c.png"

    @pytest.mark.parametrize(
        "row",
        [
            {"image": None},
            {"images": []},
            {"image": "https://example.org/x.png"},
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            {"messages": [{"role": "user", "content": "the image c.png"}]},
        ],
    )
    def test_what_names_no_file_of_the_data_set_is_left_alone(self, row: dict[str, Any]) -> None:
        assert check(json.dumps(row).encode(), limit=1000, pictures=self.problem).problem_count == 0

    @pytest.mark.parametrize("images", ["5", "[[]]", "[{}]", '[{"imageId": 1}]', "{}", '[""]'])
    def test_reports_images_of_another_shape(self, images: str) -> None:
        line = b'{"images": %s}\n' % images.encode()

        assert found(check(line, pictures=self.problem)) == [("/lines/1", "line_images_invalid")]

    def test_does_not_look_at_images_of_a_single_file(self) -> None:
        assert check(b'{"images": "anything"}\n').problem_count == 0
