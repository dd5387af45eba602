"""Secrets in what an attempt left: hidden from readers while it runs, taken out of its files when it has ended."""

import base64
import json
import stat
from pathlib import Path
from urllib.parse import quote

import pytest

from app.executor.runs.events import EventReader, NoteEvent
from app.executor.runs.log_file import read_chunk, tail_lines
from app.executor.runs.redaction import begin, finish
from app.executor.runs.run_folder import RunFolder

SECRET = 'correct "horse"/ü'
KEY = "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END KEY-----\n"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "1")
    folder.output.mkdir(parents=True)
    begin(folder, [SECRET, KEY])
    return folder


def read(path: Path, size: int) -> str:
    """Return the file as a reader sees it who takes `size` bytes at a time."""
    text, offset = "", 0
    while (chunk := read_chunk(path, offset, size, final=True)).next_offset > offset:
        text, offset = text + chunk.text, chunk.next_offset
    return text


class TestReaders:
    def test_see_no_secret_wherever_the_output_is_cut(self, run: RunFolder) -> None:
        line = f"a {SECRET} b {SECRET}{SECRET}\n"
        run.output_log.write_text(line, "utf-8")
        hidden = "*" * len(SECRET.encode())

        seen = {read(run.output_log, size) for size in range(4, len(line.encode()) + 2)}

        assert seen == {f"a {hidden} b {hidden}{hidden}\n"}
        assert tail_lines(run.output_log, 1) == [f"a {hidden} b {hidden}{hidden}"]

    def test_wait_for_the_rest_of_what_may_become_one(self, run: RunFolder) -> None:
        content = f"a {SECRET} b\n".encode()
        text, offset = "", 0
        for size in range(len(content) + 1):
            run.output_log.write_bytes(content[:size])
            chunk = read_chunk(run.output_log, offset)
            text, offset = text + chunk.text, chunk.next_offset
            assert chunk.end

        assert text == f"a {'*' * len(SECRET.encode())} b\n"
        run.output_log.write_bytes(content + SECRET.encode()[:3])
        assert read_chunk(run.output_log, offset).text == ""
        assert read_chunk(run.output_log, offset, final=True).text == SECRET[:3]

    @pytest.mark.parametrize(
        "written",
        [
            SECRET,
            json.dumps(SECRET)[1:-1],
            json.dumps(SECRET, ensure_ascii=False)[1:-1],
            quote(SECRET),
            quote(SECRET, safe=""),
            *(
                base64.b64encode(SECRET.encode() + rest).decode()[: len(SECRET.encode()) // 3 * 4]
                for rest in (b"", b":x")
            ),
            KEY.strip(),
            json.dumps(KEY.strip())[1:-1],
            *(line for line in KEY.splitlines()),
        ],
    )
    def test_see_none_in_its_usual_spellings(self, run: RunFolder, written: str) -> None:
        run.output_log.write_text(f"<{written}>\n", "utf-8")

        assert set(read(run.output_log, 1000)) <= set("<*>\n")

    def test_see_none_in_events(self, run: RunFolder) -> None:
        note = {"type": "note", "time": 1.0, "message": f"token {SECRET}"}
        run.events.write_text(json.dumps(note) + "\n")

        (event,) = EventReader(run.events).read()

        assert isinstance(event, NoteEvent)
        assert event.message == "token " + "*" * len(json.dumps(SECRET)[1:-1])

    def test_see_nothing_where_it_is_not_known_what_is_secret(self, run: RunFolder) -> None:
        run.output_log.write_text(f"{SECRET}\nmore\n")
        run.redactions.write_text("{")

        assert set(read(run.output_log, 1000)) == {"*", "\n"}


class TestFinish:
    def test_leaves_positions_and_no_secret_in_any_file(self, run: RunFolder) -> None:
        long = ("x" * 1000 + SECRET) * 3000  # reaches over blocks
        run.output_log.write_text(long, "utf-8")
        run.parameters.write_text(json.dumps({"token": SECRET}))
        (run.ranks / "r" / "0").mkdir(parents=True)
        (run.ranks / "r" / "0" / "stdout.log").write_text(f"{SECRET}\n", "utf-8")
        (run.output / "mine.txt").write_text(SECRET, "utf-8")
        outside = run.path.parent / "outside"
        outside.write_text(SECRET, "utf-8")
        (run.path / "link").symlink_to(outside)
        assert stat.S_IMODE(run.redactions.stat().st_mode) == 0o600

        finish(run)
        finish(run)

        assert run.output_log.read_text("utf-8") == ("x" * 1000 + "*" * len(SECRET.encode())) * 3000
        assert json.loads(run.parameters.read_text()) == {"token": "*" * len(json.dumps(SECRET)[1:-1])}
        assert (run.ranks / "r" / "0" / "stdout.log").read_text() == "*" * len(SECRET.encode()) + "\n"
        assert not run.redactions.exists()
        # what the script makes is the caller's, and links lead elsewhere
        assert (run.output / "mine.txt").read_text("utf-8") == outside.read_text("utf-8") == SECRET
