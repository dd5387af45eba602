"""One resumable stream per job: transitions, output, curves, progress and scores, in the order they become visible.

The stream reads what others write: transitions from the database, everything else from the run folder. A slow or
absent reader therefore never slows a training. The id of every event is the position behind it, so a reader that comes
back with `Last-Event-ID` goes on there: no byte of the output comes twice or is missing, and points of a curve that
were on their way come again (they carry their step). The stream ends only after the last byte.

However many readers a job has, one `_Tailer` watches it. It begins where the first reader arrived, and ends with the
last one. A reader first reads by itself up to the tailer's position, then takes the parts that the tailer read. Of
those a bounded number is kept; a reader that is slower reads by itself again until it has caught up.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

from app.domain.enums import EndReason, JobStatus
from app.executor.runs.events import EvaluationEvent, MetricsEvent, NoteEvent, ProgressEvent, StageEvent
from app.executor.runs.log_file import LogChunk
from app.executor.runs.progress import ProgressEstimator
from app.executor.runs.run_reader import InvalidEventId, RunReader, StreamPart, StreamPosition
from app.store.home import Home
from app.store.session import Database
from app.store.tables import JobEventRow

__all__ = ["InvalidEventId", "JobStreams", "StreamItem", "StreamPosition"]

logger = logging.getLogger(__name__)

DATABASE_SECONDS: Final = 0.5
# Files are looked at after a hundredth of the time in which nothing came: a line is shown within a fiftieth of a second
# while lines come, and a job that says nothing for half a minute costs four looks a second.
_QUIET_SHARE: Final = 0.01
_SHORTEST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 0.25
_KEPT_BYTES: Final = 1024 * 1024
_BYTES_OF_EVENT: Final = 256


@dataclass(frozen=True)
class StreamItem:
    """One thing that happened; `name` is `state`, `log`, `metrics`, `progress`, `evaluation`, `note` or `end`."""

    name: str
    data: dict[str, Any]
    position: StreamPosition
    reason: EndReason | None = None


class JobStreams:
    """The streams of all jobs that this process is asked for.

    `database_seconds`: how often the row of a watched job is looked at.
    """

    def __init__(self, database: Database, home: Home, *, database_seconds: float = DATABASE_SECONDS) -> None:
        self._database = database
        self._home = home
        self._database_seconds = database_seconds
        self._tailers: dict[str, _Tailer] = {}

    async def follow(
        self, job_id: str, position: StreamPosition, *, database_seconds: float | None = None
    ) -> AsyncGenerator[StreamItem, None]:
        """Yield what happens to the job from `position` on; ends after its end."""
        items = _Items(position)
        async with aclosing(self._pieces(job_id, position, database_seconds or self._database_seconds)) as parts:
            async for part in parts:
                for item in items.of(part):
                    yield item

    async def _pieces(
        self, job_id: str, position: StreamPosition, database_seconds: float
    ) -> AsyncGenerator[StreamPart, None]:
        reader = RunReader(self._database, self._home, job_id, position)
        while True:
            tailer = self._tailers.get(job_id)
            until, number = (tailer.position, tailer.next) if tailer is not None else (None, 0)
            async with aclosing(reader.advance(until)) as parts:
                async for part in parts:
                    yield part
            if reader.ended:
                return
            if tailer is None:
                if job_id in self._tailers:
                    continue  # another reader started it meanwhile
                tailer, until = self._start(job_id, reader.position), reader.position
            with tailer.followed(database_seconds):
                if reader.position != until:  # it is ahead, or came with an id that no reader ever got
                    await tailer.news(number)
                    continue
                async with aclosing(tailer.parts(number)) as parts:
                    async for part in parts:
                        reader.position = part.position
                        yield part
                        if isinstance(part.content, JobStatus):
                            return

    def _start(self, job_id: str, position: StreamPosition) -> "_Tailer":
        reader = RunReader(self._database, self._home, job_id, position)
        tailer = self._tailers[job_id] = _Tailer(reader, job_id, closed=lambda: self._tailers.pop(job_id, None))
        return tailer


class _Tailer:
    """Watches one job for all of its readers. `position` lies behind part `next - 1`."""

    def __init__(self, reader: RunReader, job_id: str, *, closed: Callable[[], object]) -> None:
        self._reader = reader
        self._job_id = job_id
        self._on_close = closed
        self._closed = False
        self._followers = 0
        self._database_seconds = DATABASE_SECONDS
        self._kept: deque[StreamPart] = deque()
        self._kept_bytes = 0
        self._first = 0
        self._news = asyncio.Event()
        self._sizes: tuple[int | bool | None, ...] = ()
        self._spoke_at = monotonic()
        self._task = asyncio.create_task(self._run(), name=f"tail {job_id}")

    @property
    def position(self) -> StreamPosition:
        return self._reader.position

    @property
    def next(self) -> int:
        """Number of the part that comes next."""
        return self._first + len(self._kept)

    @contextmanager
    def followed(self, database_seconds: float) -> Iterator[None]:
        """Watch the job while the block runs."""
        self._followers += 1
        self._database_seconds = min(self._database_seconds, database_seconds)
        try:
            yield
        finally:
            self._followers -= 1
            if not self._followers:
                self._close()
                self._task.cancel()

    async def news(self, number: int) -> None:
        """Wait until part `number` was read, or nothing more comes."""
        while number >= self.next and not self._closed:
            await self._news.wait()

    async def parts(self, number: int) -> AsyncGenerator[StreamPart, None]:
        """Yield the parts from `number` on; ends when nothing more comes, and when a part is not kept any more."""
        while True:
            await self.news(number)
            if not self._first <= number < self.next:
                return
            yield self._kept[number - self._first]
            number += 1

    async def _run(self) -> None:
        try:
            # asked as well as cancelled: a driver may swallow a cancellation
            while not (self._reader.ended or self._closed):
                await self._publish_all(self._reader.advance())
                if not self._reader.ended:
                    await self._watch()
        except Exception:  # the readers go on by themselves, and meet the error if it is still there
            logger.warning("job_tailer_failed", extra={"job_id": self._job_id}, exc_info=True)
        finally:
            self._close()

    async def _watch(self) -> None:
        """Look at the files until it is time for the database; a new attempt shows by its folder."""
        until = monotonic() + self._database_seconds
        while (left := until - monotonic()) > 0:
            pause = min(max((monotonic() - self._spoke_at) * _QUIET_SHARE, _SHORTEST_PAUSE), _LONGEST_PAUSE)
            await asyncio.sleep(min(pause, left))
            # in a thread: the home may lie on a network disk, which can stand still
            sizes = await asyncio.to_thread(self._reader.sizes)
            if sizes == self._sizes:
                continue
            self._sizes = sizes
            if self._reader.attempts:
                await self._publish_all(self._reader.read(self._reader.attempts, final=False))
            if sizes[-1]:
                return

    async def _publish_all(self, parts: AsyncGenerator[StreamPart, None]) -> None:
        async with aclosing(parts):
            async for part in parts:
                self._publish(part)

    def _publish(self, part: StreamPart) -> None:
        self._spoke_at = monotonic()
        self._kept.append(part)
        self._kept_bytes += _weight(part)
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= _weight(self._kept.popleft())
            self._first += 1
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._on_close()
            self._wake()


def _weight(part: StreamPart) -> int:
    match part.content:
        case LogChunk() as chunk:
            return chunk.next_offset - chunk.offset
        case tuple() as events:
            return len(events) * _BYTES_OF_EVENT
        case _:
            return _BYTES_OF_EVENT


class _Items:
    """Converts parts into one reader's items. Events carry the position before their part, others the one after."""

    def __init__(self, position: StreamPosition) -> None:
        self._position = position
        self._estimator = ProgressEstimator()

    def of(self, part: StreamPart) -> Iterator[StreamItem]:
        """Yield the items of the next part."""
        if part.position.attempt != self._position.attempt:
            self._position = self._position.in_attempt(part.position.attempt)
            self._estimator = ProgressEstimator()
        before, self._position = self._position, part.position
        match part.content:
            case JobEventRow() as row:
                yield _transition(row, part.position)
            case LogChunk() as chunk:
                data = {
                    "attempt": part.position.attempt, "text": chunk.text,
                    "offset": chunk.offset, "next_offset": chunk.next_offset,
                }  # fmt: skip
                yield StreamItem("log", data, part.position)
            case JobStatus() as status:
                yield StreamItem("end", {"status": status}, part.position)
            case events:
                for event in events:
                    if (shown := self._shown(event)) is not None:
                        yield StreamItem(*shown, before)

    def _shown(self, event: StageEvent) -> tuple[str, dict[str, Any]] | None:
        match event:
            case MetricsEvent():
                return "metrics", {"step": event.step, "time": event.time, "values": event.values}
            case ProgressEvent():
                self._estimator.add(event)
                progress = self._estimator.progress
                assert progress is not None
                return "progress", dict(vars(progress))
            case EvaluationEvent():
                return "evaluation", dict(vars(event))
            case NoteEvent():
                return "note", {"message": event.message}
            case _:
                return None


def _transition(row: JobEventRow, position: StreamPosition) -> StreamItem:
    data = {
        "job": row.job_id, "attempt": row.attempt, "status": row.status, "reason": row.reason,
        "at": row.created_at.isoformat(),
    }  # fmt: skip
    return StreamItem("state", data, position, reason=row.reason)
