"""The one writer of `status`: transitions of jobs, the ends of their attempts, and what follows for jobs that wait.

The API requests cancels; a live job is written by the node that holds it (`app.store.job_attempts`). Every change is
one conditional UPDATE that records its event, so that of two writers one wins.
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.demand import COMPARISON_PRIORITY
from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.errors import Conflict
from app.domain.kinds import KINDS_IN_ENVIRONMENTS
from app.domain.transitions import TERMINAL, UNFINISHED, check_transition
from app.domain.webhooks import PUBLISHED_STATUSES, event_of
from app.store import leases, webhooks
from app.store.jobs import JOB, get, record_events, waiting_demands
from app.store.tables import CLAIMABLE, LIVE_ATTEMPT, AttemptRow, JobRow

FAILED_AT_ONCE = 100
_ATTEMPT: sa.Table = AttemptRow.__table__  # type: ignore[attr-defined]
# On tables, not on classes, and made once: what the ORM does with a statement takes longer than the statement.
_END_ATTEMPT = (
    sa.update(_ATTEMPT)
    .where(
        _ATTEMPT.c.id == sa.bindparam("ended_id"),
        _ATTEMPT.c.token == sa.bindparam("ended_token"),
        _ATTEMPT.c.live.is_(True),
    )
    .values({name: sa.bindparam(name) for name in ("live", "reason", "reason_params", "finished_at", "exit")})
)
# Without a condition on the status: SQLite would take the index of that and visit all of a long queue.
_SUCCESSORS = sa.select(JOB.c.id).where(JOB.c.blocked_by == sa.bindparam("predecessor"))
UNPROVEN = frozenset({EndReason.NODE_LOST, EndReason.SUPERVISOR_LOST})
"""Ends that, without an exit record, say nothing about the processes."""


class JobAlreadyFinished(Conflict):
    """The job has already ended and cannot be cancelled."""

    code = "job_already_finished"


@dataclass(frozen=True)
class End:
    """How an attempt and its job end."""

    status: JobStatus
    reason: EndReason
    params: Mapping[str, Any]
    exit: Mapping[str, Any] | None = None
    result_model_id: str | None = None
    memory: Mapping[str, Any] | None = None


async def request_cancel(session: AsyncSession, job_id: str, *, now: datetime) -> JobRow:
    """Cancel a queued job at once; ask the node of a live one to stop it. Twice is fine, after the end is not."""
    # locked: between two looks the job could be claimed, or come back to the queue, and miss the request
    job = await get(session, job_id, lock=True)
    if job.status in TERMINAL:
        raise JobAlreadyFinished(job=job_id, status=job.status)
    if job.status is JobStatus.QUEUED:
        end = End(status=JobStatus.CANCELLED, reason=EndReason.CANCELLED, params={})
        await end_queued(session, job_id, end, now=now)
    elif job.cancel_requested_at is None:
        job.cancel_requested_at = job.updated_at = now
        session.add(job)
        await session.flush()
    return await get(session, job_id)


async def request_cancel_of_method(session: AsyncSession, method_id: str, *, now: datetime) -> Sequence[str]:
    """Cancel every unfinished job of the method; return their ids."""
    statement = select(JobRow.id).where(JobRow.method_id == method_id, col(JobRow.status).in_(UNFINISHED))
    # in the order in which the end of a job locks those that wait for it, else the two could wait for each other
    unfinished = (await session.exec(statement.order_by(col(JobRow.chain_id), col(JobRow.position)))).all()
    for job_id in unfinished:
        if (await get(session, job_id)).status not in TERMINAL:  # a predecessor's end may have ended it already
            await request_cancel(session, job_id, now=now)
    return unfinished


async def cancel_comparisons(session: AsyncSession, *, now: datetime) -> Sequence[str]:
    """Cancel the comparisons of answers, so that a person's question waits for none of them; return their ids."""
    statement = select(JobRow.id).where(
        col(JobRow.status).in_(UNFINISHED),
        JobRow.priority == COMPARISON_PRIORITY,
        col(JobRow.cancel_requested_at).is_(None),
    )
    found = (await session.exec(statement.order_by(col(JobRow.chain_id), col(JobRow.position)))).all()
    for job_id in found:
        with contextlib.suppress(JobAlreadyFinished):
            await request_cancel(session, job_id, now=now)
    return found


async def succeed_unlaunched(session: AsyncSession, job_id: str, end: End, *, now: datetime) -> None:
    """End a queued job whose result is there already; release the jobs that wait for it."""
    if await write_status(session, job_id, old={JobStatus.QUEUED}, new=JobStatus.SUCCEEDED, now=now, end=end):
        await release_successors(session, job_id, model_id=end.result_model_id, now=now)


async def fail_queued(
    session: AsyncSession,
    *,
    environment: str,
    reason: EndReason,
    params: Mapping[str, Any],
    now: datetime,
    waiting_since: datetime | None = None,
    spare_patient: bool = False,
) -> int:
    """Fail queued jobs that need `environment`, oldest first, and return how many; 0 means that none is left.

    At most `FAILED_AT_ONCE`, so that other writers get their turn. With `waiting_since` only those that could have run
    at that time; with `spare_patient` not those whose caller said that they shall wait.
    """
    waiting = await waiting_demands(session, KINDS_IN_ENVIRONMENTS)
    demands = [demand.text for demand in waiting if demand.environment == environment]
    statement = select(JobRow.id).where(
        sa.text(CLAIMABLE), col(JobRow.kind).in_(KINDS_IN_ENVIRONMENTS), col(JobRow.demand).in_(demands)
    )
    if waiting_since is not None:
        statement = statement.where(col(JobRow.updated_at) <= waiting_since)
    if spare_patient:
        statement = statement.where(col(JobRow.launch)["wait"].as_boolean().is_not(True))
    end = End(status=JobStatus.FAILED, reason=reason, params=params)
    job_ids = (await session.exec(statement.order_by(col(JobRow.created_at)).limit(FAILED_AT_ONCE))).all()
    for job_id in job_ids:
        await end_queued(session, job_id, end, now=now)
    return len(job_ids)


async def end_queued(session: AsyncSession, job_id: str, end: End, *, now: datetime) -> None:
    """End a queued job without success, and the jobs that wait for it."""
    if await write_status(session, job_id, old={JobStatus.QUEUED}, new=end.status, now=now, end=end):
        await end_successors(session, job_id, now=now)


async def end_all_unfinished(session: AsyncSession, end: End, *, now: datetime) -> int:
    """End every job that has not ended, wherever it is, with its attempts and leases; return how many there were."""
    connection = await session.connection()
    closed = {"live": False, "reason": end.reason, "finished_at": now}
    await connection.execute(sa.update(_ATTEMPT).where(sa.text(LIVE_ATTEMPT)).values(**closed))
    await leases.release_all(session, now=now)
    unfinished = (await session.exec(select(JobRow.id).where(col(JobRow.status).in_(UNFINISHED)))).all()
    nowhere = {"blocked_by": None, "cancel_requested_at": None}
    for at in range(0, len(unfinished), FAILED_AT_ONCE):
        some = unfinished[at : at + FAILED_AT_ONCE]
        await write_statuses(session, some, old=UNFINISHED, new=end.status, now=now, end=end, values=nowhere)
    return len(unfinished)


async def end_queued_builds(session: AsyncSession, node_id: str, end: End, *, now: datetime) -> int:
    """End the queued builds of environments on this node; return how many there were."""
    statement = select(JobRow.id).where(
        JobRow.node_id == node_id, JobRow.status == JobStatus.QUEUED, JobRow.kind == JobKind.ENVIRONMENT
    )
    builds = (await session.exec(statement)).all()
    for job_id in builds:
        await write_status(session, job_id, old={JobStatus.QUEUED}, new=end.status, now=now, end=end)
    return len(builds)


async def write_status(
    session: AsyncSession,
    job_id: str,
    *,
    old: Collection[JobStatus],
    new: JobStatus,
    now: datetime,
    token: str | None = None,
    unless_cancelled: bool = False,
    why: EndReason | None = None,
    end: End | None = None,
    values: Mapping[str, Any] | None = None,
) -> bool:
    """Change the status if it still is one of `old` and (given) the token is still valid; record the event.

    `unless_cancelled`: nor if a cancel was requested. `why` goes into the event where there is no `end`.
    """
    conditions = []
    if token is not None:
        conditions.append(JOB.c.token == token)
    if unless_cancelled:
        conditions.append(JOB.c.cancel_requested_at.is_(None))
    changed = await write_statuses(
        session, [job_id], old=old, new=new, now=now, conditions=conditions, why=why, end=end, values=values
    )
    return job_id in changed


async def write_statuses(
    session: AsyncSession,
    job_ids: Sequence[str],
    *,
    old: Collection[JobStatus],
    new: JobStatus,
    now: datetime,
    conditions: Sequence[sa.ColumnElement[bool]] = (),
    why: EndReason | None = None,
    end: End | None = None,
    values: Mapping[str, Any] | None = None,
) -> Mapping[str, int]:
    """Change the status of those that still are in one of `old`, record the events; return job → its attempts."""
    for status in old:
        check_transition(status, new)
    changes: dict[str, Any] = {"status": new, "updated_at": now, "reserved_node_id": None, **(values or {})}
    if end is not None:
        changes |= {"reason": end.reason, "reason_params": dict(end.params), "finished_at": now}
        if end.result_model_id is not None:
            changes["result_model_id"] = end.result_model_id
        if end.memory is not None:
            changes["memory"] = dict(end.memory)
    statement = sa.update(JOB).where(JOB.c.id.in_(job_ids), JOB.c.status.in_(old), *conditions)
    subscribed = webhooks.has_subscribers() if new in PUBLISHED_STATUSES else sa.false()
    written = statement.values(**changes).returning(JOB.c.id, JOB.c.attempts, JOB.c.kind, subscribed)
    await session.flush()  # rows that the session knows keep their values; `get` reads them again
    rows = (await (await session.connection()).execute(written)).all()
    reason = end.reason if end else why
    await record_events(
        session, {job_id: attempt for job_id, attempt, _, _ in rows}, status=new, reason=reason, now=now
    )
    for job_id, _, kind, has_subscriber in rows:
        if has_subscriber and (event := event_of(kind, new)) is not None:
            job = await get(session, job_id)
            if job.priority != COMPARISON_PRIORITY:  # nobody asked for it
                await webhooks.publish(session, job, event, now=now)
    return {job_id: attempt for job_id, attempt, _, _ in rows}


async def end_attempt(
    session: AsyncSession,
    attempt: AttemptRow,
    *,
    reason: EndReason,
    params: Mapping[str, Any] | None,
    exit_record: Mapping[str, Any] | None,
    now: datetime,
) -> None:
    """Write the end of a live attempt, and free its accelerators once its processes are proven gone."""
    ended = {
        "ended_id": attempt.id,
        "ended_token": attempt.token,
        "live": False,
        "reason": reason,
        "reason_params": _without_tail(params or {}),
        "finished_at": now,
        "exit": dict(exit_record) if exit_record else None,
    }
    await (await session.connection()).execute(_END_ATTEMPT, ended)
    if attempt.accelerators:
        await leases.end_of_attempt(session, attempt.id, proven_empty=_is_proven_empty(reason, exit_record), now=now)


def _is_proven_empty(reason: EndReason, exit_record: Mapping[str, Any] | None) -> bool:
    """Say whether nothing of the attempt is left: its supervisor found the tree empty, or nothing was ever started."""
    if exit_record is not None:
        return not exit_record.get("unkillable")
    return reason not in UNPROVEN


def _without_tail(params: Mapping[str, Any]) -> dict[str, Any]:
    """The last lines of output are kept with the job; those of an attempt stand in its folder."""
    return {name: value for name, value in params.items() if name != "log_tail"}


async def release_successors(session: AsyncSession, job_id: str, *, model_id: str | None, now: datetime) -> None:
    """Let the jobs that wait for one that succeeded be claimed."""
    waiting = await _successors(session, job_id)
    if not waiting:
        return
    # one that waited for its base model keeps the model that it goes on from
    made = {"model_id": model_id} if model_id is not None else {}
    await session.exec(
        sa.update(JobRow)
        .where(col(JobRow.id).in_(waiting), col(JobRow.status) == JobStatus.QUEUED)
        .values(blocked_by=None, updated_at=now, **made)
    )


async def end_successors(session: AsyncSession, job_id: str, *, now: datetime) -> None:
    """End what waits for a job that did not succeed, and what waits for that."""
    failed = _without_base_model(await get(session, job_id))
    if failed is not None:
        for successor in await _successors(session, job_id):
            await end_queued(session, successor, failed, now=now)
        return
    end = End(status=JobStatus.CANCELLED, reason=EndReason.PREDECESSOR_FAILED, params={"predecessor": job_id})
    waiting = [job_id]
    while waiting:
        for successor in await _successors(session, waiting.pop()):
            if await write_status(session, successor, old={JobStatus.QUEUED}, new=end.status, now=now, end=end):
                waiting.append(successor)


def _without_base_model(job: JobRow) -> End | None:
    """Return how those end that wait for a base model that could not be made; None for the end of any other job."""
    if job.kind is not JobKind.BASE_MODEL or job.status is not JobStatus.FAILED:
        return None
    told = {"detail": job.reason_params.get("detail", ""), "log_tail": job.reason_params.get("log_tail", [])}
    params = {"base_model": job.name, "build": job.id, **told}
    return End(status=JobStatus.FAILED, reason=EndReason.BASE_MODEL_BUILD_FAILED, params=params)


async def _successors(session: AsyncSession, job_id: str) -> Sequence[str]:
    """Return the jobs that wait, or waited, for this one."""
    return (await (await session.connection()).execute(_SUCCESSORS, {"predecessor": job_id})).scalars().all()
