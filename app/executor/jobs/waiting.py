"""Explain why jobs are queued: position, estimated start, reason. A few queries for a page of jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.demand import Demand
from app.domain.enums import JobStatus
from app.domain.kinds import SlotPool, kinds_of
from app.domain.placement import NEVER, Candidate
from app.domain.projects import EVERY_PROJECT
from app.domain.waiting import KnownNode, NodeCondition, WaitingReason, estimated_starts, waiting_reason
from app.store.claims import first_in_order, hosts_of, limits_of, slot_holders
from app.store.clock import database_now
from app.store.nodes import NODE_SILENT_AFTER, all_nodes
from app.store.session import within
from app.store.tables import JobRow, NodeRow

COUNTED = 1000  # positions further back are not reported
FORESEEN = 100  # starts further back are not estimated


@dataclass(frozen=True)
class Waiting:
    """`position` 1 is the next one; None: not in the queue yet, of a kind without one, or too far back."""

    reason: WaitingReason
    position: int | None = None
    estimated_start: datetime | None = None


async def waiting_of(session: AsyncSession, rows: Sequence[JobRow]) -> Mapping[str, Waiting]:
    """Return job → what it waits for, for the queued ones among `rows`."""
    queued = [row for row in rows if row.status is JobStatus.QUEUED]
    if not queued:
        return {}
    now = await database_now(session)
    held_back = {row.id: waiting for row in queued if (waiting := _held_back(row, now=now)) is not None}
    ready = [_candidate(row) for row in queued if row.id not in held_back]
    if not ready:
        return held_back
    async with within(session, EVERY_PROJECT):  # jobs wait for those of all projects
        queue = await first_in_order(session, kinds_of(SlotPool.STAGES), now=now, limit=COUNTED)
        nodes = await _nodes(session, now=now)
        limits = await limits_of(session, [one.demand for one in (*queue[:FORESEEN], *ready)])
    places = {one.job_id: place for place, one in enumerate(queue, start=1)}
    starts = estimated_starts(queue[:FORESEEN], nodes, limits=limits, now=now)
    return held_back | {
        one.job_id: Waiting(
            reason=waiting_reason(one, nodes, limits=limits, now=now),
            position=places.get(one.job_id),
            estimated_start=starts.get(one.job_id),
        )
        for one in ready
    }


def _held_back(row: JobRow, *, now: datetime) -> Waiting | None:
    """Return what keeps the job out of the queue."""
    if row.blocked_by is not None:
        # only the making of its base model comes before the first job of a chain
        code = "waiting_base_model" if row.chain_id == row.id else "waiting_predecessor"
        return Waiting(WaitingReason(code, {"job": row.blocked_by}))
    if row.not_before is not None and row.not_before > now:
        moment = row.not_before.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return Waiting(WaitingReason("waiting_not_before", {"time": moment}))
    return None


def _candidate(row: JobRow) -> Candidate:
    return Candidate(
        job_id=row.id,
        demand=Demand.parse(row.demand),
        priority=row.priority,
        created_at=row.created_at,
        seconds=row.limits.get("seconds"),
        reserved_node_id=row.reserved_node_id,
    )


async def _nodes(session: AsyncSession, *, now: datetime) -> Sequence[KnownNode]:
    rows = await all_nodes(session)
    holders = await slot_holders(session)
    return [
        KnownNode(
            host=host,
            condition=_condition(row, now=now),
            slots=_slots(row, holders.get(row.id, ()), now=now),
        )
        for row, host in zip(rows, await hosts_of(session, rows, reservations=False), strict=True)
    ]


def _condition(row: NodeRow, *, now: datetime) -> NodeCondition:
    if row.dead_at is not None:
        return NodeCondition.DEAD
    if now - row.heartbeat_at >= NODE_SILENT_AFTER:
        return NodeCondition.SILENT
    if row.draining_at is not None:
        return NodeCondition.DRAINING
    return NodeCondition.REFUSING if row.refusal is not None else NodeCondition.WORKS


def _slots(row: NodeRow, holders: Sequence[datetime | None], *, now: datetime) -> tuple[datetime, ...]:
    busy = sorted(NEVER if end is None else max(end, now) for end in holders)[: row.slots]
    return (*[now] * (row.slots - len(busy)), *busy)
