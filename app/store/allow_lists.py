"""Allow-lists of environments and nodes. Rows of all projects: environments and nodes are shared."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.allow_lists import AllowedMethod, AllowList
from app.store import methods
from app.store.projects import all_ids
from app.store.session import EVERYBODYS
from app.store.tables import EnvironmentRuleRow, MethodRow, NodeRow


async def of_environments(session: AsyncSession) -> Mapping[str, AllowList]:
    """Return the allow-lists of environments by name; one without allows everything."""
    rows = (await session.exec(select(EnvironmentRuleRow))).all()
    return {row.environment: AllowList.model_validate(row.allowed) for row in rows}


def of_node(row: NodeRow) -> AllowList:
    """Return the allow-list of a node."""
    return AllowList.model_validate(row.allowed) if row.allowed else AllowList()


async def set_of_environment(
    session: AsyncSession, environment: str, allowed: AllowList, *, by: str, now: datetime
) -> None:
    """Give an environment an allow-list."""
    values: dict[str, Any] = {"allowed": allowed.model_dump(mode="json"), "changed_by": by, "changed_at": now}
    this = col(EnvironmentRuleRow.environment) == environment
    written = await session.exec(sa.update(EnvironmentRuleRow).where(this).values(**values))
    assert isinstance(written, CursorResult)
    if written.rowcount == 0:
        session.add(EnvironmentRuleRow(environment=environment, **values))
        await session.flush()


async def set_of_node(session: AsyncSession, row: NodeRow, allowed: AllowList) -> None:
    """Give a locked node an allow-list."""
    row.allowed = allowed.model_dump(mode="json")
    session.add(row)
    await session.flush()


async def find_method(session: AsyncSession, method: str) -> AllowedMethod | None:
    """Return the existing method with this id, of whichever project, else the one of this name in the session's."""
    by_id = select(MethodRow).where(MethodRow.id == method, col(MethodRow.deleted_at).is_(None))
    row = (await session.exec(by_id.execution_options(**EVERYBODYS))).first() or await methods.find(session, method)
    return None if row is None else AllowedMethod(id=row.id, name=row.name, project=row.project_id)


async def unknown_projects(session: AsyncSession, projects: Sequence[str]) -> Sequence[str]:
    """Return which of these are no projects."""
    known = frozenset(await all_ids(session)) if projects else frozenset()
    return [project for project in projects if project not in known]
