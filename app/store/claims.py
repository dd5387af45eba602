"""The claim: a node wins the first job that it may start now, with the accelerators that the job holds.

One transaction: look at the fronts of the queue, at the node's leases, at limits and reservations; decide by the pure
rules of `app.domain.placement`; write. Two nodes never win the same job (a conditional UPDATE), two attempts never one
accelerator (a partial unique index), and a limited queue lets its claimers in one after the other (its row is locked).
"""

import functools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.demand import Demand
from app.domain.enums import JobKind
from app.domain.placement import (
    LEASING,
    LIMITED,
    Candidate,
    Decision,
    Host,
    QueueLimit,
    QueueLimits,
    Take,
    cards_of,
    decide,
    is_blocked,
    misfits,
)
from app.store import jobs, leases
from app.store.jobs import Claim
from app.store.nodes import accelerators_of, blocked_of, takes_jobs, working_nodes
from app.store.tables import (
    CLAIMABLE,
    LIVE_ATTEMPT,
    LIVE_JOB,
    RESERVING,
    AttemptRow,
    JobRow,
    NodeRow,
    QueueRow,
)
from app.store.types import UtcDateTime

MOST_TRIES = 20  # other nodes may be faster so often before this one looks again later
_ORDER = (col(JobRow.priority), col(JobRow.created_at), col(JobRow.id))


@dataclass(frozen=True)
class Offer:
    """What a node could run now. `slots`: for jobs that hold no accelerator; `usable`: ids, held ones among them.

    `usable` None: no stranger uses any of its accelerators.
    """

    node_id: str
    environments: Collection[str]
    slots: int
    usable: Collection[str] | None = None


async def claim(
    session: AsyncSession, offer: Offer, *, kinds: Collection[JobKind], now: datetime, lease: timedelta
) -> Claim | None:
    """Win the first job of `kinds` that the node may start now; None when there is none.

    A job that this node will be free for soonest gets its reservation on the way.
    """
    # locked: a person must not declare it dead, or drain it, between this look and the end of the transaction
    node = await session.get_one(NodeRow, offer.node_id, with_for_update={"read": True})
    if not takes_jobs(node):  # what it keeps accelerators for is taken over by others
        return None
    for _ in range(MOST_TRIES):
        host = await _host(session, node, offer, kinds)
        candidates = await _candidates(session, host, kinds, now=now)
        if not candidates and host.keeps_for is None:
            return None
        limits = await limits_of(session, [one.demand for one in candidates], lock=True)
        others = await _others(session, host, candidates, now=now)
        decision = decide(candidates, host, others=others, limits=limits, now=now)
        await _reserve(session, host, decision)
        if decision.take is None:
            return None
        won = await _win(session, host, decision.take, now=now, lease=lease)
        if won is not None:
            return won
    return None


async def limits_of(session: AsyncSession, demands: Collection[Demand], *, lock: bool = False) -> QueueLimits:
    """Return the limits that jobs of these demands meet; with `lock` nobody else claims from a limited queue now."""
    names = {demand.queue for demand in demands if demand.kind in LIMITED}
    limited = sa.or_(col(QueueRow.max_live).is_not(None), col(QueueRow.max_live_per_user).is_not(None))
    statement = select(QueueRow.name, QueueRow.max_live, QueueRow.max_live_per_user).where(
        col(QueueRow.name).in_(names), limited
    )
    # always in the same order, else two claimers could wait for each other
    statement = statement.order_by(col(QueueRow.name))
    rows = (await session.exec(statement.with_for_update() if lock else statement)).all()
    by_queue = {name: QueueLimit(max_live=most, max_live_per_user=per_user) for name, most, per_user in rows}
    if not by_queue:
        return QueueLimits()
    counted = (
        select(JobRow.queue, JobRow.submitted_by, sa.func.count())
        .where(sa.text(LIVE_JOB), col(JobRow.queue).in_(by_queue), col(JobRow.kind).in_(LIMITED))
        .group_by(col(JobRow.queue), col(JobRow.submitted_by))
    )
    live = {(queue, user): count for queue, user, count in (await session.exec(counted)).all()}
    return QueueLimits(by_queue=by_queue, live=live)


async def hosts_of(session: AsyncSession, rows: Sequence[NodeRow], *, reservations: bool = True) -> Sequence[Host]:
    """Return the nodes as placement sees them, without slots: only a node itself knows those."""
    ids = [row.id for row in rows]
    holders = await leases.held(session, ids)
    kept = await _reserved_for(session, ids) if reservations else {}
    return [
        Host(
            node_id=row.id,
            name=row.name,
            environments=frozenset(row.environments),
            labels=row.labels,
            cards=cards_of(accelerators_of(row), held=holders.get(row.id, {}), blocked=blocked_of(row)),
            keeps_for=kept.get(row.id),
        )
        for row in rows
    ]


async def first_in_order(
    session: AsyncSession, kinds: Collection[JobKind], *, now: datetime, limit: int
) -> Sequence[Candidate]:
    """Return the first jobs of `kinds` in the queue that are due, whatever they ask for."""
    statement = _candidate_statement().where(sa.text(CLAIMABLE), col(JobRow.kind).in_(kinds), _due())
    return [
        _candidate(row)
        for row in (await session.exec(statement.order_by(*_ORDER).limit(limit), params={"now": now})).all()
    ]


async def slot_holders(session: AsyncSession) -> Mapping[str, Sequence[datetime | None]]:
    """Return node → when the jobs that hold one of its slots are expected to end; None when nobody knows."""
    statement = (
        select(AttemptRow.node_id, AttemptRow.expected_end_at, AttemptRow.accelerators)
        .join(JobRow, col(JobRow.id) == col(AttemptRow.job_id))
        .where(sa.text(f"attempt.{LIVE_ATTEMPT}"), col(JobRow.kind).in_(LIMITED))
    )
    found: dict[str, list[datetime | None]] = defaultdict(list)
    for node_id, expected_end_at, accelerators in (await session.exec(statement)).all():
        if not accelerators:
            found[node_id].append(expected_end_at)
    return found


# ---- the node itself ------------------------------------------------------------------------------------------------


async def _host(session: AsyncSession, node: NodeRow, offer: Offer, kinds: Collection[JobKind]) -> Host:
    """Return this node with what it offers; reservations are for kinds that hold accelerators."""
    known = accelerators_of(node)
    holders = await leases.held(session, [node.id]) if known else {}
    several = len(known) > 1 and set(kinds) >= LEASING
    kept = await _reserved_for(session, [node.id]) if several else {}
    blocked = set() if offer.usable is None else {one.id for one in known} - set(offer.usable)
    return Host(
        node_id=node.id,
        name=node.name,
        environments=frozenset(offer.environments),
        labels=node.labels,
        cards=cards_of(known, held=holders.get(node.id, {}), blocked=blocked),
        slots=offer.slots,
        keeps_for=kept.get(node.id),
    )


async def _others(
    session: AsyncSession, host: Host, candidates: Sequence[Candidate], *, now: datetime
) -> Sequence[Host]:
    """Return the other nodes that take jobs, if a job waits for several accelerators and nobody keeps them here."""
    unkept = (one for one in candidates if one.reserved_node_id != host.node_id)
    if not any(is_blocked(one, host) for one in unkept):
        return ()
    return await hosts_of(session, [row for row in await working_nodes(session, now=now) if row.id != host.node_id])


async def _reserved_for(session: AsyncSession, node_ids: Collection[str]) -> Mapping[str, Candidate]:
    statement = _candidate_statement().where(sa.text(RESERVING), col(JobRow.reserved_node_id).in_(node_ids))
    found = [_candidate(row) for row in (await session.exec(statement)).all()]
    return {one.reserved_node_id: one for one in found if one.reserved_node_id is not None}


# ---- the queue ------------------------------------------------------------------------------------------------------


async def _candidates(
    session: AsyncSession, host: Host, kinds: Collection[JobKind], *, now: datetime
) -> Sequence[Candidate]:
    """Return the first job of each demand that the node could meet, and beside a reservation some more of each."""
    heads = (await session.exec(_heads_statement(frozenset(kinds)), params={"now": now})).all()
    found = [one for one in map(_candidate, heads) if not misfits(one.demand, host)]
    if host.keeps_for is not None:
        found += await _with_time_limits(session, [one.demand for one in found], now=now)
    return found


@functools.cache
def _heads_statement(kinds: frozenset[JobKind]) -> Any:
    """Return the query of the first job of each demand that is due."""
    waiting = jobs.waiting_demands_cte(kinds)
    head = (
        sa.select(col(JobRow.id))
        .where(sa.text(CLAIMABLE), col(JobRow.kind) == waiting.c.kind, col(JobRow.demand) == waiting.c.demand, _due())
        .order_by(*_ORDER)
        .limit(1)
        .correlate(waiting)
        .scalar_subquery()
    )
    return _candidate_statement().join_from(waiting, JobRow, col(JobRow.id) == head)


async def _with_time_limits(session: AsyncSession, demands: Sequence[Demand], *, now: datetime) -> Sequence[Candidate]:
    """Return jobs near the front that have a time limit: one may fit into a gap where the first one does not."""
    found: list[Candidate] = []
    for demand in demands[:MOST_TRIES]:
        statement = _candidate_statement().where(
            sa.text(CLAIMABLE), col(JobRow.kind) == demand.kind, col(JobRow.demand) == demand.text, _due()
        )
        rows = await session.exec(statement.order_by(*_ORDER).limit(MOST_TRIES), params={"now": now})
        found += [one for one in map(_candidate, rows.all()) if one.seconds is not None]
    return found


def _candidate_statement() -> Any:
    names = ("id", "demand", "priority", "created_at", "limits", "reserved_node_id")
    return sa.select(*(getattr(JobRow, name) for name in names))


def _candidate(row: Any) -> Candidate:
    return Candidate(
        job_id=row.id,
        demand=Demand.parse(row.demand),
        priority=row.priority,
        created_at=row.created_at,
        seconds=row.limits.get("seconds"),
        reserved_node_id=row.reserved_node_id,
    )


def _due() -> sa.ColumnElement[bool]:
    now = sa.bindparam("now", type_=UtcDateTime)
    return sa.or_(col(JobRow.not_before).is_(None), col(JobRow.not_before) <= now)


# ---- writing --------------------------------------------------------------------------------------------------------


async def _win(session: AsyncSession, host: Host, take: Take, *, now: datetime, lease: timedelta) -> Claim | None:
    job_id = await _lock(session, take, now=now)
    if job_id is None:
        return None
    return await jobs.take(session, job_id, node_id=host.node_id, accelerators=take.accelerators, now=now, lease=lease)


async def _lock(session: AsyncSession, take: Take, *, now: datetime) -> str | None:
    """Return the job to take: what another node is about to claim is stepped over, not waited for."""
    candidate = take.candidate
    if session.get_bind().dialect.name == "sqlite":  # one writer at a time: nobody else is about to
        return candidate.job_id
    statement = select(JobRow.id).where(sa.text(CLAIMABLE))
    if take.interchangeable:
        alike = (col(JobRow.kind) == candidate.demand.kind, col(JobRow.demand) == candidate.demand.text, _due())
        statement = statement.where(*alike).order_by(*_ORDER).limit(1)
    else:
        statement = statement.where(JobRow.id == candidate.job_id)
    return (await session.exec(statement.with_for_update(skip_locked=True), params={"now": now})).first()


async def _reserve(session: AsyncSession, host: Host, decision: Decision) -> None:
    if decision.release is not None:
        await _write_reservation(session, decision.release, None)
    if decision.reserve is not None:
        await _write_reservation(session, decision.reserve, host.node_id)


async def _write_reservation(session: AsyncSession, candidate: Candidate, node_id: str | None) -> None:
    """Change whose reservation it is, unless somebody was faster or is at the row right now."""
    seen = col(JobRow.reserved_node_id).is_not_distinct_from(candidate.reserved_node_id)
    free = select(JobRow.id).where(JobRow.id == candidate.job_id, sa.text(CLAIMABLE), seen)
    if (await session.exec(free.with_for_update(skip_locked=True))).first() is not None:
        await session.exec(sa.update(JobRow).where(col(JobRow.id) == candidate.job_id).values(reserved_node_id=node_id))
