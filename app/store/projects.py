"""Projects and their members. Both belong to the installation: every session sees them all."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.access import Role, caller_name
from app.domain.errors import Conflict, NotFound
from app.domain.kinds import LIMITED_KINDS
from app.domain.projects import NO_LIMITS, ProjectLimits
from app.domain.transitions import UNFINISHED
from app.store.methods import NameTaken
from app.store.paging import PageRequest, Slice, page_slice
from app.store.session import scope_of
from app.store.tables import DatasetRow, JobRow, ModelRow, ProjectMemberRow, ProjectRow


class ProjectNotFound(NotFound):
    """No project has this id, or it is none of the caller's."""

    code = "project_not_found"


class MemberNotFound(NotFound):
    """The project has no such member."""

    code = "project_member_not_found"


class ProjectJobsLimitReached(Conflict):
    """As many stages of the project, or of the caller in it, wait or run as may at once."""

    code = "project_jobs_limit"


class ProjectDiskLimitReached(Conflict):
    """The project's data sets and models take as many bytes as they may."""

    code = "project_disk_limit"


async def get(session: AsyncSession, project: str, *, lock: bool = False) -> ProjectRow:
    """Return the project or raise `ProjectNotFound`; with `lock` others wait until the transaction ends."""
    row = await session.get(ProjectRow, project, populate_existing=True, with_for_update=lock or None)
    if row is None:
        raise ProjectNotFound(project=project)
    return row


async def all_ids(session: AsyncSession) -> Sequence[str]:
    """Return the ids of all projects, the oldest first."""
    return (await session.exec(select(ProjectRow.id).order_by(col(ProjectRow.created_at), col(ProjectRow.id)))).all()


async def exists(session: AsyncSession, project: str) -> bool:
    """Return whether there is such a project."""
    return await session.get(ProjectRow, project) is not None


async def page(
    session: AsyncSession, wanted: PageRequest, *, among: Collection[str] | None = None
) -> Slice[ProjectRow]:
    """Return one page of the projects, or of those among these."""
    statement: Any = select(ProjectRow)
    if among is not None:
        statement = statement.where(col(ProjectRow.id).in_(among))
    return await page_slice(session, statement, wanted, column=getattr(ProjectRow, wanted.sort), tie=ProjectRow.id)


async def insert(session: AsyncSession, row: ProjectRow) -> None:
    """Insert the project, or raise `NameTaken`."""
    session.add(row)
    try:
        await session.flush()
    except sa.exc.IntegrityError as exc:
        raise NameTaken(name=row.id, pointer="/id") from exc


async def limits_of(session: AsyncSession, *, lock: bool = False) -> ProjectLimits:
    """Return what the session's project may use; with `lock`, where something is limited, others wait."""
    project = scope_of(session).project
    row = None if project is None else await session.get(ProjectRow, project)
    limits = NO_LIMITS if row is None else ProjectLimits(**row.limits)
    if lock and project is not None and limits != NO_LIMITS:
        limits = ProjectLimits(**(await get(session, project, lock=True)).limits)
    return limits


@dataclass(frozen=True)
class Use:
    """What a project uses now: its stages that wait or run, and the bytes of its data sets and models."""

    jobs: int
    jobs_of_caller: int
    disk_bytes: int


async def use_of(session: AsyncSession, caller: str) -> Use:
    """Return what the session's project uses, and `caller` of it."""
    unfinished = sa.and_(col(JobRow.status).in_(UNFINISHED), col(JobRow.kind).in_(LIMITED_KINDS))
    jobs = select(sa.func.count()).select_from(JobRow).where(unfinished)
    of_caller = jobs.where(JobRow.created_by == caller)
    data = select(sa.func.coalesce(sa.func.sum(DatasetRow.size_bytes), 0))
    models = select(sa.func.coalesce(sa.func.sum(ModelRow.size_bytes), 0)).where(col(ModelRow.deleted_at).is_(None))
    counts = [(await session.exec(statement)).one() for statement in (jobs, of_caller, data, models)]
    return Use(jobs=counts[0], jobs_of_caller=counts[1], disk_bytes=int(counts[2]) + int(counts[3]))


async def require_room(session: AsyncSession, *, jobs: int = 0, new_bytes: int = 0) -> None:
    """Raise an error unless the session's project may have so many more stages and bytes.

    Where something is limited, others that ask wait until the transaction ends. Training needs disk: it is refused
    where none is left.
    """
    limits = await limits_of(session, lock=True)
    if limits == NO_LIMITS:
        return
    use = await use_of(session, caller_name())
    for limit, present in ((limits.jobs, use.jobs), (limits.jobs_per_person, use.jobs_of_caller)):
        if limit is not None and jobs and present + jobs > limit:
            raise ProjectJobsLimitReached(limit=limit, present=present, wanted=jobs)
    if limits.disk_bytes is not None and use.disk_bytes + new_bytes >= limits.disk_bytes:
        raise ProjectDiskLimitReached(limit=limits.disk_bytes, present=use.disk_bytes)


async def role_of(session: AsyncSession, project: str, principal: str) -> Role | None:
    """Return the role of a principal in the project; None if it is no member."""
    row = await session.get(ProjectMemberRow, (project, principal))
    return None if row is None else row.role


async def projects_of(session: AsyncSession, principal: str) -> Sequence[str]:
    """Return the ids of the projects that the principal is a member of."""
    statement = select(ProjectMemberRow.project_id).where(ProjectMemberRow.principal == principal)
    return (await session.exec(statement.order_by(col(ProjectMemberRow.project_id)))).all()


async def members(session: AsyncSession, project: str) -> Sequence[ProjectMemberRow]:
    """Return the members of a project by name."""
    statement = select(ProjectMemberRow).where(ProjectMemberRow.project_id == project)
    return (await session.exec(statement.order_by(ProjectMemberRow.name, ProjectMemberRow.principal))).all()


async def set_member(
    session: AsyncSession, project: str, principal: str, *, role: Role, name: str, by: str, now: datetime
) -> ProjectMemberRow:
    """Give a principal a role in the project; one that is a member already gets it instead of the one it had."""
    await get(session, project, lock=True)  # of two at the same instant one waits
    row = await session.get(ProjectMemberRow, (project, principal))
    if row is None:
        row = ProjectMemberRow(project_id=project, principal=principal, role=role, created_by=by, created_at=now)
    row.role, row.name = role, name
    session.add(row)
    await session.flush()
    return row


async def remove_member(session: AsyncSession, project: str, principal: str) -> None:
    """Take a principal out of the project, or raise `MemberNotFound`."""
    statement = sa.delete(ProjectMemberRow).where(
        col(ProjectMemberRow.project_id) == project, col(ProjectMemberRow.principal) == principal
    )
    result = await session.exec(statement)
    assert isinstance(result, CursorResult)
    if result.rowcount == 0:
        raise MemberNotFound(project=project, principal=principal)
