"""Events of a stage: JSON lines that a script (or the log projection) appends to a file, and that readers follow.

Scripts are untrusted writers: a line that is foreign, broken or too long is skipped and counted, and
the values of the others are made safe to store and send (finite numbers, valid text of bounded length).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from app.domain.plain_text import storable
from app.executor.runs.redaction import read_at
from app.executor.runs.run_folder import RunFolder

MAX_LINE_BYTES = 1024 * 1024
READ_BYTES = 4 * 1024 * 1024
_MAX_TEXT = 10_000
_MAX_NAME = 200
_MAX_VALUES = 500
_MAX_STEP = 2**53


class Source(IntEnum):
    """Where metrics and progress were found; those of a higher source count alone.

    COUNTED: printed, at steps that are counted because the output names none. FOUND: printed, or in a file that a
    library writes, at their own steps. RECORD: in a log record of the contract. OWN: told by the script itself.
    """

    NOTHING = 0
    COUNTED = 1
    FOUND = 2
    RECORD = 3
    OWN = 4


@dataclass(frozen=True)
class MetricsEvent:
    """Named numbers at a step; a value that was NaN, infinite or null is None."""

    time: float
    step: int
    values: Mapping[str, float | None]
    source: Source = Source.OWN


@dataclass(frozen=True)
class ProgressEvent:
    """Progress of the stage: steps of a total, or a percentage. Bytes: of what is being downloaded."""

    time: float
    step: int
    total: int | None = None
    message: str | None = None
    percent: float | None = None
    bytes_done: int | None = None
    bytes_total: int | None = None
    source: Source = Source.OWN


@dataclass(frozen=True)
class ArtifactEvent:
    """A file that the script made."""

    time: float
    path: str
    kind: str


@dataclass(frozen=True)
class EvaluationEvent:
    """A score on held-out samples, before or after the training."""

    time: float
    name: str
    phase: str
    value: float | None
    samples: int


@dataclass(frozen=True)
class SampleEvent:
    """What a held-out prompt was answered with, before or after the training."""

    time: float
    phase: str
    number: int
    prompt: str
    wanted: str
    answer: str


@dataclass(frozen=True)
class NoteEvent:
    """A message for the person who watches the job."""

    time: float
    message: str


@dataclass(frozen=True)
class RecordEvent:
    """A log record of the contract (`write_log`) that is no metric: its code and what it carries."""

    time: float
    code: int
    level: str
    detail: str


@dataclass(frozen=True)
class StatusEvent:
    """A status of DeepExtension that the script set for a task."""

    time: float
    task: str
    status: int


StageEvent = (
    MetricsEvent | ProgressEvent | ArtifactEvent | EvaluationEvent | SampleEvent | NoteEvent | RecordEvent | StatusEvent
)

_TYPE_NAMES: dict[type[StageEvent], str] = {
    MetricsEvent: "metrics",
    ProgressEvent: "progress",
    ArtifactEvent: "artifact",
    EvaluationEvent: "evaluation",
    SampleEvent: "sample",
    NoteEvent: "note",
    RecordEvent: "record",
    StatusEvent: "status",
}


class BrokenEvent(ValueError):
    """The line is not a valid event."""


def parse_event(line: bytes) -> StageEvent | None:
    """Read one line; None for a line that is well-formed but says nothing (blank, bookmark).

    Raises `BrokenEvent` for everything else that is no event.
    """
    if not line.strip():
        return None
    if len(line) > MAX_LINE_BYTES:
        raise BrokenEvent("line too long")
    try:
        document = json.loads(line)
        return _event(document)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as exc:
        raise BrokenEvent(str(exc)) from exc


def event_document(event: StageEvent) -> dict[str, Any]:
    """Return the event as the JSON object that stands in a file; what is not known is left out or null."""
    document: dict[str, Any] = {"type": _TYPE_NAMES[type(event)], **vars(event)}
    if isinstance(event, ProgressEvent):
        for name in ("percent", "bytes_done", "bytes_total"):
            if document[name] is None:
                del document[name]
    if isinstance(event, MetricsEvent | ProgressEvent):
        del document["source"]
        if event.source < Source.RECORD:
            document["source"] = event.source.name.lower()
    return document


def finite(value: object) -> float | None:
    """Return a number as a finite float; None for everything that is none, such as NaN, infinity, null or a flag."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def clean_text(value: object, limit: int = _MAX_TEXT) -> str:
    """Return text that databases and encoders take, of at most `limit` characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return storable(text[:limit])[:limit]


def _event(document: Any) -> StageEvent | None:
    if not isinstance(document, dict):
        raise BrokenEvent("not an object")
    time = finite(document.get("time")) or 0.0
    match document.get("type"):
        case "metrics":
            values = _values(document["values"])
            return MetricsEvent(time=time, step=_step(document["step"]), values=values, source=_source(document))
        case "progress":
            return _progress(document, time=time)
        case "artifact":
            return ArtifactEvent(time=time, path=_text(document["path"]), kind=_text(document.get("kind", "file")))
        case "evaluation":
            return _evaluation(document, time=time)
        case "sample":
            texts = {name: _text(document[name]) for name in ("prompt", "wanted", "answer")}
            return SampleEvent(time=time, phase=_phase(document), number=_step(document["number"]), **texts)
        case "note":
            return NoteEvent(time=time, message=_text(document["message"]))
        case "record":
            level, detail = _text(document["level"]), _text(document["detail"])
            return RecordEvent(time=time, code=_step(document["code"]), level=level, detail=detail)
        case "status":
            return StatusEvent(time=time, task=_text(document["task"]), status=_step(document["status"]))
        case "offset":  # a bookmark of the log projection
            return None
        case other:
            raise BrokenEvent(f"unknown type {other!r}")


def _progress(document: dict[str, Any], *, time: float) -> ProgressEvent:
    total = document.get("total")
    message = document.get("message")
    return ProgressEvent(
        time=time,
        step=_step(document["step"]),
        total=None if total is None else _step(total),
        message=None if message is None else _text(message),
        percent=finite(document.get("percent")),
        bytes_done=_bytes(document.get("bytes_done")),
        bytes_total=_bytes(document.get("bytes_total")),
        source=_source(document),
    )


def _source(document: dict[str, Any]) -> Source:
    """Return the source that a line of a projection names; others are a script's own, or records."""
    return _SOURCES.get(str(document.get("source")), Source.OWN)


_SOURCES = {source.name.lower(): source for source in (Source.COUNTED, Source.FOUND)}


def _bytes(value: object) -> int | None:
    number = finite(value)
    return None if number is None or number < 0 else int(number)


def _evaluation(document: dict[str, Any], *, time: float) -> EvaluationEvent:
    return EvaluationEvent(
        time=time,
        name=_text(document["name"])[:_MAX_NAME],
        phase=_phase(document),
        value=finite(document["value"]),
        samples=_step(document.get("samples", 0)),
    )


def _phase(document: dict[str, Any]) -> str:
    phase = document["phase"]
    if phase not in ("before", "after"):
        raise BrokenEvent("phase is neither before nor after")
    return str(phase)


def _step(value: object) -> int:
    number = finite(value) if not isinstance(value, str) else None
    if number is None or number < 0 or number > _MAX_STEP or number != int(number):
        raise BrokenEvent("not a count")
    return int(number)


def _values(values: object) -> dict[str, float | None]:
    if not isinstance(values, dict):
        raise BrokenEvent("values are no object")
    named = list(values.items())[:_MAX_VALUES]
    # a value of another kind (text, a list) is no metric; null and NaN are holes
    return {
        clean_text(name, _MAX_NAME): finite(value)
        for name, value in named
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise BrokenEvent("not a text")
    return clean_text(value)


class EventReader:
    """Reads the events of one file as they come. A half-written last line waits for its end.

    `offset` is the byte behind the last line that was read; a new reader can go on there. `end`, such an offset of
    another reader, is where this one stops.
    """

    def __init__(self, path: Path, offset: int = 0, *, end: int | None = None) -> None:
        self._path = path
        self._end = end
        self._inside_long_line = False
        self.offset = offset
        self.skipped = 0

    def read(self, limit: int = READ_BYTES) -> list[StageEvent]:
        """Return the events in the next `limit` bytes (at least one line's worth); empty when there is nothing new."""
        limit = max(limit, MAX_LINE_BYTES)
        if self._end is not None:
            limit = min(limit, max(self._end - self.offset, 0))
        data = read_at(self._path, self.offset, limit)
        complete, _, rest = data.rpartition(b"\n") if b"\n" in data else (b"", b"", data)
        self.offset += len(data) - len(rest)
        lines = complete.split(b"\n") if len(rest) < len(data) else []
        if self._inside_long_line and lines:
            del lines[0]
            self._inside_long_line = False
        if len(rest) >= MAX_LINE_BYTES:
            self._skip_long(len(rest))
        return self._parse(lines)

    def batches(self) -> Iterator[list[StageEvent]]:
        """Yield the events up to the present end of the file, some megabytes at a time."""
        while True:
            before = self.offset
            events = self.read()
            if self.offset == before:
                return
            yield events

    def _skip_long(self, size: int) -> None:
        self.offset += size
        if not self._inside_long_line:
            self.skipped += 1
        self._inside_long_line = True

    def _parse(self, lines: Sequence[bytes]) -> list[StageEvent]:
        events: list[StageEvent] = []
        for line in lines:
            try:
                event = parse_event(line)
            except BrokenEvent:
                self.skipped += 1
                continue
            if event is not None:
                events.append(event)
        return events


@dataclass(frozen=True)
class EventPosition:
    """How far a reader is in an attempt's two event files, and the best sources so far; as text it fits a stream id."""

    own: int = 0
    projected: int = 0
    metrics: Source = Source.NOTHING
    progress: Source = Source.NOTHING

    def __str__(self) -> str:
        return f"{self.own}.{self.projected}.{len(Source) * self.metrics + self.progress}"

    @classmethod
    def parse(cls, text: str) -> "EventPosition":
        """Read the text form; raises ValueError for anything else."""
        own, projected, sources = (int(part) for part in text.split("."))
        if min(own, projected, sources) < 0:
            raise ValueError("a position is not negative")
        metrics, progress = divmod(sources, len(Source))
        return cls(own=own, projected=projected, metrics=Source(metrics), progress=Source(progress))


class RunEvents:
    """Follows the events of one attempt: what the script wrote itself, and what was found in its output and files.

    The same is often said in several ways. Of metrics only those of the best source so far count, and likewise of
    progress. Records stand in the output only.
    """

    def __init__(
        self, folder: RunFolder, position: EventPosition | None = None, *, until: EventPosition | None = None
    ) -> None:
        position = position or EventPosition()
        self._own = EventReader(folder.events, position.own, end=until.own if until else None)
        self._projected = EventReader(
            folder.projected_events, position.projected, end=until.projected if until else None
        )
        self._metrics = position.metrics
        self._progress = position.progress

    @property
    def position(self) -> EventPosition:
        """Return where a new reader can go on."""
        return EventPosition(
            own=self._own.offset, projected=self._projected.offset, metrics=self._metrics, progress=self._progress
        )

    @property
    def skipped(self) -> int:
        """Return how many lines were no events."""
        return self._own.skipped + self._projected.skipped

    @property
    def metrics_source(self) -> Source:
        """Return the best source of metrics so far."""
        return self._metrics

    def read(self) -> Iterator[StageEvent]:
        """Yield what is new in both files, up to their present ends; never holds more than a few megabytes."""
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[list[StageEvent]]:
        """Yield what `read` does in pieces; `position` is behind the last one."""
        for own in self._own.batches():
            yield self._counting(own, most=Source.OWN)
        for projected in self._projected.batches():
            yield self._counting(projected, most=Source.RECORD)

    def _counting(self, events: list[StageEvent], *, most: Source) -> list[StageEvent]:
        """Leave out what a better source says; what stands in the script's own file is its own, whatever it claims."""
        sources = [_source_of(event, most) for event in events]
        for event, source in zip(events, sources, strict=True):
            if isinstance(event, MetricsEvent):
                self._metrics = max(self._metrics, source)
            elif isinstance(event, ProgressEvent):
                self._progress = max(self._progress, source)
        return [event for event, source in zip(events, sources, strict=True) if self._counts(event, source)]

    def _counts(self, event: StageEvent, source: Source) -> bool:
        match event:
            case MetricsEvent():
                return source >= self._metrics
            case ProgressEvent():
                return source >= self._progress
            case _:
                return True


def _source_of(event: StageEvent, most: Source) -> Source:
    if most is Source.RECORD and isinstance(event, MetricsEvent | ProgressEvent):
        return min(event.source, most)
    return most
