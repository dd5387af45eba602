"""Server-sent events, read as they come."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StreamEvent:
    """One event of a stream; `id` is where a reader resumes after it."""

    event: str
    data: Any
    id: str | None = None


def parse_events(chunks: Iterable[bytes]) -> Iterator[StreamEvent]:
    """Yield the events in a byte stream; a half-sent event at the end is dropped, comments are heartbeats."""
    name, event_id = "message", None
    data: list[str] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield StreamEvent(event=name, data=_value("\n".join(data)), id=event_id)
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                name = value
            case "data":
                data.append(value)
            case "id":
                event_id = value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Split at line feeds only: texts may hold other characters that some would call line ends."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
