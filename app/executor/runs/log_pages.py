"""Pages of a job's output: by offset, or from its last lines on. All functions block."""

import os
from dataclasses import dataclass
from pathlib import Path

from app.executor.runs.log_file import CHUNK_BYTES, TAIL_BYTES, collapse_carriage_returns, read_chunk

MAX_PAGE_BYTES = 1024 * 1024
_BLOCK_BYTES = 64 * 1024


@dataclass(frozen=True)
class LogRange:
    """What a reader wants: bytes from `offset` on, or (given) the last `tail` lines; `raw` keeps terminal codes."""

    offset: int = 0
    limit: int = CHUNK_BYTES
    tail: int | None = None
    raw: bool = False
    attempt: int | None = None


@dataclass(frozen=True)
class LogPage:
    """Text of the bytes `offset` to `next_offset`. `end`: the job has ended and nothing follows."""

    text: str
    offset: int
    next_offset: int
    size: int
    end: bool
    attempt: int


def read_page(path: Path, wanted: LogRange, *, attempt: int, ended: bool) -> LogPage:
    """Read one page; `ended` says that the file has stopped growing."""
    offset = wanted.offset if wanted.tail is None else tail_offset(path, wanted.tail)
    chunk = read_chunk(path, offset, min(wanted.limit, MAX_PAGE_BYTES), final=ended)
    text = chunk.text if wanted.raw else collapse_carriage_returns(chunk.text, at_line_start=chunk.at_line_start)
    return LogPage(
        text=text,
        offset=chunk.offset,
        next_offset=chunk.next_offset,
        size=chunk.size,
        end=ended and chunk.end,
        attempt=attempt,
    )


def tail_offset(path: Path, lines: int, *, max_bytes: int = TAIL_BYTES) -> int:
    """Return where the last `lines` lines begin, but never more than `max_bytes` before the end."""
    try:
        with path.open("rb", buffering=0) as file:
            return _line_start(file.fileno(), lines, max_bytes)
    except FileNotFoundError:
        return 0


def _line_start(descriptor: int, lines: int, max_bytes: int) -> int:
    size = os.fstat(descriptor).st_size
    if lines <= 0 or size == 0:
        return size
    floor = max(size - max_bytes, 0)
    # the newline that ends the last line separates nothing
    end = size - 1 if os.pread(descriptor, 1, size - 1) == b"\n" else size
    while end > floor:
        start = max(end - _BLOCK_BYTES, floor)
        block = os.pread(descriptor, end - start, start)
        while (found := block.rfind(b"\n")) >= 0:
            lines -= 1
            if lines == 0:
                return start + found + 1
            block = block[:found]
        end = start
    return floor
