"""Redis notifies: with it a job starts at once, without it a moment later, and nothing else depends on it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis

from app.domain.enums import JobStatus
from app.executor.nodes.notifier import FileNotifier, listen_to_file
from app.executor.nodes.redis_notifier import RedisNotifier, queue_name
from tests.servers import RedisServer, free_port
from tests.waiting import until
from tests.worker.harness import Site

RARELY = {"DEEPE_POLL_SECONDS": "300"}
# what only a look in the database would find is not found: the one limit of a test that has a meaning
BEFORE_A_LOOK = pytest.mark.timeout(240)  # noqa: TID251


@pytest.fixture
async def notifier(own_redis: RedisServer) -> AsyncIterator[RedisNotifier]:
    async def nodes() -> list[str]:
        return ["one"]

    notifier = RedisNotifier(own_redis.url(0), nodes=nodes)
    yield notifier
    await notifier.close()


async def listening(server: RedisServer) -> bool:
    """Say whether a worker asks for its queue."""
    with redis.Redis(port=server.port) as client:
        return any(client_info["cmd"].startswith("zrange") for client_info in client.client_list())


@BEFORE_A_LOOK
@pytest.mark.redis
class TestRedisNotifier:
    async def test_job_starts_although_the_database_is_never_asked(
        self, redis_site: Site, own_redis: RedisServer, notifier: RedisNotifier
    ) -> None:
        redis_site.start_worker(**RARELY)
        await until(lambda: listening(own_redis), "a listening worker", report=redis_site.report)
        job_id = await redis_site.submit()

        notifier.notify(job_id)
        await redis_site.wait(job_id, JobStatus.SUCCEEDED)

        assert redis_site.journal(job_id) == ["run"]

    async def test_notifies_again_after_redis_was_away(
        self, redis_site: Site, own_redis: RedisServer, notifier: RedisNotifier
    ) -> None:
        worker = redis_site.start_worker(**RARELY)
        await until(lambda: listening(own_redis), "a listening worker", report=redis_site.report)

        own_redis.stop()

        async def noticed() -> bool:
            return bool(worker.events("notifications_interrupted"))

        await until(noticed, "the worker's notice", report=redis_site.report)
        own_redis.start()
        await until(lambda: listening(own_redis), "a listening worker", report=redis_site.report)
        job_id = await redis_site.submit()
        notifier.notify(job_id)
        row = await redis_site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED
        assert worker.process.poll() is None
        assert "Traceback" not in worker.log
        worker.stop()

    async def test_flush_changes_nothing(self, redis_site: Site, own_redis: RedisServer) -> None:
        ids = [
            await redis_site.submit("import play\nplay.journal('run')\nplay.wait_for('go')\nplay.adapter()\n")
            for _ in range(2)
        ]
        redis_site.start_worker()
        await redis_site.wait_for_journal(ids[0])

        with redis.Redis(port=own_redis.port) as client:
            client.flushall()
        redis_site.open("go")
        rows = await redis_site.wait_for_end(*ids)

        assert [row.status for row in rows] == [JobStatus.SUCCEEDED] * 2
        assert [redis_site.journal(job_id) for job_id in ids] == [["run"]] * 2

    async def test_stale_and_doubled_notifications_change_nothing(
        self, redis_site: Site, own_redis: RedisServer, notifier: RedisNotifier
    ) -> None:
        job_id = await redis_site.submit()
        for _ in range(20):
            notifier.notify(job_id)
        notifier.notify("no-such-job")

        redis_site.start_worker(**RARELY)
        await redis_site.wait(job_id, JobStatus.SUCCEEDED)

        async def emptied() -> bool:
            with redis.Redis(port=own_redis.port, db=1) as client:
                return bool(client.zcard(queue_name("one")) == 0)

        await until(emptied, "an empty queue", report=redis_site.report)
        assert redis_site.journal(job_id) == ["run"]


class TestFileNotifier:
    async def test_wakes_a_listener_each_time(self, tmp_path: Path) -> None:
        woken = asyncio.Event()
        stopping = asyncio.Event()
        path = tmp_path / "notifier"
        fifo = tmp_path / "fifos" / "one"
        notifier = FileNotifier(path, fifos=tmp_path / "elsewhere")
        listener = asyncio.create_task(listen_to_file(path, fifo=fifo, wake=woken.set, stopping=stopping))
        await asyncio.sleep(0)  # it has looked once

        for _ in range(3):
            woken.clear()
            notifier.notify("job")
            await woken.wait()

        stopping.set()
        await listener

    async def test_nodes_on_this_machine_are_woken_at_once(self, tmp_path: Path) -> None:
        woken, stopping = asyncio.Event(), asyncio.Event()
        fifos = tmp_path / "fifos"
        never_touched = tmp_path / "other" / "notifier"
        listener = asyncio.create_task(
            listen_to_file(never_touched, fifo=fifos / "one", wake=woken.set, stopping=stopping)
        )
        await asyncio.sleep(0)  # it listens

        FileNotifier(tmp_path / "notifier", fifos=fifos).notify("job")
        await woken.wait()

        stopping.set()
        await listener

    async def test_notification_that_cannot_arrive_is_silent(self, tmp_path: Path) -> None:
        notifier = FileNotifier(tmp_path / "no-folder" / "notifier", fifos=tmp_path / "no-fifos")

        notifier.notify("job")

        await notifier.close()


class TestWithout:
    async def test_jobs_are_found_in_the_database(self, site: Site) -> None:
        worker = site.start_worker(**RARELY)
        job_id = await site.submit()

        row = await site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED
        assert worker.events("worker_started")[0]["redis"] is False

    async def test_redis_that_never_answers_is_no_obstacle(self, site: Site) -> None:
        site.redis_url = f"redis://127.0.0.1:{free_port()}"
        job_id = await site.submit()

        worker = site.start_worker()
        row = await site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED
        worker.stop()
        assert "Traceback" not in worker.log

    async def test_notification_for_a_redis_that_is_away_is_silent(self, caplog: pytest.LogCaptureFixture) -> None:
        async def nodes() -> list[str]:
            return ["one"]

        notifier = RedisNotifier(f"redis://127.0.0.1:{free_port()}", nodes=nodes)

        notifier.notify("a")
        await notifier.close()
        notifier.notify("b")
        await notifier.close()

        assert [record.message for record in caplog.records if record.name == "app.executor.nodes.redis_notifier"] == [
            "notification_lost"
        ]
