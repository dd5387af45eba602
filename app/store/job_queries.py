"""Lists of jobs: filters, sort, keyset pages."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import JobKind, JobStatus
from app.domain.transitions import UNFINISHED
from app.store.paging import Order, Slice, keyset_slice
from app.store.tables import MEASURED, NAMED_OUTSIDE, JobRow

SORT_COLUMNS = {"created_at": JobRow.created_at, "name": JobRow.name, "updated_at": JobRow.updated_at}


@dataclass(frozen=True)
class JobFilter:
    """What a list of jobs shows; None and empty mean everything."""

    statuses: Collection[JobStatus] = ()
    kinds: Collection[JobKind] = ()
    method_id: str | None = None
    chain_id: str | None = None
    external_id: str | None = None
    text: str | None = None


async def list_jobs(
    session: AsyncSession,
    wanted: JobFilter,
    *,
    sort: str,
    descending: bool,
    after: tuple[Any, Any] | None,
    limit: int,
) -> Slice[JobRow]:
    """Return one page of jobs."""
    statement = select(JobRow)
    if wanted.statuses:
        statement = statement.where(col(JobRow.status).in_(wanted.statuses))
    if wanted.kinds:
        statement = statement.where(col(JobRow.kind).in_(wanted.kinds))
    if wanted.method_id is not None:
        statement = statement.where(JobRow.method_id == wanted.method_id)
    if wanted.chain_id is not None:
        statement = statement.where(JobRow.chain_id == wanted.chain_id)
    if wanted.external_id is not None:
        statement = statement.where(JobRow.external_id == wanted.external_id, sa.text(NAMED_OUTSIDE))
    if wanted.text:
        statement = statement.where(col(JobRow.name).icontains(wanted.text, autoescape=True))
    order = Order(column=SORT_COLUMNS[sort], tie=JobRow.id, descending=descending)
    return await keyset_slice(session, statement, order, after=after, limit=limit)


async def newest_named(session: AsyncSession, external_id: str) -> JobRow | None:
    """Return the newest job of a task of DeepExtension's backend."""
    statement = select(JobRow).where(JobRow.external_id == external_id, sa.text(NAMED_OUTSIDE))
    newest_first = (col(JobRow.created_at).desc(), col(JobRow.id).desc())
    return (await session.exec(statement.order_by(*newest_first).limit(1))).first()


async def named_that_ended(session: AsyncSession, *, after: datetime, before: datetime) -> Sequence[JobRow]:
    """Return the jobs of the backend's tasks that ended between two times."""
    statement = select(JobRow).where(
        sa.text(NAMED_OUTSIDE), col(JobRow.finished_at) > after, col(JobRow.finished_at) <= before
    )
    return (await session.exec(statement)).all()


async def measured_trainings(
    session: AsyncSession, *, method_id: str, base_model_id: str, limit: int
) -> Sequence[JobRow]:
    """Return the newest trainings of a method and base model whose memory was measured, newest first."""
    statement = (
        select(JobRow)
        .where(JobRow.method_id == method_id, JobRow.base_model_id == base_model_id, sa.text(MEASURED))
        .order_by(col(JobRow.created_at).desc())
        .limit(limit)
    )
    return (await session.exec(statement)).all()


@dataclass(frozen=True)
class ChainLink:
    """A job of a chain, as others of the chain show it."""

    id: str
    kind: JobKind
    status: JobStatus


async def links_of(session: AsyncSession, chain_ids: Collection[str]) -> Mapping[str, Sequence[ChainLink]]:
    """Return chain → its jobs in their order."""
    chains: dict[str, list[ChainLink]] = defaultdict(list)
    rows = await (await session.connection()).execute(_LINKS, {"chains": list(chain_ids)})
    for chain_id, job_id, kind, status in rows:
        chains[chain_id].append(ChainLink(id=job_id, kind=kind, status=status))
    return chains


_LINKS = (
    sa.select(col(JobRow.chain_id), col(JobRow.id), col(JobRow.kind), col(JobRow.status))
    .where(col(JobRow.chain_id).in_(sa.bindparam("chains", expanding=True)))
    .order_by(col(JobRow.position))
)


async def chain_around(session: AsyncSession, job_id: str) -> Sequence[JobRow]:
    """Return the jobs of the chain that this one belongs to, in their order; empty if there is no such job."""
    chain_id = select(JobRow.chain_id).where(JobRow.id == job_id).scalar_subquery()
    statement = select(JobRow).where(JobRow.chain_id == chain_id).order_by(col(JobRow.position))
    return (await session.exec(statement)).all()


async def unfinished_retry_of(session: AsyncSession, job_id: str) -> str | None:
    """Return a job that repeats this one and has not ended."""
    statement = select(JobRow.id).where(JobRow.retry_of == job_id, col(JobRow.status).in_(UNFINISHED)).limit(1)
    return (await session.exec(statement)).first()
