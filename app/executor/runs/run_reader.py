"""Reads what became of a job from a position on: transitions from the database, everything else from its run folders.

Any reader can go on where another one stopped, also in the middle of a file that grows: a position lies behind a whole
character and a whole line of events.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from app.domain.enums import JobStatus
from app.domain.errors import Invalid
from app.domain.transitions import TERMINAL
from app.executor.runs.events import EventPosition, RunEvents, StageEvent
from app.executor.runs.log_file import CHUNK_BYTES, LogChunk, read_chunk
from app.executor.runs.run_folder import RunFolder
from app.store import jobs as store
from app.store.home import Home
from app.store.session import Database
from app.store.tables import JobEventRow

_MOST_ROWS: Final = 2**31 - 1
_MOST_BYTES: Final = 2**62


class InvalidEventId(Invalid):
    """`Last-Event-ID` is none of this stream's."""

    code = "invalid_event_id"


@dataclass(frozen=True)
class StreamPosition:
    """How far a reader is: last transition seen, and in which attempt's files up to where."""

    transition: int = 0
    attempt: int = 0
    log: int = 0
    events: EventPosition = field(default_factory=EventPosition)

    def __str__(self) -> str:
        return f"{self.transition}-{self.attempt}-{self.log}-{self.events}"

    @classmethod
    def parse(cls, text: str | None) -> "StreamPosition":
        """Read the text form; None and empty mean the beginning."""
        if not text:
            return cls()
        try:
            first, second, third, events = text.split("-")
            position = cls(int(first), int(second), int(third), EventPosition.parse(events))
            position.require_plausible()
        except ValueError as error:
            raise InvalidEventId(pointer="Last-Event-ID:", given=text[:80]) from error
        return position

    def require_plausible(self) -> None:
        """Raise ValueError for numbers that databases and files do not count to."""
        if (
            max(self.transition, self.attempt) > _MOST_ROWS
            or max(self.log, self.events.own, self.events.projected) > _MOST_BYTES
        ):
            raise ValueError("a position beyond the end of the stream")

    def in_attempt(self, attempt: int) -> "StreamPosition":
        """Return the position with which the files of `attempt` are read."""
        if attempt == self.attempt:
            return self
        return replace(self, attempt=attempt, log=0, events=EventPosition())


@dataclass(frozen=True)
class StreamPart:
    """A part of the stream: a transition, events, output, or the status with which the job ended.

    `position` lies behind it.
    """

    content: JobEventRow | tuple[StageEvent, ...] | LogChunk | JobStatus
    position: StreamPosition


class RunReader:
    """Reads one job. `position` lies behind the last part; `ended` says that there is nothing more to come."""

    def __init__(self, database: Database, home: Home, job_id: str, position: StreamPosition) -> None:
        self._database = database
        self._home = home
        self._job_id = job_id
        self.position = position
        self.attempts = 0
        self.ended = False

    async def advance(self, until: StreamPosition | None = None) -> AsyncGenerator[StreamPart, None]:
        """Yield what lies behind the position: up to `until`, else up to the present and to the end of the job."""
        # status before files: what was written before the end was recorded is found by the reads that follow
        async with self._database.reading() as session:
            job = await store.get(session, self._job_id)
            transitions = list(await store.events_after(session, self._job_id, self.position.transition))
        status, self.attempts = job.status, job.attempts
        if until is not None:
            transitions = [row for row in transitions if row.id is not None and row.id <= until.transition]
            self.attempts = until.attempt
        ending = until is None and status in TERMINAL
        for row in transitions:
            if row.status not in TERMINAL:
                yield self._transition(row)
        for attempt in range(max(self.position.attempt, 1), self.attempts + 1):
            async for part in self.read(attempt, final=ending or attempt < self.attempts, until=until):
                yield part
        for row in transitions:
            if row.status in TERMINAL:
                yield self._transition(row)
        if ending:
            self.ended = True
            yield StreamPart(status, self.position)

    async def read(
        self, attempt: int, *, final: bool, until: StreamPosition | None = None
    ) -> AsyncGenerator[StreamPart, None]:
        """Yield what is new in the files of the attempt; `final`: nothing is written to them any more."""
        self.position = self.position.in_attempt(attempt)
        bound = until if until is not None and until.attempt == attempt else None
        while parts := await asyncio.to_thread(self._read_some, final=final, until=bound):
            for part in parts:
                self.position = part.position
                yield part

    def sizes(self) -> tuple[int | bool | None, ...]:
        """Return what changes when there is something new in the files, or a new attempt begins. Blocks."""
        attempt = self.position.attempt
        folder = RunFolder(self._home.run_folder(self._job_id, attempt))
        files = (folder.output_log, folder.events, folder.projected_events) if attempt else ()
        return (*map(_size, files), self._home.run_folder(self._job_id, attempt + 1).exists())

    def _read_some(self, *, final: bool, until: StreamPosition | None) -> list[StreamPart]:
        """Return the next events and the next output, some megabytes at most; empty at the end. Blocks."""
        position = self.position
        folder = RunFolder(self._home.run_folder(self._job_id, position.attempt))
        parts: list[StreamPart] = []
        events = RunEvents(folder, position.events, until=until.events if until else None)
        if (batch := next(events.batches(), None)) is not None:
            position = replace(position, events=events.position)
            parts.append(StreamPart(tuple(batch), position))
        end = until.log if until else None
        chunk = read_chunk(folder.output_log, position.log, CHUNK_BYTES, final=final, end=end)
        if chunk.text:
            position = replace(position, log=chunk.next_offset)
            parts.append(StreamPart(chunk, position))
        return parts

    def _transition(self, row: JobEventRow) -> StreamPart:
        assert row.id is not None
        self.position = replace(self.position, transition=row.id)
        return StreamPart(row, self.position)


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (half the time of Path.stat, and often asked)
    except FileNotFoundError:
        return None
