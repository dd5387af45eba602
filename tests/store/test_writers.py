"""Writers of one process take turns on SQLite, in the order in which they came; none is lost to another's sleep."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel import select

from app.domain.projects import DEFAULT_SCOPE
from app.store import session as sessions
from app.store.jobs import get
from app.store.session import Database
from tests.job_rows import add_job
from tests.waiting import until

WRITERS = 20


async def rename(
    database: Database, job_id: str, name: str, done: list[str], *, wait_for: asyncio.Event | None = None
) -> None:
    async with database.writing() as session:
        job = await get(session, job_id)
        if wait_for is not None:
            await wait_for.wait()
        job.name = name
        session.add(job)
    done.append(name)


def waiting(database: Database) -> int:
    """Return how many writers wait for their turn."""
    lock = database._write_lock
    return len(lock._waiters or ()) if lock.locked() else -1


@pytest.fixture
async def warm(sqlite_url: str) -> AsyncIterator[Database]:
    """Yield a database whose connections are open, so that a writer asks for its turn as soon as it runs."""
    database = Database(sqlite_url, pool_size=WRITERS, scope=DEFAULT_SCOPE)
    connections = [await database.engine.connect() for _ in range(WRITERS)]
    for connection in connections:
        await connection.close()
    yield database
    await database.close()


class TestWriting:
    async def test_turns_come_in_order(self, warm: Database) -> None:
        job_id = await add_job(warm)
        done: list[str] = []
        names = [f"{number}" for number in range(WRITERS)]

        all_have_asked = asyncio.Event()
        writers = []
        for number, name in enumerate(names):
            writers.append(asyncio.create_task(rename(warm, job_id, name, done, wait_for=all_have_asked)))
            await until(lambda: waiting(warm) == number, f"{name} in the queue")  # noqa: B023 - awaited at once
        all_have_asked.set()
        await asyncio.gather(*writers)

        assert done == names

    async def test_turn_is_given_back_after_a_failure(self, warm: Database) -> None:
        job_id = await add_job(warm)

        with pytest.raises(IntegrityError):
            await add_job(warm, id=job_id)

        done: list[str] = []
        await rename(warm, job_id, "after", done)
        assert done == ["after"]

    @pytest.mark.parametrize("victim", ["who has it", "who waits for it"])
    async def test_turn_is_given_back_after_a_cancellation(self, warm: Database, victim: str) -> None:
        job_id = await add_job(warm)
        done: list[str] = []
        holding, let_go = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with warm.writing() as session:
                await get(session, job_id)
                holding.set()
                await let_go.wait()

        holder = asyncio.create_task(hold())
        await holding.wait()
        waiter = asyncio.create_task(rename(warm, job_id, "waiter", done))
        await until(lambda: waiting(warm) == 1, "the second writer in the queue")
        (holder if victim == "who has it" else waiter).cancel()
        if victim == "who waits for it":
            await asyncio.wait([waiter])
            let_go.set()
        ends = await asyncio.gather(holder, waiter, return_exceptions=True)

        assert sum(isinstance(end, asyncio.CancelledError) for end in ends) == 1
        await rename(warm, job_id, "after", done)
        assert done[-1] == "after"

    async def test_writer_inside_of_a_writer_is_told_that_the_database_is_locked(
        self, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sessions, "BUSY_TIMEOUT_MS", 50)
        database = Database(sqlite_url, scope=DEFAULT_SCOPE)

        async def write_twice() -> None:
            async with database.writing() as outer:
                await outer.exec(select(1))  # a transaction begins with its first statement
                await add_job(database)

        with pytest.raises(OperationalError, match="database is locked"):
            await write_twice()

        await database.close()
