"""Archives: one file of rows, or a data folder with pictures; nothing leaves its folder, nothing swells."""

import gzip
import io
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.formats.base import FormatProblem, Limits
from app.formats.reading import extract_pictures
from tests.formats.files import problem_of, read

ROWS = b'{"q": "a", "image": "a.png"}\n'
LIMITS = Limits(row_characters=1000, output_bytes=100_000_000, files=20)


def zipped(*files: tuple[str, bytes], **options: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(*files: tuple[str, bytes], compression: str = "", change: Any = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz" if compression else "w:") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if change is not None:
                change(entry)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def extracted(content: bytes, limits: Limits = LIMITS) -> dict[str, bytes] | str | None:
    """Return the files of the folder, the code of a problem, or None if it is no archive with pictures."""
    with tempfile.TemporaryDirectory() as root:
        file, folder, scratch = Path(root, "file"), Path(root, "out", "folder"), Path(root, "scratch")
        file.write_bytes(content)
        scratch.mkdir()
        folder.parent.mkdir()
        try:
            found = extract_pictures(file, folder, limits, scratch=scratch)
        except FormatProblem as problem:
            return problem.code
        finally:
            assert [entry.name for entry in folder.parent.iterdir()] in ([], ["folder"])
            assert sorted(entry.name for entry in Path(root).iterdir()) == ["file", "out", "scratch"]
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files} if found else None


FOLDER = (("data.jsonl", ROWS), ("images/a.png", b"picture"), ("README.md", b"about"))


class TestOneFile:
    @pytest.mark.parametrize(
        ("content", "compression"),
        [
            (zipped(("data.jsonl", ROWS)), "zip"),
            (zipped(("folder/", b""), ("folder/data.csv", b"q,image\na,a.png\n"), ("__MACOSX/._x", b"")), "zip"),
            (tarred(("data.jsonl", ROWS)), "tar"),
            (tarred(("data.jsonl", ROWS), compression="gz"), "tar.gzip"),
            (gzip.compress(ROWS), "gzip"),
        ],
        ids=["zip", "folder in zip", "tar", "tar.gz", "gz"],
    )
    def test_the_only_file_of_rows_is_read(self, content: bytes, compression: str) -> None:
        rows, source = read(content)

        assert [row for _, row in rows] == [{"q": "a", "image": "a.png"}]
        assert source.compression == compression

    def test_other_files_are_named(self) -> None:
        assert read(zipped(("data.jsonl", ROWS), ("README.md", b"x")))[1].left_out == ["README.md"]

    @pytest.mark.parametrize(
        ("content", "code"),
        [
            (zipped(("a.csv", b"x"), ("b.csv", b"x")), "archive_several_files"),
            (zipped(("README.md", b"x")), "archive_no_rows"),
            (zipped(*FOLDER), "archive_has_pictures"),
            (zipped(("data.jsonl", zipped(("data.jsonl", ROWS)))), "archive_nested"),
            (gzip.compress(gzip.compress(ROWS)), "archive_nested"),
            (gzip.compress(ROWS)[:-10], "archive_broken"),
            (zipped(("data.jsonl", ROWS))[:-10], "archive_broken"),
            (gzip.compress(b" " * 80_000_000), "archive_too_large"),
        ],
        ids=["several", "none", "pictures", "zip in zip", "gzip in gzip", "cut gzip", "cut zip", "bomb"],
    )
    def test_one_sentence_says_what_is_wrong(self, content: bytes, code: str) -> None:
        assert problem_of(content)[0] == code


class TestFolder:
    @pytest.mark.parametrize(
        "content", [zipped(*FOLDER), tarred(*FOLDER), tarred(*FOLDER, compression="gz")], ids=["zip", "tar", "tar.gz"]
    )
    def test_becomes_the_folder(self, content: bytes) -> None:
        assert extracted(content) == dict(FOLDER)

    def test_the_one_folder_in_it_is_taken_off(self) -> None:
        assert extracted(zipped(*((f"cats/{name}", text) for name, text in FOLDER))) == dict(FOLDER)

    @pytest.mark.parametrize(
        "content", [ROWS, b"", zipped(("data.jsonl", ROWS)), gzip.compress(ROWS)], ids=["rows", "empty", "zip", "gz"]
    )
    def test_anything_else_is_left_alone(self, content: bytes) -> None:
        assert extracted(content) is None

    def test_names_of_windows_are_read_as_they_were_meant(self) -> None:
        name = "images/红色圆形.png"
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("data.jsonl", ROWS)
            archive.writestr("images/AAAAAAAA.png", b"picture")
        content = stream.getvalue().replace(b"A" * 8, "红色圆形".encode("gbk"))

        assert extracted(content) == {"data.jsonl": ROWS, name: b"picture"}

    def odd(self) -> Iterator[tuple[str, bytes]]:
        for name in (
            "../a.png",
            "/a.png",
            "a/../../b.png",
            "C:/a.png",
            "a\\b.png",
            "a" * 300 + ".png",
            "a\nb.png",
            "a/" * 40 + "a.png",
        ):
            yield "archive_odd_name", zipped(*FOLDER, (name, b"x"))
            yield "archive_odd_name", tarred(*FOLDER, (name, b"x"))

        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):

            def change(entry: tarfile.TarInfo, kind: bytes = kind) -> None:
                if entry.name == "images/a.png":
                    entry.type, entry.linkname, entry.size = kind, "/etc/passwd", 0

            yield "archive_odd_file", tarred(*FOLDER, change=change)
        link = zipfile.ZipInfo("images/link.png")
        link.external_attr = 0o120777 << 16
        yield "archive_odd_file", zipped(*FOLDER, (link, b"/etc/passwd"))  # type: ignore[arg-type]
        yield "archive_name_twice", zipped(*FOLDER, ("images/A.png", b"x"))
        yield "archive_too_many", zipped(*FOLDER, *((f"images/{n}.png", b"x") for n in range(20)))
        yield "archive_too_large", zipped(*FOLDER, ("images/b.png", b"\0" * 100_000_001))
        yield "archive_bomb", zipped(*FOLDER, ("images/b.png", b"\0" * 90_000_000))
        locked = zipped(*FOLDER)
        yield (
            "archive_encrypted",
            locked.replace(b"PK\3\4\x14\0\0\0", b"PK\3\4\x14\0\1\0").replace(
                b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"
            ),
        )

    def test_what_is_unsafe_or_too_large_is_refused(self) -> None:
        found = [(extracted(content), code) for code, content in self.odd()]

        assert [code for code, _ in found] == [code for _, code in found]

    def test_more_than_the_archive_says_is_never_written(self) -> None:
        content = bytearray(tarred(*FOLDER))

        assert extracted(bytes(content[:1000])) == "archive_broken"
