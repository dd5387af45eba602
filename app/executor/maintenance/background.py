"""Periodic work of an API process: one action again and again, with backoff after errors, until it stops."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager

from app.executor.nodes.backoff import backoff_seconds, log_failure

logger = logging.getLogger(__name__)

Stopping = asyncio.Event
Work = Callable[[Stopping], Coroutine[object, object, None]]
ENDING_SECONDS = 20.0


@asynccontextmanager
async def in_background(*works: Work) -> AsyncIterator[None]:
    """Run the works beside the block; at its end tell them to stop, and cancel those that take too long."""
    stopping = Stopping()
    tasks = [asyncio.create_task(work(stopping)) for work in works]
    try:
        yield
    finally:
        stopping.set()
        if tasks:
            await asyncio.wait(tasks, timeout=ENDING_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def keep_doing(
    act: Callable[[], Awaitable[object]],
    *,
    every: float,
    stopping: Stopping,
    event: str,
    woken: asyncio.Event | None = None,
) -> None:
    """Call `act` every so many seconds, at once when `woken` is set, later each time it fails; `event` names that."""
    failures = 0
    while not stopping.is_set():
        if woken is not None:
            woken.clear()
        pause = every
        try:
            await act()
            failures = 0
        except Exception as error:
            failures += 1
            pause = max(backoff_seconds(failures), every)
            log_failure(logger, event, error, {"next_try_in": pause})
        await _wait(pause, stopping, None if failures else woken)


async def _wait(seconds: float, *signals: asyncio.Event | None) -> None:
    waiting = [asyncio.ensure_future(signal.wait()) for signal in signals if signal is not None]
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
