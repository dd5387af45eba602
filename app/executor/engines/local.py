"""The engine of a node that runs attempts on its own machine.

Every attempt has a control folder on the node's local disk. What runs belongs to a detached supervisor, so it outlives
the worker; the next one finds it by its folder.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.executor.engines.base import AttemptPhase, AttemptState, LaunchSpec, Strays
from app.executor.engines.wakeup_fifo import listening
from app.executor.supervisor import client, program
from app.executor.supervisor.client import AttemptIsSupervised, ForkServer
from app.executor.supervisor.program import boot_id, clock_since_boot
from app.store.home import NodeHome

__all__ = ["LocalEngine", "boot_id", "clock_since_boot"]

logger = logging.getLogger(__name__)

STARTING_SECONDS = 5.0  # how long a supervisor may take to lock its folder before it is started again
REMOVAL_SECONDS = 2.0  # a supervisor holds its folder's lock for a moment after it wrote the exit
ACTIVITY = "activity.json"


class LocalEngine:
    """Attempts below one folder of this machine."""

    def __init__(self, home: NodeHome, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._root = home.attempts
        self._fifo = home.wakeup_fifo
        self._monotonic = monotonic
        self._starts: dict[str, _Start] = {}
        self._forks = ForkServer()

    @contextlib.contextmanager
    def running(self, notify: Callable[[], None]) -> Iterator[None]:
        with listening(self._fifo, notify), self._forks:
            yield

    def observe(self, attempt_id: str) -> AttemptState:
        seen = client.observe(self._folder(attempt_id))
        start = self._starts.get(attempt_id)
        if start is not None and (seen.supervised or seen.phase is not start.phase):
            start = None  # it came; should it be gone again, no other is on the way
            del self._starts[attempt_id]
        return AttemptState(
            phase=seen.phase,
            supervised=seen.supervised,
            pending=start is not None and self._monotonic() < start.until,
            stopping=seen.stopping,
            pid=seen.process.pid if seen.process else None,
            heartbeat_age=seen.heartbeat_age,
            running_seconds=seen.running_seconds,
            exit=seen.exit,
        )

    async def prepare(self, attempt_id: str, spec: LaunchSpec) -> None:
        await asyncio.to_thread(client.prepare, self._folder(attempt_id), spec)

    async def place(self, attempt_id: str) -> None:
        await self._supervise(attempt_id, client.start)

    async def recover(self, attempt_id: str) -> None:
        await self._supervise(attempt_id, client.adopt)

    async def stop(self, attempt_id: str, reason: str) -> None:
        folder = self._folder(attempt_id)
        if folder.exists():  # a supervisor that is late must find the request
            await asyncio.to_thread(client.request_stop, folder, reason)

    async def end_strays(self, attempt_id: str) -> Strays:
        return Strays(*await asyncio.to_thread(program.end_strays, attempt_id))

    async def is_empty(self, attempt_id: str) -> bool:
        return not await asyncio.to_thread(client.has_processes, attempt_id)

    async def known_attempts(self) -> Sequence[str]:
        await asyncio.to_thread(client.finish_removals, self._root)
        return [folder.name for folder in await asyncio.to_thread(client.list_attempts, self._root)]

    async def discard(self, attempt_id: str) -> None:
        self._starts.pop(attempt_id, None)
        deadline = self._monotonic() + REMOVAL_SECONDS
        while True:
            try:
                await asyncio.to_thread(client.remove, self._folder(attempt_id))
            except AttemptIsSupervised:
                if self._monotonic() > deadline:
                    return
                await asyncio.sleep(0.02)
            except OSError as error:
                logger.warning("folder_not_removed", extra={"attempt": attempt_id, "error": str(error)})
                return
            else:
                return

    def silent_seconds(self, attempt_id: str, signature: str) -> float:
        """Return it by the machine's monotonic clock, which stands still while the machine sleeps.

        The moment of the last change is kept in the control folder; one of another boot counts for nothing.
        """
        folder, now, boot = self._folder(attempt_id), self._monotonic(), boot_id()
        known = _Activity.read(folder / ACTIVITY)
        if known is not None and known.seen == signature and known.boot_id == boot:
            return now - known.since
        with contextlib.suppress(OSError):  # a full disk: counted anew, so later than it should
            program.Folder(str(folder)).write(ACTIVITY, vars(_Activity(signature, now, boot)), durable=False)
        return 0.0

    def _folder(self, attempt_id: str) -> Path:
        return self._root / attempt_id

    async def _supervise(self, attempt_id: str, start: Callable[[Path, ForkServer], None]) -> None:
        folder = self._folder(attempt_id)
        phase = client.observe(folder).phase
        await asyncio.to_thread(start, folder, self._forks)
        self._starts[attempt_id] = _Start(phase=phase, until=self._monotonic() + STARTING_SECONDS)


@dataclass(frozen=True)
class _Start:
    """A supervisor that was started: how far the attempt was then, and until when it may be on its way."""

    phase: AttemptPhase
    until: float


@dataclass(frozen=True)
class _Activity:
    """What an attempt's files looked like, and since when (monotonic)."""

    seen: str
    since: float
    boot_id: str

    @classmethod
    def read(cls, path: Path) -> "_Activity | None":
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
