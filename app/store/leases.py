"""Leases: which attempt holds which accelerator of a node.

A lease is taken in the transaction of the claim and ends in that of the attempt's end. A partial unique index makes two
holders impossible. When it is not proven that nothing of the attempt is left (processes that could not be killed, a
node that was lost), the lease stays, *quarantined*: the accelerator is out of use until its node proves that the
processes are gone, or a person releases it.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import Conflict, NotFound
from app.store.clock import database_now
from app.store.nodes import get_node
from app.store.tables import LIVE_LEASE, AttemptRow, LeaseRow, NodeRow

_LIVE = sa.text(f"lease.{LIVE_LEASE}")
_LEASE: sa.Table = LeaseRow.__table__  # type: ignore[attr-defined]
# On tables and made once, as those of an attempt's end in `jobs.py`.
_INSERT = sa.insert(_LEASE)
_OF_ATTEMPT = sa.update(_LEASE).where(_LEASE.c.attempt_id == sa.bindparam("attempt"), _LIVE)
_RELEASE = _OF_ATTEMPT.values(live=False, released_at=sa.bindparam("now"))
_QUARANTINE = _OF_ATTEMPT.values(quarantined_at=sa.bindparam("now"))


class AcceleratorNotFound(NotFound):
    """The node has no accelerator of this id."""

    code = "accelerator_not_found"


class AcceleratorInUse(Conflict):
    """An attempt holds it, and nothing says that its processes are gone."""

    code = "accelerator_in_use"


async def take(session: AsyncSession, attempts: Sequence[AttemptRow]) -> None:
    """Lease its `accelerators` to each attempt; raise `IntegrityError` if one of them is held.

    The lease begins now, not when its claim began: that may have waited until the holder before gave it back.
    """
    if not any(attempt.accelerators for attempt in attempts):
        return
    now = await database_now(session)
    rows = [
        {
            "id": str(uuid4()),
            "node_id": attempt.node_id,
            "accelerator": accelerator,
            "attempt_id": attempt.id,
            "live": True,
            "created_at": now,
        }
        for attempt in attempts
        for accelerator in attempt.accelerators
    ]
    await (await session.connection()).execute(_INSERT, rows)


async def held(session: AsyncSession, node_ids: Collection[str]) -> Mapping[str, Mapping[str, datetime | None]]:
    """Return node → accelerator → when its holder is expected to end; None when unknown, and in quarantine."""
    statement = (
        select(LeaseRow.node_id, LeaseRow.accelerator, LeaseRow.quarantined_at, AttemptRow.expected_end_at)
        .join(AttemptRow, col(AttemptRow.id) == col(LeaseRow.attempt_id))
        .where(col(LeaseRow.node_id).in_(node_ids), _LIVE)
    )
    found: dict[str, dict[str, datetime | None]] = defaultdict(dict)
    for node_id, accelerator, quarantined_at, expected_end_at in (await session.exec(statement)).all():
        found[node_id][accelerator] = None if quarantined_at else expected_end_at
    return found


async def end_of_attempt(session: AsyncSession, attempt_id: str, *, proven_empty: bool, now: datetime) -> None:
    """Release what the attempt holds, or quarantine it while something of the attempt may be left."""
    statement = _RELEASE if proven_empty else _QUARANTINE
    await (await session.connection()).execute(statement, {"attempt": attempt_id, "now": now})


async def release_all(session: AsyncSession, *, now: datetime) -> None:
    """Release every accelerator: nothing of what held them runs in this installation."""
    await session.exec(sa.update(LeaseRow).where(col(LeaseRow.live)).values(live=False, released_at=now))


async def quarantined_attempts(session: AsyncSession, node_id: str) -> Sequence[str]:
    """Return the ended attempts whose processes may still use accelerators of the node."""
    statement = (
        select(LeaseRow.attempt_id)
        .where(LeaseRow.node_id == node_id, col(LeaseRow.quarantined_at).is_not(None), _LIVE)
        .distinct()
    )
    return (await session.exec(statement)).all()


async def release_proven(session: AsyncSession, attempt_ids: Collection[str], *, now: datetime) -> int:
    """Release what these quarantined attempts hold: their node saw that nothing of them is left."""
    result = await session.exec(
        sa.update(LeaseRow)
        .where(col(LeaseRow.attempt_id).in_(attempt_ids), col(LeaseRow.quarantined_at).is_not(None), _LIVE)
        .values(live=False, released_at=now)
    )
    assert isinstance(result, CursorResult)
    return result.rowcount


async def release(session: AsyncSession, node: str, accelerator: str, *, now: datetime) -> NodeRow:
    """Release a quarantined accelerator because a person says so; a free one stays free."""
    row = await get_node(session, node)
    statement = select(LeaseRow).where(LeaseRow.node_id == row.id, LeaseRow.accelerator == accelerator, _LIVE)
    lease = (await session.exec(statement.with_for_update())).first()
    if lease is None:
        if accelerator not in {known.get("id") for known in row.accelerators}:
            raise AcceleratorNotFound(node=row.name, accelerator=accelerator)
        return row
    if lease.quarantined_at is None:
        attempt = await session.get_one(AttemptRow, lease.attempt_id)
        raise AcceleratorInUse(node=row.name, accelerator=accelerator, job=attempt.job_id)
    lease.live, lease.released_at = False, now
    session.add(lease)
    await session.flush()
    return row
