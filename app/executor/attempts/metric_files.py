"""Read curves from the files that trainers write into a stage's output folder.

`trainer_log.jsonl` (LLaMA-Factory) and `logging.jsonl` (ms-swift) grow by a line for each report, with the step and how
many there will be. TensorBoard's event files hold everything that was logged to it. `trainer_state.json` (transformers)
comes with each checkpoint: it corrects what was printed, whose digits are few and whose steps are sometimes unknown.

Files are untrusted: what is broken or too large is passed over. The step and the names are the file's own, except that
`train/loss` and `eval/loss` of TensorBoard are called what transformers prints, `loss` and `eval_loss`.
"""

import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.executor.runs.events import MetricsEvent, ProgressEvent, Source, clean_text, finite

STATE_FILE = "trainer_state.json"
_LINES_FILES = ("trainer_log.jsonl", "logging.jsonl")
_EVENTS_PREFIX = "events.out.tfevents."
_MAX_ENTRIES = 2000
_MAX_DEPTH = 4
_MAX_FILES = 16
_READ_BYTES = 1024 * 1024
_MAX_STATE_BYTES = 32 * 1024 * 1024
_NAMES = {"lr": "learning_rate"}
_NO_METRICS = {"step", "global_step", "current_steps", "total_steps", "max_steps", "percentage", "total_flos"}


@dataclass(frozen=True)
class Reading:
    """What was read of a file, and how far: bytes, or entries of a history."""

    file: str
    position: int
    events: tuple[MetricsEvent | ProgressEvent, ...]


class MetricFiles:
    """Reads what is new in the files of one output folder. `positions` say how far an earlier reader came."""

    def __init__(self, folder: Path, positions: Mapping[str, int]) -> None:
        self._folder = folder
        self._positions = dict(positions)
        self._state_seen: tuple[str, int, int] | None = None
        self._tags: dict[str, str] = {}

    def read(self, *, now: float) -> Iterator[Reading]:
        """Yield what is new, some megabytes at most."""
        lines, records, states = _files(self._folder)
        for path in (*lines, *records):
            name = path.relative_to(self._folder).as_posix()
            position = self._positions.get(name, 0)
            position = position if position <= _size(path) else 0  # begun anew
            end, events = (_read_lines if path in lines else self._read_records)(path, position, now)
            if end != position:
                self._positions[name] = end
                yield Reading(name, end, tuple(events))
        if states:
            yield from self._read_state(max(states, key=lambda path: _modified(path)), now)

    def _read_state(self, path: Path, now: float) -> Iterator[Reading]:
        seen = (str(path), _modified(path), _size(path))
        if seen == self._state_seen or seen[2] > _MAX_STATE_BYTES:
            return
        self._state_seen = seen
        try:
            history = json.loads(_read_at(path, 0, _MAX_STATE_BYTES))["log_history"]
            entries = [entry for entry in history if isinstance(entry, dict)]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return  # written at this moment, or by another program
        position = self._positions.get(STATE_FILE, 0)
        events = [event for entry in entries[position:] for event in _report(entry, now)]
        if len(entries) > position:
            self._positions[STATE_FILE] = len(entries)
            yield Reading(STATE_FILE, len(entries), tuple(events))

    def _read_records(self, path: Path, position: int, now: float) -> tuple[int, list[MetricsEvent | ProgressEvent]]:
        """Read records of an event file: a length, its checksum, the bytes, their checksum."""
        data = _read_at(path, position, _READ_BYTES)
        events: dict[int, MetricsEvent] = {}
        at = 0
        while len(data) - at >= _HEAD.size:
            (length,) = _LENGTH.unpack_from(data, at)
            end = at + _HEAD.size + length + _CHECKSUM_BYTES
            if end > len(data):
                if at == 0 and length > _READ_BYTES // 2:
                    # a picture, or no event file at all: looked past
                    at = end if position + end <= _size(path) else at
                break
            moment, step, values = _scalars(data[at + _HEAD.size : end - _CHECKSUM_BYTES])
            if values and step >= 0:
                named = {self._name(tag): value for tag, value in values.items()}
                known = events.get(step)
                merged = {**known.values, **named} if known else named
                events[step] = MetricsEvent(moment or now, step, merged, Source.FOUND)
            at = end
        return position + at, list(events.values())

    def _name(self, tag: str) -> str:
        """Return what transformers prints for a tag; another tag that would be called the same is marked."""
        name = tag.removeprefix("train/") if tag.startswith("train/") else tag
        name = f"eval_{tag.removeprefix('eval/')}" if tag.startswith("eval/") else name
        name = clean_text(name, 200)
        return name if self._tags.setdefault(name, tag) == tag else f"tensorboard/{clean_text(tag, 180)}"


def _files(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return the files of lines, event files and states in the folder, of a few thousand entries at most."""
    lines: list[Path] = []
    records: list[Path] = []
    states: list[Path] = []
    entries = 0
    for root, folders, names in os.walk(folder):
        entries += len(folders) + len(names)
        if entries > _MAX_ENTRIES or len(Path(root).relative_to(folder).parts) >= _MAX_DEPTH:
            folders.clear()
        for name in sorted(names):
            path = Path(root, name)
            if name in _LINES_FILES:
                lines.append(path)
            elif name.startswith(_EVENTS_PREFIX):
                records.append(path)
            elif name == STATE_FILE:
                states.append(path)
    return lines[:_MAX_FILES], sorted(records)[:_MAX_FILES], states


def _read_lines(path: Path, position: int, now: float) -> tuple[int, list[MetricsEvent | ProgressEvent]]:
    data = _read_at(path, position, _READ_BYTES)
    complete = data[: data.rfind(b"\n") + 1]
    if not complete and len(data) == _READ_BYTES:
        return position + len(data), []  # no line of a log
    events: list[MetricsEvent | ProgressEvent] = []
    for line in complete.splitlines():
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(document, dict):
            events += _report(document, now)
    return position + len(complete), events


def _report(entry: Mapping[str, Any], now: float) -> Iterator[MetricsEvent | ProgressEvent]:
    joined = next((entry[name] for name in _JOINED if isinstance(entry.get(name), str)), "")
    done, _, of = joined.partition("/")
    step = _count(done or next((entry[name] for name in _STEPS if name in entry), None))
    total = _count(of or next((entry[name] for name in _TOTALS if name in entry), None))
    if step is None:
        return
    values = {
        clean_text(_NAMES.get(name, name), 200): finite(value)
        for name, value in entry.items()
        if name not in _NO_METRICS and isinstance(value, int | float) and not isinstance(value, bool)
    }
    if values:
        yield MetricsEvent(now, step, values, Source.FOUND)
    if total:
        yield ProgressEvent(now, step, total, source=Source.FOUND)


_JOINED = ("global_step/max_steps", "iteration")
_STEPS = ("current_steps", "global_step", "step")
_TOTALS = ("total_steps", "max_steps")


def _count(value: object) -> int | None:
    number = finite(value)
    return int(number) if number is not None and 0 <= number < 2**53 else None


# ---- records of TensorBoard: of its messages, the four that hold a scalar ----

_LENGTH = struct.Struct("<Q")
_HEAD = struct.Struct("<QI")
_CHECKSUM_BYTES = 4
_FLOAT, _DOUBLE = 1, 2  # types of a tensor


def _scalars(record: bytes) -> tuple[float, int, dict[str, float | None]]:
    """Return the time, step and scalars of an `Event`; none of them for what is no such message."""
    moment, step = 0.0, 0
    values: dict[str, float | None] = {}
    try:
        for number, content in _fields(record):
            if number == 1 and isinstance(content, bytes):
                moment = finite(struct.unpack("<d", content)[0]) or 0.0
            elif number == 2 and isinstance(content, int):
                step = content if content < 2**53 else -1
            elif number == 5 and isinstance(content, bytes):
                for _, value in _fields(content):
                    tag, scalar = _scalar(value)
                    if tag and scalar is not None:
                        values[tag] = finite(scalar)
    except (struct.error, IndexError, ValueError, TypeError):
        return 0.0, 0, {}
    return moment, step, values


def _scalar(value: bytes | int) -> tuple[str, float | None]:
    """Return the tag and the number of a `Summary.Value`; None if it holds something else, such as a picture."""
    tag, scalar = "", None
    for number, content in _fields(_as_bytes(value)):
        if number == 1:
            tag = _as_bytes(content).decode("utf-8", "replace")
        elif number == 2:
            (scalar,) = struct.unpack("<f", _as_bytes(content))
        elif number == 8:
            scalar = _tensor(_as_bytes(content))
    return tag, scalar


def _tensor(message: bytes) -> float | None:
    """Return the number of a `TensorProto` that holds one."""
    fields = dict(_fields(message))
    kind = fields.get(1)
    letter, number = ("<f", 5) if kind == _FLOAT else ("<d", 6)
    content = fields.get(number) or fields.get(4)
    if kind not in (_FLOAT, _DOUBLE) or not isinstance(content, bytes) or len(content) != struct.calcsize(letter):
        return None
    return float(struct.unpack(letter, content)[0])


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and content of each field of a protocol buffer: a number, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        match key & 7:
            case 0:
                content, at = _varint(message, at)
                yield key >> 3, content
                continue
            case 1:
                length = 8
            case 2:
                length, at = _varint(message, at)
            case 5:
                length = 4
            case _:
                raise ValueError("no field")
        if at + length > len(message):
            raise ValueError("cut off")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("no number")


def _as_bytes(content: bytes | int) -> bytes:
    if isinstance(content, int):
        raise TypeError("a number")
    return content


def _read_at(path: Path, position: int, size: int) -> bytes:
    """Read a part of a regular file; a link, or what would keep the reader waiting, is empty."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            return os.pread(descriptor, size, position) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
        finally:
            os.close(descriptor)
    except OSError:
        return b""


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
