"""How much one caller may ask of one process of the API: requests a minute, and streams at once."""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from starlette.types import Scope

from app.domain.access import Caller, CallerKind
from app.domain.errors import TooMany

LIMITS: Final = "deepe.limits"
"""The `CallerLimits` in the scope of a request."""
_PROBES: Final = frozenset({"/healthz", "/readyz", "/health", "/metrics"})
_MOST_CALLERS: Final = 10_000
_STREAM_WAIT_SECONDS: Final = 5


class TooManyRequests(TooMany):
    """The caller sends requests faster than the service allows."""

    code = "too_many_requests"


class TooManyStreams(TooMany):
    """The caller holds as many streams as the service allows."""

    code = "too_many_streams"


class CallerLimits:
    """Counts what callers do; 0 is no limit. Callers without a name of their own are told apart by their address.

    A caller may send a minute's requests at once and then as many as the minute gives back.
    """

    def __init__(
        self, *, requests_per_minute: int = 0, streams: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_minute = requests_per_minute
        self._most_streams = streams
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._streams: Counter[str] = Counter()

    def admit(self, scope: Scope, caller: Caller | None, address: str | None) -> None:
        """Count a request; raise `TooManyRequests`. Probes are not counted."""
        key = _key(caller, address)
        scope[LIMITS] = self, key
        if not self._per_minute or scope["path"] in _PROBES:
            return
        now = self._clock()
        left, since = self._left.pop(key, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * self._per_minute / 60)
        self._left[key] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > _MOST_CALLERS:
            self._left.popitem(last=False)
        if left < 1:
            seconds = math.ceil((1 - left) * 60 / self._per_minute)
            raise TooManyRequests(limit=self._per_minute, seconds=seconds)

    @contextmanager
    def _stream(self, key: str) -> Iterator[None]:
        if self._most_streams and self._streams[key] >= self._most_streams:
            raise TooManyStreams(limit=self._most_streams, seconds=_STREAM_WAIT_SECONDS)
        self._streams[key] += 1
        try:
            yield
        finally:
            self._streams[key] -= 1
            if not self._streams[key]:
                del self._streams[key]

    @staticmethod
    @contextmanager
    def stream(scope: Scope) -> Iterator[None]:
        """Count a stream of the request's caller as long as it lasts; raise `TooManyStreams`."""
        limits, key = scope.get(LIMITS) or (None, "")
        if limits is None:
            yield
            return
        with limits._stream(key):
            yield


def _key(caller: Caller | None, address: str | None) -> str:
    if caller is not None and caller.kind in (CallerKind.KEY, CallerKind.PERSON):
        return caller.principal
    return f"{caller.principal if caller is not None else ''}@{address or ''}"
