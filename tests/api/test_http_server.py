"""A connection whose request's head never ends is closed; requests under way are not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fastapi import FastAPI

from app.api.http_server import HttpProtocol
from tests.servers import free_port
from tests.waiting import until

HEAD = b"GET /slow HTTP/1.1\r\nHost: 127.0.0.1\r\n"


class Impatient(HttpProtocol):
    head_seconds = 0.2


class Slow:
    """A server with a route that answers when it is let go."""

    def __init__(self) -> None:
        self.port = free_port()
        self.begun = asyncio.Event()
        self.let_go = asyncio.Event()
        self.app = FastAPI()

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
async def server() -> AsyncIterator[Slow]:
    slow = Slow()
    config = uvicorn.Config(slow.app, port=slow.port, http=Impatient, log_config=None, lifespan="off")
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
