"""Server-sent events: ids to resume from, heartbeats while nothing happens, an end after the last event.

FastAPI's own `EventSourceResponse` starts its answer before the route has run, so a route of it could not say 404; and
it puts texts in JSON quotes. What is ours: a route looks things up first, then returns `event_stream(...)`.
When the caller goes away or the server stops, the iterator of events is closed: its `finally` blocks run.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import anyio
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from app.api.errors import problem_of, translate
from app.api.language import negotiate
from app.api.limits import CallerLimits

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 15.0
RETRY_MILLISECONDS: Final = 2000
PROBLEM_EVENT: Final = "problem"
_HEARTBEAT = b": heartbeat\n\n"
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class ServerEvent:
    """One event. `data` is a model or anything JSON; `id` is where a reader resumes after it."""

    data: Any
    event: str | None = None
    id: str | None = None

    def encode(self) -> bytes:
        """Return the event as it goes over the wire."""
        data = self.data.model_dump_json() if isinstance(self.data, BaseModel) else _json(self.data)
        return format_sse_event(data_str=data, event=self.event, id=self.id)


class _EventStream(EventSourceResponse):
    """Closes its events however it ends: left to the garbage collector they would run on after the caller left."""

    body_iterator: AsyncGenerator[bytes, None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with CallerLimits.stream(scope):
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                await self.body_iterator.aclose()


def event_stream(
    request: Request, events: AsyncIterator[ServerEvent], *, heartbeat_seconds: float = HEARTBEAT_SECONDS
) -> EventSourceResponse:
    """Return the response that sends `events` as they come and ends with them.

    An error on the way becomes a last event `problem` with the problem document; the caller may resume.
    """
    return _EventStream(
        _frames(request, events, heartbeat_seconds),
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _frames(
    request: Request, events: AsyncIterator[ServerEvent], heartbeat_seconds: float
) -> AsyncGenerator[bytes, None]:
    yield format_sse_event(retry=RETRY_MILLISECONDS)
    coming: asyncio.Task[ServerEvent] | None = None
    try:
        while True:
            # a task of its own, so that a heartbeat interrupts nothing in the iterator
            coming = coming or asyncio.create_task(_next(events))
            await asyncio.wait({coming}, timeout=heartbeat_seconds)
            if not coming.done():
                yield _HEARTBEAT
                continue
            event, coming = coming.result(), None
            yield event.encode()
    except StopAsyncIteration:
        return
    except Exception as exc:
        yield _problem(request, exc)
    finally:
        await _close(events, coming)


async def _next(events: AsyncIterator[ServerEvent]) -> ServerEvent:
    return await anext(events)


def _problem(request: Request, exc: Exception) -> bytes:
    logger.warning("event_stream_failed", extra={"path": request.url.path}, exc_info=exc)
    language = negotiate(request.headers.get("accept-language"))
    problem = problem_of(translate(exc), language=language, instance=request.url.path)
    return ServerEvent(problem, event=PROBLEM_EVENT).encode()


async def _close(events: AsyncIterator[ServerEvent], coming: asyncio.Task[ServerEvent] | None) -> None:
    # shielded: the cancellation that brought us here would otherwise interrupt the closing as well
    with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})
            if not coming.cancelled():
                coming.exception()  # looked at, so that asyncio does not complain about it
        if isinstance(events, AsyncGenerator):
            await events.aclose()


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace").decode()
