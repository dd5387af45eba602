"""Output is read by offset, whatever bytes it holds and however it grows."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.executor.runs.log_file import LogChunk, collapse_carriage_returns, read_chunk, tail_lines

TEXT = "größe 学习率 🚀 ok\n"


def read_all(path: Path, limit: int) -> list[LogChunk]:
    chunks: list[LogChunk] = []
    offset = 0
    while True:
        chunk = read_chunk(path, offset, limit, final=True)
        if chunk.next_offset == offset:
            return chunks
        chunks.append(chunk)
        offset = chunk.next_offset


def bytes_read() -> int:
    """Return how much this process has read so far, from whatever."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


class TestReadChunk:
    @pytest.mark.parametrize("limit", range(4, len(TEXT.encode()) + 2))
    def test_never_cuts_a_character(self, tmp_path: Path, limit: int) -> None:
        path = tmp_path / "output.log"
        path.write_bytes((TEXT * 5).encode())

        chunks = read_all(path, limit)

        assert "".join(chunk.text for chunk in chunks) == TEXT * 5
        assert all(chunk.next_offset - chunk.offset == len(chunk.text.encode()) for chunk in chunks)
        assert "\ufffd" not in "".join(chunk.text for chunk in chunks)

    @pytest.mark.parametrize("cut", range(len(TEXT.encode()) + 1))
    def test_leaves_a_half_written_character_for_the_next_read(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "output.log"
        data = TEXT.encode()
        path.write_bytes(data[:cut])

        first = read_chunk(path)
        path.write_bytes(data)
        second = read_chunk(path, first.next_offset)

        assert first.end
        assert first.text + second.text == TEXT

    def test_delivers_the_half_character_once_the_file_has_stopped_growing(self, tmp_path: Path) -> None:
        path = tmp_path / "output.log"
        path.write_bytes("é".encode()[:1])

        assert read_chunk(path).next_offset == 0
        assert read_chunk(path, final=True) == LogChunk("\ufffd", 0, 1, end=True, size=1, at_line_start=True)

    @given(data=st.binary(max_size=200), limit=st.integers(min_value=4, max_value=50))
    def test_any_bytes_come_through_with_exact_offsets(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes, limit: int
    ) -> None:
        path = tmp_path_factory.mktemp("log") / "output.log"
        path.write_bytes(data)

        chunks = read_all(path, limit)

        assert "".join(chunk.text for chunk in chunks) == data.decode("utf-8", "replace")
        assert [chunk.offset for chunk in chunks[1:]] == [chunk.next_offset for chunk in chunks[:-1]]
        assert not chunks or chunks[-1].next_offset == len(data)

    def test_keeps_an_escape_sequence_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "output.log"
        text = "abc\x1b[31mred\x1b]0;title\x07\x1b[0mx"
        path.write_text(text)

        for limit in range(12, len(text) + 1):
            shown = "".join(collapse_carriage_returns(chunk.text) for chunk in read_all(path, limit))

            assert shown == "abcredx", limit

    def test_knows_where_lines_begin_and_what_is_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "output.log"

        assert read_chunk(path, 7) == LogChunk("", 0, 0, end=True, size=0, at_line_start=True)

        path.write_text("ab\ncd\n")

        assert read_chunk(path, 3).at_line_start
        assert not read_chunk(path, 4).at_line_start
        assert read_chunk(path, 99) == LogChunk("", 6, 6, end=True, size=6, at_line_start=True)
        assert not read_chunk(path, 0, 4).end

    @pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much was read")
    def test_reads_only_what_is_new_in_a_large_file(self, tmp_path: Path) -> None:
        path = tmp_path / "output.log"
        with path.open("wb") as file:
            file.seek(1 << 30)  # sparse: 1 GB that takes no space
            file.write(b"new\n")

        before = bytes_read()
        chunks = [read_chunk(path, 1 << 30) for _ in range(200)]
        lines = tail_lines(path, 1)
        read = bytes_read() - before

        assert {chunk.text for chunk in chunks} == {"new\n"}
        assert lines == ["new"]
        assert read < 1 << 24


class TestCollapse:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("plain\n", "plain\n"),
            ("dos\r\nline\r\n", "dos\nline\n"),
            (" 10%\r 20%\r100%\ndone\n", "100%\ndone\n"),
            ("\r 10%\r 20%", " 20%"),
            ("100%\r\r\n", "100%\n"),
            ("\x1b[1;31mError\x1b[0m \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\n", "Error link\n"),
            ("a\x00b\x08\n", "ab\n"),
            ("50%\x1b[K\r", "50%\r"),
        ],
    )
    def test_shows_the_last_state_of_a_line(self, text: str, shown: str) -> None:
        assert collapse_carriage_returns(text) == shown

    @given(
        a=st.text(alphabet="xy\r\n", max_size=12),
        b=st.text(alphabet="xy\r\n", max_size=12),
        c=st.text(alphabet="xy\r\n", max_size=12),
    )
    def test_chunks_collapse_like_the_whole_wherever_they_are_cut(self, a: str, b: str, c: str) -> None:
        stream = collapse_carriage_returns(a)
        for chunk in (b, c):
            stream += collapse_carriage_returns(chunk, at_line_start=stream.endswith("\n") or not stream)

        assert collapse_carriage_returns(stream).rstrip("\r") == collapse_carriage_returns(a + b + c).rstrip("\r")

    def test_a_chunk_of_a_progress_bar_tells_the_reader_to_start_its_line_again(self) -> None:
        assert collapse_carriage_returns("\r 20%\r 30%", at_line_start=False) == "\r 30%"


class TestTail:
    def test_returns_the_last_lines_reading_backwards(self, tmp_path: Path) -> None:
        path = tmp_path / "output.log"
        path.write_text("".join(f"line {n}\n" for n in range(200_000)))

        assert tail_lines(path, 3) == ["line 199997", "line 199998", "line 199999"]
        assert len(tail_lines(path, 20_000)) == 20_000
        assert tail_lines(path, 0) == []

    def test_counts_an_unfinished_line_and_keeps_blank_ones(self, tmp_path: Path) -> None:
        path = tmp_path / "output.log"
        path.write_text("a\n\nb\r c")

        assert tail_lines(path, 2) == ["", " c"]
        assert tail_lines(path, 9) == ["a", "", " c"]
        assert tail_lines(tmp_path / "missing", 9) == []

    def test_a_progress_bar_of_megabytes_is_one_line(self, tmp_path: Path) -> None:
        path = tmp_path / "output.log"
        path.write_text("start\n" + "".join(f"\rstep {n:06d}" for n in range(200_000)) + "\nend\n")

        assert tail_lines(path, 2) == ["step 199999", "end"]
