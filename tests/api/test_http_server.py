"""A connection whose request's head never ends is closed; requests under way are not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from app.api.http_server import HttpProtocol
from tests.servers import free_port
from tests.waiting import until

HEAD = b"GET /slow HTTP/1.1\r\nHost: 127.0.0.1\r\n"


class Impatient(HttpProtocol):
    head_seconds = 0.2
    body_seconds = 0.2
    body_bytes = 1000
    answer_seconds = 0.2


class Slow:
    """A server with a route that answers when it is let go."""

    def __init__(self) -> None:
        self.port = free_port()
        self.begun = asyncio.Event()
        self.let_go = asyncio.Event()
        self.app = FastAPI()

        self.taken = 0
        self.gone = asyncio.Event()

        @self.app.post("/body")
        async def body(request: Request) -> dict[str, int]:
            self.begun.set()
            try:
                async for piece in request.stream():
                    self.taken += len(piece)
                    if request.headers.get("x-wait"):
                        await self.let_go.wait()
            except ClientDisconnect:
                self.gone.set()
                raise
            return {"taken": self.taken}

        @self.app.get("/large")
        async def large() -> StreamingResponse:
            async def pieces() -> AsyncIterator[bytes]:
                try:
                    while True:
                        yield b"x" * 65536
                        await asyncio.sleep(0)  # as reading a file does
                finally:
                    self.gone.set()

            return StreamingResponse(pieces())

        @self.app.get("/slow")
        async def slow() -> dict[str, bool]:
            self.begun.set()
            await self.let_go.wait()
            return {"ok": True}

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def is_closed_on_silence(self) -> bool:
        """Connect, say nothing and wait until the server closes."""
        reader, writer = await self.connect()
        rest = await reader.read()
        writer.close()
        return rest == b""


@pytest.fixture
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Slow]:
    slow = Slow()
    most = getattr(request, "param", None)
    config = uvicorn.Config(
        slow.app, port=slow.port, http=Impatient, log_config=None, lifespan="off", limit_concurrency=most
    )
    running = uvicorn.Server(config)
    task = asyncio.create_task(running.serve())
    await until(lambda: running.started, "the server listens")
    yield slow
    slow.let_go.set()
    running.should_exit = True
    await task


async def drip(writer: asyncio.StreamWriter) -> None:
    """Send a head that never ends, a byte now and then."""
    with contextlib.suppress(ConnectionError):
        writer.write(HEAD + b"X-Long: ")
        while not writer.is_closing():
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.02)


async def test_silent_connection_is_closed(server: Slow) -> None:
    assert await server.is_closed_on_silence()


async def test_head_that_never_ends_is_cut_off(server: Slow) -> None:
    reader, writer = await server.connect()
    dripping = asyncio.create_task(drip(writer))

    with contextlib.suppress(ConnectionError):  # what was sent last may be answered with a reset
        assert await reader.read() == b""

    writer.close()
    await dripping
    assert not server.begun.is_set()


async def test_second_head_that_never_ends_is_cut_off(server: Slow) -> None:
    server.let_go.set()
    reader, writer = await server.connect()
    writer.write(HEAD + b"\r\n")
    answer = await reader.readuntil(b'{"ok":true}')
    dripping = asyncio.create_task(drip(writer))

    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""

    writer.close()
    await dripping
    assert answer.startswith(b"HTTP/1.1 200")


async def test_request_under_way_has_all_the_time(server: Slow) -> None:
    reader, writer = await server.connect()
    writer.write(HEAD + b"\r\n")
    await server.begun.wait()
    assert await server.is_closed_on_silence()  # it came later, so that the time is over for both

    server.let_go.set()

    assert (await reader.readuntil(b'{"ok":true}')).startswith(b"HTTP/1.1 200")
    writer.close()


BODY = b"POST /body HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n"


async def test_body_that_trickles_is_cut_off(server: Slow) -> None:
    reader, writer = await server.connect()
    writer.write(BODY + b"\r\n")
    await server.begun.wait()

    async def trickle() -> None:
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())

    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""

    writer.close()
    await trickling
    await server.gone.wait()
    assert server.taken < 1_000_000


async def test_body_that_the_service_does_not_read_has_all_the_time(server: Slow) -> None:
    reader, writer = await server.connect()
    writer.write(BODY + b"X-Wait: 1\r\n\r\n")
    await server.begun.wait()
    sending = asyncio.create_task(_send(writer, b"x" * 1_000_000))
    for _ in range(2):  # each waits for the end of its head's time: two looks at the body are over then, and more
        assert await server.is_closed_on_silence()

    server.let_go.set()

    await sending
    assert (await reader.readuntil(b'{"taken":1000000}')).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_answer_that_nobody_takes_is_given_up(server: Slow) -> None:
    _, writer = await server.connect()
    writer.write(b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")  # the reader's buffer is full soon

    await server.gone.wait()

    writer.close()


@pytest.mark.parametrize("server", [2], indirect=True)
async def test_connection_over_the_limit_is_told_so(server: Slow) -> None:
    held = [await server.connect() for _ in range(2)]
    for _, writer in held:
        writer.write(HEAD + b"\r\n")
    await server.begun.wait()

    reader, writer = await server.connect()
    answer = await reader.read()
    writer.close()

    assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"too_many_connections" in answer
    server.let_go.set()
    for reader, writer in held:
        assert (await reader.readuntil(b'{"ok":true}')).startswith(b"HTTP/1.1 200")
        writer.close()


async def _send(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(content)
    await writer.drain()
