"""Stream the answer of an inference request. Each request is one job that runs the method's inference script.

The job runs on a node like any other, with slots of its own; the answer is read from its output as it grows. A caller
who goes away before the end cancels the job.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from datetime import datetime

from app.domain.enums import EndReason, JobStatus
from app.domain.training_types import TYPES
from app.executor.nodes.notifier import Notifier
from app.executor.runs.inference_protocol import AnswerChunk, Failure, FinishReason, InferenceParser, Noise
from app.executor.runs.job_spec import JobSpec
from app.executor.runs.pictures import URL, pictures_of
from app.executor.runs.stream import JobStreams, StreamPosition
from app.store import job_status
from app.store import jobs as store
from app.store.home import Home
from app.store.job_status import JobAlreadyFinished
from app.store.session import Database

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class AnswerText:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class AnswerImage:
    """An image of the answer, by its address."""

    url: str


@dataclass(frozen=True)
class AnswerEnd:
    """The end of the answer; `error` says what went wrong when `finish_reason` is `error`."""

    finish_reason: FinishReason
    job_id: str
    error: str | None = None
    reason: EndReason | None = None


AnswerEvent = AnswerText | AnswerImage | AnswerEnd


class ChatService:
    """Streams the answers of inference requests."""

    def __init__(
        self,
        database: Database,
        home: Home,
        notifier: Notifier,
        *,
        streams: JobStreams,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._home = home
        self._streams = streams
        self._notifier = notifier
        self._clock = clock

    async def follow(self, job_id: str, *, cancel_if_left: bool = True) -> AsyncGenerator[AnswerEvent, None]:
        """Yield the answer as it comes; the last event is an `AnswerEnd`, whatever happens to the job.

        `cancel_if_left`: cancel the job of a caller who goes away.
        """
        parser = InferenceParser()
        error: str | None = None
        reason: EndReason | None = None
        finished = False
        items = self._streams.follow(job_id, StreamPosition(), database_seconds=_LOOK_SECONDS)
        try:
            async for item in items:
                match item.name:
                    case "log":
                        events = parser.feed(item.data["text"])
                    case "state":
                        reason = item.reason
                        continue
                    case "end":
                        finished = True
                        events = parser.close()
                    case _:
                        continue
                for event in events:
                    match event:
                        case AnswerChunk():
                            yield AnswerText(event.text)
                        case Failure():
                            error = event.error
                        case Noise():
                            logger.debug("inference_noise", extra={"job_id": job_id, "line": event.line})
                if finished:
                    status = JobStatus(item.data["status"])
                    pictures = await asyncio.to_thread(pictures_of, self._home.images, job_id)
                    for name in pictures:
                        yield AnswerImage(URL.format(name=name))
                    succeeded = status is JobStatus.SUCCEEDED
                    if succeeded and not pictures and await self._draws(job_id):
                        succeeded, error = False, error or "the script ended without an error, but drew no picture"
                    finish = parser.finish_reason(succeeded=succeeded, cancelled=status is JobStatus.CANCELLED)
                    yield AnswerEnd(finish_reason=finish, job_id=job_id, error=error, reason=reason)
        finally:
            await items.aclose()
            if not finished and cancel_if_left:
                await cancel_abandoned(self._database, self._notifier, job_id, now=self._clock())

    async def _draws(self, job_id: str) -> bool:
        async with self._database.reading() as session:
            training_type = JobSpec.of(await store.get(session, job_id)).training_type
        return TYPES[training_type].generates_images


async def cancel_abandoned(database: Database, notifier: Notifier, job_id: str, *, now: datetime) -> None:
    """Cancel a job whose caller is gone, unless it has ended."""
    try:
        async with database.writing() as session:
            await job_status.request_cancel(session, job_id, now=now)
    except JobAlreadyFinished:
        return
    notifier.notify(job_id)
    logger.info("answer_abandoned", extra={"job_id": job_id})
