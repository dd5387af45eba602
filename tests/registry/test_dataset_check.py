"""Every way in which a line of a data set can be wrong, each with its number."""

import json
from collections.abc import Collection

import pytest

from app.domain.texts import Language
from app.registry.dataset_check import MAX_PROBLEMS, DatasetReport, check_lines

GOOD = b'{"prompt": "a", "completion": ""}\n'


def check(*lines: bytes, limit: int = 100, images: Collection[str] | None = None) -> DatasetReport:
    return check_lines(lines, max_characters=limit, images=images)


def found(report: DatasetReport) -> list[tuple[str, str]]:
    return [(problem.pointer, problem.code) for problem in report.problems]


class TestCheckLines:
    def test_accepts_lines_with_the_first_lines_fields_in_any_order(self) -> None:
        report = check(GOOD, b'{"completion": null, "prompt": 1}\r\n', '{"prompt": "é你", "completion": "x"}'.encode())

        assert report == DatasetReport(rows=3, columns=("prompt", "completion"), problems=(), problem_count=0)

    def test_reports_bad_json_on_line_7(self) -> None:
        report = check(*[GOOD] * 6, b'{"prompt": "a", "completion": }\n', GOOD)

        assert found(report) == [("/lines/7", "line_not_json")]
        assert report.problems[0].params == {"line": 7, "column": 31, "problem": "Expecting value"}
        assert "Line 7" in report.problems[0].detail()
        assert "第 7 行" in report.problems[0].detail(Language.ZH)
        assert report.rows == 8

    def test_reports_an_empty_data_set(self) -> None:
        assert found(check()) == [("/lines", "dataset_empty")]

    @pytest.mark.parametrize(
        ("line", "code"),
        [
            (b"\n", "line_blank"),
            (b"  \t\n", "line_blank"),
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
            (b'{"prompt": 1}\n', "line_fields_missing"),
            (b'{"prompt": 1, "completion": 1, "note": 1}\n', "line_fields_extra"),
            (b'{"prompt": 1, "Completion": 1}\n', "line_fields_differ"),
            (b"{}\n", "line_fields_missing"),
        ],
    )
    def test_reports_what_is_wrong_with_a_line(self, line: bytes, code: str) -> None:
        report = check(GOOD, line, GOOD, limit=10_000)

        assert found(report) == [("/lines/2", code)]
        assert "{" not in report.problems[0].detail().replace('{"', "")

    def test_names_the_fields_that_differ(self) -> None:
        report = check(GOOD, b'{"prompt": 1, "answer": 2, "note": 3}\n')

        assert report.problems[0].params == {"line": 2, "missing": "completion", "extra": "answer, note"}

    def test_names_the_byte_that_is_not_utf8(self) -> None:
        report = check(GOOD, b'{"prompt": "\xff"}\n')

        assert report.problems[0].params == {"line": 2, "byte": 13}

    def test_reports_a_byte_order_mark_once(self) -> None:
        assert found(check(b"\xef\xbb\xbf" + GOOD, GOOD)) == [("/lines/1", "line_has_bom")]

    def test_counts_characters_not_bytes(self) -> None:
        line = json.dumps({"prompt": "你" * 50}, ensure_ascii=False)

        assert check(line.encode() + b"\r\n", limit=len(line)).problem_count == 0
        assert found(check(line.encode(), limit=len(line) - 1)) == [("/lines/1", "line_too_long")]

    def test_takes_fields_from_the_first_line_that_is_an_object(self) -> None:
        report = check(b"oops\n", GOOD, b'{"a": 1}\n')

        assert found(report) == [("/lines/1", "line_not_json"), ("/lines/3", "line_fields_differ")]
        assert report.columns == ("prompt", "completion")

    def test_lists_a_hundred_problems_and_counts_all(self) -> None:
        report = check(*[b"x\n"] * 250)

        assert len(report.problems) == MAX_PROBLEMS
        assert (report.problem_count, report.rows) == (250, 250)


class TestImages:
    def test_accepts_images_that_are_there(self) -> None:
        report = check(b'{"images": [{"imageId": "a.png"}, {"imageId": "b.png"}]}\n', images={"a.png", "b.png"})

        assert report.problem_count == 0

    def test_reports_an_image_that_is_missing(self) -> None:
        report = check(b'{"images": [{"imageId": "a.png"}, {"imageId": "../b.png"}]}\n', images={"a.png"})

        assert found(report) == [("/lines/1", "line_image_missing")]
        assert report.problems[0].params["image"] == "../b.png"

    @pytest.mark.parametrize("images", ['"a.png"', '["a.png"]', "[{}]", '[{"imageId": 1}]', "{}"])
    def test_reports_images_of_another_shape(self, images: str) -> None:
        line = b'{"images": %s}\n' % images.encode()

        assert found(check(line, images={"a.png"})) == [("/lines/1", "line_images_invalid")]

    def test_does_not_look_at_images_of_a_single_file(self) -> None:
        assert check(b'{"images": "anything"}\n').problem_count == 0
