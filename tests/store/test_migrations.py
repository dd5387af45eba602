import sqlalchemy as sa

from app.store.migrate import differences, downgrade, upgrade
from app.store.session import Database


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
