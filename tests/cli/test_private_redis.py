"""The private Redis with a real server: what the service, the scripts and every other account can do with it."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from app.cli.private_redis import SOCKET_PATH_BYTES, PrivateRedis
from app.executor.attempts.script_status import FAILED, RUNNING, RedisScriptStatus
from app.executor.nodes.redis_notifier import RedisNotifier, queue_name
from tests.servers import redis_executable
from tests.waiting import wait_until

pytestmark = pytest.mark.redis


REFUSED = "(?i)no permissions|command not allowed"
"""By the rules for the caller; or, of what Valkey lets nobody do, by it itself."""


@pytest.fixture(params=["socket", "socket in an odd folder", "password"], scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    folder = tmp_path_factory.mktemp("r")
    match request.param:
        case "socket in an odd folder":
            folder /= 'a "b\\ü?#%20'
        case "password":
            folder /= "x" * SOCKET_PATH_BYTES
    private = PrivateRedis(Path(redis_executable()), folder / "redis")
    before = os.umask(0)
    command = private.configure()
    with private.configuration.open("rb") as configuration:
        process = subprocess.Popen(command, stdin=configuration, stdout=subprocess.DEVNULL, umask=0o077)
    try:
        wait_until(private.answers, "Redis")
        yield private
    finally:
        os.umask(before)
        process.terminate()
        process.wait()


@pytest.fixture
def script(server: PrivateRedis) -> Iterator[redis.Redis]:
    """A client as in a user's script, or in any other account of the machine."""
    variables = server.script_variables
    host, port = variables["AI_PY_REDIS_HOST"], int(variables["AI_PY_REDIS_START_PORT"])
    with redis.Redis(host=host, port=port, db=0, decode_responses=True) as client:
        yield client


def test_service_connects_by_a_socket_where_its_path_fits(server: PrivateRedis) -> None:
    fits = len(os.fsencode(server.folder)) < 90

    assert server.url.startswith("unix://" if fits else "redis://")


def test_scripts_keep_their_status(script: redis.Redis) -> None:
    job = str(uuid4())

    script.set(job, '{"status": 3}')

    assert script.get(job) == '{"status": 3}'
    assert script.delete(job) == 1


@pytest.mark.parametrize(
    "command",
    [
        "SET k planted", "GET deepe:node:a", "ZADD deepe:node:a 1 x", "KEYS *", "SCAN 0", "CONFIG SET dir /tmp",
        "CONFIG GET *", "MODULE LOAD /nonexistent.so", "DEBUG SLEEP 0", "SAVE", "BGREWRITEAOF", "FLUSHALL", "SHUTDOWN",
        "EVAL return(1) 0", "SCRIPT FLUSH", "ACL LIST", "REPLICAOF 127.0.0.1 1", "MONITOR", "CLIENT LIST", "INFO",
        "PUBLISH deepe:node:a x", "SUBSCRIBE deepe:node:a", "SELECT 1", "MIGRATE 127.0.0.1 1 k 0 1",
    ],
)  # fmt: skip
def test_others_can_do_nothing_else(script: redis.Redis, command: str) -> None:
    with pytest.raises(redis.exceptions.ResponseError, match=REFUSED):
        script.execute_command(*command.split())  # type: ignore[no-untyped-call]


def test_others_do_not_guess_the_password(script: redis.Redis) -> None:
    with pytest.raises(redis.exceptions.AuthenticationError):
        script.execute_command("AUTH", "deepe", "deepe")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("command", ["CONFIG GET *", "MODULE LIST", "DEBUG SLEEP 0", "FLUSHALL", "ACL LIST", "SAVE"])
def test_service_itself_has_no_dangerous_commands(server: PrivateRedis, command: str) -> None:
    with redis.Redis.from_url(server.url) as client, pytest.raises(redis.exceptions.ResponseError, match=REFUSED):
        client.execute_command(*command.split())


async def test_service_has_what_it_needs(server: PrivateRedis, caplog: pytest.LogCaptureFixture) -> None:
    status, job = RedisScriptStatus(server.url), str(uuid4())

    async def nodes() -> list[str]:
        return ["node"]

    notifier = RedisNotifier(server.url, nodes=nodes)
    await status.launching(job)
    await status.running(job, 7)
    running = await status.read(job)
    await status.ended(job, succeeded=False)
    notifier.notify(job)
    await notifier.close()
    await status.close()

    with redis.Redis.from_url(server.url, db=1) as client:
        hints = client.zcard(queue_name("node"))
    assert (running, hints) == (RUNNING, 1)
    assert caplog.messages == []


def test_scripts_are_heard(server: PrivateRedis, script: redis.Redis) -> None:
    job = str(uuid4())
    script.set(job, f'{{"status": {FAILED}}}')

    with redis.Redis.from_url(server.url) as client:
        assert client.get(job) == f'{{"status": {FAILED}}}'.encode()


def test_files_are_for_the_owner_alone_and_no_argument_tells_the_password(server: PrivateRedis) -> None:
    password = server.url.partition(":")[2].rpartition("@")[0].rpartition(":")[2]
    arguments = server.configure()

    modes = {file.name: stat.S_IMODE(file.stat().st_mode) & 0o077 for file in server.folder.rglob("*")}
    assert set(modes.values()) == {0}
    assert {"appendonly.aof", "redis.conf"} <= set(modes) or "appendonlydir" in modes
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
    assert len(password) > 30
    assert password not in " ".join(arguments)
    assert password not in server.configuration.read_text()


def test_folder_of_an_earlier_version_is_closed(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").touch(mode=0o644)
    tmp_path.chmod(0o755)

    PrivateRedis(Path(redis_executable()), tmp_path)

    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "appendonly.aof").stat().st_mode) == 0o600
