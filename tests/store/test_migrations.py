import asyncio

import pytest
import sqlalchemy as sa
from sqlmodel import select

from app.domain.enums import JobKind
from app.store.migrate import ADVISORY_LOCK, differences, downgrade, upgrade
from app.store.session import Database
from app.store.tables import JobRow
from tests.job_rows import add_node, insert, new_job
from tests.waiting import until


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


class TestPatience:
    @pytest.mark.parametrize("database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
    async def test_waits_for_another_process_that_migrates_longer_than_any_query_may_take(
        self, database_url: str
    ) -> None:
        """Two API processes start together, and the migration of the first takes minutes."""
        impatient = Database(database_url, silent_after=0.2)
        other = Database(database_url)
        waiting = sa.text(
            "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) "
            "WHERE locktype = 'advisory' AND NOT granted AND clock_timestamp() - query_start > interval '0.5 s'"
        )
        try:
            async with other.writing() as session:
                await (await session.connection()).execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
                second = asyncio.create_task(upgrade(impatient))

                async def is_waiting() -> bool:
                    async with other.reading() as looking:
                        return bool((await (await looking.connection()).execute(waiting)).scalar())

                await until(is_waiting, "the second process")
                assert not second.done()
            await second
        finally:
            await impatient.close()
            await other.close()


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
