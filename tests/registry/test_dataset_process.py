"""Data sets of every format become JSONL beside the original, within limits that a process keeps."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from app.formats.base import Options
from app.registry.datasets.files import NotADataset
from app.registry.datasets.process import BoundedDatasetReader, ProcessLimits

MIB = 1024 * 1024
LINE = b'{"q": "a", "a": "b"}\n'


def reader(*, output_bytes: int = 50 * MIB, limits: ProcessLimits | None = None) -> BoundedDatasetReader:
    return BoundedDatasetReader(row_characters=1000, output_bytes=output_bytes, limits=limits)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class TestPlain:
    def test_jsonl_is_left_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "a.jsonl"
        file.write_bytes(LINE * 3)

        found = reader().read(file)

        assert (found.jsonl, found.source, found.converted, found.report.rows) == (file, None, False, 3)
        assert names(tmp_path) == ["a.jsonl"]

    @pytest.mark.parametrize("first", [10, 100_000, 400_000, 999_000])
    def test_a_long_first_row_is_a_row(self, tmp_path: Path, first: int) -> None:
        file = tmp_path / "a.jsonl"
        file.write_bytes(json.dumps({"messages": [{"role": "user", "content": "{" * first}]}).encode() + b"\n" + LINE)

        found = BoundedDatasetReader(row_characters=1_000_000, output_bytes=50 * MIB).read(file)

        assert (found.jsonl, found.report.rows, found.report.problems) == (file, 2, ())
        assert names(tmp_path) == ["a.jsonl"]

    @pytest.mark.parametrize("large", [False, True])
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.jsonl", b"\xef\xbb\xbf" + LINE),
            ("a.jsonl", LINE + b"\r\n  \n" + LINE),
            ("a.jsonl", LINE.decode().encode("utf-16")),
            ("a.txt", LINE),
            ("a.csv", b"q,a\r\na,b\r\n"),
        ],
    )
    def test_anything_else_becomes_jsonl_that_every_script_reads(
        self, tmp_path: Path, name: str, content: bytes, large: bool
    ) -> None:
        file = tmp_path / name
        times = 60_000 if large else 1  # a process of its own is taken from 1 MiB on
        body = content.removeprefix(b"q,a\r\n") if name == "a.csv" else content
        more = body.removeprefix(b"\xef\xbb\xbf").removeprefix(b"\xff\xfe") * (times - 1)
        file.write_bytes(content + more)

        found = reader().read(file)

        rows = found.jsonl.read_bytes()
        assert found.report.problems == ()
        assert rows == LINE * found.report.rows
        assert found.report.rows >= times
        assert found.size_bytes == len(rows)
        assert names(tmp_path) == sorted([name, f".{name}.{found.digest[:16]}.jsonl"])
        assert file.read_bytes() == content + more
        assert found.source is not None
        assert found.source["size_bytes"] == len(content + more)

    def test_problems_have_the_places_of_the_original(self, tmp_path: Path) -> None:
        file = tmp_path / "a.json"
        file.write_text('[\n{"a": 1},\n{"a": 1, "a": 2},\n{}\n]')

        found = reader().read(file)

        assert [(one.pointer, one.code) for one in found.report.problems] == [
            ("/lines/3", "line_duplicate_key"),
            ("/lines/4", "line_without_fields"),
        ]
        assert names(tmp_path) == ["a.json"]

    def test_nothing_is_left_if_it_is_only_asked(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("q,a\na,b\n")

        assert reader().read(tmp_path / "a.csv", keep=False).report.rows == 1
        assert names(tmp_path) == ["a.csv"]

    def test_a_folder_with_a_table_and_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "a.png").write_bytes(b"picture")
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,cat\nb.png,dog\n")

        problems = reader().read(tmp_path).report.problems
        (tmp_path / "images" / "b.png").write_bytes(b"picture")
        found = reader().read(tmp_path)

        assert [(one.pointer, one.code) for one in problems] == [("/lines/3", "line_image_missing")]
        assert found.jsonl.parent == tmp_path
        assert [json.loads(line)["file_name"] for line in found.jsonl.read_text().splitlines()] == ["a.png", "b.png"]

    def test_a_link_to_a_device_is_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "zero.jsonl").symlink_to("/dev/zero")

        with pytest.raises(NotADataset):
            reader().read(tmp_path / "zero.jsonl")


class TestLimits:
    def parquet(self, folder: Path, rows: int = 100_000) -> Path:
        file = folder / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"q": ["a" * 100] * rows}), file)
        return file

    def test_a_table_of_a_library_is_read_in_a_process(self, tmp_path: Path) -> None:
        found = reader().read(self.parquet(tmp_path))

        assert (found.report.rows, found.report.problems) == (100_000, ())
        assert found.jsonl.stat().st_size == found.size_bytes

    @pytest.mark.parametrize(
        ("output_bytes", "limits", "expected"),
        [
            (MIB, ProcessLimits(), {"reading_output"}),
            # a library in C++ may abort before Python can say that there is no memory
            (50 * MIB, ProcessLimits(memory_bytes=60 * MIB), {"reading_memory", "reading_crashed"}),
            (50 * MIB, ProcessLimits(seconds=0.05), {"reading_time"}),
        ],
        ids=["output", "memory", "time"],
    )
    def test_what_meets_a_limit_is_stopped_and_leaves_nothing(
        self, tmp_path: Path, output_bytes: int, limits: ProcessLimits, expected: set[str]
    ) -> None:
        file = self.parquet(tmp_path)

        found = reader(output_bytes=output_bytes, limits=limits).read(file)

        (problem,) = found.report.problems
        assert problem.code in expected
        assert "{" not in problem.detail()
        assert names(tmp_path) == ["a.parquet"]

    def test_a_bomb_in_gzip_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "a.jsonl.gz"
        file.write_bytes(gzip.compress(LINE * 10_000_000, compresslevel=9))

        found = reader(output_bytes=5 * MIB).read(file, Options())

        assert [problem.code for problem in found.report.problems] == ["archive_too_large"]


def test_the_service_imports_no_library_of_a_format() -> None:
    program = "import sys, app.main; print(*sorted({'openpyxl', 'pyarrow', 'pandas', 'numpy'} & sys.modules.keys()))"

    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert said.stdout.split() == []
