"""Bring a database to the newest schema. Safe to run by several processes at once.

Alembic is imported when there is something to migrate only: most starts find the schema as it should be.
"""

import functools
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from app.domain.projects import EVERY_PROJECT
from app.store.session import Database

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
VERSION_TABLE = "alembic_version"
ADVISORY_LOCK = 0x64656570  # "deep"; any constant that no other user of the database takes
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class SchemaState(StrEnum):
    """How the schema of a database compares with this version of the product."""

    MISSING = "missing"
    OLDER = "older"
    CURRENT = "current"
    NEWER = "newer"


class DatabaseUnusable(Exception):
    """No waiting helps; the text says what is wrong, `advice` what to do."""

    def __init__(self, message: str, *, advice: str) -> None:
        self.advice = advice
        super().__init__(message)


class SchemaTooNew(DatabaseUnusable):
    """A newer version of the product has migrated the database."""

    def __init__(self, database: Database, revision: str) -> None:
        super().__init__(
            f"The database {_shown(database)} has the schema {revision}, which this version does not know.",
            advice="Install the version that wrote it, or restore the backup from before its upgrade.",
        )


class DatabaseDamaged(DatabaseUnusable):
    """The file is not a SQLite database, or is incomplete."""

    def __init__(self, database: Database, reason: object) -> None:
        super().__init__(
            f"The database {_shown(database)} is damaged: {reason}.",
            advice="Restore a backup of the file, or move it away to begin with an empty one.",
        )


class ReferencesBroken(Exception):
    """Rows refer to rows that are not there. Nothing was changed."""


async def upgrade(database: Database, *, revision: str = "head") -> None:
    """Run all migrations that are missing, in one transaction (on both databases DDL is transactional).

    Raises `DatabaseUnusable` for a damaged database and for a newer schema.
    """
    if await schema_state(database) is SchemaState.CURRENT and revision == "head":
        return
    async with for_migrations(database) as migrated, migrated.writing() as session:
        connection = await session.connection()
        await connection.run_sync(migrate_connection, revision)


async def downgrade(database: Database, *, revision: str) -> None:
    """Go back to `revision` (`base` empties the database)."""
    async with for_migrations(database) as migrated, migrated.writing() as session:
        connection = await session.connection()
        await connection.run_sync(migrate_connection, revision, down=True)


async def schema_state(database: Database) -> SchemaState:
    """Return how the schema stands; raise `SchemaTooNew` or `DatabaseDamaged` if it cannot be used."""
    with explaining_damage(database):
        async with database.engine.connect() as connection:
            found = await connection.run_sync(revision_of)
    if found is None:
        return SchemaState.MISSING
    if found not in revisions():
        raise SchemaTooNew(database, found)
    return SchemaState.CURRENT if found == revisions()[-1] else SchemaState.OLDER


async def check_integrity(database: Database) -> None:
    """Read the whole of a SQLite database; raise `DatabaseDamaged` if something is wrong with it."""
    if database.engine.dialect.name != "sqlite":
        return
    with explaining_damage(database):
        async with database.engine.connect() as connection:
            said = (await connection.exec_driver_sql("PRAGMA quick_check(1)")).scalar()
    if said != "ok":
        raise DatabaseDamaged(database, said)


@contextmanager
def explaining_damage(database: Database) -> Iterator[None]:
    """Raise `DatabaseDamaged` for what SQLite says of a damaged file."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        origin = error.orig if isinstance(error, DBAPIError) else error
        code = getattr(origin, "sqlite_errorcode", None)
        if code is None or code & 0xFF not in _DAMAGED:
            raise
        raise DatabaseDamaged(database, origin) from error


@functools.cache
def revisions() -> tuple[str, ...]:
    """Return all revisions of the schema, oldest first: the files are named by them."""
    return tuple(sorted(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py")))


@asynccontextmanager
async def for_migrations(database: Database) -> AsyncIterator[Database]:
    """Yield the database for statements of minutes, such as an index of a long table.

    SQLite checks foreign keys at the end: it alters a table by making a new one, and would refuse to drop the old one
    while rows refer to it.
    """
    migrated = Database(database.url, pool_size=1, silent_after=None, foreign_keys=False, scope=EVERY_PROJECT)
    try:
        yield migrated
    finally:
        await migrated.close()


def revision_of(connection: sa.Connection) -> str | None:
    """Return the revision of the schema; None: the database has none of our tables."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    revision: str | None = connection.scalar(sa.select(sa.column("version_num")).select_from(sa.table(VERSION_TABLE)))
    return revision


def migrate_connection(connection: sa.Connection, revision: str, *, down: bool = False) -> None:
    """Run the migrations to `revision` in the transaction of `connection`."""
    from alembic import command
    from alembic.config import Config

    if connection.dialect.name == "postgresql":
        # two API processes starting together would otherwise both create the tables
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    (command.downgrade if down else command.upgrade)(config, revision)
    if connection.dialect.name == "sqlite" and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all()):
        raise ReferencesBroken(f"references to nothing at revision {revision}: {broken[:10]}")


def _shown(database: Database) -> str:
    url = make_url(database.url)
    is_file = url.get_backend_name() == "sqlite"
    return str(url.database) if is_file else url.render_as_string(hide_password=True)
