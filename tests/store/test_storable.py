"""Text that a database refuses never makes a statement fail, and never comes back from one."""

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app.domain.projects import DEFAULT_SCOPE
from app.store import jobs
from app.store.session import Database
from app.store.transient import is_transient
from tests.job_rows import add_job

LATIN_1 = os.fsdecode(b"\xfc.txt")


async def read(database: Database, job_id: str) -> Any:
    async with database.reading() as session:
        return await jobs.get(session, job_id)


class TestWriting:
    @pytest.mark.parametrize(
        ("value", "kept"),
        [
            (LATIN_1, "\\xfc.txt"),
            ("a\x00b", "a\\x00b"),
            ("\ud83d", "\\ud83d"),
            ("Größe 😀\n", "Größe 😀\n"),
            ("\\udcfc \\u0000", "\\udcfc \\u0000"),
        ],
    )
    async def test_text_is_kept_in_a_form_that_can_be_sent(self, database: Database, value: str, kept: str) -> None:
        job_id = await add_job(database, name=value, reason_params={"detail": value, value: [value]})

        row = await read(database, job_id)

        assert (row.name, row.reason_params) == (kept, {"detail": kept, kept: [kept]})

    async def test_document_that_json_lacks_words_for_is_kept_without(self, database: Database) -> None:
        deep: Any = []
        for _ in range(100_000):
            deep = [deep]

        job_id = await add_job(database, reason_params={"nan": float("nan"), "huge": 10**5000, "deep": deep})

        kept = (await read(database, job_id)).reason_params
        assert kept["nan"] is None
        assert kept["huge"] == "…"

    async def test_condition_with_such_text_finds_nothing(self, database: Database) -> None:
        await add_job(database)

        for value in (LATIN_1, "a\x00b"):
            async with database.reading() as session:
                found = await (await session.connection()).execute(
                    sa.text("SELECT id FROM job WHERE id = :id"), {"id": value}
                )
                assert found.all() == []


class TestReading:
    async def test_row_that_was_written_before_is_made_sendable(self, database: Database) -> None:
        job_id = await add_job(database)
        raw = '{"detail": "it holds \\udcfc.txt", "\\ud800": "a\\ud83d\\ude00", "whole": "\\uD83D\\uDE00"}'
        async with database.writing() as session:
            statement = sa.text("UPDATE job SET reason_params = :raw WHERE id = :id")
            await (await session.connection()).execute(statement, {"raw": raw, "id": job_id})

        row = await read(database, job_id)

        assert row.reason_params == {"detail": "it holds \\xfc.txt", "\\ud800": "a😀", "whole": "😀"}


class TestIsTransient:
    async def test_value_that_is_refused_is_not(self, database: Database) -> None:
        job_id = await add_job(database)

        with pytest.raises(sa.exc.SQLAlchemyError) as twice:
            await add_job(database, id=job_id)
        with pytest.raises(sa.exc.SQLAlchemyError) as stranger:
            await add_job(database, status="bogus")

        assert not is_transient(twice.value)
        assert not is_transient(stranger.value)

    @pytest.mark.parametrize("kind", ["sqlite+aiosqlite:///{}/absent/x.db", "postgresql+asyncpg://u@127.0.0.1:1/x"])
    async def test_database_that_is_down_is(self, tmp_path: Path, kind: str) -> None:
        before = set(threading.enumerate())
        down = Database(kind.format(tmp_path), scope=DEFAULT_SCOPE)

        with pytest.raises((sa.exc.SQLAlchemyError, OSError)) as met:
            await down.ping()

        assert is_transient(met.value)
        await down.close()
        for thread in set(threading.enumerate()) - before:  # the driver's answers to this event loop at its end
            if "_connection_worker_thread" in thread.name:
                await asyncio.to_thread(thread.join, 10)

    @pytest.mark.parametrize(
        ("error", "passes"),
        [
            (OSError(errno.ENOSPC, "full"), True),
            (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
            (TimeoutError(), True),
            (PermissionError(errno.EACCES, "denied"), False),
            (FileNotFoundError(errno.ENOENT, "gone"), False),
            (UnicodeEncodeError("utf-8", "\udcfc", 0, 1, "surrogates"), False),
            (KeyError("audio"), False),
        ],
    )
    def test_tells_what_passes_by_itself(self, error: Exception, passes: bool) -> None:
        assert is_transient(error) is passes
