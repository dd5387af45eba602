"""Figures of the whole installation, the same from every process, without reading what is finished.

What grows (ends, attempts, waiting times) is summed up once: `fold` adds the transitions that came since to totals in
one row and remembers how far it came. Each reader folds; a conditional update lets one of several win. Transitions
of the last seconds wait for the next time: their ids may have been given in another order than they were committed.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.demand import Demand
from app.domain.enums import JobKind, JobStatus
from app.domain.transitions import TERMINAL
from app.store.clock import database_now
from app.store.tables import (
    CLAIMABLE,
    LIVE_ATTEMPT,
    LIVE_JOB,
    LIVE_LEASE,
    PENDING_DELIVERY,
    AttemptRow,
    DeliveryRow,
    InstallationRow,
    JobEventRow,
    JobRow,
    LeaseRow,
    NodeRow,
)
from app.store.types import enum_type

TOTALS_KEY: Final = "statistics"
FOLDED_AT_ONCE: Final = 5000
SETTLED: Final = timedelta(seconds=10)
WAITING_BUCKETS: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)


@dataclass(frozen=True)
class Totals:
    """Sums since the installation began, up to one transition. Keys are words joined by `/`."""

    event_id: int = 0
    ended: Mapping[str, int] = field(default_factory=dict)
    """kind/status/reason → jobs."""
    attempts: Mapping[str, int] = field(default_factory=dict)
    """kind/reason → attempts that ended."""
    waited: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """kind → jobs per bucket, those beyond the last, then the sum of seconds."""

    def document(self) -> dict[str, Any]:
        """Return what the row keeps."""
        return {**vars(self)}


@dataclass(frozen=True)
class Waiting:
    """Jobs that could start: how many of a kind in a queue, and since when the first waits."""

    kind: JobKind
    queue: str
    count: int
    oldest: datetime


@dataclass(frozen=True)
class NodeFigures:
    """A node: its last heartbeat, its accelerators, and the lease of its attempts that ends first."""

    name: str
    heartbeat_at: datetime
    is_dead: bool
    refuses: bool
    accelerators: int
    leased: int
    quarantined: int
    lease_expires_at: datetime | None


@dataclass(frozen=True)
class Figures:
    """The figures at `now`, by the database's clock."""

    now: datetime
    totals: Totals
    waiting: Sequence[Waiting]
    live: Mapping[tuple[JobKind, JobStatus], int]
    nodes: Sequence[NodeFigures]
    pending_messages: int
    oldest_message: datetime | None


async def figures(session: AsyncSession) -> Figures:
    """Return all figures; fold first for fresh totals."""
    pending = select(sa.func.count(), sa.func.min(col(DeliveryRow.created_at))).where(sa.text(PENDING_DELIVERY))
    messages, oldest = (await session.exec(pending)).one()
    return Figures(
        now=await database_now(session),
        totals=await totals(session),
        waiting=await _waiting(session),
        live=await _live(session),
        nodes=await _nodes(session),
        pending_messages=messages,
        oldest_message=oldest,
    )


# ---- now ------------------------------------------------------------------------------------------------------------


async def _waiting(session: AsyncSession) -> Sequence[Waiting]:
    # everything stands in the index of the queue, which SQLite takes for an equality only; the queue's name is part of
    # the demand
    of_kinds: list[Any] = [
        sa.select(
            sa.literal(kind, enum_type(JobKind)).label("kind"),
            col(JobRow.demand).label("demand"),
            sa.func.count().label("count"),
            sa.func.min(col(JobRow.created_at)).label("oldest"),
        )
        .where(sa.text(CLAIMABLE), col(JobRow.kind) == kind)
        .group_by(col(JobRow.demand))
        for kind in JobKind
    ]
    waiting = sa.union_all(*of_kinds).subquery()
    statement = select(waiting.c.kind, waiting.c.demand, waiting.c.count, waiting.c.oldest)
    found: dict[tuple[JobKind, str], Waiting] = {}
    for kind, demand, count, oldest in (await session.exec(statement)).all():
        key = (kind, Demand.parse(demand).queue)
        before = found.get(key)
        if before is not None:
            count, oldest = count + before.count, min(oldest, before.oldest)
        found[key] = Waiting(kind=kind, queue=key[1], count=count, oldest=oldest)
    return list(found.values())


async def _live(session: AsyncSession) -> Mapping[tuple[JobKind, JobStatus], int]:
    statement = (
        select(col(JobRow.kind), col(JobRow.status), sa.func.count())
        .where(sa.text(LIVE_JOB))
        .group_by(col(JobRow.kind), col(JobRow.status))
    )
    return {(kind, status): count for kind, status, count in (await session.exec(statement)).all()}


async def _nodes(session: AsyncSession) -> Sequence[NodeFigures]:
    leases = (
        select(col(LeaseRow.node_id), sa.func.count(), sa.func.count(col(LeaseRow.quarantined_at)))
        .where(sa.text(LIVE_LEASE))
        .group_by(col(LeaseRow.node_id))
    )
    in_use, quarantined = Counter[str](), Counter[str]()
    for node, held, set_aside in (await session.exec(leases)).all():
        in_use[node], quarantined[node] = held - set_aside, set_aside
    first = (
        select(col(AttemptRow.node_id), sa.func.min(col(AttemptRow.lease_expires_at)))
        .where(sa.text(LIVE_ATTEMPT))
        .group_by(col(AttemptRow.node_id))
    )
    expires: Mapping[str, datetime] = dict((await session.exec(first)).all())
    rows = (await session.exec(select(NodeRow).where(col(NodeRow.removed_at).is_(None)))).all()
    return [
        NodeFigures(
            name=row.name,
            heartbeat_at=row.heartbeat_at,
            is_dead=row.dead_at is not None,
            refuses=row.refusal is not None or row.draining_at is not None,
            accelerators=len(row.accelerators),
            leased=in_use[row.id],
            quarantined=quarantined[row.id],
            lease_expires_at=expires.get(row.id),
        )
        for row in rows
    ]


# ---- since the beginning --------------------------------------------------------------------------------------------


async def totals(session: AsyncSession) -> Totals:
    """Return the sums as they were folded last."""
    row = await session.get(InstallationRow, TOTALS_KEY, populate_existing=True)
    return Totals() if row is None else Totals(**row.value)


async def fold(session: AsyncSession) -> bool:
    """Add up to `FOLDED_AT_ONCE` transitions to the totals; True when there may be more."""
    before = await totals(session)
    now = await database_now(session)
    rows = (await session.exec(_transitions(before.event_id))).all()
    settled = list(takewhile(lambda row: row.created_at < now - SETTLED, rows))
    if settled:
        await _write(session, before, _added(before, settled), now=now)
    return len(settled) == FOLDED_AT_ONCE


def _transitions(event_id: int) -> Any:
    newer = (
        sa.select(JobEventRow).where(col(JobEventRow.id) > event_id).order_by(col(JobEventRow.id)).limit(FOLDED_AT_ONCE)
    ).subquery()
    ended_with_it = sa.and_(
        col(AttemptRow.job_id) == newer.c.job_id,
        col(AttemptRow.number) == newer.c.attempt,
        col(AttemptRow.finished_at) == newer.c.created_at,
        col(AttemptRow.reason) == newer.c.reason,  # not its launch, should both be of one instant
    )
    return (
        sa.select(
            newer.c.id, newer.c.status, newer.c.reason, newer.c.attempt, newer.c.created_at,
            col(JobRow.kind), col(JobRow.position), col(JobRow.created_at).label("submitted_at"),
            col(AttemptRow.id).label("ended_attempt"),
        )
        .join(JobRow, col(JobRow.id) == newer.c.job_id)
        .outerjoin(AttemptRow, ended_with_it)
        .order_by(newer.c.id)
    )  # fmt: skip


def _added(before: Totals, rows: Sequence[Any]) -> Totals:
    ended, attempts = Counter(before.ended), Counter(before.attempts)
    waited = {kind: list(counts) for kind, counts in before.waited.items()}
    for row in rows:
        kind = row.kind.value
        if row.status in TERMINAL:
            ended[f"{kind}/{row.status.value}/{row.reason.value}"] += 1
        if row.ended_attempt is not None:
            attempts[f"{kind}/{row.reason.value}"] += 1
        # those behind others in a chain waited for them, not for a place
        if row.status is JobStatus.LAUNCHING and row.attempt == 1 and row.position == 0:
            seconds = max((row.created_at - row.submitted_at).total_seconds(), 0.0)
            counts = waited.setdefault(kind, [0.0] * (len(WAITING_BUCKETS) + 2))
            counts[bisect_left(WAITING_BUCKETS, seconds)] += 1
            counts[-1] += seconds
    return Totals(event_id=rows[-1].id, ended=ended, attempts=attempts, waited=waited)


async def _write(session: AsyncSession, before: Totals, after: Totals, *, now: datetime) -> None:
    """Write the new totals unless another process was faster; then its are as good."""
    if before.event_id == 0:
        session.add(InstallationRow(key=TOTALS_KEY, value=after.document(), updated_at=now))
        await session.flush()
        return
    result = await session.exec(
        sa.update(InstallationRow)
        .where(
            col(InstallationRow.key) == TOTALS_KEY,
            col(InstallationRow.value)["event_id"].as_integer() == before.event_id,
        )
        .values(value=after.document(), updated_at=now)
        .execution_options(synchronize_session=False)
    )
    assert isinstance(result, CursorResult)
