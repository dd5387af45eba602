"""JSON documents, tables and their encodings, as people's tools write them."""

import gzip
import json
from typing import Any

import pytest

from app.formats.base import Limits
from tests.formats.files import problem_of, read, rows_of

ROWS = [{"question": "你好？", "answer": 'ä; "quoted",\nsecond line'}, {"question": "b", "answer": None}]
TABLE = 'question;answer\r\n你好？;"ä; ""quoted"",\nsecond line"\r\nb;\r\n'


def short(value: object) -> str:
    """Return the name of a case: contents are long."""
    return repr(value)[:40]


class TestJson:
    @pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_an_array_is_read_however_it_is_written(self, indent: Any, encoding: str, wrapped: bool) -> None:
        document = {"version": 1, "data": ROWS, "tags": ["a"]} if wrapped else ROWS

        rows, source = read(json.dumps(document, ensure_ascii=False, indent=indent).encode(encoding))

        assert [row for _, row in rows] == ROWS
        assert (source.format, source.member) == ("json", "data" if wrapped else None)
        assert source.left_out == (["version", "tags"] if wrapped else [])

    def test_items_have_the_lines_in_which_they_begin(self) -> None:
        rows, _ = read(b'[\n {"a":\n 1},\n\n {"a": 2}, {"a": 3}]\n')

        assert rows == [(2, {"a": 1}), (5, {"a": 2}), (5, {"a": 3})]

    def test_items_longer_than_what_is_read_at_once(self) -> None:
        items = [{"a": "x" * 300_000, "b": [1] * n} for n in range(4)]
        limits = Limits(row_characters=400_000, output_bytes=10**9)

        rows, _ = read(json.dumps(items, indent=1).encode(), limits=limits)

        assert [row for _, row in rows] == items

    def test_lines_of_json_stay_lines(self) -> None:
        assert read(b'{"messages": [{"role": "user"}]}\n')[1].format == "jsonl"
        assert read(b'{"a": 1}\n{"data": [{"b": 1}]}\n')[1].format == "jsonl"

    @pytest.mark.parametrize(
        ("content", "code", "params"),
        [
            (b'[\n{"a": 1},\n{"a": }\n]', "json_broken", {"line": 3, "column": 7, "problem": "Expecting value"}),
            (b'[{"a": 1}\n{"a": 2}]', "json_broken", {"line": 2, "column": 1, "problem": "Expecting ','"}),
            (b'[{"a": 1}', "json_broken", {"line": 1, "column": 10, "problem": "Expecting ','"}),
            (b'[{"a": "x', "json_broken", {"line": 1, "column": 8, "problem": "Unterminated string starting at"}),
            (b"[" * 100_000, "json_broken", {"line": 1, "column": 2, "problem": "nested too deeply"}),
            (b'[{"a": ' + b"1" * 5000 + b"}]", "json_broken", {"problem": "a number with too many digits"}),
            (b'[{"a": 1}]\n[{"a": 2}]\n', "json_goes_on", {"line": 2}),
            (b'[{"a": 1}, "b"]', "json_item_not_object", {"item": 2, "line": 1, "found": '"…"'}),
            (b'[["a", "b"], ["c", "d"]]', "json_item_not_object", {"item": 1}),
            (b'{"data": [{"a": 1}], "rows": [{"a": 1}]\n}', "json_several_arrays", {"names": "data, rows"}),
            (b'{"train": [{"a": 1}], "test": [{"a": 1}]}\n', "json_several_arrays", {"names": "train, test"}),
            (b'{\n"a": 1\n}\n{\n"a": 2\n}\n', "json_goes_on", {"line": 4}),
            (b'{"messages": [\n{"role": "user"}]}', "json_array_unclear", {"name": "messages"}),
            (b'{\n"question": ["a"],\n"answer": ["b"]}', "json_no_array", {"names": "question, answer"}),
            (b'[{"a": "' + b"x" * 20_000 + b'"}]', "line_too_long", {"line": 1, "limit": 10_000}),
        ],
        ids=short,
    )
    def test_one_sentence_says_what_is_wrong(self, content: bytes, code: str, params: dict[str, Any]) -> None:
        found, values = problem_of(content)

        assert (found, {name: values[name] for name in params}) == (code, params)

    @pytest.mark.parametrize("options", [{"table": True}, {"delimiter": "comma"}], ids=["content type", "delimiter"])
    def test_json_is_never_read_as_a_table(self, options: dict[str, Any]) -> None:
        for content in (b'{"a": 1, "b": 2}\n{"a": 3, "b": 4}\n', b'[{"a": 1, "b": 2},\n{"a": 3, "b": 4}]'):
            if "table" in options:
                assert rows_of(content, **options) == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
            else:
                assert problem_of(content, **options)[0] == "option_not_used"

    def test_one_line_with_all_rows_may_be_longer_than_a_row(self) -> None:
        content = json.dumps({"data": [{"a": n} for n in range(5000)]}).encode()

        assert len(rows_of(content)) == 5000


class TestTables:
    def test_lines_of_code_in_a_field_are_no_json(self) -> None:
        content = b'question,answer\n"Write C","int main()\n{\n  return 0;\n}\n"\n'

        assert rows_of(content) == [{"question": "Write C", "answer": "int main()\n{\n  return 0;\n}\n"}]

    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_the_delimiter_is_found(self, delimiter: str, encoding: str) -> None:
        rows, source = read(TABLE.replace(";", delimiter).encode(encoding))

        assert [row["question"] for _, row in rows] == ["你好？", "b"]
        assert rows[1] == (4, {"question": "b", "answer": None})
        assert (source.format, source.delimiter) == ("csv", delimiter)

    def test_quotes_line_breaks_and_empty_fields(self) -> None:
        assert rows_of(TABLE.encode()) == ROWS

    def test_the_line_that_names_the_separator_for_excel_is_no_header(self) -> None:
        assert rows_of(b"sep=;\r\na;b,c\r\n1;2\r\n") == [{"a": "1", "b,c": "2"}]

    def test_values_are_text_and_blank_records_are_none(self) -> None:
        content = b"id,note,\r\n007,1.50,\r\n\r\n,,\r\n008, a ,\r\n"

        assert rows_of(content) == [{"id": "007", "note": "1.50"}, {"id": "008", "note": " a "}]

    def test_gbk_is_read_if_it_is_named_or_certain(self) -> None:
        short = "问题,答案\n你好,世界\n".encode("gbk")
        long = ("问题,答案\n" + "今天天气怎么样？,这个问题的答案是，我们可以在网上查到有关的信息。\n" * 20).encode(
            "gbk"
        )

        assert rows_of(short, encoding="gbk") == [{"问题": "你好", "答案": "世界"}]
        assert problem_of(short)[0] == "text_encoding_unclear"
        assert read(long)[1].encoding == "gb18030"
        assert rows_of(long)[0]["问题"] == "今天天气怎么样？"

    @pytest.mark.parametrize(
        ("text", "encoding"),
        [
            (
                "질문,답변\n" + "오늘 날씨가 어떻습니까?,이 질문에 대한 답은 인터넷에서 찾을 수 있습니다.\n" * 20,
                "euc-kr",
            ),
            (
                "質問,答え\n"
                + "今日の天気はどうですか？,この質問の答えはインターネットで調べることができます。\n" * 20,
                "euc-jp",
            ),
            (
                "質問,答え\n"
                + "今日の天気はどうですか？,この質問の答えはインターネットで調べることができます。\n" * 20,
                "shift-jis",
            ),
            ("問題,答案\n" + "今天天氣怎麼樣？,這個問題的答案可以在網路上查到有關的資訊。\n" * 20, "big5"),
            ("Frage;Antwort\n" + "Wäre es möglich?;Für Größe und Maß: ja, größtenteils\n" * 20, "cp1252"),
            ("вопрос;ответ\n" + "Какая сегодня погода?;Ответ можно найти в интернете\n" * 20, "cp1251"),
        ],
    )
    def test_no_other_encoding_is_taken_for_chinese(self, text: str, encoding: str) -> None:
        assert problem_of(text.encode(encoding))[0] == "text_encoding_unclear"
        assert len(rows_of(text.encode(encoding), encoding=encoding)) == 20

    def test_one_column_is_a_table_if_it_is_said(self) -> None:
        content = b"text\nHello\nWorld, again\n"

        assert problem_of(b"text\nHello\nWorld\n")[0] == "text_without_rows"
        assert rows_of(b"text\nHello\nWorld\n", table=True) == [{"text": "Hello"}, {"text": "World"}]
        assert rows_of(content, delimiter="tab") == [{"text": "Hello"}, {"text": "World, again"}]

    @pytest.mark.parametrize(
        ("content", "code", "params"),
        [
            (
                b"a,b,c,d\n" + b"1,2,3,4\n" * 10 + b"1,2,3,4,5\n",
                "table_field_count",
                {"line": 12, "fields": 5, "header": 4},
            ),
            (b"question,answer\n" + b"Hi, you,there\n" * 9, "table_field_count", {"line": 2, "fields": 3, "header": 2}),
            (b"a,b\n1,2\n1\n1,2\n", "table_field_count", {"line": 3, "fields": 1, "header": 2}),
            (b'a,b\n1,2\n1,"x\n1,2\n', "table_quotes", {"line": 3}),
            (b'a,b\n1,"x" y\n', "table_quotes", {"line": 2}),
            (b"a,b,a\n1,2,3\n", "header_repeats", {"name": "a", "place": "line 1, column 3"}),
            (b"1,2\n3,4\n", "header_not_names", {"value": "1", "place": "line 1, column 1"}),
            (b"a,,c\n1,2,3\n", "header_missing", {"line": 2, "column": 2}),
            (b"a;b,c\n1;2,3\n", "delimiter_unclear", {"first": ";", "second": ","}),
            (b'a,b\n1,"' + b"x" * 20_000 + b'"\n', "line_too_long", {"line": 2}),
            (b"a,b\n1,2\n\xff,3\n", "text_encoding_unclear", {"byte": 9}),
            (b"a,b\n" + b"1,2\n" * 70_000 + b"\xff,3\n", "text_not_encoded", {"line": 70_002, "byte": 280_005}),
            ("a,b\n1,\ud83d\n".encode("utf-16-le", "surrogatepass"), "text_not_encoded", {"encoding": "utf-16-le"}),
        ],
        ids=short,
    )
    def test_one_sentence_says_what_is_wrong(self, content: bytes, code: str, params: dict[str, Any]) -> None:
        found, values = problem_of(content)

        assert (found, {name: values[name] for name in params}) == (code, params)


class TestNamed:
    """What is no data set is called by its name."""

    @pytest.mark.parametrize(
        ("content", "name"),
        [
            (b"%PDF-1.7\n...", "PDF"),
            (b"\x89PNG\r\n\x1a\n", "PNG"),
            (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 100, "Excel 97-2003 (.xls) / Word 97-2003 (.doc)"),
            (b"  <!DOCTYPE html>\n<html>", "HTML"),
            (b'\xef\xbb\xbf<?xml version="1.0"?><a/>', "XML"),
            (b"SQLite format 3\0", "SQLite"),
            (b"7z\xbc\xaf\x27\x1c", "7-Zip (.7z)"),
            (b"\x28\xb5\x2f\xfd....", "Zstandard (.zst)"),
        ],
    )
    def test_other_formats(self, content: bytes, name: str) -> None:
        assert problem_of(content) == ("file_is_other", {"format": name})

    @pytest.mark.parametrize("content", [bytes(range(256)) * 10, b"\0" * 100, b"\1\2\3\4" * 100], ids=short)
    def test_bytes_of_no_known_format(self, content: bytes) -> None:
        assert problem_of(content)[0] == "file_unknown"

    @pytest.mark.parametrize("content", [b"Hello", b"Hello, world", b"x\n" * 300, b"# Title\n\nSome text, and more.\n"])
    def test_plain_text(self, content: bytes) -> None:
        assert problem_of(content)[0] == "text_without_rows"

    @pytest.mark.parametrize(
        ("options", "code"),
        [
            ({"encoding": "utf-9"}, "encoding_unknown"),
            ({"encoding": "rot13"}, "encoding_unknown"),
            ({"encoding": ""}, "encoding_unknown"),
            ({"encoding": "gbk"}, "encoding_contradicts"),
            ({"delimiter": ":"}, "delimiter_unknown"),
            ({"sheet": "A"}, "option_not_used"),
        ],
    )
    def test_options_that_are_wrong_or_without_effect(self, options: dict[str, str], code: str) -> None:
        assert problem_of("a,b\n1,2\n".encode("utf-8-sig"), **options)[0] == code

    def test_gzip_is_taken_off(self) -> None:
        rows, source = read(gzip.compress(TABLE.encode()))

        assert [row for _, row in rows] == ROWS
        assert source.compression == "gzip"
