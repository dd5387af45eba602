"""Queues: limits by name. A queue without a row accepts jobs without limits."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.kinds import LIMITED_KINDS
from app.store.session import EVERYBODYS
from app.store.tables import CLAIMABLE, LIVE_JOB, JobRow, QueueRow


async def all_queues(session: AsyncSession) -> Sequence[QueueRow]:
    """Return the queues with limits by name; there are dozens, not thousands."""
    return (await session.exec(select(QueueRow).order_by(col(QueueRow.name)))).all()


async def find_queue(session: AsyncSession, name: str, *, lock: bool = False) -> QueueRow | None:
    """Return the queue; with `lock`, claims and changes wait until the transaction ends."""
    return await session.get(QueueRow, name, with_for_update=lock or None, populate_existing=True)


async def set_limits(
    session: AsyncSession, name: str, *, max_live: int | None, max_live_per_user: int | None, now: datetime
) -> None:
    """Upsert the queue's limits. Running jobs are not affected."""
    values = {"max_live": max_live, "max_live_per_user": max_live_per_user, "updated_at": now}
    changed = await session.exec(sa.update(QueueRow).where(col(QueueRow.name) == name).values(**values))
    assert isinstance(changed, CursorResult)
    if changed.rowcount == 0:
        await session.exec(sa.insert(QueueRow).values(name=name, created_at=now, **values))


async def delete_limits(session: AsyncSession, name: str) -> None:
    """Remove the limits. Jobs of the queue continue."""
    await session.exec(sa.delete(QueueRow).where(col(QueueRow.name) == name))


async def live_by_queue(session: AsyncSession) -> Mapping[str, int]:
    """Return queue → how many of its jobs run, for those that have any."""
    statement = (
        select(JobRow.queue, sa.func.count())
        .where(sa.text(LIVE_JOB), col(JobRow.kind).in_(LIMITED_KINDS))
        .group_by(col(JobRow.queue))
        .execution_options(**EVERYBODYS)
    )
    return dict((await session.exec(statement)).all())


async def queued_by_queue(session: AsyncSession, most: int) -> Mapping[str, int]:
    """Return queue → how many of the first `most` waiting jobs are in it."""
    first = (
        select(JobRow.queue)
        .where(sa.text(CLAIMABLE), col(JobRow.kind).in_(LIMITED_KINDS))
        .order_by(col(JobRow.priority), col(JobRow.created_at), col(JobRow.id))
        .limit(most)
        .subquery()
    )
    statement = sa.select(first.c.queue, sa.func.count()).group_by(first.c.queue).execution_options(**EVERYBODYS)
    counted: Any = await session.exec(statement)  # type: ignore[call-overload]
    return dict(counted.all())
