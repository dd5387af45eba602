import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.types import Message, Receive, Scope, Send

from app.api.errors import DatabaseBusy
from app.api.headers import LastEventId
from app.api.sse import ServerEvent, event_stream
from tests.api.foundation import client_of, make_app
from tests.waiting import until

Events = Callable[[], AsyncIterator[ServerEvent]]


def make_stream(events: Events, *, heartbeat_seconds: float = 15) -> FastAPI:
    app = make_app()

    @app.get("/api/v1/stream")
    async def read_stream(request: Request, last_event_id: LastEventId = None) -> Response:
        return event_stream(request, events(), heartbeat_seconds=heartbeat_seconds)

    return app


async def read(app: FastAPI) -> httpx.Response:
    async with client_of(app) as client:
        return await client.get("/api/v1/stream")


class TestEventStream:
    async def test_sends_events_with_ids_and_ends_after_the_last(self) -> None:
        async def events() -> AsyncIterator[ServerEvent]:
            yield ServerEvent({"line": "一\n二"}, event="log", id="7")
            yield ServerEvent("plain", id="8")

        response = await read(make_stream(events))

        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        assert response.text == (
            'retry: 2000\n\nevent: log\ndata: {"line":"一\\n二"}\nid: 7\n\ndata: "plain"\nid: 8\n\n'
        )

    async def test_heartbeats_while_nothing_happens_lose_no_event(self) -> None:
        beats = 0
        beaten = asyncio.Event()

        async def events() -> AsyncIterator[ServerEvent]:
            yield ServerEvent(1)
            await beaten.wait()
            yield ServerEvent(2)

        app = make_stream(events, heartbeat_seconds=0.02)

        async def counting(scope: Scope, receive: Receive, send: Send) -> None:
            async def count(message: Message) -> None:
                nonlocal beats
                beats += message.get("body", b"").count(b": heartbeat")
                if beats >= 2:
                    beaten.set()
                await send(message)

            await app(scope, receive, count)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(counting), base_url="http://127.0.0.1") as client:
            response = await client.get("/api/v1/stream")

        assert beats >= 2
        assert response.text.replace(": heartbeat\n\n", "") == "retry: 2000\n\ndata: 1\n\ndata: 2\n\n"

    async def test_error_on_the_way_is_the_last_event(self) -> None:
        async def events() -> AsyncIterator[ServerEvent]:
            yield ServerEvent(1)
            raise DatabaseBusy

        last = (await read(make_stream(events))).text.rstrip().split("\n\n")[-1]

        assert last.startswith("event: problem\ndata: ")
        assert json.loads(last.split("data: ")[1])["code"] == "database_busy"

    async def test_unexpected_error_tells_no_secrets(self) -> None:
        async def events() -> AsyncIterator[ServerEvent]:
            yield ServerEvent(1)
            raise KeyError("secret")

        text = (await read(make_stream(events))).text

        assert "internal_error" in text
        assert "secret" not in text

    async def test_lone_surrogate_does_not_break_the_stream(self) -> None:
        async def events() -> AsyncIterator[ServerEvent]:
            yield ServerEvent("\udcff")

        assert 'data: "?"' in (await read(make_stream(events))).text

    async def test_events_are_closed_when_the_reader_leaves_while_they_wait(self) -> None:
        closed = asyncio.Event()

        async def events() -> AsyncIterator[ServerEvent]:
            try:
                yield ServerEvent(1)
                await asyncio.Event().wait()
            finally:
                closed.set()

        await _leave_after_first_event(make_stream(events))

        await closed.wait()

    async def test_events_are_closed_when_the_reader_leaves_while_they_flow(self) -> None:
        closed = asyncio.Event()

        async def events() -> AsyncIterator[ServerEvent]:
            try:
                while True:
                    yield ServerEvent("x" * 10_000)
            finally:
                closed.set()

        await _leave_after_first_event(make_stream(events))

        await closed.wait()


async def _leave_after_first_event(app: FastAPI) -> None:
    """Read one event over a real connection, then close it."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started, "the server")  # uvicorn has no event for it
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None) as client,
            client.stream("GET", "/api/v1/stream") as response,
        ):
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    break
    finally:
        server.should_exit = True
        await serving
        listener.close()
