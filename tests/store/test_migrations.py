import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlmodel import SQLModel, select

from app.domain.enums import JobKind, ModelState
from app.domain.projects import DEFAULT_SCOPE
from app.store.migrate import (
    ADVISORY_LOCK,
    MIGRATIONS,
    DatabaseDamaged,
    SchemaState,
    SchemaTooNew,
    check_integrity,
    downgrade,
    revisions,
    schema_state,
    upgrade,
)
from app.store.session import Database
from app.store.tables import JobRow
from tests.api.resources import insert_model
from tests.job_rows import add_method, add_node, cards, claim, insert, new_chain, new_job
from tests.waiting import until


async def differences(database: Database) -> list[object]:
    """Return what the tables say and the migrated database lacks."""
    async with database.reading() as session:
        connection = await session.connection()
        return await connection.run_sync(
            lambda sync: list(compare_metadata(MigrationContext.configure(sync), SQLModel.metadata))
        )


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

    async def test_database_says_how_its_schema_stands(self, database: Database) -> None:
        current = await schema_state(database)
        await downgrade(database, revision=revisions()[0])
        older = await schema_state(database)
        await downgrade(database, revision="base")

        assert [current, older, await schema_state(database)] == [
            SchemaState.CURRENT, SchemaState.OLDER, SchemaState.MISSING,
        ]  # fmt: skip

    async def test_schema_of_a_newer_version_is_refused_and_left_alone(self, database: Database) -> None:
        async with database.writing() as session:
            await (await session.connection()).exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")

        with pytest.raises(SchemaTooNew, match="9999"):
            await upgrade(database)

    def test_revisions_are_those_of_alembic(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        script = ScriptDirectory.from_config(config)

        assert list(revisions()) == [one.revision for one in reversed(list(script.walk_revisions()))]


async def _use(database: Database) -> None:
    await upgrade(database)
    await check_integrity(database)


class TestDamage:
    @pytest.mark.parametrize("content", [b"no database at all, but long enough to be taken for one" * 20, None])
    async def test_file_is_refused_with_a_sentence(self, tmp_path: Path, content: bytes | None) -> None:
        file = tmp_path / "deepe.db"
        database = Database(f"sqlite+aiosqlite:///{file}", scope=DEFAULT_SCOPE)
        await upgrade(database)
        await database.close()
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
        damaged = Database(f"sqlite+aiosqlite:///{file}", scope=DEFAULT_SCOPE)

        with pytest.raises(DatabaseDamaged, match=r"deepe\.db is damaged"):
            await _use(damaged)
        await damaged.close()


class TestPatience:
    @pytest.mark.parametrize("database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
    async def test_waits_for_another_process_that_migrates_longer_than_any_query_may_take(
        self, database_url: str
    ) -> None:
        """Two API processes start together, and the migration of the first takes minutes."""
        impatient = Database(database_url, silent_after=0.2, scope=DEFAULT_SCOPE)
        other = Database(database_url, scope=DEFAULT_SCOPE)
        waiting = sa.text(
            "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) "
            "WHERE locktype = 'advisory' AND NOT granted AND clock_timestamp() - query_start > interval '0.5 s'"
        )
        await downgrade(other, revision="base")
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


class TestRows:
    async def test_survive_every_migration_down_and_up_again(self, database: Database) -> None:
        method = await add_method(database)
        first = await insert_model(database, method_id=method)
        await insert_model(database, method_id=method, parent_id=first, state=ModelState.COMPLETE)
        await insert(database, *new_chain(method_id=method))
        assert await claim(database, await add_node(database, accelerators=cards(1))) is not None
        before = await _counts(database)

        for revision in reversed(revisions()[1:-1]):  # the second made the leases
            await downgrade(database, revision=revision)
        for revision in revisions():
            await upgrade(database, revision=revision)

        assert await _counts(database) == before
        assert await differences(database) == []


async def _counts(database: Database) -> dict[str, int]:
    async with database.reading() as session:
        connection = await session.connection()
        # the audit trail ends with its migration, and with it the head
        tables = [one for one in SQLModel.metadata.sorted_tables if one.name not in ("audit_record", "installation")]
        return {one.name: await connection.scalar(sa.select(sa.func.count()).select_from(one)) or 0 for one in tables}


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
