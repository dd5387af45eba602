"""The claim: a node wins the first job that it may start now, with the accelerators that the job holds.

One transaction: look at the fronts of the queue, at the node's leases, at limits and reservations; decide by the pure
rules of `app.domain.placement`; write. Two nodes never win the same job (a conditional UPDATE), two attempts never one
accelerator (a partial unique index), and a limited queue lets its claimers in one after the other (its row is locked).
"""

import functools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.demand import Demand
from app.domain.enums import JobKind
from app.domain.kinds import HOLDING_KINDS, KINDS, LIMITED_KINDS, SlotPool, kinds_of
from app.domain.placement import (
    Candidate,
    Decision,
    Host,
    QueueLimit,
    QueueLimits,
    Take,
    cards_of,
    decide,
    is_blocked,
    mismatches,
)
from app.store import audit_records, job_attempts, jobs, leases
from app.store.allow_lists import of_node
from app.store.job_attempts import Claim
from app.store.nodes import accelerators_of, blocked_of, lacking_of, takes_jobs, working_nodes
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

    `usable` None: no foreign process uses any of its accelerators.
    """

    node_id: str
    environments: Collection[str]
    slots: int
    usable: Collection[str] | None = None


async def claim(
    session: AsyncSession, offer: Offer, *, kinds: Collection[JobKind], now: datetime, lease: timedelta
) -> Claim | None:
    """Win the first job of `kinds` that the node may start now; None when there is none."""
    won = await claim_several(session, offer, kinds=kinds, now=now, lease=lease, most=1)
    return won[0] if won else None


async def claim_several(
    session: AsyncSession, offer: Offer, *, kinds: Collection[JobKind], now: datetime, lease: timedelta, most: int
) -> Sequence[Claim]:
    """Win the first jobs of `kinds` that the node may start now, in their order, at most `most`.

    A job that this node will be free for soonest gets its reservation on the way.
    """
    # locked: a person must not declare it dead, or drain it, between this look and the end of the transaction
    node = await session.get_one(NodeRow, offer.node_id, with_for_update={"read": True})
    if not takes_jobs(node):  # what it keeps accelerators for is taken over by others
        return ()
    won: list[Claim] = []
    for _ in range(MOST_TRIES):
        slots = offer.slots - sum(not claim.attempt.accelerators for claim in won)
        front = await _look(session, node, replace(offer, slots=slots), kinds, now=now)
        if front is None:
            break
        takes, look_again = await _choose(session, front, most=most - len(won), now=now)
        won += await job_attempts.take_several(session, takes, node_id=node.id, now=now, lease=lease)
        if len(won) == most or not look_again:
            break
    if won:
        await audit_records.record_launches(session, node, won, now=now)
    return won


async def limits_of(session: AsyncSession, demands: Collection[Demand], *, lock: bool = False) -> QueueLimits:
    """Return the limits that jobs of these demands meet; with `lock` no other node claims from a limited queue now."""
    names = {demand.queue for demand in demands if KINDS[demand.kind].counts_in_limits}
    statement = select(QueueRow.name, QueueRow.max_live, QueueRow.max_live_per_user).where(
        col(QueueRow.name).in_(names), _has_limits()
    )
    # always in the same order, else two claimers could wait for each other
    statement = statement.order_by(col(QueueRow.name))
    rows = (await session.exec(statement.with_for_update() if lock else statement)).all()
    by_queue = {name: QueueLimit(max_live=most, max_live_per_user=per_user) for name, most, per_user in rows}
    if not by_queue:
        return QueueLimits()
    counted = (
        select(JobRow.queue, JobRow.submitted_by, sa.func.count())
        .where(sa.text(LIVE_JOB), col(JobRow.queue).in_(by_queue), col(JobRow.kind).in_(LIMITED_KINDS))
        .group_by(col(JobRow.queue), col(JobRow.submitted_by))
    )
    live = {(queue, user): count for queue, user, count in (await session.exec(counted)).all()}
    return QueueLimits(by_queue=by_queue, live=live)


def _has_limits() -> sa.ColumnElement[bool]:
    return sa.or_(col(QueueRow.max_live).is_not(None), col(QueueRow.max_live_per_user).is_not(None))


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
            lacking=lacking_of(row),
            allowed=of_node(row),
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
    """Return node → when the jobs that hold one of its slots are expected to end; None when unknown."""
    statement = (
        select(AttemptRow.node_id, AttemptRow.expected_end_at, AttemptRow.accelerators)
        .join(JobRow, col(JobRow.id) == col(AttemptRow.job_id))
        .where(sa.text(f"attempt.{LIVE_ATTEMPT}"), col(JobRow.kind).in_(kinds_of(SlotPool.STAGES)))
    )
    found: dict[str, list[datetime | None]] = defaultdict(list)
    for node_id, expected_end_at, accelerators in (await session.exec(statement)).all():
        if not accelerators:
            found[node_id].append(expected_end_at)
    return found


# ---- choosing -------------------------------------------------------------------------------------------------------


@dataclass
class _Front:
    """What the node decides by. It is kept in step with what the node takes, so that it need not look again."""

    host: Host
    candidates: list[Candidate]
    others: Sequence[Host]
    limits: QueueLimits
    alike: dict[str, list[Candidate]] = field(default_factory=dict)  # by demand: the next ones, locked

    def take(self, take: Take, candidate: Candidate, *, now: datetime) -> None:
        """Take `candidate`, which stands for that of the decision; the next one like it comes to the front."""
        until = None if candidate.seconds is None else now + timedelta(seconds=candidate.seconds)
        kept = self.host.keeps_for
        self.host = replace(
            self.host,
            cards=tuple(
                replace(card, free=False, until=until) if card.accelerator.id in take.accelerators else card
                for card in self.host.cards
            ),
            slots=self.host.slots - (not take.accelerators),
            keeps_for=None if kept is not None and kept.job_id == candidate.job_id else kept,
        )
        self.limits = self.limits.with_one_more(candidate.demand)
        gone = {take.candidate.job_id, candidate.job_id}
        self.candidates = [one for one in self.candidates if one.job_id not in gone]
        self.alike = {text: [one for one in alike if one.job_id not in gone] for text, alike in self.alike.items()}
        if following := self.alike.get(candidate.demand.text):
            self.candidates.append(following[0])

    def needs_others(self) -> bool:
        """Say whether a job waits for several accelerators and no reservation keeps them here."""
        unkept = (one for one in self.candidates if one.reserved_node_id != self.host.node_id)
        return any(is_blocked(one, self.host) for one in unkept)


async def _look(
    session: AsyncSession, node: NodeRow, offer: Offer, kinds: Collection[JobKind], *, now: datetime
) -> _Front | None:
    """Return what the node decides by; None if nothing waits for it."""
    host = await _host(session, node, offer, kinds)
    candidates, limited = await _candidates(session, host, kinds, now=now)
    if not candidates and host.keeps_for is None:
        return None
    limits = await limits_of(session, [one.demand for one in candidates], lock=True) if limited else QueueLimits()
    front = _Front(host=host, candidates=list(candidates), others=(), limits=limits)
    if front.needs_others():
        rows = [row for row in await working_nodes(session, now=now) if row.id != host.node_id]
        front.others = await hosts_of(session, rows)
    return front


async def _choose(
    session: AsyncSession, front: _Front, *, most: int, now: datetime
) -> tuple[Sequence[tuple[str, tuple[str, ...]]], bool]:
    """Return the jobs to take with their accelerators, and whether there may be more after another look."""
    takes: list[tuple[str, tuple[str, ...]]] = []
    while len(takes) < most:
        decision = decide(front.candidates, front.host, others=front.others, limits=front.limits, now=now)
        await _reserve(session, front.host, decision)
        if decision.take is None:
            return takes, False
        candidate = await _lock(session, front, decision.take, most=most - len(takes), now=now)
        if candidate is None:  # another node was faster
            return takes, True
        takes.append((candidate.job_id, decision.take.accelerators))
        front.take(decision.take, candidate, now=now)
        if decision.reserve or decision.release or (not front.others and front.needs_others()):
            return takes, True
    return takes, False


async def _lock(session: AsyncSession, front: _Front, take: Take, *, most: int, now: datetime) -> Candidate | None:
    """Return the job to take: what another node is about to claim is stepped over, not waited for.

    With it, those are read and locked that may be taken next in its place.
    """
    chosen = take.candidate
    if take.interchangeable and (known := front.alike.get(chosen.demand.text)):
        return known[0]
    sqlite = session.get_bind().dialect.name == "sqlite"  # one writer at a time: no other node is about to claim
    if sqlite and (most == 1 or not take.interchangeable):
        return chosen
    statement = _candidate_statement().where(sa.text(CLAIMABLE))
    if take.interchangeable:
        alike = (col(JobRow.kind) == chosen.demand.kind, col(JobRow.demand) == chosen.demand.text, _due())
        statement = statement.where(*alike).order_by(*_ORDER).limit(most)
    else:
        statement = statement.where(col(JobRow.id) == chosen.job_id)
    rows = (await session.exec(statement.with_for_update(skip_locked=True), params={"now": now})).all()
    found = [_candidate(row) for row in rows]
    if take.interchangeable:
        front.alike[chosen.demand.text] = found
    return found[0] if found else None


# ---- the node itself ------------------------------------------------------------------------------------------------


async def _host(session: AsyncSession, node: NodeRow, offer: Offer, kinds: Collection[JobKind]) -> Host:
    """Return this node with what it offers; reservations are for kinds that hold accelerators."""
    known = accelerators_of(node)
    holders = await leases.held(session, [node.id]) if known else {}
    several = len(known) > 1 and set(kinds) >= HOLDING_KINDS
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
        lacking=lacking_of(node),
        allowed=of_node(node),
    )


async def _reserved_for(session: AsyncSession, node_ids: Collection[str]) -> Mapping[str, Candidate]:
    statement = _candidate_statement().where(sa.text(RESERVING), col(JobRow.reserved_node_id).in_(node_ids))
    found = [_candidate(row) for row in (await session.exec(statement)).all()]
    return {one.reserved_node_id: one for one in found if one.reserved_node_id is not None}


# ---- the queue ------------------------------------------------------------------------------------------------------


async def _candidates(
    session: AsyncSession, host: Host, kinds: Collection[JobKind], *, now: datetime
) -> tuple[Sequence[Candidate], bool]:
    """Return the first job of each demand that the node could meet, and beside a reservation some more of each.

    With them, whether the queue of any has limits.
    """
    heads = (await session.exec(_heads_statement(frozenset(kinds)), params={"now": now})).all()
    found = [one for one in map(_candidate, heads) if not mismatches(one.demand, host)]
    if host.keeps_for is not None:
        found += await _with_time_limits(session, [one.demand for one in found], now=now)
    return found, any(row.limited for row in heads)


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
    limited = sa.exists().where(col(QueueRow.name) == col(JobRow.queue), _has_limits()).label("limited")
    return _candidate_statement().add_columns(limited).join_from(waiting, JobRow, col(JobRow.id) == head)


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


async def _reserve(session: AsyncSession, host: Host, decision: Decision) -> None:
    if decision.release is not None:
        await _write_reservation(session, decision.release, None)
    if decision.reserve is not None:
        await _write_reservation(session, decision.reserve, host.node_id)


async def _write_reservation(session: AsyncSession, candidate: Candidate, node_id: str | None) -> None:
    """Change whose reservation it is, unless another node was faster or has locked the row."""
    seen = col(JobRow.reserved_node_id).is_not_distinct_from(candidate.reserved_node_id)
    free = select(JobRow.id).where(JobRow.id == candidate.job_id, sa.text(CLAIMABLE), seen)
    if (await session.exec(free.with_for_update(skip_locked=True))).first() is not None:
        await session.exec(sa.update(JobRow).where(col(JobRow.id) == candidate.job_id).values(reserved_node_id=node_id))
