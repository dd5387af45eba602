"""Environments that are registered by name, with or without a spec. Others are known because a node has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.names import name_key
from app.domain.transitions import LIVE
from app.store import named
from app.store.session import EVERYBODYS
from app.store.tables import BUILDING, EnvironmentRow, JobRow

REMEMBERED_BUILDS = 500


async def find_environment(session: AsyncSession, name: str) -> EnvironmentRow | None:
    """Return the registered environment with exactly this name; conda names are case-sensitive."""
    return (await session.exec(select(EnvironmentRow).where(EnvironmentRow.name == name))).first()


async def all_environments(session: AsyncSession) -> Sequence[EnvironmentRow]:
    """Return the registered environments by name; there are dozens, not thousands."""
    return (await session.exec(select(EnvironmentRow).order_by(col(EnvironmentRow.name_key)))).all()


async def spec_hashes(session: AsyncSession) -> Mapping[str, str | None]:
    """Return name → digest of the specification of every registered environment."""
    return dict((await session.exec(select(EnvironmentRow.name, EnvironmentRow.spec_hash))).all())


async def environments_in_use(session: AsyncSession, node_id: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the environments that queued jobs will need, and those that live jobs of the node run in."""
    queued = select(JobRow.environment).where(JobRow.status == JobStatus.QUEUED).distinct()
    live = select(JobRow.environment).where(JobRow.node_id == node_id, col(JobRow.status).in_(LIVE)).distinct()
    return frozenset((await session.exec(queued)).all()), frozenset((await session.exec(live)).all())


async def ensure_shipped(session: AsyncSession, name: str, *, spec: str, spec_hash: str, now: datetime) -> bool:
    """Register an environment of the product or bring its spec up to date; return whether anything changed.

    An environment that a user registered under the name stays as it is.
    """
    row = await named.find(session, EnvironmentRow, name)
    if row is None:
        await named.insert(session, new_environment(name, spec=spec, spec_hash=spec_hash, now=now, shipped=True))
        return True
    if not row.shipped or row.spec == spec:
        return False
    await named.update(session, row, spec=spec, spec_hash=spec_hash, updated_at=now)
    return True


async def builds(session: AsyncSession) -> frozenset[tuple[str, str]]:
    """Return the environments that are being built right now, each with the id of the node that builds it."""
    statement = select(JobRow.environment, JobRow.node_id).where(sa.text(BUILDING), col(JobRow.node_id).is_not(None))
    found = await session.exec(statement.execution_options(**EVERYBODYS))
    return frozenset((name, node or "") for name, node in found.all())


@dataclass(frozen=True)
class LastBuild:
    """The newest build of an environment on a node; `spec` is the text that it was made from."""

    job_id: str
    status: JobStatus
    reason: EndReason | None
    params: Mapping[str, Any]
    spec: str | None


async def last_builds(session: AsyncSession) -> Mapping[tuple[str, str], LastBuild]:
    """Return (environment, node id) → its newest build, of the builds that are remembered: the newest few hundred."""
    statement = (
        select(JobRow)
        # builds have no method: the index on it finds them among a hundred thousand jobs
        .where(col(JobRow.method_id).is_(None), JobRow.kind == JobKind.ENVIRONMENT)
        .order_by(col(JobRow.created_at).desc(), col(JobRow.id))
        .limit(REMEMBERED_BUILDS)
        .execution_options(**EVERYBODYS)
    )
    found: dict[tuple[str, str], LastBuild] = {}
    for job in (await session.exec(statement)).all():
        order = job.launch.get("build") or {}
        if job.node_id is not None and order.get("action", "build") == "build":
            found.setdefault((job.environment, job.node_id), _last_build(job, order.get("spec")))
    return found


def _last_build(job: JobRow, spec: str | None) -> LastBuild:
    return LastBuild(job_id=job.id, status=job.status, reason=job.reason, params=job.reason_params, spec=spec)


def new_environment(
    name: str, *, spec: str | None, spec_hash: str | None, now: datetime, shipped: bool = False
) -> EnvironmentRow:
    """Return the row of an environment, not yet inserted."""
    return EnvironmentRow(
        id=str(uuid4()),
        name=name,
        name_key=name_key(name),
        spec=spec,
        spec_hash=spec_hash,
        shipped=shipped,
        created_at=now,
        updated_at=now,
    )
