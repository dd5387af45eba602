"""The protocol of the HTTP server: uvicorn's, with limits for connections that are slow, half open or too many.

uvicorn waits for ever for the first byte of a connection, for the end of a head, for a body and for who reads an
answer, so that a client could hold connections by sending or taking a byte now and then. How large a body may be is
decided by `app.api.guards`.
"""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any, ClassVar, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS: Final = 30.0
BODY_SECONDS: Final = 30.0
"""How often the speed of a body is looked at."""
BODY_BYTES: Final = 15_000
"""Bytes that a body brings at least in that time: 500 a second, less than any line has."""
ANSWER_SECONDS: Final = 300.0
"""How long an answer waits for a client that takes nothing of it."""


class HttpProtocol(H11Protocol):
    """Closes connections that hold something without need.

    - The head of a request must be complete in `head_seconds`, counted from the start of the connection, and for its
      later requests from their first byte.
    - A body must bring `body_bytes` in one of two successive `body_seconds`; time in which the service does not read
      does not count.
    - A client that takes nothing of an answer for `answer_seconds` gets no more.
    - Connections over `limit_concurrency` are answered 503 and closed at once.
    """

    head_seconds: ClassVar[float] = HEAD_SECONDS
    body_seconds: ClassVar[float] = BODY_SECONDS
    body_bytes: ClassVar[int] = BODY_BYTES
    answer_seconds: ClassVar[float] = ANSWER_SECONDS
    _received = 0
    _was_slow = False

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        # uvicorn counts the requests of others as well and answers with a plain text
        self._most_connections, self.limit_concurrency = self.limit_concurrency, None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (listening := transport.get_extra_info("socket")) is not None and listening.family != socket.AF_UNIX:
            # the system finds out that a machine is gone, also while nothing is sent
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._most_connections is not None and len(self.connections) > self._most_connections:
            self.logger.warning("too_many_connections")
            transport.write(_too_many_connections())
            transport.close()
            return
        self._after(self.head_seconds, "head", transport.close)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if "head" not in self._timers and not self._answers():
            self._after(self.head_seconds, "head", self.transport.close)
        self._received += len(data)
        super().data_received(data)
        if self._answers():
            self._stop("head")
        self._watch_body()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._after(self.answer_seconds, "answer", self.transport.abort)

    def resume_writing(self) -> None:
        self._stop("answer")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for name in [*self._timers]:
            self._stop(name)
        super().connection_lost(exc)

    def _answers(self) -> bool:
        """Whether a request whose head is complete is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_body(self) -> None:
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop("body")
        elif "body" not in self._timers:
            self._was_slow = False
            self._begin_to_count()

    def _begin_to_count(self) -> None:
        self._received = 0
        self._after(self.body_seconds, "body", self._look_at_body)

    def _look_at_body(self) -> None:
        waits_for_us = self.flow.read_paused or self.conn.they_are_waiting_for_100_continue
        is_slow = not waits_for_us and self._received < self.body_bytes
        if is_slow and self._was_slow:
            self.logger.info("slow_body")
            self.transport.close()
            return
        # once is no proof: the service may have begun to read again just now
        self._was_slow = is_slow
        self._begin_to_count()

    def _after(self, seconds: float, name: str, act: Callable[[], None]) -> None:
        self._timers[name] = self.loop.call_later(seconds, act)

    def _stop(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


def _too_many_connections() -> bytes:
    # before the request is known there is no language, and no route that could answer
    body = json.dumps(
        {
            "type": "urn:deepe:problem:too_many_connections",
            "title": "Service unavailable",
            "status": 503,
            "code": "too_many_connections",
            "detail": "The service has as many connections as DEEPE_MAX_CONNECTIONS allows. Try again later.",
        }
    ).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 5\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
