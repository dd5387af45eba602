"""Projects: who may enter which, with what role, and what can be done with them.

The address of a request names its project (`/projects/bikes/api/v1/...`); without one it works in `default`, or in the
only project that its caller has. Nobody learns of a project that is not theirs: it is not found.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Final, Protocol

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.access import Caller, Role
from app.domain.errors import InvalidRequest, NotAllowed, Violation
from app.domain.plain_text import shown
from app.domain.projects import DEFAULT_PROJECT, ProjectLimits, check_project_id
from app.store import projects as store
from app.store.paging import PageRequest, Slice
from app.store.projects import ProjectNotFound, Use
from app.store.session import Database
from app.store.tables import ProjectMemberRow, ProjectRow

MAX_TITLE: Final = 200
PRINCIPALS: Final = ("key:", "person:")


class ProjectNotNamed(NotAllowed):
    """The address names no project, and the caller has a role in several and none in the installation."""

    code = "project_not_named"


class ProjectLicence(Protocol):
    """Says how many projects an installation may have."""

    def require_room_for_project(self, present: int) -> None:
        """Raise an error when there may not be more than the `present` projects."""
        ...


class Projects:
    """What can be done with projects."""

    def __init__(self, *, database: Database, licence: ProjectLicence, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._licence = licence
        self._clock = clock

    async def enter(self, caller: Caller, named: str | None) -> Caller:
        """Return the caller with its role in the project that the address names."""
        if caller.only_project is not None:
            if named not in (None, caller.only_project):
                raise ProjectNotFound(project=shown(named))
            return replace(caller, project=caller.only_project)
        if named is None:
            return caller if caller.role is not None else await self._enter_only(caller)
        async with self._database.reading() as session:
            role = await self._role(session, caller, named) if await store.exists(session, named) else None
        if role is None:
            raise ProjectNotFound(project=shown(named))
        return replace(caller, project=named, role_in_project=role)

    async def _enter_only(self, caller: Caller) -> Caller:
        async with self._database.reading() as session:
            mine = await store.projects_of(session, caller.principal)
        if len(mine) == 1:
            return await self.enter(caller, mine[0])
        if not mine and caller.refusal is not None:
            raise caller.refusal
        raise ProjectNotNamed(caller=caller.name, projects=", ".join(mine) or "-")

    async def _role(self, session: AsyncSession, caller: Caller, project: str) -> Role | None:
        given = await store.role_of(session, project, caller.principal)
        everywhere = caller.role if caller.role is Role.ADMIN or project == DEFAULT_PROJECT else None
        return next((role for role in reversed(Role) if role in (given, everywhere)), None)

    async def page(self, session: AsyncSession, wanted: PageRequest, *, caller: Caller) -> Slice[ProjectRow]:
        """Return one page of the projects that the caller may enter."""
        if caller.role is Role.ADMIN:
            return await store.page(session, wanted)
        mine = set() if caller.only_project is not None else {*await store.projects_of(session, caller.principal)}
        mine |= {DEFAULT_PROJECT} if caller.role is not None else set()
        mine |= {caller.only_project} if caller.only_project is not None else set()
        return await store.page(session, wanted, among=mine)

    async def get(self, session: AsyncSession, caller: Caller) -> ProjectRow:
        """Return the project that the caller is in."""
        return await store.get(session, caller.project or DEFAULT_PROJECT)

    async def create(self, session: AsyncSession, project: str, *, title: str, by: Caller) -> ProjectRow:
        """Make a project; `NameTaken`, `ProjectLimitReached`. Its folders and methods are the caller's to make."""
        check_project_id(project)
        # two at the same instant: the second sees the first
        await store.get(session, DEFAULT_PROJECT, lock=True)
        self._licence.require_room_for_project(len(await store.all_ids(session)))
        now = self._clock()
        row = ProjectRow(id=project, title=title, created_by=by.name, created_at=now, updated_at=now)
        await store.insert(session, row)
        return row

    async def change(
        self, session: AsyncSession, caller: Caller, *, title: str, check: Callable[[str], None]
    ) -> ProjectRow:
        """Give the project that the caller is in another title."""
        row = await store.get(session, caller.project or DEFAULT_PROJECT, lock=True)
        check(version_of(row))
        row.title, row.updated_at = title, self._clock()
        session.add(row)
        await session.flush()
        return row

    async def use(self, session: AsyncSession, caller: Caller) -> Use:
        """Return what the session's project uses now, and the caller of it."""
        return await store.use_of(session, caller.name)

    async def set_limits(
        self, session: AsyncSession, caller: Caller, limits: ProjectLimits, *, check: Callable[[str], None]
    ) -> ProjectRow:
        """Say what the project that the caller is in may use. What it uses beyond goes on."""
        row = await store.get(session, caller.project or DEFAULT_PROJECT, lock=True)
        check(version_of(row))
        row.limits, row.updated_at = limits.model_dump(mode="json", exclude_none=True), self._clock()
        session.add(row)
        await session.flush()
        return row

    async def members(self, session: AsyncSession, caller: Caller) -> list[ProjectMemberRow]:
        """Return the members of the project that the caller is in."""
        return list(await store.members(session, caller.project or DEFAULT_PROJECT))

    async def set_member(
        self, session: AsyncSession, caller: Caller, principal: str, *, role: Role, name: str
    ) -> ProjectMemberRow:
        """Give a principal a role in the project that the caller is in."""
        if not principal.startswith(PRINCIPALS):
            raise InvalidRequest([Violation("/principal", "principal_wrong", {"principal": principal})])
        project = caller.project or DEFAULT_PROJECT
        return await store.set_member(
            session, project, principal, role=role, name=name, by=caller.name, now=self._clock()
        )

    async def remove_member(self, session: AsyncSession, caller: Caller, principal: str) -> None:
        """Take a principal out of the project that the caller is in; its next request finds no such project."""
        await store.remove_member(session, caller.project or DEFAULT_PROJECT, principal)


def version_of(row: ProjectRow) -> str:
    """Return what changes with every change of the project."""
    return str(int(row.updated_at.timestamp() * 1e6))
