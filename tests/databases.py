"""Migrated databases for tests, without paying for a migration, a checkpoint or a disk each time."""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import sqlalchemy as sa

from app.domain.projects import DEFAULT_PROJECT, DEFAULT_SCOPE
from app.store.migrate import upgrade
from app.store.session import Database
from tests.servers import postgres_url

MEMORY = Path("/dev/shm")  # where there is one, a commit of SQLite waits for no disk

_TABLES = """
SELECT string_agg(relname, ',' ORDER BY relname) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
"""
_DELETE_PROJECTS = f"""
DELETE FROM project WHERE id <> '{DEFAULT_PROJECT}'; UPDATE project SET title = '', limits = '{{}}'
"""
_END_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


class PostgresDatabase:
    """A migrated database of the private server that one test after the other gets, each time empty.

    `CREATE DATABASE` and `DROP DATABASE` for each test would write a checkpoint each.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self._name = ""
        self._schema = ""

    @property
    def url(self) -> str:
        return postgres_url(self._server, self._name)

    async def prepare(self) -> None:
        """Make the database if there is none."""
        if self._name:
            return
        self._name = f"test_{uuid4().hex}"
        await execute(self._server, f'CREATE DATABASE "{self._name}" TEMPLATE "template"')
        connection = await self._connect()
        self._schema = await self._schema_of(connection)
        await connection.close()

    async def empty(self) -> None:
        """End all connections and delete all rows; a database whose schema is another one now is left behind."""
        connection = await self._connect()
        try:
            await connection.execute(_END_OTHERS)
            if await self._schema_of(connection) != self._schema:
                self._name = ""
                return
            tables = [name for name in self._schema.split(",")[:-1] if name not in ("alembic_version", "project")]
            deletes = "; ".join([*(f'DELETE FROM "{name}"' for name in tables), _DELETE_PROJECTS])
            sequences = "SELECT setval(oid::regclass, 1, false) FROM pg_class WHERE relkind = 'S'"
            await connection.execute(f"SET session_replication_role = replica; {deletes}; {sequences}")
        finally:
            await connection.close()

    async def _connect(self) -> "asyncpg.Connection":
        return await asyncpg.connect(self.url.replace("+asyncpg", ""))

    async def _schema_of(self, connection: "asyncpg.Connection") -> str:
        tables = await connection.fetchval(_TABLES)
        with contextlib.suppress(asyncpg.UndefinedTableError):
            return f"{tables},{await connection.fetchval('SELECT version_num FROM alembic_version')}"
        return str(tables)


@contextlib.contextmanager
def fast_folder() -> Iterator[Path]:
    """Make a folder in memory if there is such a file system and it has room, else a temporary one."""
    is_fast = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2**30
    with tempfile.TemporaryDirectory(prefix="deepe-tests-", dir=MEMORY if is_fast else None) as folder:
        yield Path(folder)


def migrate(url: str) -> None:
    """Bring the database of this URL to the newest schema."""
    asyncio.run(_migrate(url))


async def _migrate(url: str) -> None:
    database = Database(url, scope=DEFAULT_SCOPE)
    try:
        await upgrade(database)
        if url.startswith("sqlite"):
            async with database.engine.connect() as connection:
                await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        await database.close()


async def execute(server: str, *statements: str) -> None:
    """Run statements outside of any transaction on the private server's database `postgres`."""
    database = Database(postgres_url(server, "postgres"), scope=DEFAULT_SCOPE)
    try:
        async with database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            for statement in statements:
                await connection.execute(sa.text(statement))
    finally:
        await database.close()
