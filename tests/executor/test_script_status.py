"""The status keys that scripts and DeepExtension's backend share."""

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
import redis

from app.executor.attempts.script_status import FAILED, RUNNING, SUCCESS, RedisScriptStatus
from app.executor.attempts.stage_process import status_variables
from tests.servers import RedisServer, free_port


@pytest.fixture
async def status(redis_server: RedisServer) -> AsyncIterator[RedisScriptStatus]:
    status = RedisScriptStatus(redis_server.url(5))  # the URL's database is the queue's business
    yield status
    await status.close()


@pytest.fixture
def job_id() -> str:
    return str(uuid4())


def read(server: RedisServer, job_id: str) -> dict[str, Any] | None:
    with redis.Redis(port=server.port, db=0) as client:
        value = client.get(job_id)
    assert value is None or isinstance(value, bytes)
    return None if value is None else dict(json.loads(value))


def write(server: RedisServer, job_id: str, value: str) -> None:
    with redis.Redis(port=server.port, db=0) as client:
        client.set(job_id, value)


@pytest.mark.redis
class TestKeys:
    async def test_stand_in_database_0_without_expiry(
        self, status: RedisScriptStatus, redis_server: RedisServer, job_id: str
    ) -> None:
        await status.launching(job_id)

        record = read(redis_server, job_id)
        assert record is not None
        assert (record["status"], record["pid"]) == (RUNNING, 0)
        with redis.Redis(port=redis_server.port, db=0) as client:
            assert client.ttl(job_id) == -1

    async def test_pid_is_added_also_by_a_worker_that_did_not_launch(
        self, status: RedisScriptStatus, redis_server: RedisServer, job_id: str
    ) -> None:
        await status.launching(job_id)
        other = RedisScriptStatus(redis_server.url(0))

        await other.running(job_id, 4711)
        await other.close()

        record = read(redis_server, job_id)
        assert record is not None
        assert (record["status"], record["pid"]) == (RUNNING, 4711)

    @pytest.mark.parametrize("value", [json.dumps({"status": FAILED, "pid": 0}), "no JSON", "[]", "7"])
    async def test_pid_replaces_nothing_that_the_script_said(
        self, status: RedisScriptStatus, redis_server: RedisServer, job_id: str, value: str
    ) -> None:
        await status.launching(job_id)
        write(redis_server, job_id, value)

        await status.running(job_id, 4711)

        with redis.Redis(port=redis_server.port, db=0) as client:
            assert client.get(job_id) == value.encode()

    @pytest.mark.parametrize(("succeeded", "number"), [(True, SUCCESS), (False, FAILED)])
    async def test_end_has_no_pid(
        self, status: RedisScriptStatus, redis_server: RedisServer, job_id: str, succeeded: bool, number: int
    ) -> None:
        await status.launching(job_id)
        await status.running(job_id, 4711)

        await status.ended(job_id, succeeded=succeeded)

        record = read(redis_server, job_id)
        assert record is not None
        assert (record["status"], record["pid"]) == (number, 0)

    @pytest.mark.parametrize(
        ("value", "number"),
        [('{"status": 3}', 3), ('{"status": "3"}', None), ("{}", None), ("no JSON", None), ("[1]", None), ("3", None)],
    )
    async def test_reads_only_what_is_a_status(
        self, status: RedisScriptStatus, redis_server: RedisServer, job_id: str, value: str, number: int | None
    ) -> None:
        write(redis_server, job_id, value)

        assert await status.read(job_id) == number

    async def test_absent_key_is_none(self, status: RedisScriptStatus, job_id: str) -> None:
        assert await status.read(job_id) is None


class TestAway:
    async def test_nothing_is_raised(self, job_id: str, caplog: pytest.LogCaptureFixture) -> None:
        status = RedisScriptStatus(f"redis://127.0.0.1:{free_port()}")

        await status.launching(job_id)
        await status.running(job_id, 1)
        await status.ended(job_id, succeeded=True)
        found = await status.read(job_id)
        await status.close()

        assert found is None
        assert set(caplog.messages) == {"script_status_lost"}


class TestVariables:
    @pytest.mark.parametrize(
        ("url", "host", "port"),
        [
            ("redis://127.0.0.1:7000/3", "127.0.0.1", "7000"),
            ("redis://user:secret@redis.example.com", "redis.example.com", "6379"),
            ("rediss://[::1]:6380", "::1", "6380"),
        ],
    )
    def test_name_host_and_port(self, url: str, host: str, port: str) -> None:
        assert status_variables(url) == {
            "AI_PY_REDIS_HOST": host,
            "AI_PY_REDIS_START_PORT": port,
            "AI_PY_REDIS_EXPOSED_PORT": port,
        }

    @pytest.mark.parametrize("url", [None, "unix:///run/redis.sock"])
    def test_are_absent_where_scripts_could_not_connect(self, url: str | None) -> None:
        assert status_variables(url) == {}
