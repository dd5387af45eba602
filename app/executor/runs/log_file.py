"""Reading a stage's output by byte offset while it is being written.

The stage appends to `output.log` and never waits for a reader. A reader asks for what lies behind its offset; the cost
is what is new, whatever the size of the file. Offsets count bytes of the file, so any process can go on where another
stopped, and a chunk never ends inside a character or a terminal escape sequence.
"""

import codecs
import os
import re
from dataclasses import dataclass
from pathlib import Path

from app.executor.runs.redaction import Redaction

CHUNK_BYTES = 256 * 1024
TAIL_BYTES = 1024 * 1024
_TAIL_BLOCK = 64 * 1024
_LONGEST_CHARACTER = 4
_LONGEST_ESCAPE = 256

_ESCAPE = re.compile(
    r"\x1b(?:"
    r"\[[0-?]*[ -/]*[@-~]"  # colours, cursor, erase
    r"|\][^\x07\x1b]*(?:\x07|\x1b\\)"  # window titles and hyperlinks
    r"|[ -/]*[0-Z\\^-~]"  # two-character ones
    r")"
)
_OPEN_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]*\x1b?|[ -/]*)?\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class LogChunk:
    """A chunk of output: the bytes `offset` to `next_offset` of the file as text.

    `end` says that nothing more could be delivered when it was read; `size` is the file's size at that time.
    `at_line_start` says that the text begins a line, which `collapse_carriage_returns` wants to know.
    """

    text: str
    offset: int
    next_offset: int
    end: bool
    size: int
    at_line_start: bool


def read_chunk(
    path: Path, offset: int = 0, limit: int = CHUNK_BYTES, *, final: bool = False, end: int | None = None
) -> LogChunk:
    """Read at most `limit` bytes (at least 4) from `offset` on; an offset behind the end reads nothing.

    Invalid bytes become U+FFFD. A character, an escape sequence or a secret (`redaction`) that is cut off at the end is
    left for the next read, unless `final` says that the file has stopped growing. With `end`, an offset where another
    chunk ended, the file is read up to there only. A file that does not exist yet is empty.
    """
    limit = max(limit, _LONGEST_CHARACTER)
    redaction = Redaction.of(path)  # before the file is read: at its end both change
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if end is not None:
                size, final = min(size, end), True
            offset = min(max(offset, 0), size)
            at_line_start = offset == 0 or os.pread(file.fileno(), 1, offset - 1) == b"\n"
            data = redaction.read(file.fileno(), limit if end is None else min(limit, size - offset), offset)
    except FileNotFoundError:
        return LogChunk(text="", offset=0, next_offset=0, end=True, size=0, at_line_start=True)
    size = max(size, offset + len(data))
    at_eof = offset + len(data) == size
    if at_eof and not final:
        data = data[: len(data) - redaction.begun(data)]
    text, consumed = _decode(data, final=final and at_eof)
    return LogChunk(
        text=text,
        offset=offset,
        next_offset=offset + consumed,
        end=at_eof,
        size=size,
        at_line_start=at_line_start,
    )


def _decode(data: bytes, *, final: bool) -> tuple[str, int]:
    """Return the text and how many bytes it stands for."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data, final)
    if final:
        return text, len(data)
    consumed = len(data) - len(decoder.getstate()[0])
    unfinished = _OPEN_ESCAPE.search(text, max(len(text) - _LONGEST_ESCAPE, 0))
    # a chunk of nothing else is delivered, so that a reader always gets on; a replaced byte has lost its length
    if unfinished and unfinished.start() > 0 and "\ufffd" not in unfinished.group():
        text = text[: unfinished.start()]
        consumed -= len(unfinished.group().encode("utf-8"))
    return text, consumed


def collapse_carriage_returns(text: str, *, at_line_start: bool = True) -> str:
    r"""Return what a terminal would show: of a line that was rewritten with `\r`, the last state; no escape sequences.

    For streams: with `at_line_start=False` a leading `\r` is kept when the first line was rewritten, telling the reader
    to drop what it shows of its open line; a trailing one is always kept. Collapsing the concatenation of collapsed
    chunks therefore gives what collapsing the whole text gives, wherever the chunks were cut.
    """
    text = _CONTROL.sub("", _ESCAPE.sub("", text))
    if "\r" not in text:
        return text
    lines = text.split("\n")
    last = len(lines) - 1
    shown = [_last_state(line) if index < last else _last_state(line, is_open=True) for index, line in enumerate(lines)]
    if not at_line_start and _rewinds(lines[0]):
        shown[0] = "\r" + shown[0]
    return "\n".join(shown)


def _last_state(line: str, *, is_open: bool = False) -> str:
    if "\r" not in line:
        return line
    body = line.rstrip("\r")
    state = body[body.rfind("\r") + 1 :]
    # what follows may be "\n", which ends the line, or text, which replaces it: the next chunk decides
    return state + "\r" if is_open and body != line else state


def _rewinds(line: str) -> bool:
    r"""Say whether `line` replaces what stood before it: text behind a `\r`."""
    return "\r" in line.rstrip("\r")


def tail_lines(path: Path, count: int, *, max_bytes: int = TAIL_BYTES) -> list[str]:
    """Return the last `count` lines as a terminal shows them, reading backwards and never more than `max_bytes`.

    An unfinished last line counts; a first line that began before `max_bytes` is returned without its beginning.
    """
    if count <= 0:
        return []
    redaction = Redaction.of(path)
    try:
        with path.open("rb", buffering=0) as file:
            data = _read_backwards(file.fileno(), redaction, lines=count, max_bytes=max_bytes)
    except FileNotFoundError:
        return []
    text = collapse_carriage_returns(data.decode("utf-8", "replace")).rstrip("\r")
    lines = text.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    return lines[-count:]


def _read_backwards(descriptor: int, redaction: Redaction, *, lines: int, max_bytes: int) -> bytes:
    position = os.fstat(descriptor).st_size
    floor = max(position - max_bytes, 0)
    blocks: list[bytes] = []
    newlines = 0
    # one more than asked for: the file's last byte is usually a newline
    while position > floor and newlines <= lines:
        start = max(position - _TAIL_BLOCK, floor)
        block = redaction.read(descriptor, position - start, start)
        newlines += block.count(b"\n")
        blocks.append(block)
        position = start
    data = b"".join(reversed(blocks))
    data = data[: len(data) - redaction.begun(data)]
    # the first byte may lie inside a character
    return data if position == 0 else data.lstrip(bytes(range(0x80, 0xC0)))
