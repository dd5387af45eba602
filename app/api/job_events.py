"""The event stream of a job, in the caller's language."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from app.api.dependencies import Services
from app.api.schemas.jobs import attempt_detail, reason_detail
from app.api.sse import ServerEvent
from app.domain.texts import Language
from app.domain.transitions import TERMINAL
from app.executor.runs.stream import StreamItem, StreamPosition
from app.store import jobs


async def job_events(
    services: Services, job_id: str, position: StreamPosition, language: Language
) -> AsyncGenerator[ServerEvent, None]:
    """Yield what happens to the job from `position` on; ends after its end."""
    async with aclosing(services.streams.follow(job_id, position)) as items:
        async for item in items:
            yield ServerEvent(await _data(services, job_id, item, language), event=item.name, id=str(item.position))


async def _data(services: Services, job_id: str, item: StreamItem, language: Language) -> dict[str, Any]:
    if item.name != "state":
        return item.data
    detail = None
    if item.reason is not None:
        async with services.database.reading() as session:
            if item.data["status"] in TERMINAL:
                detail = reason_detail(await jobs.get(session, job_id), language)
            else:  # an attempt ended, and the job is tried again
                past = await jobs.attempts_of(session, job_id)
                ended = [attempt for attempt in past if attempt.row.number == item.data["attempt"]]
                detail = attempt_detail(ended[0], language) if ended else None
    return {**item.data, "reason_detail": detail}
