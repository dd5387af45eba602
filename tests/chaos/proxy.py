"""A TCP proxy that can cut, delay or swallow what goes through it: a bad network between a node and its database."""

import asyncio
import contextlib
from enum import StrEnum


class Line(StrEnum):
    """What the network does."""

    GOOD = "good"
    SLOW = "slow"  # every packet comes late
    SILENT = "silent"  # nothing comes through, nobody is told
    CUT = "cut"  # connections break and cannot be made


class Proxy:
    """Forwards a port of its own to `target`."""

    def __init__(self, target: int, *, listen: str = "127.0.0.1") -> None:
        self._target = target
        self._listen = listen
        self._line = Line.GOOD
        self._changed = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.delay_seconds = 0.1
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self._listen, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def become(self, line: Line) -> None:
        """Change the network, for open connections too."""
        self._line = line
        self._changed.set()
        self._changed = asyncio.Event()
        if line is Line.CUT:
            for writer in self._open:
                writer.transport.abort()

    async def close(self) -> None:
        self.become(Line.CUT)
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._line is Line.CUT:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._open |= ends
        try:
            with contextlib.suppress(asyncio.CancelledError):  # the loop ends; asyncio would log it
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                while self._line is Line.SILENT:
                    await self._changed.wait()
                if self._line is Line.SLOW:
                    await asyncio.sleep(self.delay_seconds)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
