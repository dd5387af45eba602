"""Jobs, their attempts and their events as rows: inserted and read. `app.store.job_status` alone changes a status."""

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import SelectOfScalar

from app.domain.demand import COMPARISON_PRIORITY, DEFAULT_QUEUE, Demand, Resources
from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.errors import NotFound
from app.domain.kinds import KINDS_IN_ENVIRONMENTS, STAGES
from app.domain.transitions import UNFINISHED
from app.store.session import EVERYBODYS, own
from app.store.tables import BUILDING, CLAIMABLE, AttemptRow, JobEventRow, JobRow, NodeRow
from app.store.types import enum_type

JOB: sa.Table = JobRow.__table__  # type: ignore[attr-defined]
_INSERT_JOB = sa.insert(JOB)
_INSERT_EVENT = sa.insert(JobEventRow.__table__)  # type: ignore[attr-defined]


class JobNotFound(NotFound):
    """No job has this id."""

    code = "job_not_found"


@dataclass(frozen=True)
class PastAttempt:
    """An attempt and the name of the node that it was launched on."""

    row: AttemptRow
    node: str


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
        own(session, job)
        job.demand = demand_of(job).text
    # not through the session: a row that it knows would be searched for changes at every flush
    rows = [{column.key: getattr(job, column.key) for column in JOB.columns} for job in jobs]
    await (await session.connection()).execute(_INSERT_JOB, rows)
    await record_events(
        session, {job.id: 0 for job in jobs}, status=JobStatus.QUEUED, reason=None, now=jobs[0].created_at
    )


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
        method_id=job.method_id if job.kind in STAGES else None,
        project_id=job.project_id,
    )


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
    statement = (
        select(JobRow)
        .where(col(JobRow.environment).in_(environments), sa.text(BUILDING))
        .execution_options(**EVERYBODYS)  # an environment is built for all of them
    )
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
    """Return how many jobs of the method are queued or live, comparisons of answers left out: nobody asked for them."""
    statement = select(sa.func.count()).where(
        JobRow.method_id == method_id,
        col(JobRow.status).in_(UNFINISHED),
        col(JobRow.priority) != COMPARISON_PRIORITY,
    )
    return (await session.exec(statement)).one()


async def next_saving(session: AsyncSession, job: JobRow) -> JobRow | None:
    """Return the saving job that follows in the chain of `job`."""
    statement = select(JobRow).where(
        JobRow.chain_id == job.chain_id, JobRow.position == job.position + 1, JobRow.kind == JobKind.SAVING
    )
    return None if job.chain_id is None else (await session.exec(statement)).first()


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
    return statement.execution_options(**EVERYBODYS)


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


async def record_events(
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
