"""Redis is a doorbell: with it a job starts at once, without it a moment later, and nothing else depends on it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis

from app.domain.enums import JobStatus
from app.executor.nodes.hints import FileDoorbell, listen_to_file
from app.executor.nodes.redis_hints import RedisDoorbell, queue_name
from tests.servers import RedisServer, free_port
from tests.waiting import until
from tests.worker.harness import Site

RARELY = {"DEEPE_POLL_SECONDS": "86400"}  # longer than any test may take


@pytest.fixture
async def doorbell(own_redis: RedisServer) -> AsyncIterator[RedisDoorbell]:
    async def nodes() -> list[str]:
        return ["one"]

    doorbell = RedisDoorbell(own_redis.url(0), nodes=nodes)
    yield doorbell
    await doorbell.close()


async def listening(server: RedisServer) -> bool:
    """Say whether a worker asks for its queue."""
    with redis.Redis(port=server.port) as client:
        return any(client_info["cmd"].startswith("zrange") for client_info in client.client_list())


@pytest.mark.redis
class TestDoorbell:
    async def test_job_starts_although_the_database_is_never_asked(
        self, redis_site: Site, own_redis: RedisServer, doorbell: RedisDoorbell
    ) -> None:
        redis_site.start_worker(**RARELY)
        await until(lambda: listening(own_redis), "a listening worker", report=redis_site.report)
        job_id = await redis_site.submit()

        doorbell.ring(job_id)
        await redis_site.wait(job_id, JobStatus.SUCCEEDED)

        assert redis_site.journal(job_id) == ["run"]

    async def test_rings_again_after_redis_was_away(
        self, redis_site: Site, own_redis: RedisServer, doorbell: RedisDoorbell
    ) -> None:
        worker = redis_site.start_worker(**RARELY)
        await until(lambda: listening(own_redis), "a listening worker", report=redis_site.report)

        own_redis.stop()

        async def noticed() -> bool:
            return bool(worker.events("hints_interrupted"))

        await until(noticed, "the worker's notice", report=redis_site.report)
        own_redis.start()
        await until(lambda: listening(own_redis), "a listening worker", report=redis_site.report)
        job_id = await redis_site.submit()
        doorbell.ring(job_id)
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

    async def test_stale_and_doubled_hints_change_nothing(
        self, redis_site: Site, own_redis: RedisServer, doorbell: RedisDoorbell
    ) -> None:
        job_id = await redis_site.submit()
        for _ in range(20):
            doorbell.ring(job_id)
        doorbell.ring("no-such-job")

        redis_site.start_worker(**RARELY)
        await redis_site.wait(job_id, JobStatus.SUCCEEDED)

        async def emptied() -> bool:
            with redis.Redis(port=own_redis.port, db=1) as client:
                return bool(client.zcard(queue_name("one")) == 0)

        await until(emptied, "an empty queue", report=redis_site.report)
        assert redis_site.journal(job_id) == ["run"]


class TestFileDoorbell:
    async def test_wakes_a_listener_each_time(self, tmp_path: Path) -> None:
        woken = asyncio.Event()
        stopping = asyncio.Event()
        path = tmp_path / "doorbell"
        bell = tmp_path / "bells" / "one"
        doorbell = FileDoorbell(path, bells=tmp_path / "elsewhere")
        listener = asyncio.create_task(listen_to_file(path, bell=bell, wake=woken.set, stopping=stopping))
        await asyncio.sleep(0)  # it has looked once

        for _ in range(3):
            woken.clear()
            doorbell.ring("job")
            await woken.wait()

        stopping.set()
        await listener

    async def test_nodes_on_this_machine_hear_the_bell(self, tmp_path: Path) -> None:
        woken, stopping = asyncio.Event(), asyncio.Event()
        bells = tmp_path / "bells"
        never_touched = tmp_path / "other" / "doorbell"
        listener = asyncio.create_task(
            listen_to_file(never_touched, bell=bells / "one", wake=woken.set, stopping=stopping)
        )
        await asyncio.sleep(0)  # it listens

        FileDoorbell(tmp_path / "doorbell", bells=bells).ring("job")
        await woken.wait()

        stopping.set()
        await listener

    async def test_ring_that_cannot_be_heard_is_silent(self, tmp_path: Path) -> None:
        doorbell = FileDoorbell(tmp_path / "no-folder" / "doorbell", bells=tmp_path / "no-bells")

        doorbell.ring("job")

        await doorbell.close()


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

    async def test_ring_for_a_redis_that_is_away_is_silent(self, caplog: pytest.LogCaptureFixture) -> None:
        async def nodes() -> list[str]:
            return ["one"]

        doorbell = RedisDoorbell(f"redis://127.0.0.1:{free_port()}", nodes=nodes)

        doorbell.ring("a")
        await doorbell.close()
        doorbell.ring("b")
        await doorbell.close()

        assert [record.message for record in caplog.records if record.name == "app.executor.nodes.redis_hints"] == [
            "hint_lost"
        ]
