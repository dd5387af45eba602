"""A session of a project sees, changes and writes rows of that project only, whatever a statement says."""

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.access import Caller, CallerKind, Role, current_caller
from app.domain.projects import DEFAULT_SCOPE, EVERY_PROJECT, Scope
from app.store import jobs
from app.store.session import EVERYBODYS, Database, ForeignProject
from app.store.tables import JobEventRow, JobRow, OfProject, SecretRow
from tests.job_rows import START, insert, new_job

BIKES = Scope("bikes")


@pytest.fixture
async def mine(database: Database) -> str:
    return (await insert(database, new_job()))[0]


@pytest.fixture
async def theirs(database: Database) -> str:
    return (await insert(database.of(BIKES), new_job()))[0]


def _count(statement: Any) -> Any:
    return select(sa.func.count()).select_from(statement.subquery())


SEEN: list[Callable[[], Any]] = [
    lambda: select(JobRow.id),
    lambda: select(JobRow.id).where(col(JobRow.id).in_(select(JobRow.id))),
    lambda: select(sa.orm.aliased(JobRow).id),
    lambda: select(JobRow.id).union_all(select(JobRow.id).where(sa.false())),
    lambda: sa.select(select(JobRow.id).subquery().c.id),
    lambda: sa.select(select(JobRow.id).cte("every_job").c.id),
    lambda: select(JobEventRow.job_id).join(JobRow, col(JobRow.id) == col(JobEventRow.job_id)),
    lambda: select(JobEventRow.job_id).where(sa.exists().where(col(JobRow.id) == col(JobEventRow.job_id))),
]


class TestReading:
    @pytest.mark.parametrize("statement", SEEN)
    async def test_every_form_of_statement_shows_rows_of_the_project_only(
        self, database: Database, mine: str, theirs: str, statement: Callable[[], Any]
    ) -> None:
        async def seen(scope: Scope) -> set[str]:
            async with database.of(scope).reading() as session:
                found: Any = await session.exec(statement())
                return set(found.scalars().all() if hasattr(found, "scalars") else found.all())

        assert await seen(DEFAULT_SCOPE) == {mine}
        assert await seen(BIKES) == {theirs}
        assert await seen(EVERY_PROJECT) == {mine, theirs}

    async def test_known_id_of_another_project_opens_nothing(self, database: Database, theirs: str) -> None:
        async with database.reading() as session:
            assert await session.get(JobRow, theirs) is None
            with pytest.raises(jobs.JobNotFound):
                await jobs.get(session, theirs)

    async def test_what_all_share_is_counted_on_request(self, database: Database, mine: str, theirs: str) -> None:
        async with database.reading() as session:
            statement = select(sa.func.count()).select_from(JobRow)

            assert (await session.exec(statement)).one() == 1
            assert (await session.exec(statement.execution_options(**EVERYBODYS))).one() == 2


class TestWriting:
    async def test_updates_and_deletions_reach_rows_of_the_project_only(
        self, database: Database, mine: str, theirs: str
    ) -> None:
        async with database.writing() as session:
            await session.exec(sa.update(JobRow).values(name="taken"))
            await session.exec(sa.delete(JobRow).where(col(JobRow.id) == theirs))

        async with database.of(BIKES).reading() as session:
            row = await jobs.get(session, theirs)
        assert row.name != "taken"

    async def test_row_that_is_held_from_elsewhere_is_not_written(self, database: Database, theirs: str) -> None:
        async with database.of(EVERY_PROJECT).reading() as session:
            row = await jobs.get(session, theirs)

        async def change(session: AsyncSession) -> None:
            session.add(row)
            row.name = "taken"

        with pytest.raises(ForeignProject):
            async with database.writing() as session:
                await change(session)

    async def test_new_row_of_another_project_is_refused(self, database: Database) -> None:
        with pytest.raises(ForeignProject):
            async with database.writing() as session:
                session.add(
                    SecretRow(id="1", name="a", project_id="bikes", created_by="", created_at=START, changed_at=START)
                )

    async def test_session_of_every_project_needs_to_be_told_whose_row_it_is(self, database: Database) -> None:
        with pytest.raises(ForeignProject):
            async with database.of(EVERY_PROJECT).writing() as session:
                await jobs.insert(session, [new_job()])

    async def test_row_belongs_to_the_project_and_names_its_maker(self, database: Database) -> None:
        token = current_caller.set(Caller(CallerKind.KEY, Role.OPERATOR, "nightly", key_id="1"))
        try:
            job_id = (await insert(database.of(BIKES), new_job()))[0]
        finally:
            current_caller.reset(token)

        async with database.of(EVERY_PROJECT).reading() as session:
            row = await jobs.get(session, job_id)
        assert (row.project_id, row.created_by) == ("bikes", "nightly")

    async def test_names_are_unique_within_a_project(self, database: Database) -> None:
        async def add(scope: Scope, key: str) -> None:
            async with database.of(scope).writing() as session:
                session.add(SecretRow(id=key, name="hub", created_by="", created_at=START, changed_at=START))

        await add(DEFAULT_SCOPE, "1")
        await add(BIKES, "2")
        with pytest.raises(sa.exc.IntegrityError):
            await add(BIKES, "3")


def test_every_table_with_a_project_is_one_whose_rows_are_kept_apart() -> None:
    tables = {mapper.class_ for mapper in SQLModel._sa_registry.mappers}
    with_project = {table.__tablename__ for table in tables if "project_id" in table.__table__.columns}
    kept_apart = {table.__tablename__ for table in tables if issubclass(table, OfProject)}

    assert with_project - kept_apart == {"access_key", "audit_record", "project_member"}
