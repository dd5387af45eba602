"""The stdout protocol of inference scripts: one JSON object per line, between lines of noise.

Only text of the answer and failures reach the caller. Everything else that a script or its libraries print stays in
the log.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_LINE_CHARACTERS = 8 * 1024 * 1024


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class AnswerChunk:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Failure:
    """The script reports that it cannot answer."""

    error: str
    traceback: str | None = None


@dataclass(frozen=True)
class Done:
    """The script reports a complete answer and its usage."""

    finish_reason: FinishReason
    usage: Mapping[str, Any]


@dataclass(frozen=True)
class Noise:
    """A line for the log, never for the caller."""

    line: str


InferenceEvent = AnswerChunk | Failure | Done | Noise


class InferenceParser:
    """Parses the output as it arrives, in chunks of any size. Use one parser for each answer."""

    def __init__(self) -> None:
        self._pending: list[str] = []
        self._pending_size = 0
        self._overflowed = False
        self._failed = False
        self._reported: FinishReason | None = None

    def feed(self, text: str) -> list[InferenceEvent]:
        """Parse the next chunk of output. Return the events of the lines that it completes."""
        *complete, rest = text.split("\n")
        events: list[InferenceEvent] = []
        for line in complete:
            self._hold(line)
            events += self._flush()
        self._hold(rest)
        return events

    def close(self) -> list[InferenceEvent]:
        """End the output. Return the events of an unfinished last line."""
        return self._flush()

    def finish_reason(self, *, succeeded: bool, cancelled: bool = False) -> FinishReason:
        """Return why the answer ended. `succeeded`: the script exited with code 0."""
        if cancelled:
            return FinishReason.CANCELLED
        if self._failed or not succeeded:
            return FinishReason.ERROR
        return self._reported or FinishReason.STOP

    def _hold(self, text: str) -> None:
        if self._pending_size + len(text) > MAX_LINE_CHARACTERS:
            self._overflowed = True
            text = ""
        self._pending.append(text)
        self._pending_size += len(text)

    def _flush(self) -> list[InferenceEvent]:
        line, overflowed = "".join(self._pending), self._overflowed
        self._pending, self._pending_size, self._overflowed = [], 0, False
        # JSON holds no raw carriage return: what stands before one is a progress bar
        line = line.rstrip("\r").rpartition("\r")[2]
        events: list[InferenceEvent] = [Noise(line[:1000])] if overflowed else list(_parse(line))
        for event in events:
            match event:
                case Failure():
                    self._failed = True
                case Done():
                    self._reported = event.finish_reason
                    self._failed |= event.finish_reason is FinishReason.ERROR
        return events


def _parse(line: str) -> Iterator[InferenceEvent]:
    if not line.strip():
        return
    start = len(line) - len(line.lstrip())
    try:
        document, end = json.JSONDecoder().raw_decode(line, start)
    except (ValueError, RecursionError):
        yield Noise(line)
        return
    event = _event(document) if isinstance(document, dict) else None
    if event is None:
        yield Noise(line)
        return
    yield event
    # another thread or stderr came in between the object and its newline
    if rest := line[end:].strip():
        yield Noise(rest)


def _event(document: Mapping[str, Any]) -> InferenceEvent | None:
    match document.get("status"):
        case "resp":
            text = document.get("text")
            return AnswerChunk(_text(text)) if text is not None else None
        case "error":
            traceback = document.get("traceback")
            return Failure(_text(document.get("error") or "the script gave no reason"), traceback and _text(traceback))
        case "done":
            usage = document.get("usage")
            return Done(_finish_reason(document.get("finish_reason")), usage if isinstance(usage, dict) else {})
        case _:
            return None


def _finish_reason(value: object) -> FinishReason:
    return FinishReason(value) if isinstance(value, str) and value in set(FinishReason) else FinishReason.STOP


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # half of a surrogate pair cannot be sent
    return text.encode("utf-8", "replace").decode("utf-8")
