import sqlalchemy as sa
from sqlmodel import select

from app.domain.enums import JobKind
from app.store.migrate import differences, downgrade, upgrade
from app.store.session import Database
from app.store.tables import JobRow
from tests.job_rows import add_node, insert, new_job


class TestMigrations:
    async def test_migrated_database_has_what_the_tables_say(self, database: Database) -> None:
        assert await differences(database) == []

    async def test_upgrade_is_idempotent(self, database: Database) -> None:
        await upgrade(database)

        assert await differences(database) == []

    async def test_downgrade_leaves_an_empty_database(self, database: Database) -> None:
        await downgrade(database, revision="base")

        async with database.engine.connect() as connection:
            tables = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())
        assert tables == ["alembic_version"]


class TestManyNodes:
    async def test_jobs_that_wait_get_the_demands_that_a_submit_would_write(self, database: Database) -> None:
        node = await add_node(database)
        rows = [
            new_job(),
            new_job(environment="other"),
            new_job(kind=JobKind.SAVING),
            new_job(kind=JobKind.ENVIRONMENT, node_id=node),
        ]
        await insert(database, *rows)
        wanted = {row.id: row.demand for row in rows}
        async with database.writing() as session:
            await session.exec(sa.update(JobRow).values(demand=""))

        await downgrade(database, revision="0001")
        await upgrade(database)

        async with database.reading() as session:
            found = dict((await session.exec(select(JobRow.id, JobRow.demand))).all())
        assert found == wanted
        assert len(set(wanted.values())) == 4
