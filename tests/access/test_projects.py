"""Whom a project lets in: people who have no role in the installation."""

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from app.access.persons import RoleNotMapped
from app.access.projects import ProjectNotNamed, Projects
from app.domain.access import LOCAL, Caller, CallerKind, Permission, Role
from app.domain.projects import DEFAULT_PROJECT, EVERY_PROJECT
from app.store.projects import ProjectNotFound
from app.store.session import Database

NOW = datetime(2026, 12, 1, tzinfo=UTC)
REFUSAL = RoleNotMapped(caller="ada", claim="groups")
ADA = Caller(CallerKind.PERSON, None, "ada", issuer="https://idp", subject="1", refusal=REFUSAL)


class AsManyAsWanted:
    def require_room_for_project(self, present: int) -> None:
        return None


async def service(database: Database, *joined: str) -> Projects:
    """Return the projects `bikes` and `cars`, some of which Ada has joined as operator."""
    projects = Projects(database=database.of(EVERY_PROJECT), licence=AsManyAsWanted(), clock=lambda: NOW)
    async with database.writing() as session:
        for project in ("bikes", "cars"):
            await projects.create(session, project, title="", by=LOCAL)
    for project in joined:
        there = await projects.enter(LOCAL, project)
        async with database.writing() as session:
            await projects.set_member(session, there, ADA.principal, role=Role.OPERATOR, name="ada")
    return projects


class TestPersonWithoutARole:
    async def test_is_told_why_where_there_is_no_membership(self, database: Database) -> None:
        projects = await service(database)

        with pytest.raises(RoleNotMapped):
            await projects.enter(ADA, None)
        with pytest.raises(ProjectNotFound):
            await projects.enter(ADA, "bikes")
        with pytest.raises(ProjectNotFound):
            await projects.enter(ADA, DEFAULT_PROJECT)

    async def test_need_not_name_the_only_project(self, database: Database) -> None:
        projects = await service(database, "bikes")

        for named in (None, "bikes"):
            inside = await projects.enter(ADA, named)
            assert (inside.project, inside.role_in_project) == ("bikes", Role.OPERATOR)
            assert inside.permissions == {Permission.READ, Permission.RUN}

    @pytest.mark.parametrize("joined", [("bikes", "cars"), ("bikes", "cars", DEFAULT_PROJECT)])
    async def test_names_one_of_several(self, database: Database, joined: Sequence[str]) -> None:
        projects = await service(database, *joined)

        with pytest.raises(ProjectNotNamed) as refused:
            await projects.enter(ADA, None)

        assert refused.value.params["projects"] == ", ".join(sorted(joined))
        assert (await projects.enter(ADA, joined[-1])).project == joined[-1]
