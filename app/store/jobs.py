"""Jobs, attempts and their events: the queue, the claim, the lease, and the one writer of `status`.

Who may write what: the API inserts chains and requests cancels (`request_cancel`). A live job belongs to the node that
claimed it; every later write of that node names the token it got with the claim, and changes nothing when the row has
moved on. To take a job is one conditional UPDATE, so two nodes never win the same one; partial unique indexes make a
second live attempt impossible whatever the code does. Which job a node takes stands in `app.store.claims`.
"""

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import SelectOfScalar

from app.domain.demand import DEFAULT_QUEUE, Demand, Resources
from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.errors import Conflict, NotFound
from app.domain.kinds import KINDS_IN_ENVIRONMENTS
from app.domain.retries import Again
from app.domain.transitions import LIVE, TERMINAL, UNFINISHED, check_transition
from app.domain.webhooks import PUBLISHED_STATUSES, event_of
from app.store import leases, webhooks
from app.store.tables import BUILDING, CLAIMABLE, LIVE_ATTEMPT, AttemptRow, JobEventRow, JobRow, NodeRow
from app.store.types import enum_type

FAILED_AT_ONCE = 100
_JOB: sa.Table = JobRow.__table__  # type: ignore[attr-defined]
_INSERT_JOB = sa.insert(_JOB)
_INSERT_EVENT = sa.insert(JobEventRow.__table__)  # type: ignore[attr-defined]
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
_SUCCESSORS = sa.select(_JOB.c.id).where(_JOB.c.blocked_by == sa.bindparam("predecessor"))
UNCHARGED = Again(charged=False, delay=timedelta())
UNPROVEN = frozenset({EndReason.NODE_LOST, EndReason.SUPERVISOR_LOST})
"""Ends that, without an exit record, say nothing about the processes."""


class JobNotFound(NotFound):
    """No job has this id."""

    code = "job_not_found"


class JobAlreadyFinished(Conflict):
    """The job has already ended and cannot be cancelled."""

    code = "job_already_finished"


@dataclass(frozen=True)
class Claim:
    """A job that this node won, and the attempt that the claim made."""

    job: JobRow
    attempt: AttemptRow


@dataclass(frozen=True)
class PastAttempt:
    """An attempt and the name of the node that it was launched on."""

    row: AttemptRow
    node: str


@dataclass(frozen=True)
class End:
    """How an attempt and its job end."""

    status: JobStatus
    reason: EndReason
    params: Mapping[str, Any]
    exit: Mapping[str, Any] | None = None
    result_model_id: str | None = None
    memory: Mapping[str, Any] | None = None


# ---- submit ---------------------------------------------------------------------------------------------------------


def new_job(
    *, kind: JobKind, name: str, environment: str, launch: Mapping[str, Any], now: datetime, **columns: Any
) -> JobRow:
    """Return a queued job that is a chain of its own; the only place where such a row is made.

    `launch` is its specification (`app.executor.runs.job_spec`), `columns` are further columns of `JobRow`.
    """
    job_id = columns.pop("id", None) or str(uuid4())
    return JobRow(
        id=job_id,
        kind=kind,
        name=name,
        status=JobStatus.QUEUED,
        reason_params={},
        chain_id=job_id,
        environment=environment,
        parameters=columns.pop("parameters", {}),
        launch=dict(launch),
        created_at=now,
        updated_at=now,
        **columns,
    )


def link(jobs: Sequence[JobRow]) -> None:
    """Make one chain of the jobs: each waits for the one before it."""
    for before, job in itertools.pairwise(jobs):
        job.chain_id, job.blocked_by = jobs[0].id, before.id


async def insert(session: AsyncSession, jobs: Sequence[JobRow]) -> None:
    """Insert queued jobs, in an order in which none waits for a later one."""
    if not jobs:
        return
    for job in jobs:
        job.demand = demand_of(job).text
    # not through the session: a row that it knows would be searched for changes at every flush
    rows = [{column.key: getattr(job, column.key) for column in _JOB.columns} for job in jobs]
    await (await session.connection()).execute(_INSERT_JOB, rows)
    await _record(session, {job.id: 0 for job in jobs}, status=JobStatus.QUEUED, reason=None, now=jobs[0].created_at)


def demand_of(job: JobRow) -> Demand:
    """Return what the job asks of a node. Only the building of an environment is bound to one from the start."""
    launch = job.launch or {}
    return Demand(
        kind=job.kind,
        environment=job.environment,
        resources=Resources.model_validate(job.resources or {}),
        processes=launch.get("launcher", {}).get("processes"),
        modules=tuple(launch.get("modules", ())),
        cuda=launch.get("cuda", False),
        queue=job.queue or DEFAULT_QUEUE,
        submitted_by=job.submitted_by or "",
        node_id=job.node_id if job.kind is JobKind.ENVIRONMENT else None,
    )


# ---- read -----------------------------------------------------------------------------------------------------------


async def get(session: AsyncSession, job_id: str, *, lock: bool = False) -> JobRow:
    """Return the job or raise `JobNotFound`. With `lock`, the row is locked until the transaction ends."""
    # "for no key update": attempts and events that merely refer to the row are not held up
    for_update: Any = {"key_share": True} if lock else None
    job = await session.get(JobRow, job_id, populate_existing=True, with_for_update=for_update)
    if job is None:
        raise JobNotFound(job=job_id)
    return job


async def chain_of(session: AsyncSession, chain_ids: Collection[str]) -> Sequence[JobRow]:
    """Return the jobs of these chains, in their order."""
    statement = select(JobRow).where(col(JobRow.chain_id).in_(chain_ids))
    return (await session.exec(statement.order_by(col(JobRow.chain_id), col(JobRow.position)))).all()


async def unfinished_builds(
    session: AsyncSession, environments: Collection[str], *, node_id: str | None = None
) -> Mapping[str, str]:
    """Return environment name → id of a job that builds it now, on this node if one is given."""
    statement = select(JobRow).where(col(JobRow.environment).in_(environments), sa.text(BUILDING))
    if node_id is not None:
        statement = statement.where(JobRow.node_id == node_id)
    return {job.environment: job.id for job in (await session.exec(statement)).all()}


async def attempts_of(session: AsyncSession, job_id: str) -> Sequence[PastAttempt]:
    """Return the attempts of the job, oldest first."""
    statement = (
        select(AttemptRow, NodeRow.name)
        .join(NodeRow, col(NodeRow.id) == col(AttemptRow.node_id))
        .where(AttemptRow.job_id == job_id)
        .order_by(col(AttemptRow.number))
    )
    return [PastAttempt(row=row, node=name) for row, name in (await session.exec(statement)).all()]


async def places_of(session: AsyncSession, job_ids: Collection[str]) -> Mapping[str, PastAttempt]:
    """Return job → its newest attempt, for those that have one."""
    if not job_ids:
        return {}
    statement = (
        select(AttemptRow, NodeRow.name)
        .join(NodeRow, col(NodeRow.id) == col(AttemptRow.node_id))
        .join(JobRow, col(JobRow.id) == col(AttemptRow.job_id))
        .where(col(AttemptRow.job_id).in_(job_ids), col(AttemptRow.number) == col(JobRow.attempts))
    )
    return {row.job_id: PastAttempt(row=row, node=name) for row, name in (await session.exec(statement)).all()}


async def events_after(session: AsyncSession, job_id: str, event_id: int) -> Sequence[JobEventRow]:
    """Return the transitions of the job that came after `event_id`, in order."""
    statement = select(JobEventRow).where(JobEventRow.job_id == job_id, col(JobEventRow.id) > event_id)
    return (await session.exec(statement.order_by(col(JobEventRow.id)))).all()


async def count_unfinished_of_method(session: AsyncSession, method_id: str) -> int:
    """Return how many jobs of the method are queued or live."""
    statement = select(sa.func.count()).where(JobRow.method_id == method_id, col(JobRow.status).in_(UNFINISHED))
    return (await session.exec(statement)).one()


# ---- cancel ---------------------------------------------------------------------------------------------------------


async def request_cancel(session: AsyncSession, job_id: str, *, now: datetime) -> JobRow:
    """Cancel a queued job at once; ask the node of a live one to stop it. Twice is fine, after the end is not."""
    # locked: between two looks the job could be claimed, or come back to the queue, and miss the request
    job = await get(session, job_id, lock=True)
    if job.status in TERMINAL:
        raise JobAlreadyFinished(job=job_id, status=job.status)
    if job.status is JobStatus.QUEUED:
        end = End(status=JobStatus.CANCELLED, reason=EndReason.CANCELLED, params={})
        await _write_status(session, job_id, old={JobStatus.QUEUED}, new=end.status, now=now, end=end)
        await _end_successors(session, job_id, now=now)
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


# ---- the node's side ------------------------------------------------------------------------------------------------


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
    numbers = await _write_statuses(
        session,
        list(tokens),
        old={JobStatus.QUEUED},
        new=JobStatus.LAUNCHING,
        now=now,
        values={
            "node_id": node_id,
            "token": sa.case(tokens, value=_JOB.c.id),
            "attempts": _JOB.c.attempts + 1,
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
    await leases.take(session, [claim.attempt for claim in claims], now=now)
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
    changed = await _write_status(
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
    return await _write_status(
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
    changed = await _write_status(
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
        await _end_attempt(session, claim.attempt, reason=reason, params=params, exit_record=exit_record, now=now)
    return changed


async def finish(session: AsyncSession, claim: Claim, end: End, *, now: datetime) -> bool:
    """End the attempt and its job; release or end the jobs that wait for it. False: the claim was lost."""
    changed = await _write_status(
        session, claim.job.id, old=LIVE, new=end.status, now=now, token=claim.attempt.token, end=end
    )
    if not changed:
        return False
    await _end_attempt(session, claim.attempt, reason=end.reason, params=end.params, exit_record=end.exit, now=now)
    if end.status is JobStatus.SUCCEEDED:
        await _release_successors(session, claim.job.id, model_id=end.result_model_id, now=now)
    else:
        await _end_successors(session, claim.job.id, now=now)
    return True


async def succeed_unlaunched(session: AsyncSession, job_id: str, end: End, *, now: datetime) -> None:
    """End a queued job whose result is there already; release the jobs that wait for it."""
    if await _write_status(session, job_id, old={JobStatus.QUEUED}, new=JobStatus.SUCCEEDED, now=now, end=end):
        await _release_successors(session, job_id, model_id=end.result_model_id, now=now)


async def next_saving(session: AsyncSession, job: JobRow) -> JobRow | None:
    """Return the saving job that follows in the chain of `job`."""
    statement = select(JobRow).where(
        JobRow.chain_id == job.chain_id, JobRow.position == job.position + 1, JobRow.kind == JobKind.SAVING
    )
    return None if job.chain_id is None else (await session.exec(statement)).first()


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
        if await _write_status(session, job_id, old={JobStatus.QUEUED}, new=end.status, now=now, end=end):
            await _end_successors(session, job_id, now=now)
    return len(job_ids)


async def fail_unlaunched(session: AsyncSession, job_id: str, end: End, *, now: datetime) -> None:
    """End a queued job that cannot run."""
    if await _write_status(session, job_id, old={JobStatus.QUEUED}, new=end.status, now=now, end=end):
        await _end_successors(session, job_id, now=now)


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
        await _write_statuses(session, some, old=UNFINISHED, new=end.status, now=now, end=end, values=nowhere)
    return len(unfinished)


async def end_queued_builds(session: AsyncSession, node_id: str, end: End, *, now: datetime) -> int:
    """End the queued builds of environments on this node; return how many there were."""
    statement = select(JobRow.id).where(
        JobRow.node_id == node_id, JobRow.status == JobStatus.QUEUED, JobRow.kind == JobKind.ENVIRONMENT
    )
    builds = (await session.exec(statement)).all()
    for job_id in builds:
        await _write_status(session, job_id, old={JobStatus.QUEUED}, new=end.status, now=now, end=end)
    return len(builds)


async def environments_waited_for(session: AsyncSession) -> Sequence[str]:
    """Return the names of the environments that queued, unblocked jobs need."""
    return sorted({demand.environment for demand in await waiting_demands(session, KINDS_IN_ENVIRONMENTS)})


# ---- the queue ------------------------------------------------------------------------------------------------------


async def waiting_demands(session: AsyncSession, kinds: Collection[JobKind] = frozenset(JobKind)) -> Sequence[Demand]:
    """Return what the queued, unblocked jobs ask for, each demand once; a few dozen however long the queue is."""
    return [Demand.parse(text) for text in (await session.exec(_waiting_statement(frozenset(kinds)))).all()]


@functools.cache
def _waiting_statement(kinds: frozenset[JobKind]) -> SelectOfScalar[str]:
    waiting = waiting_demands_cte(kinds)
    statement: SelectOfScalar[str] = select(waiting.c.demand).where(waiting.c.demand.is_not(None))
    return statement


def waiting_demands_cte(kinds: frozenset[JobKind]) -> sa.CTE:
    """Jump through the index from one demand to the next; a DISTINCT would visit all of a queue of 100,000 jobs."""
    names = (sa.select(sa.literal(kind, enum_type(JobKind)).label("kind")) for kind in sorted(kinds))
    wanted = sa.union_all(*names).subquery()
    # the kind stands in the demand, too: without an equality SQLite would take the index of the status
    first = sa.select(sa.func.min(JobRow.demand)).where(sa.text(CLAIMABLE), col(JobRow.kind) == wanted.c.kind)
    waiting = sa.select(wanted.c.kind, first.scalar_subquery().label("demand")).cte("waiting", recursive=True)
    following = sa.select(sa.func.min(JobRow.demand)).where(
        sa.text(CLAIMABLE), col(JobRow.kind) == waiting.c.kind, col(JobRow.demand) > waiting.c.demand
    )
    return waiting.union_all(
        sa.select(waiting.c.kind, following.scalar_subquery()).where(waiting.c.demand.is_not(None))
    )


# ---- the one writer of `status` -------------------------------------------------------------------------------------


async def _write_status(
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
        conditions.append(_JOB.c.token == token)
    if unless_cancelled:
        conditions.append(_JOB.c.cancel_requested_at.is_(None))
    changed = await _write_statuses(
        session, [job_id], old=old, new=new, now=now, conditions=conditions, why=why, end=end, values=values
    )
    return job_id in changed


async def _write_statuses(
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
    statement = sa.update(_JOB).where(_JOB.c.id.in_(job_ids), _JOB.c.status.in_(old), *conditions)
    subscribed = webhooks.has_subscribers() if new in PUBLISHED_STATUSES else sa.false()
    written = statement.values(**changes).returning(_JOB.c.id, _JOB.c.attempts, _JOB.c.kind, subscribed)
    await session.flush()  # rows that the session knows keep their values; `get` reads them again
    rows = (await (await session.connection()).execute(written)).all()
    reason = end.reason if end else why
    await _record(session, {job_id: attempt for job_id, attempt, _, _ in rows}, status=new, reason=reason, now=now)
    for job_id, _, kind, has_subscriber in rows:
        if has_subscriber and (event := event_of(kind, new)) is not None:
            await webhooks.publish(session, await get(session, job_id), event, now=now)
    return {job_id: attempt for job_id, attempt, _, _ in rows}


async def _end_attempt(
    session: AsyncSession,
    attempt: AttemptRow,
    *,
    reason: EndReason,
    params: Mapping[str, Any] | None,
    exit_record: Mapping[str, Any] | None,
    now: datetime,
) -> None:
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


async def _release_successors(session: AsyncSession, job_id: str, *, model_id: str | None, now: datetime) -> None:
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


async def _end_successors(session: AsyncSession, job_id: str, *, now: datetime) -> None:
    """End what waits for a job that did not succeed, and what waits for that."""
    failed = _without_base_model(await get(session, job_id))
    if failed is not None:
        for successor in await _successors(session, job_id):
            if await _write_status(session, successor, old={JobStatus.QUEUED}, new=failed.status, now=now, end=failed):
                await _end_successors(session, successor, now=now)
        return
    end = End(status=JobStatus.CANCELLED, reason=EndReason.PREDECESSOR_FAILED, params={"predecessor": job_id})
    waiting = [job_id]
    while waiting:
        for successor in await _successors(session, waiting.pop()):
            if await _write_status(session, successor, old={JobStatus.QUEUED}, new=end.status, now=now, end=end):
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


async def _record(
    session: AsyncSession,
    attempts: Mapping[str, int],
    *,
    status: JobStatus,
    reason: EndReason | None,
    now: datetime,
) -> None:
    """Insert the events of a transition; `attempts`: job → number of its attempt."""
    if attempts:
        common = {"status": status, "reason": reason, "created_at": now}
        rows = [{"job_id": job_id, "attempt": attempt, **common} for job_id, attempt in attempts.items()]
        # not `values(rows)`: such a statement is compiled anew each time
        await (await session.connection()).execute(_INSERT_EVENT, rows)
