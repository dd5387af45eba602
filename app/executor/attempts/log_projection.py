"""Events that scripts print into their output: found there, and appended to a file of events.

Scripts of the contract print `[log_data]: {json}`; others print what their trainers print (`printed_output`). Every
record in an attempt's output belongs to that attempt, whatever task id it carries, because only its processes write
there. Of a group of processes rank 0 reports the curves, and every one its failure.

Each appended line carries how far the output was consumed (`at`, and `done` when it is one of several events of a
record), and what must be remembered of it (`state`). The last complete line therefore says where to go on after a
crash: nothing is lost and nothing comes twice. A worker is the only writer of the file; complete lines are never
rewritten, so readers need not know of any of this.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import time
from typing import Any

from app.executor.attempts.last_words import LOG_DATA, TRAINING_FAILED, failure_text
from app.executor.attempts.metric_files import Reading
from app.executor.attempts.printed_forms import MAX_LINE_BYTES
from app.executor.attempts.printed_output import NEAR_BYTES, TAKEN_AWAY, Line, PrintedOutput, State, printed_lines
from app.executor.runs.events import (
    MetricsEvent,
    ProgressEvent,
    RecordEvent,
    Source,
    StageEvent,
    clean_text,
    event_document,
    finite,
)
from app.executor.runs.redaction import read_at

MARKER = LOG_DATA.encode()
TRAINING = 200009
BATCH_BYTES = 4 * 1024 * 1024
MAX_RECORD_BYTES = 1024 * 1024
# output without records is not searched again after a restart
_BOOKMARK_BYTES = 16 * 1024 * 1024
_TAIL_BYTES = 64 * 1024
_HEAD_BYTES = 64 * 1024
# what a launcher puts before the lines of the other processes of a group
_OTHER_RANK = re.compile(rb"\[rank[1-9]\d*\]: $")
_MARK_BYTES = 20


@dataclass(frozen=True)
class _Place:
    """Where to go on: the byte behind what was consumed, and how many events of the record there are written."""

    at: int = 0
    done: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Record:
    start: int
    end: int
    document: dict[str, Any]
    other_rank: bool = False


@dataclass(frozen=True)
class _Found:
    """Events of one record or line, and what must be remembered before and behind it."""

    start: int
    end: int
    events: Sequence[StageEvent]
    before: State
    behind: State


class LogProjector:
    """Turns what stands in `output_log` into lines of `events_file`.

    `own_events` is the script's own file: of what it tells itself, nothing that is printed as well is kept.
    """

    def __init__(
        self, output_log: Path, events_file: Path, own_events: Path | None = None, *, clock: Callable[[], float] = time
    ) -> None:
        self._output_log = output_log
        self._events_file = events_file
        self._own_events = own_events
        self._clock = clock
        self._waited = -1
        self._written = _Place()
        self._offset = 0
        self._printed = PrintedOutput(State())
        self._recover()

    @property
    def offset(self) -> int:
        """Return how many bytes of the output were consumed."""
        return self._offset

    def advance(self, max_bytes: int = BATCH_BYTES, *, final: bool = False) -> int:
        """Consume at most about `max_bytes` of new output and return how many; 0 means there is nothing to do.

        A record that is still being written waits for its end, unless `final` says that the output is complete.
        """
        # a record that is longer than the batch could never be read
        data = read_at(self._output_log, self._offset, max(max_bytes, 2 * MAX_RECORD_BYTES))
        if not data:
            return 0
        records, consumed = _scan(data, final=final)
        printed = [line for line in printed_lines(data, final=final) if line.end <= consumed]
        if not final:
            consumed = _whole_lines(data, consumed, [*records, *printed])
        if printed and not final and self._may_go_on(printed, consumed):
            consumed = printed.pop().start - len(TAKEN_AWAY)
        end = self._offset + consumed
        lines = [line for found in self._found(records, printed, consumed) for line in self._lines(found)]
        if not lines and end - self._written.at >= _BOOKMARK_BYTES:
            lines = [_line({"type": "offset", "at": end, "state": self._printed.state.document()})]
            self._written = _Place(end)
        if lines:
            try:
                self._append(b"".join(lines))
            except OSError:
                # a full disk: part of it may be written, so go on where the file says
                self._recover()
                raise
        self._offset = end
        return consumed

    def add(self, reading: Reading) -> None:
        """Append what was found in a file of the output folder."""
        place = self._written
        mark: dict[str, Any] = {"at": place.at, "file": reading.file, "file_at": reading.position}
        mark |= {"done": place.done} if place.done else {}
        mark |= {"state": place.state} if place.state else {}
        lines = [event_document(event) for event in reading.events] or [{"type": "offset"}]
        try:
            self._append(b"".join(_line(line | mark) for line in lines))
        except OSError:
            self._recover()
            raise

    def _recover(self) -> None:
        self._written = _recover(self._events_file)
        self._offset = self._written.at
        self._printed = PrintedOutput(State.of(self._written.state))
        self._shown = self._printed.progress

    def _may_go_on(self, printed: Sequence[Line], consumed: int) -> bool:
        """Say whether to wait once for what tells the step of the last line."""
        last = len(printed) - 1
        place = self._offset + printed[last].start
        if place == self._waited or consumed - printed[last].end > NEAR_BYTES:
            return False
        self._waited = place
        return self._printed.needs_more(printed, last)

    def _found(self, records: Sequence[_Record], printed: Sequence[Line], consumed: int) -> Iterator[_Found]:
        """Yield what stands in the output, in its order; the newest state of a bar last."""
        now = self._clock()
        tells = self.told_by_script()
        indexes = {id(line): index for index, line in enumerate(printed)}
        places: list[_Record | Line] = sorted([*records, *printed], key=lambda one: one.start)
        for one in places:
            before = self._printed.state.copy()
            events: list[StageEvent]
            if isinstance(one, _Record):
                events = [] if _is_echo(one) else self._record_events(one.document, now=now)
            else:
                events = list(self._printed.events(printed, indexes[id(one)], now=now))
                events = [event for event in events if not ("metrics" in tells and isinstance(event, MetricsEvent))]
            if events:
                yield _Found(one.start, one.end, events, before, self._printed.state.copy())
        shown = self._printed.progress
        if shown is not None and shown != self._shown and "progress" not in tells:
            state = self._printed.state.copy()
            step, total = shown
            yield _Found(consumed, consumed, [ProgressEvent(now, step, total, source=Source.FOUND)], state, state)
        self._shown = shown

    def _record_events(self, document: dict[str, Any], *, now: float) -> list[StageEvent]:
        """Translate a record; see `PrintedOutput.take_record` for what was printed before it."""
        self._printed.state.has_records = True
        events = [
            self._printed.take_record(event) if isinstance(event, MetricsEvent) else event
            for event in _events(document, now=now)
        ]
        return [event for event in events if event is not None]

    def told_by_script(self) -> frozenset[str]:
        """Return what the script tells itself, by the beginning of its own file: `metrics`, `progress`."""
        if self._own_events is None:
            return frozenset()
        head = read_at(self._own_events, 0, _HEAD_BYTES)
        return frozenset(kind for kind in ("metrics", "progress") if f'"type": "{kind}"'.encode() in head)

    def _lines(self, found: _Found) -> Iterator[bytes]:
        start, end = self._offset + found.start, self._offset + found.end
        skip = self._written.done if start == self._written.at else 0
        for number, event in enumerate(found.events, start=1):
            is_last = number == len(found.events)
            place = (
                _Place(end, 0, found.behind.document()) if is_last else _Place(start, number, found.before.document())
            )
            if number > skip:
                position: dict[str, Any] = {"at": place.at}
                position |= {"done": place.done} if place.done else {}
                position |= {"state": place.state} if place.state else {}
                yield _line(event_document(event) | position)
            self._written = place

    def _append(self, data: bytes) -> None:
        descriptor = os.open(self._events_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)


def file_positions(events_file: Path) -> dict[str, int]:
    """Return how far the files were read that `LogProjector.add` was given."""
    positions: dict[str, int] = {}
    try:
        with events_file.open("rb") as file:
            for line in file:
                if b'"file_at"' in line and (document := _document(line)):
                    positions[str(document.get("file"))] = int(document.get("file_at", 0))
    except FileNotFoundError:
        pass
    return positions


def _document(line: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _recover(events_file: Path) -> _Place:
    """Drop a half-written last line and return where the last complete one says that it stopped."""
    try:
        with events_file.open("r+b") as file:
            size = end = file.seek(0, os.SEEK_END)
            place = None
            while place is None:
                end, line = _last_line(file.fileno(), end)
                place = _place_of(line)
                # after a power cut a line may hold anything
                end = end if place else end - len(line) - 1
            if end < size:
                file.truncate(end)
            return place
    except FileNotFoundError:
        return _Place()


def _place_of(line: bytes) -> _Place | None:
    if not line:
        return _Place()
    try:
        document = json.loads(line)
        state = document.get("state")
        return _Place(int(document["at"]), int(document.get("done", 0)), state if isinstance(state, dict) else {})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _last_line(descriptor: int, size: int) -> tuple[int, bytes]:
    """Return where the complete lines end, and the last of them."""
    length = _TAIL_BYTES
    while True:
        start = max(size - length, 0)
        data = os.pread(descriptor, size - start, start)
        complete, newline, _ = data.rpartition(b"\n")
        _earlier, found, last = complete.rpartition(b"\n")
        if newline and (found or start == 0):
            return start + len(complete) + 1, last
        if start == 0:
            return 0, b""
        length *= 4


def _scan(data: bytes, *, final: bool) -> tuple[list[_Record], int]:
    """Return the complete records in `data` and how many bytes need not be looked at again."""
    records: list[_Record] = []
    position = 0
    while (marker := data.find(MARKER, position)) >= 0:
        begin = marker + len(MARKER)
        mark = _OTHER_RANK.search(data, max(position, marker - _MARK_BYTES), marker)
        start = mark.start() if mark else marker
        newline = data.find(b"\n", begin)
        rest = data[begin : newline if newline >= 0 else len(data)]
        if found := _decode(rest[:MAX_RECORD_BYTES]):
            document, length = found
            position = begin + length
            records.append(_Record(start, position, document, other_rank=mark is not None))
        elif newline >= 0 or final or len(rest) >= MAX_RECORD_BYTES:
            position = begin  # broken, cut off for ever, or no record at all
        else:
            return records, start
    if final:
        return records, len(data)
    return records, max(position, len(data) - _open_marker(data))


def _whole_lines(data: bytes, consumed: int, found: Sequence[_Record | Line]) -> int:
    """Return how much may be consumed: a line that is still being written waits for its end, if that is near."""
    newest = max(data.rfind(b"\n", 0, consumed), data.rfind(b"\r", 0, consumed)) + 1
    newest = max(newest, *(one.end for one in found)) if found else newest
    if consumed - newest > MAX_LINE_BYTES:
        return consumed
    # a report behind it is known by this
    return newest - len(TAKEN_AWAY) if data.endswith(TAKEN_AWAY, 0, newest) else newest


def _open_marker(data: bytes) -> int:
    """Return how many bytes at the end may be the beginning of a marker, with the mark of a rank before it."""
    size = next((size for size in range(len(MARKER) - 1, 0, -1) if data.endswith(MARKER[:size])), 0)
    window = max(0, len(data) - size - _MARK_BYTES)
    newline = data.rfind(b"\n", window)
    begins = newline >= 0 or window == 0
    return len(data) - newline - 1 if begins and data.startswith(b"[", newline + 1) else size


def _is_echo(record: _Record) -> bool:
    """Say whether another process of a group reports what rank 0 reports as well."""
    return record.other_rank and record.document.get("msg") != TRAINING_FAILED


def _decode(data: bytes) -> tuple[dict[str, Any], int] | None:
    """Read the JSON object at the beginning of `data`; what another process printed behind it does not matter."""
    # surrogateescape keeps the lengths of text and bytes convertible
    text = data.decode("utf-8", "surrogateescape")
    begin = len(text) - len(text.lstrip(" "))
    try:
        document, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    return document, len(text[:end].encode("utf-8", "surrogateescape"))


def _events(record: dict[str, Any], *, now: float) -> list[StageEvent]:
    """Translate one record; one without a code says nothing."""
    code = record.get("msg")
    if not isinstance(code, int) or isinstance(code, bool) or code < 0:
        return []
    moment = _time(record.get("time"), now=now)
    if code == TRAINING:
        return _training_events(record, moment)
    detail = failure_text(record) if code == TRAINING_FAILED else record.get("msgDetail") or ""
    level = clean_text(record.get("level") or "", 20).lower()
    return [RecordEvent(time=moment, code=code, level=level, detail=clean_text(detail))]


def _training_events(record: dict[str, Any], moment: float) -> list[StageEvent]:
    details = record.get("details")
    details = details if isinstance(details, dict) else {}
    percent = finite(record.get("msgDetail"))
    number = finite(details.get("step"))
    step = int(number) if number is not None and number >= 0 else None
    values = {
        clean_text(name, 200): value
        for name, given in details.items()
        if name != "step" and (value := finite(given)) is not None
    }
    events: list[StageEvent] = []
    if step is not None and values:
        events.append(MetricsEvent(time=moment, step=step, values=values))
    if percent is not None and percent >= 0:
        if step is None:
            events.append(ProgressEvent(time=moment, step=min(int(percent), 100), total=100))
        else:
            events.append(ProgressEvent(time=moment, step=step, percent=min(percent, 100.0)))
    return events


def _time(value: object, *, now: float) -> float:
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return now
        # a time without a zone is ambiguous
        return moment.timestamp() if moment.tzinfo else now
    return now


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False).encode("ascii") + b"\n"
