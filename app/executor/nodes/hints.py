"""Hints, "look at the database now": over Redis, else by a file and by bells.

They may be lost, late or doubled, and change nothing but latency. Those over Redis: `app.executor.nodes.redis_hints`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from app.executor.engines.wakeup_fifo import listening, strike

logger = logging.getLogger(__name__)

# how often one looks who did not hear the bell
FILE_SECONDS = 0.2


class Doorbell(Protocol):
    """Tells nodes that there is something to do. Never raises, never waits for Redis."""

    def ring(self, job_id: str) -> None: ...

    async def close(self) -> None: ...


class FileDoorbell:
    """Without Redis: strikes the bells in a folder, which nodes on this machine hear at once, and touches a file.

    Nodes elsewhere look at its time often, which costs them next to nothing. A network disk may show the new time late;
    nodes look in the database all the same.
    """

    def __init__(self, path: Path, *, bells: Path) -> None:
        self._path = path
        self._bells = bells

    def ring(self, job_id: str) -> None:
        """Strike and touch in the background."""
        asyncio.get_running_loop().run_in_executor(None, self._touch, job_id)

    async def close(self) -> None:
        """Do nothing: what is on its way arrives."""

    def _touch(self, job_id: str) -> None:
        for bell in self._bells.glob("*"):
            strike(bell)
        try:
            self._path.touch()
        except OSError as error:
            logger.warning("hint_lost", extra={"job_id": job_id, "error": str(error)})


async def listen_to_file(path: Path, *, bell: Path, wake: Callable[[], None], stopping: asyncio.Event) -> None:
    """Wake the agent whenever its bell was struck or the file was touched, until `stopping`."""
    bell.parent.mkdir(mode=0o700, exist_ok=True)
    seen = _touched_at(path)
    with listening(bell, wake):
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
