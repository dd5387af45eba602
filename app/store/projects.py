"""Projects and their members. Both belong to the installation: every session sees them all."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.access import Role
from app.domain.errors import NotFound
from app.store.methods import NameTaken
from app.store.paging import PageRequest, Slice, page_slice
from app.store.tables import ProjectMemberRow, ProjectRow


class ProjectNotFound(NotFound):
    """No project has this id, or it is none of the caller's."""

    code = "project_not_found"


class MemberNotFound(NotFound):
    """The project has no such member."""

    code = "project_member_not_found"


async def get(session: AsyncSession, project: str, *, lock: bool = False) -> ProjectRow:
    """Return the project or raise `ProjectNotFound`; with `lock` others wait until the transaction ends."""
    row = await session.get(ProjectRow, project, populate_existing=True, with_for_update=lock or None)
    if row is None:
        raise ProjectNotFound(project=project)
    return row


async def all_ids(session: AsyncSession) -> Sequence[str]:
    """Return the ids of all projects, the oldest first."""
    return (await session.exec(select(ProjectRow.id).order_by(col(ProjectRow.created_at), col(ProjectRow.id)))).all()


async def page(session: AsyncSession, wanted: PageRequest, *, of_member: str | None) -> Slice[ProjectRow]:
    """Return one page of the projects, or of those that the principal is a member of."""
    statement: Any = select(ProjectRow)
    if of_member is not None:
        mine = select(ProjectMemberRow.project_id).where(ProjectMemberRow.principal == of_member)
        statement = statement.where(col(ProjectRow.id).in_(mine))
    return await page_slice(session, statement, wanted, column=getattr(ProjectRow, wanted.sort), tie=ProjectRow.id)


async def insert(session: AsyncSession, row: ProjectRow) -> None:
    """Insert the project, or raise `NameTaken`."""
    session.add(row)
    try:
        await session.flush()
    except sa.exc.IntegrityError as exc:
        raise NameTaken(name=row.id, pointer="/id") from exc


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
