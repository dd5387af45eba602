"""One resumable stream per job: transitions, output, curves, progress and scores, in the order they become visible.

The stream reads what others write: transitions from the database, everything else from the run folder. A slow or
absent reader therefore never slows a training. The id of every event is the position behind it, so a reader that comes
back with `Last-Event-ID` goes on there: no byte of the output comes twice or is missing, and points of a curve that
were on their way come again (they carry their step). The stream ends only after the last byte.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from app.domain.enums import EndReason, JobStatus
from app.domain.errors import Invalid
from app.domain.transitions import TERMINAL
from app.executor.runs.events import (
    EvaluationEvent,
    EventPosition,
    MetricsEvent,
    NoteEvent,
    ProgressEvent,
    RunEvents,
    StageEvent,
)
from app.executor.runs.log_file import CHUNK_BYTES, read_chunk
from app.executor.runs.progress import ProgressEstimator
from app.executor.runs.run_folder import RunFolder
from app.store import jobs as store
from app.store.home import Home
from app.store.session import Database
from app.store.tables import JobEventRow

WATCH_SECONDS: Final = 0.1
DATABASE_SECONDS: Final = 0.5
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
            raise ValueError("a position that nobody ever reached")


@dataclass(frozen=True)
class StreamItem:
    """One thing that happened; `name` is `state`, `log`, `metrics`, `progress`, `evaluation`, `note` or `end`."""

    name: str
    data: dict[str, Any]
    position: StreamPosition
    reason: EndReason | None = None


class JobStream:
    """Follows one job from a position until its end."""

    def __init__(
        self,
        database: Database,
        home: Home,
        job_id: str,
        position: StreamPosition,
        *,
        database_seconds: float = DATABASE_SECONDS,
    ) -> None:
        self._database_seconds = database_seconds
        self._database = database
        self._home = home
        self._job_id = job_id
        self._position = position
        self._estimator = ProgressEstimator()

    async def items(self) -> AsyncGenerator[StreamItem, None]:
        """Yield what happens; ends after the end of the job."""
        while True:
            # status before files: what was written before the end was recorded is found by the reads that follow
            status, attempts, transitions = await self._look()
            finished = status in TERMINAL
            ends = [row for row in transitions if row.status in TERMINAL]
            for row in transitions:
                if row.status not in TERMINAL:
                    yield self._transition(row)
            for attempt in range(max(self._position.attempt, 1), attempts + 1):
                async for item in self._read_attempt(attempt, final=finished or attempt < attempts):
                    yield item
            for row in ends:
                yield self._transition(row)
            if finished:
                yield StreamItem("end", {"status": status}, self._position)
                return
            async for item in self._watch(attempts):
                yield item

    async def _look(self) -> tuple[JobStatus, int, list[JobEventRow]]:
        async with self._database.reading() as session:
            job = await store.get(session, self._job_id)
            transitions = await store.events_after(session, self._job_id, self._position.transition)
        return job.status, job.attempts, list(transitions)

    async def _watch(self, attempt: int) -> AsyncGenerator[StreamItem, None]:
        """Look at the files more often than at the database; a new attempt shows by its folder."""
        following = self._home.run_folder(self._job_id, attempt + 1)
        for _ in range(max(round(self._database_seconds / WATCH_SECONDS), 1)):
            await asyncio.sleep(WATCH_SECONDS)
            if attempt:
                async for item in self._read_attempt(attempt, final=False):
                    yield item
            if await asyncio.to_thread(following.exists):
                return

    async def _read_attempt(self, attempt: int, *, final: bool) -> AsyncGenerator[StreamItem, None]:
        if attempt != self._position.attempt:
            self._position = replace(self._position, attempt=attempt, log=0, events=EventPosition())
            self._estimator = ProgressEstimator()
        folder = RunFolder(self._home.run_folder(self._job_id, attempt))
        reader = RunEvents(folder, self._position.events)
        batches = reader.batches()
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            for event in batch:
                item = self._event(event)
                if item is not None:
                    yield item
            self._position = replace(self._position, events=reader.position)
        while True:
            chunk = await asyncio.to_thread(read_chunk, folder.output_log, self._position.log, CHUNK_BYTES, final=final)
            if chunk.text:
                self._position = replace(self._position, log=chunk.next_offset)
                data = {
                    "attempt": attempt, "text": chunk.text, "offset": chunk.offset, "next_offset": chunk.next_offset,
                }  # fmt: skip
                yield StreamItem("log", data, self._position)
            if chunk.end or not chunk.text:
                return

    def _transition(self, row: JobEventRow) -> StreamItem:
        assert row.id is not None
        self._position = replace(self._position, transition=row.id)
        data = {
            "job": row.job_id, "attempt": row.attempt, "status": row.status, "reason": row.reason,
            "at": row.created_at.isoformat(),
        }  # fmt: skip
        return StreamItem("state", data, self._position, reason=row.reason)

    def _event(self, event: StageEvent) -> StreamItem | None:
        match event:
            case MetricsEvent():
                return self._item("metrics", step=event.step, time=event.time, values=event.values)
            case ProgressEvent():
                self._estimator.add(event)
                progress = self._estimator.progress
                assert progress is not None
                return self._item("progress", **vars(progress))
            case EvaluationEvent():
                return self._item("evaluation", **vars(event))
            case NoteEvent():
                return self._item("note", message=event.message)
            case _:
                return None

    def _item(self, name: str, /, **data: Any) -> StreamItem:
        return StreamItem(name, data, self._position)
