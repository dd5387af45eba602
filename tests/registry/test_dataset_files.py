"""Data sets on disk: one bounded pass, the right digest, nothing but regular files."""

import hashlib
import json
import os
import tracemalloc
from io import BytesIO
from pathlib import Path

import pytest

from app.registry.datasets.files import (
    BoundedLines,
    DatasetFileExists,
    NotADataset,
    SeveralDatasets,
    inspect,
    locate,
    place,
    remove_abandoned_uploads,
)

LINE = b'{"prompt": "a", "completion": "b"}\n'


def bounded(content: bytes, *, max_bytes: int) -> BoundedLines:
    return BoundedLines(BytesIO(content), max_bytes=max_bytes)


class TestBoundedLines:
    @pytest.mark.parametrize("content", [b"", b"a", b"a\n", b"a\nb", b"\n\n", b"abcdef\n", b"x" * 5000 + b"\nyy\n"])
    def test_yields_every_line_and_hashes_every_byte(self, content: bytes) -> None:
        lines = bounded(content, max_bytes=4)

        pieces = list(lines)

        assert [piece[:4] for piece in pieces] == [line[:4] for line in content.splitlines(keepends=True)]
        assert all(len(piece) <= 6 for piece in pieces)
        assert lines.digest == hashlib.sha256(content).hexdigest()
        assert lines.size == len(content)


class TestInspect:
    def test_needs_memory_for_a_line_not_for_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "endless.jsonl"
        file.write_bytes(b"x" * 30_000_000)

        tracemalloc.start()
        found = inspect(file, max_characters=100)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

        assert [problem.code for problem in found.report.problems] == ["line_too_long"]
        assert (found.report.rows, found.size_bytes) == (1, 30_000_000)
        assert peak < 10_000_000

    def test_refuses_a_pipe_instead_of_waiting_for_its_writer(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.jsonl")

        with pytest.raises(NotADataset):
            inspect(tmp_path / "pipe.jsonl", max_characters=100)

    def test_checks_images_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "images" / "sub").mkdir(parents=True)
        (tmp_path / "images" / "a.png").write_bytes(b"picture")
        (tmp_path / "images" / "sub" / "d.png").write_bytes(b"picture")
        (tmp_path / "images" / "empty.png").touch()
        (tmp_path / "beside.png").write_bytes(b"picture")
        names = [
            "a.png",
            "b.png",
            "sub",
            "empty.png",
            "sub/d.png",
            "beside.png",
            "../x.png",
            "/etc/passwd",
            "x" * 300,
            "a\0",
        ]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps({"images": [name]}) + "\n" for name in names))

        found = inspect(tmp_path, max_characters=400)

        assert [(problem.pointer, problem.code) for problem in found.report.problems] == [
            ("/lines/2", "line_image_missing"),
            ("/lines/3", "line_image_not_file"),
            ("/lines/4", "line_image_empty"),
            *((f"/lines/{line}", "line_image_missing") for line in (7, 8, 9, 10)),
        ]


class TestLocate:
    def test_takes_the_only_jsonl_of_a_folder(self, tmp_path: Path) -> None:
        for name in ("output.jsonl", "readme.md", ".hidden.jsonl"):
            (tmp_path / name).touch()

        assert locate(tmp_path).rows.name == "output.jsonl"

    def test_refuses_a_folder_with_none_or_several(self, tmp_path: Path) -> None:
        with pytest.raises(NotADataset):
            locate(tmp_path)
        for name in ("a.jsonl", "b.jsonl"):
            (tmp_path / name).touch()
        with pytest.raises(SeveralDatasets, match=r"a\.jsonl, b\.jsonl"):
            locate(tmp_path)

    def test_takes_a_file_of_any_name_and_the_only_table_of_a_folder(self, tmp_path: Path) -> None:
        for name in ("table.csv", "readme.md", ".table.csv.0123456789abcdef.jsonl"):
            (tmp_path / name).touch()

        assert locate(tmp_path / "readme.md").rows.name == "readme.md"
        assert locate(tmp_path).rows.name == "table.csv"


class TestPlace:
    def test_never_overwrites_other_bytes(self, tmp_path: Path) -> None:
        upload, target = tmp_path / "up", tmp_path / "target.jsonl"
        upload.write_bytes(LINE)
        target.write_bytes(b"mine")

        with pytest.raises(DatasetFileExists):
            place(upload, target, digest=hashlib.sha256(LINE).hexdigest())

        assert target.read_bytes() == b"mine"

    def test_takes_over_the_same_bytes_that_a_crash_left(self, tmp_path: Path) -> None:
        upload, target = tmp_path / "up", tmp_path / "target.jsonl"
        upload.write_bytes(LINE)
        target.write_bytes(LINE)

        place(upload, target, digest=hashlib.sha256(LINE).hexdigest())

        assert target.read_bytes() == LINE


class TestRemoveAbandonedUploads:
    def test_removes_old_ones_only(self, tmp_path: Path) -> None:
        old, new = tmp_path / ".upload-1.jsonl", tmp_path / ".upload-2.jsonl"
        old.touch()
        new.touch()
        os.utime(old, (0, 0))

        removed = remove_abandoned_uploads(tmp_path)

        assert (removed, old.exists(), new.exists()) == (1, False, True)
