"""The protocol of the HTTP server: uvicorn's, with a time limit for what comes before a request.

uvicorn waits for ever for the first byte of a connection and for the end of a head, so that a client could hold
connections by sending a byte now and then. A body is bounded in size by `app.api.guards`, an answer by who reads it.
"""

import asyncio
from typing import ClassVar, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS: Final = 30.0


class HttpProtocol(H11Protocol):
    """Closes a connection whose request's head is not complete in time.

    The time runs from the start of the connection, and for its later requests from their first byte.
    """

    head_seconds: ClassVar[float] = HEAD_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.head_seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and not self._answers():
            self._deadline = self.loop.call_later(self.head_seconds, self.transport.close)
        super().data_received(data)
        if self._answers():
            self._forget_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _answers(self) -> bool:
        """Whether a request whose head is complete is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
