"""The folders of a node's attempts: those of ended ones go, and what runs although no live row knows it is ended.

A crash between an end and the removal leaves the first; a database that was restored, or a node that was declared dead,
the second: orphans. While there are orphans the node takes no jobs, and every round looks at them.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Final

from app.executor.nodes.trouble import TROUBLE
from app.executor.supervisor import client
from app.executor.supervisor.client import AttemptIsSupervised, AttemptPhase

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 60.0
REMOVAL_SECONDS: Final = 2.0  # a supervisor holds its folder's lock for a moment after it wrote the exit


class AttemptFolders:
    """The folders below one root. `follow_up` writes what follows from an end that a crash may have cut off."""

    def __init__(
        self,
        root: Path,
        *,
        follow_up: Callable[[str], Awaitable[None]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._follow_up = follow_up
        self._monotonic = monotonic
        self._orphans: frozenset[str] = frozenset()
        self._looked_at = float("-inf")

    @property
    def has_orphans(self) -> bool:
        """Whether something ran at the last look although no live row knows it."""
        return bool(self._orphans)

    def of(self, attempt_id: str) -> Path:
        return self._root / attempt_id

    def look_again(self) -> None:
        """Let the next `clear` look, however little time has passed."""
        self._looked_at = float("-inf")

    async def clear(self, known: Collection[str]) -> None:
        """Remove the folders of attempts that have ended, and end orphans; `known` ones are left alone."""
        if self._monotonic() - self._looked_at < LOOK_SECONDS and not self._orphans:
            return
        self._looked_at = self._monotonic()
        await asyncio.to_thread(client.finish_removals, self._root)
        orphans: set[str] = set()
        for folder in await asyncio.to_thread(client.list_attempts, self._root):
            if folder.name in known:
                continue
            try:
                if not await self._clear(folder):
                    orphans.add(folder.name)
            except TROUBLE:
                raise
            except Exception:
                logger.exception("folder_not_cleared", extra={"attempt": folder.name})
        self._orphans = frozenset(orphans)

    async def remove(self, attempt_id: str) -> None:
        """Remove the folder of an attempt whose end is written; what cannot go now goes at a later look."""
        deadline = self._monotonic() + REMOVAL_SECONDS
        while True:
            try:
                await asyncio.to_thread(client.remove, self.of(attempt_id))
            except AttemptIsSupervised:
                if self._monotonic() > deadline:
                    return
                await asyncio.sleep(0.02)
            except OSError as error:
                logger.warning("folder_not_removed", extra={"attempt": attempt_id, "error": str(error)})
                return
            else:
                return

    async def _clear(self, folder: Path) -> bool:
        """Remove the folder of an attempt that has ended, else see to its end. False: something of it may run."""
        observation = client.observe(folder)
        begun = observation.supervised or observation.phase in (AttemptPhase.STARTED, AttemptPhase.RUNNING)
        if observation.exit is not None or not begun:
            await self._follow_up(folder.name)
            await self.remove(folder.name)
            return True
        if not (observation.supervised and observation.stopping):
            logger.warning("orphan_stopped", extra={"attempt": folder.name})
            await asyncio.to_thread(client.request_stop, folder, "orphan")
            if not observation.supervised:  # its supervisor died, the script may live
                await asyncio.to_thread(client.adopt, folder)
        return False
