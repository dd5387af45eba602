"""Attempts that the engine has and no live row knows: ended ones are discarded, what runs is ended.

A crash between an end and the removal leaves the first; a database that was restored, or a node that was declared dead,
the second: orphans. While there are orphans the node accepts no jobs, and every round looks at them.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from app.executor.engines.base import AttemptPhase, Engine
from app.executor.nodes.backoff import TRANSIENT

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 60.0


class Orphans:
    """The attempts of one engine. `follow_up` writes what follows from an end that a crash may have cut off."""

    def __init__(
        self,
        engine: Engine,
        *,
        follow_up: Callable[[str], Awaitable[None]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._follow_up = follow_up
        self._monotonic = monotonic
        self._running: frozenset[str] = frozenset()
        self._looked_at = float("-inf")

    @property
    def exist(self) -> bool:
        """Whether something ran at the last look although no live row knows it."""
        return bool(self._running)

    def look_again(self) -> None:
        """Let the next `clear` look, however little time has passed."""
        self._looked_at = float("-inf")

    async def clear(self, known: Collection[str]) -> None:
        """Discard attempts that have ended, and end orphans; `known` ones are left alone."""
        if self._monotonic() - self._looked_at < LOOK_SECONDS and not self._running:
            return
        self._looked_at = self._monotonic()
        running: set[str] = set()
        for attempt_id in await self._engine.known_attempts():
            if attempt_id in known:
                continue
            try:
                if not await self._clear(attempt_id):
                    running.add(attempt_id)
            except TRANSIENT:
                raise
            except Exception:
                logger.exception("attempt_not_cleared", extra={"attempt": attempt_id})
        self._running = frozenset(running)

    async def _clear(self, attempt_id: str) -> bool:
        """Discard an attempt that has ended, else see to its end. False: something of it may run."""
        state = self._engine.observe(attempt_id)
        begun = state.supervised or state.phase in (AttemptPhase.STARTED, AttemptPhase.RUNNING)
        if state.exit is not None or not begun:
            await self._follow_up(attempt_id)
            await self._engine.discard(attempt_id)
            return True
        if not (state.supervised and state.stopping):
            logger.warning("orphan_stopped", extra={"attempt": attempt_id})
            await self._engine.stop(attempt_id, "orphan")
            if not state.supervised:  # its supervisor died, the script may live
                await self._engine.recover(attempt_id)
        return False
