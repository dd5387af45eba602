"""What nodes are doing: their live attempts, and who holds their accelerators."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import JobKind, JobStatus
from app.store.session import EVERYBODYS, scope_of
from app.store.tables import LIVE_ATTEMPT, LIVE_LEASE, AttemptRow, JobRow, LeaseRow


@dataclass(frozen=True)
class LiveJob:
    """A job that a node claimed and did not end, with its present attempt."""

    id: str
    name: str
    kind: JobKind
    status: JobStatus
    attempt: int
    accelerators: tuple[str, ...]
    claimed_at: datetime
    cancel_requested: bool


@dataclass(frozen=True)
class Holder:
    """The attempt that an accelerator is leased to; `quarantined`: it ended, and something of it may be left."""

    job_id: str
    attempt: int
    quarantined: bool


async def live_jobs(session: AsyncSession, node_ids: Collection[str]) -> Mapping[str, Sequence[LiveJob]]:
    """Return node → its live jobs, the longest first; a node without any is left out.

    Those of other projects are among them, since they keep the node busy; they have no name.
    """
    project = scope_of(session).project
    statement = (
        select(AttemptRow, JobRow)
        .join(JobRow, col(JobRow.id) == col(AttemptRow.job_id))
        .where(col(AttemptRow.node_id).in_(node_ids), sa.text(LIVE_ATTEMPT))
        .order_by(col(AttemptRow.created_at), col(AttemptRow.id))
        .execution_options(**EVERYBODYS)
    )
    found: dict[str, list[LiveJob]] = defaultdict(list)
    for attempt, job in (await session.exec(statement)).all():
        found[attempt.node_id].append(
            LiveJob(
                id=job.id,
                name=job.name if project in (None, job.project_id) else "",
                kind=job.kind,
                status=job.status,
                attempt=attempt.number,
                accelerators=tuple(attempt.accelerators),
                claimed_at=attempt.created_at,
                cancel_requested=job.cancel_requested_at is not None,
            )
        )
    return found


async def holders(session: AsyncSession, node_ids: Collection[str]) -> Mapping[str, Mapping[str, Holder]]:
    """Return node → accelerator → who holds it."""
    statement = (
        select(LeaseRow, AttemptRow.job_id, AttemptRow.number)
        .join(AttemptRow, col(AttemptRow.id) == col(LeaseRow.attempt_id))
        .where(col(LeaseRow.node_id).in_(node_ids), sa.text(f"lease.{LIVE_LEASE}"))
    )
    found: dict[str, dict[str, Holder]] = defaultdict(dict)
    for lease, job_id, attempt in (await session.exec(statement)).all():
        found[lease.node_id][lease.accelerator] = Holder(job_id, attempt, lease.quarantined_at is not None)
    return found
