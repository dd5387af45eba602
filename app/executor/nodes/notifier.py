"""Notifications, "look at the database now": over Redis, else through FIFOs and a touched file.

They may be lost, late or doubled, and change nothing but latency. Those over Redis:
`app.executor.nodes.redis_notifier`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from app.executor.engines.wakeup_fifo import listening, notify

logger = logging.getLogger(__name__)

# how often the file's time is read where the FIFO does not reach
FILE_SECONDS = 0.2


class Notifier(Protocol):
    """Notifies nodes that there is something to do. Never raises, never waits for Redis."""

    def notify(self, job_id: str) -> None: ...

    async def close(self) -> None: ...


class FileNotifier:
    """Notifies without Redis: through the FIFOs of the nodes on this machine, and by touching a file.

    Nodes elsewhere read the file's time often, which costs next to nothing. A network disk may show the new time late;
    nodes poll the database all the same.
    """

    def __init__(self, path: Path, *, fifos: Path) -> None:
        self._path = path
        self._fifos = fifos

    def notify(self, job_id: str) -> None:
        """Notify and touch in the background."""
        asyncio.get_running_loop().run_in_executor(None, self._touch, job_id)

    async def close(self) -> None:
        """Do nothing: notifications on their way arrive."""

    def _touch(self, job_id: str) -> None:
        for fifo in self._fifos.glob("*"):
            notify(fifo)
        try:
            self._path.touch()
        except OSError as error:
            logger.warning("notification_lost", extra={"job_id": job_id, "error": str(error)})


async def listen_to_file(path: Path, *, fifo: Path, wake: Callable[[], None], stopping: asyncio.Event) -> None:
    """Wake the agent at every notification through its FIFO and every touch of the file, until `stopping`."""
    fifo.parent.mkdir(mode=0o700, exist_ok=True)
    seen = _touched_at(path)
    with listening(fifo, wake):
        while not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), timeout=FILE_SECONDS)
            now = _touched_at(path)
            if now != seen:
                seen = now
                wake()


def _touched_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
