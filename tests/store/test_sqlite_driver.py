"""What the driver must keep although it makes one trip where aiosqlite makes five."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.projects import DEFAULT_SCOPE
from app.store.session import Database
from app.store.sqlite_driver import SqliteConnection

COUNT = sa.text("SELECT count(*) FROM thing")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'things.db'}", pool_size=2, scope=DEFAULT_SCOPE)
    await write(database, "CREATE TABLE thing (id INTEGER PRIMARY KEY, name TEXT UNIQUE)")
    yield database
    await database.close()


async def write(database: Database, statement: str, **parameters: object) -> int:
    async with database.writing() as session:
        result = await (await session.connection()).execute(sa.text(statement), parameters)
        return result.rowcount


async def count(session: AsyncSession) -> int:
    return int((await (await session.connection()).execute(COUNT)).scalar_one())


class TestStatements:
    async def test_tell_how_many_rows_they_changed_and_what_they_return(self, database: Database) -> None:
        changed = await write(database, "INSERT INTO thing (name) VALUES ('a'), ('b')")
        async with database.writing() as session:
            connection = await session.connection()
            returned = await connection.execute(sa.text("UPDATE thing SET name = name || '!' RETURNING id, name"))
            rows = [tuple(row) for row in returned]
            await connection.execute(sa.text("INSERT INTO thing (name) VALUES (:name)"), [{"name": "x"}, {"name": "y"}])

        async with database.reading() as session:
            assert (changed, rows, await count(session)) == (2, [(1, "a!"), (2, "b!")], 4)

    async def test_that_fail_leave_the_connection_fit_for_the_next(self, database: Database) -> None:
        await write(database, "INSERT INTO thing (name) VALUES ('a')")

        for _ in range(3):  # more often than there are connections
            with pytest.raises(IntegrityError):
                await write(database, "INSERT INTO thing (name) VALUES ('a')")
            async with database.reading() as session:
                with pytest.raises(OperationalError):
                    await (await session.connection()).execute(sa.text("SELECT nothing"))

        async with database.reading() as session:
            assert await count(session) == 1


class TestTransactions:
    async def test_reader_sees_one_state_however_often_it_looks(self, database: Database) -> None:
        async with database.reading() as session:
            before = await count(session)
            await write(database, "INSERT INTO thing (name) VALUES ('a')")
            seen = await count(session)

        async with database.reading() as later:
            assert (before, seen, await count(later)) == (0, 0, 1)

    async def test_of_a_cancelled_task_does_not_stay_open(self, database: Database) -> None:
        async def look() -> None:
            async with database.reading() as session:
                await count(session)

        for number in range(20):  # at different moments: before, during and after the statement
            task = asyncio.create_task(look())
            for _ in range(number % 7):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            await write(database, "INSERT INTO thing (name) VALUES (NULL)")
            async with database.reading() as session, database.reading() as other:
                assert await count(session) == await count(other) == number + 1


class TestOtherProcesses:
    async def test_leave_the_log_alone_that_our_connections_write(self, database: Database, tmp_path: Path) -> None:
        """A new connection must not drop the locks of the others (POSIX locks belong to a process)."""
        file, log = tmp_path / "things.db", tmp_path / "things.db-wal"
        async with database.reading() as session, database.reading() as other:
            await count(session), await count(other)
        before = log.stat().st_ino
        program = (
            f"import sqlite3; c = sqlite3.connect({str(file)!r});"
            "c.execute(\"INSERT INTO thing (name) VALUES ('x')\"); c.commit(); c.close()"
        )

        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], check=True)
        await write(database, "INSERT INTO thing (name) VALUES ('y')")

        assert log.stat().st_ino == before
        async with database.reading() as session:
            assert await count(session) == 2


async def test_connection_that_is_stopped_while_a_cancelled_task_closes_it_keeps_nobody(tmp_path: Path) -> None:
    """That is what happens to a statement of a task that is still there when the event loop ends."""
    connection = SqliteConnection(str(tmp_path / "things.db"))
    await connection
    closing = asyncio.create_task(connection.close())
    await asyncio.sleep(0)  # the close is on its way to the thread

    closing.cancel()
    connection.stop()

    with pytest.raises(asyncio.CancelledError):
        await closing
    connection._thread.join()
