import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.argspec.client import Reading
from app.argspec.report import SyntaxProblem
from app.argspec.source import NotPython, parse
from app.domain.texts import Language
from app.registry.methods.files import python_problem


def check_python(source: str | bytes) -> SyntaxProblem | None:
    try:
        parse(source)
    except NotPython as error:
        return error.problem
    return None


class TestCheckPython:
    @pytest.mark.parametrize(
        "source",
        [
            "",
            "print('hello')\n",
            "\ufeffx = 1\n",
            b"\xef\xbb\xbfx = 1\n",
            b"# -*- coding: latin-1 -*-\nx = '\xe9'\n",
            "# -*- coding: latin-1 -*-\nx = 'ü'\n",
            b"x = 1\r\ny = 2\r\n",
            "x = '\\d'\n",
            "x = 1 is 1\n",
            "def f():\n    return 1",
        ],
    )
    def test_accepts(self, source: str | bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert check_python(source) is None

    @pytest.mark.parametrize(
        ("source", "line", "column"),
        [
            ("x = (\n", 1, 5),
            ("x = 1\nif x\n    pass\n", 2, 5),
            ("def f():\nreturn 1\n", 2, 1),
            ("return 1\n", 1, 1),
            ("x = 1\nbreak\n", 2, 1),
            ("print 'hello'\n", 1, 1),
            ("x = 'ab\n", 1, 5),
            ("a = 1\nb = '\0'\n", 2, 6),
            (b"a = 1\nb = '\0'\n", 2, 6),
            (b"a = 1\nb = '\xff'\n", 2, 6),
            ("ä = '\0'\n", 1, 6),
            (b"# coding: no-such-codec\n", 1, 1),
            ("x = 1\n".encode("utf-16"), 1, 4),
        ],
    )
    def test_names_line_and_column(self, source: str | bytes, line: int, column: int) -> None:
        problem = check_python(source)

        assert problem is not None
        assert (problem.line, problem.column) == (line, column)
        assert problem.message

    @pytest.mark.parametrize(
        "source",
        [
            "(" * 5_000 + ")" * 5_000,
            "x = " + "-" * 100_000 + "1",
            "x = " + "+".join("1" * 50_000),
            "x = " + "not " * 50_000 + "1",
            "".join(f"{' ' * depth}if x:\n" for depth in range(500)) + " " * 500 + "pass",
            "x" + ".y" * 100_000,
            "lambda: " * 20_000 + "1",
        ],
        ids=["parentheses", "minus", "sum", "not", "blocks", "attributes", "lambdas"],
    )
    def test_survives_code_that_is_nested_absurdly(self, source: str) -> None:
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(check_python, source).result() is not None


class TestPythonProblem:
    def test_says_file_line_and_column_in_every_language(self) -> None:
        violation = python_problem(Reading(problem=check_python(b"x = (\n")), "train.py", "/stages/training/file")

        assert violation is not None
        assert (violation.pointer, violation.code) == ("/stages/training/file", "invalid_python")
        for language in Language:
            assert "train.py" in violation.detail(language)
            assert "{" not in violation.detail(language)

    def test_says_nothing_about_python(self) -> None:
        assert python_problem(Reading(problem=check_python(b"x = 1\n")), "train.py") is None
