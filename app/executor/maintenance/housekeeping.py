"""Remove old run folders of failed jobs and inference requests, checkpoints, logs and rows that are no longer needed.

One process of an installation does this at a time. It takes a turn by a conditional update and holds it by a lease on
the database's clock, so the turn of a dead process expires. Steps are small, run in threads and hold no session. The
next run finds what an interrupted step left. Never removed: files of unfinished jobs, folders of unknown jobs, links,
and folders of existing models.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from uuid import uuid4

from app.domain.errors import Conflict
from app.domain.retention import Retention, RetentionTarget, too_old
from app.executor.maintenance import retention_targets
from app.executor.maintenance.background import Stopping, keep_doing
from app.store import housekeeping as store
from app.store.audit_records import old_records
from app.store.clock import database_now
from app.store.home import Home
from app.store.models import living_paths
from app.store.session import Database

logger = logging.getLogger(__name__)

EVERY = timedelta(hours=1)
LEASE = timedelta(minutes=10)
LOOK_SECONDS = 300.0
JOBS_AT_ONCE = 100


class HousekeepingRunning(Conflict):
    """Another process is removing old files now."""

    code = "housekeeping_running"


@dataclass(frozen=True)
class Removed:
    """How many of a target were or would be removed. `size_bytes` counts files."""

    target: RetentionTarget
    count: int = 0
    size_bytes: int = 0

    def plus(self, count: int, size_bytes: int = 0) -> "Removed":
        """Return the sum."""
        return Removed(self.target, self.count + count, self.size_bytes + size_bytes)


class Housekeeper:
    """Removes old files and rows periodically or on request."""

    def __init__(self, *, database: Database, home: Home, retention: Retention) -> None:
        self._database = database
        self._home = home
        self._retention = retention

    async def run_now_and_then(self, stopping: Stopping) -> None:
        """Remove old files whenever it is due and no other process does it, until `stopping` is set."""

        async def look() -> None:
            if await self._take_turn(unasked=True) is not None:
                logger.info("housekeeping_done")

        await keep_doing(look, every=LOOK_SECONDS, stopping=stopping, event="housekeeping_failed")

    async def run(self) -> Sequence[Removed]:
        """Remove what is too old now. Raise `HousekeepingRunning` if another process does it."""
        removed = await self._take_turn(unasked=False)
        if removed is None:
            raise HousekeepingRunning
        return removed

    async def preview(self) -> Sequence[Removed]:
        """Return what a run would remove now. Change nothing."""
        return await _Round(self._database, self._home, self._retention, remove=False).all()

    async def _take_turn(self, *, unasked: bool) -> Sequence[Removed] | None:
        holder = str(uuid4())
        async with self._database.writing() as session:
            if not await store.take_turn(session, holder, lease=LEASE, unasked=unasked):
                return None

        async def keep() -> None:
            async with self._database.writing() as session:
                if not await store.keep_turn(session, holder, lease=LEASE):
                    raise HousekeepingRunning

        try:
            return await _Round(self._database, self._home, self._retention, remove=True, keep_turn=keep).all()
        finally:
            async with self._database.writing() as session:
                await store.give_turn_back(session, holder, next_in=EVERY)


_Act = Callable[..., Awaitable[int]]


async def _nothing_to_keep() -> None: ...


class _Round:
    """One run over all targets."""

    def __init__(
        self,
        database: Database,
        home: Home,
        retention: Retention,
        *,
        remove: bool,
        keep_turn: Callable[[], Awaitable[None]] = _nothing_to_keep,
    ) -> None:
        self._database = database
        self._home = home
        self._retention = retention
        self._remove = remove
        self._keep_turn = keep_turn
        self._removed = {target: Removed(target) for target in RetentionTarget}

    async def all(self) -> Sequence[Removed]:
        async with self._database.reading() as session:
            now = await database_now(session)
        await self._runs(now)
        await self._logs(now)
        await self._rows(RetentionTarget.DELIVERIES, store.old_deliveries, now)
        await self._rows(RetentionTarget.IDEMPOTENCY_KEYS, store.old_idempotency_keys, now)
        await self._rows(RetentionTarget.AUDIT_RECORDS, old_records, now)
        found = list(self._removed.values())
        if self._remove and any(entry.count for entry in found):
            fields = {entry.target.value: f"{entry.count} ({entry.size_bytes} bytes)" for entry in found}
            logger.info("old_files_removed", extra=fields)
        return found

    async def _runs(self, now: datetime) -> None:
        batches = retention_targets.job_folders(self._home.runs, at_once=JOBS_AT_ONCE)
        while batch := await asyncio.to_thread(next, batches, None):
            await self._keep_turn()
            async with self._database.reading() as session:
                runs = await store.ended_runs(session, batch)
            for job_id, run in runs.items():
                target = too_old(run, self._retention, now)
                if target is not None:
                    await self._run(job_id, target)

    async def _run(self, job_id: str, target: RetentionTarget) -> None:
        folder = self._home.runs / job_id
        async with self._database.reading() as session:
            keep = [
                self._home.absolute(path) for path in await living_paths(session, inside=self._home.relative(folder))
            ]
        if target is RetentionTarget.CHECKPOINTS:
            found = await asyncio.to_thread(retention_targets.checkpoints, folder, keep=keep)
            await self._paths(target, found, root=self._home.runs)
        elif not keep:  # the folder of an existing model is kept, whatever became of its job
            await self._paths(target, [folder], root=self._home.runs)

    async def _logs(self, now: datetime) -> None:
        limit = self._retention.limit(RetentionTarget.SCRIPT_LOGS, now)
        if limit is not None:
            for home in await asyncio.to_thread(list, self._home.of_every_project()):
                found = await asyncio.to_thread(retention_targets.old_logs, home.logs, limit)
                await self._paths(RetentionTarget.SCRIPT_LOGS, found, root=home.logs)

    async def _paths(self, target: RetentionTarget, paths: Iterable[Path], *, root: Path) -> None:
        for path in paths:
            size = await asyncio.to_thread(retention_targets.size_of, path)
            if self._remove and not await asyncio.to_thread(retention_targets.remove, path, root=root):
                logger.warning("old_files_kept", extra={"path": str(path)})
                continue
            self._removed[target] = self._removed[target].plus(1, size)

    async def _rows(self, target: RetentionTarget, act: _Act, now: datetime) -> None:
        limit = self._retention.limit(target, now)
        if limit is None:
            return
        while True:
            count = await self._in_session(act, limit)
            self._removed[target] = self._removed[target].plus(count)
            if not self._remove or count == 0:
                return
            await self._keep_turn()

    async def _in_session(self, act: _Act, limit: datetime) -> int:
        opened = self._database.writing() if self._remove else self._database.reading()
        async with opened as session:
            return await act(session, limit, remove=self._remove)
