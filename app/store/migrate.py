"""Bring a database to the newest schema. Safe to run by several processes at once."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlmodel import SQLModel

from app.store.session import Database

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
ADVISORY_LOCK = 0x64656570  # "deep"; any constant that no other user of the database takes


async def upgrade(database: Database, *, revision: str = "head") -> None:
    """Run all migrations that are missing, in one transaction (on both databases DDL is transactional)."""
    async with _patient(database) as patient, patient.writing() as session:
        connection = await session.connection()
        await connection.run_sync(_run, revision)


async def downgrade(database: Database, *, revision: str) -> None:
    """Go back to `revision` (`base` empties the database)."""
    async with _patient(database) as patient, patient.writing() as session:
        connection = await session.connection()
        await connection.run_sync(_run, revision, down=True)


async def differences(database: Database) -> list[object]:
    """Return what the tables say and the migrated database lacks; empty when they agree."""
    async with database.reading() as session:
        connection = await session.connection()
        return await connection.run_sync(
            lambda sync: list(compare_metadata(MigrationContext.configure(sync), SQLModel.metadata))
        )


@asynccontextmanager
async def _patient(database: Database) -> AsyncIterator[Database]:
    """Yield the database for statements of minutes, such as an index of a long table; SQLite always waits."""
    if database.engine.dialect.name == "sqlite":
        yield database
        return
    patient = Database(database.url, pool_size=1, silent_after=None)
    try:
        yield patient
    finally:
        await patient.close()


def _run(connection: sa.Connection, revision: str, *, down: bool = False) -> None:
    if connection.dialect.name == "postgresql":
        # two API processes starting together would otherwise both create the tables
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    (command.downgrade if down else command.upgrade)(config, revision)
