"""What a node writes of the jobs that it holds: take, mark, requeue, finish.

A live job belongs to the node that claimed it. Every write names the token that it got with the claim, and changes
nothing when the row has moved on. To take jobs is one conditional UPDATE, so two nodes never win the same one; partial
unique indexes make a second live attempt impossible whatever the code does. Which job a node takes stands in
`app.store.claims`.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason, JobStatus
from app.domain.retries import Again
from app.domain.transitions import LIVE
from app.store import leases
from app.store.job_status import (
    End,
    end_attempt,
    end_successors,
    release_successors,
    write_status,
    write_statuses,
)
from app.store.jobs import JOB
from app.store.nodes import STATUS_COLUMNS, NodeStatus, node_status_of
from app.store.tables import LIVE_ATTEMPT, AttemptRow, JobRow, NodeRow

UNCHARGED = Again(charged=False, delay=timedelta())


@dataclass(frozen=True)
class Claim:
    """A job that this node won, and the attempt that the claim made."""

    job: JobRow
    attempt: AttemptRow


async def take_several(
    session: AsyncSession,
    wanted: Sequence[tuple[str, Sequence[str]]],
    *,
    node_id: str,
    now: datetime,
    lease: timedelta,
) -> Sequence[Claim]:
    """Give queued jobs to the node, each with its accelerators; those that are not queued any more are left out."""
    if not wanted:
        return ()
    tokens = {job_id: str(uuid4()) for job_id, _ in wanted}
    numbers = await write_statuses(
        session,
        list(tokens),
        old={JobStatus.QUEUED},
        new=JobStatus.LAUNCHING,
        now=now,
        values={
            "node_id": node_id,
            "token": sa.case(tokens, value=JOB.c.id),
            "attempts": JOB.c.attempts + 1,
        },
    )
    rows = select(JobRow).where(col(JobRow.id).in_(numbers)).execution_options(populate_existing=True)
    taken = {job.id: job for job in (await session.exec(rows)).all()}
    claims = []
    for job_id, accelerators in wanted:
        if (job := taken.get(job_id)) is None:
            continue
        seconds = job.limits.get("seconds")
        attempt = AttemptRow(
            id=str(uuid4()),
            job_id=job_id,
            number=numbers[job_id],
            node_id=node_id,
            token=tokens[job_id],
            live=True,
            lease_expires_at=now + lease,
            accelerators=list(accelerators),
            expected_end_at=None if seconds is None else now + timedelta(seconds=seconds),
            created_at=now,
        )
        claims.append(Claim(job=job, attempt=attempt))
    session.add_all([claim.attempt for claim in claims])
    await session.flush()
    await leases.take(session, [claim.attempt for claim in claims])
    return claims


async def live_attempts(session: AsyncSession, node_id: str) -> Sequence[Claim]:
    """Return what this node has claimed and not ended."""
    statement = (
        select(JobRow, AttemptRow)
        .join(AttemptRow, col(AttemptRow.job_id) == col(JobRow.id))
        .where(AttemptRow.node_id == node_id, sa.text(LIVE_ATTEMPT))
        .order_by(col(AttemptRow.created_at))
    )
    return [Claim(job=job, attempt=attempt) for job, attempt in (await session.exec(statement)).all()]


async def node_and_attempts(session: AsyncSession, node_id: str) -> tuple[NodeStatus, Sequence[Claim]]:
    """Return the status of a node and what it has claimed and not ended, by one statement."""
    rows = (await session.exec(_node_and_attempts_statement(), params={"node_id": node_id})).all()
    claims = [Claim(job=row.JobRow, attempt=row.AttemptRow) for row in rows if row.AttemptRow is not None]
    return node_status_of(rows[0]), claims


@functools.cache
def _node_and_attempts_statement() -> Any:
    live = sa.and_(col(AttemptRow.node_id) == col(NodeRow.id), sa.text(f"attempt.{LIVE_ATTEMPT}"))
    return (
        sa.select(*STATUS_COLUMNS, JobRow, AttemptRow)
        .select_from(NodeRow)
        .outerjoin(AttemptRow, live)
        .outerjoin(JobRow, col(JobRow.id) == col(AttemptRow.job_id))
        .where(col(NodeRow.id) == sa.bindparam("node_id"))
        .order_by(col(AttemptRow.created_at))
    )


async def renew_leases(session: AsyncSession, node_id: str, *, now: datetime, lease: timedelta) -> None:
    """Extend the lease of everything that this node holds."""
    await session.exec(
        sa.update(AttemptRow)
        .where(col(AttemptRow.node_id) == node_id, sa.text(LIVE_ATTEMPT))
        .values(lease_expires_at=now + lease)
    )


async def expect_ends(session: AsyncSession, ends: Mapping[str, datetime | None]) -> None:
    """Write down when live attempts are expected to end; None: unknown."""
    for attempt_id, end in ends.items():
        await session.exec(
            sa.update(AttemptRow)
            .where(col(AttemptRow.id) == attempt_id, col(AttemptRow.live).is_(True))
            .values(expected_end_at=end)
        )


async def mark_running(session: AsyncSession, claim: Claim, *, now: datetime) -> bool:
    """Record that the script's process exists. False: the claim was lost."""
    changed = await write_status(
        session,
        claim.job.id,
        old={JobStatus.LAUNCHING},
        new=JobStatus.RUNNING,
        now=now,
        token=claim.attempt.token,
        values={"started_at": sa.func.coalesce(col(JobRow.started_at), now)},
    )
    if changed:
        await session.exec(sa.update(AttemptRow).where(col(AttemptRow.id) == claim.attempt.id).values(started_at=now))
    return changed


async def mark_stopping(session: AsyncSession, claim: Claim, *, now: datetime) -> bool:
    """Record that the process tree was signalled to stop. False: the claim was lost."""
    return await write_status(
        session,
        claim.job.id,
        old={JobStatus.LAUNCHING, JobStatus.RUNNING},
        new=JobStatus.STOPPING,
        now=now,
        token=claim.attempt.token,
    )


async def record_resume(session: AsyncSession, claim: Claim, checkpoint: Mapping[str, Any]) -> None:
    """Remember which checkpoint the attempt is given."""
    await session.exec(
        sa.update(AttemptRow)
        .where(col(AttemptRow.id) == claim.attempt.id, sa.text(LIVE_ATTEMPT))
        .values(resumed_from=dict(checkpoint))
    )


async def requeue(
    session: AsyncSession,
    claim: Claim,
    *,
    reason: EndReason,
    now: datetime,
    again: Again = UNCHARGED,
    params: Mapping[str, Any] | None = None,
    exit_record: Mapping[str, Any] | None = None,
) -> bool:
    """End an attempt and let the job be claimed again, after the decision's delay.

    False: the claim was lost, or a cancel was requested; nothing changed.
    """
    counter = JobRow.retries if again.charged else JobRow.recoveries
    changed = await write_status(
        session,
        claim.job.id,
        old=LIVE,
        new=JobStatus.QUEUED,
        now=now,
        token=claim.attempt.token,
        unless_cancelled=True,
        why=reason,
        values={
            "token": None,
            "not_before": now + again.delay if again.delay else None,
            ("retries" if again.charged else "recoveries"): counter + 1,
        },
    )
    if changed:
        await end_attempt(session, claim.attempt, reason=reason, params=params, exit_record=exit_record, now=now)
    return changed


async def finish(session: AsyncSession, claim: Claim, end: End, *, now: datetime) -> bool:
    """End the attempt and its job; release or end the jobs that wait for it. False: the claim was lost."""
    changed = await write_status(
        session, claim.job.id, old=LIVE, new=end.status, now=now, token=claim.attempt.token, end=end
    )
    if not changed:
        return False
    await end_attempt(session, claim.attempt, reason=end.reason, params=end.params, exit_record=end.exit, now=now)
    if end.status is JobStatus.SUCCEEDED:
        await release_successors(session, claim.job.id, model_id=end.result_model_id, now=now)
    else:
        await end_successors(session, claim.job.id, now=now)
    return True
