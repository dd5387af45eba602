"""Queues: read them, set and remove their limits."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.exc import IntegrityError
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.demand import QUEUE_NAME
from app.domain.errors import NotFound
from app.store import queues
from app.store.tables import QueueRow


class QueueNotFound(NotFound):
    """No queue can have this name."""

    code = "queue_not_found"


Check = Callable[[str], None]
MOST_COUNTED = 10_000


@dataclass(frozen=True)
class QueueView:
    """A queue; `row` None: it has jobs and no limits. `waiting` counts the first ten thousand waiting jobs."""

    name: str
    row: QueueRow | None
    running: int
    waiting: int

    @property
    def version(self) -> str:
        """Return what changes with every change of the limits."""
        return queue_version(self.row)


class Queues:
    """The service behind the routes of queues."""

    def __init__(self, *, clock: Callable[[], datetime]) -> None:
        self._clock = clock

    async def views(self, session: AsyncSession) -> Sequence[QueueView]:
        """Return by name the queues that have limits or jobs."""
        rows = {row.name: row for row in await queues.all_queues(session)}
        running = await queues.live_by_queue(session)
        waiting = await queues.queued_by_queue(session, MOST_COUNTED)
        names = sorted({*rows, *running, *waiting})
        return [
            QueueView(name=name, row=rows.get(name), running=running.get(name, 0), waiting=waiting.get(name, 0))
            for name in names
        ]

    async def get(self, session: AsyncSession, name: str) -> QueueView:
        """Return the queue. Every name is one: without limits and jobs it is merely empty."""
        _require_name(name)
        found = {view.name: view for view in await self.views(session)}
        return found.get(name) or QueueView(name=name, row=None, running=0, waiting=0)

    async def set_limits(
        self, session: AsyncSession, name: str, *, max_live: int | None, max_live_per_user: int | None, check: Check
    ) -> QueueView:
        """Set the limits. Running jobs are not affected. `check` gets the version that is replaced and may refuse."""
        _require_name(name)
        check(queue_version(await queues.find_queue(session, name, lock=True)))
        now = self._clock()
        try:
            async with session.begin_nested():
                await queues.set_limits(session, name, max_live=max_live, max_live_per_user=max_live_per_user, now=now)
        except IntegrityError:  # another request set the first ones a moment ago
            return await self.set_limits(
                session, name, max_live=max_live, max_live_per_user=max_live_per_user, check=check
            )
        return await self.get(session, name)

    async def delete_limits(self, session: AsyncSession, name: str, *, check: Check) -> None:
        """Remove the limits. Idempotent."""
        _require_name(name)
        check(queue_version(await queues.find_queue(session, name, lock=True)))
        await queues.delete_limits(session, name)


def queue_version(row: QueueRow | None) -> str:
    """Return a version of the limits."""
    return "none" if row is None else row.updated_at.strftime("%Y%m%d%H%M%S%f")


def _require_name(name: str) -> None:
    if not re.fullmatch(QUEUE_NAME, name):
        raise QueueNotFound(queue=name)
