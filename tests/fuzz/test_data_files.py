"""Random and damaged files of every format: rows that are JSON objects, or one sentence, and nothing else happens."""

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.errors import Violation
from app.formats.base import FormatProblem, Limits, Options
from app.formats.detection import head_of
from app.formats.reading import extract_pictures, open_rows
from app.registry.datasets.check import check_lines
from app.registry.datasets.process import BoundedDatasetReader
from tests.formats.test_archives import FOLDER, tarred, zipped
from tests.formats.test_tables import parquet, workbook
from tests.fuzz.test_readers import EXAMPLES, JSON, fuzz

LIMITS = Limits(row_characters=4000, output_bytes=20_000_000, files=100)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030", "big5", "cp1252"])

FIELDS = st.text(st.sampled_from('ab,;\t|"\n\r 你ä0'), max_size=8)
TABLES = st.lists(st.lists(FIELDS, min_size=1, max_size=4), max_size=6).flatmap(
    lambda rows: st.sampled_from([",", ";", "\t", "|"]).map(
        lambda delimiter: "\r\n".join(delimiter.join(row) for row in rows)
    )
)
DOCUMENTS = st.one_of(
    st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=5),
    st.dictionaries(st.sampled_from(["data", "rows", "messages", "x"]), JSON, max_size=3),
    JSON,
).flatmap(lambda value: st.sampled_from([None, 0, 2]).map(lambda indent: json.dumps(value, indent=indent)))
TEXTS = st.one_of(
    st.text(),
    st.text('{}[]",:;\t\r\n \\u0d8ea1-+.', max_size=60),
    TABLES,
    DOCUMENTS,
    st.lists(DOCUMENTS, max_size=4).map("\n".join),
)

SAMPLES = {
    "workbook": workbook(["q", "a", "when"], ["你好", 1.5, True], [None, "=1+1", "#N/A"], sheets={"empty": []}),
    "zip": zipped(*FOLDER),
    "one file": zipped(("data.jsonl", b'{"a": 1}\n')),
    "tar": tarred(*FOLDER),
    "tar.gz": tarred(*FOLDER, compression="gz"),
    "gzip": gzip.compress(b'[{"a": 1}]'),
}


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Return a file with a few bytes changed, cut out or added."""
    place = st.integers(0, len(content))
    change = st.tuples(place, st.integers(0, 30), st.binary(max_size=8))

    def changed(changes: list[tuple[int, int, bytes]]) -> bytes:
        result = content
        for at, length, new in changes:
            result = result[:at] + new + result[at + length :]
        return result

    return st.lists(change, min_size=1, max_size=3).map(changed)


def said(problem: FormatProblem) -> None:
    """Fail for a problem without a sentence, or one with a gap in it."""
    violation = Violation(problem.pointer, problem.code, problem.params)
    sentence = violation.detail()
    assert sentence != problem.code
    json.dumps([violation.pointer, sentence]).encode()


def read_all(content: bytes, **options: Any) -> None:
    """Read a file in every way; only problems with a sentence may come of it."""
    ways: list[Callable[[Path, Path], object]] = [
        lambda file, scratch: check_lines(
            open_rows(file, Options(**options), LIMITS, scratch=scratch).rows, max_characters=LIMITS.row_characters
        ),
        lambda file, scratch: extract_pictures(file, scratch / "folder", LIMITS, scratch=scratch),
    ]
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            file, scratch = Path(folder, "file"), Path(folder, "scratch")
            file.write_bytes(content)
            scratch.mkdir()
            try:
                report = way(file, scratch)
            except FormatProblem as problem:
                said(problem)
            else:
                for violation in getattr(report, "problems", ()):
                    assert violation.detail() != violation.code
            assert sorted(entry.name for entry in Path(folder).iterdir()) == ["file", "scratch"]
            assert head_of(file) == content[: len(head_of(file))]


@fuzz
@given(text=TEXTS, encoding=ENCODINGS, named=st.booleans(), table=st.booleans())
def test_texts(text: str, encoding: str, named: bool, table: bool) -> None:
    content = text.encode(encoding, "replace" if encoding != "utf-8" else "surrogatepass")

    read_all(content, encoding=encoding.removesuffix("-sig") if named else None, table=table)


@fuzz
@given(content=st.binary() | st.sampled_from([b"PK\3\4", b"\x1f\x8b", b"[", b"{", b"\xff\xfe"]).flatmap(
    lambda magic: st.binary(max_size=300).map(lambda rest: magic + rest)
))  # fmt: skip
def test_bytes(content: bytes) -> None:
    read_all(content)


@fuzz
@given(content=st.sampled_from(list(SAMPLES.values())).flatmap(damaged))
def test_damaged_containers(content: bytes) -> None:
    read_all(content)


# a library in C++ may end its process: it is read in one of its own
@settings(fuzz, max_examples=max(EXAMPLES // 5, 5))
@given(content=damaged(parquet({"q": ["a", None], "n": [1.5, 2], "turns": [[{"role": "user"}], []]})))
def test_damaged_columns(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.parquet")
        file.write_bytes(content)

        found = BoundedDatasetReader(row_characters=4000, output_bytes=20_000_000).read(file)

        assert all(problem.detail() != problem.code for problem in found.report.problems)
        assert found.report.problem_count or found.report.rows
        left = {entry.name for entry in Path(folder).iterdir()}
        assert left == {"a.parquet", *([found.jsonl.name] if not found.report.problem_count else [])}
