"""The service in one command: private Redis, API and one worker as children of this process.

`EmbeddedService.start` returns when the API is ready; from then on a child that dies is started again. `stop` ends
them in order (API, worker, Redis), so that nothing new is accepted while work is put down. Stages of running jobs have
supervisors of their own and go on; the worker of the next start adopts them.
"""

import fcntl
import http.client
import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from app.cli.command import CliFailure, HomeUnusable
from app.cli.private_redis import NO_REDIS, PrivateRedis, RedisChoice
from app.cli.processes import (
    ManagedProcess,
    ProcessSpec,
    Say,
    StartProcess,
    Watchdog,
    any_free,
    describe_exit,
    is_free,
    next_free,
    start_process,
)
from app.secret_values import CALLER_FIELDS, without_secrets
from app.settings import Settings
from app.store.home import make_private_folder

LOCK_FILE: Final = "dev.lock"
LEFTOVER_SECONDS: Final = 15.0
"""How long the processes of a service that was killed may need to end."""
READY_SECONDS: Final = 60.0
REDIS_SECONDS: Final = 20.0
_LOOK_SECONDS: Final = 0.05
_EVERY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where to call such a server from here


class HomeInUse(CliFailure):
    """Another embedded service holds the home."""

    def __init__(self, home: Path, holder: dict[str, Any]) -> None:
        self.holder = holder
        who = f"{holder.get('command', 'deepe dev')} (process {holder.get('pid', 'unknown')})"
        where = f", which answers at {holder['url']}" if holder.get("url") else ""
        super().__init__(
            f"{home} is in use by {who}{where}.",
            notes=("Stop that one first, or choose another folder with --home or DEEPE_HOME.",),
        )


class HomeLock:
    """A lock on a home's `dev.lock`.

    The watchdog of the processes holds it, too: when we are killed, it is free once everything we started has ended.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._file: int | None = None

    @property
    def descriptor(self) -> int:
        """The open file that holds the lock."""
        assert self._file is not None
        return self._file

    def take(self, *, command: str) -> None:
        """Take the lock and say who we are, or raise `HomeInUse`; wait for what a killed service left."""
        descriptor = os.open(self._home / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + LEFTOVER_SECONDS
        while not _locked(descriptor):
            holder = _read(descriptor)
            if _lives(holder.get("pid")) or time.monotonic() > deadline:
                os.close(descriptor)
                raise HomeInUse(self._home, holder)
            time.sleep(0.05)
        self._file = descriptor
        self.note(command=command, url=None)

    def note(self, **facts: object) -> None:
        """Record what a second process needs to know."""
        assert self._file is not None
        known = {**_read(self._file), "pid": os.getpid(), **facts}
        text = json.dumps(known).encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text, 0)

    def release(self) -> None:
        """Give the lock back; the file stays, because deleting it would let two hold a lock each."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lives(pid: object) -> bool:
    if not isinstance(pid, int):
        return True  # it has just taken the lock and not yet said who it is
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read(descriptor: int) -> dict[str, Any]:
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class StartFailed(CliFailure):
    """The embedded service did not come up."""


class PortTaken(CliFailure):
    """Another program listens on the port."""

    def __init__(self, host: str, port: int) -> None:
        proposal = next_free(host, port + 1)
        super().__init__(
            f"Port {port} on {host} is taken by another program.",
            notes=(f"Port {proposal} is free: add --port {proposal} (or set DEEPE_PORT={proposal}).",),
        )


class RunnerPortTaken(CliFailure):
    """Another program listens on the port for DeepExtension's backend, which has to stay as the backend knows it."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            f"Port {port} on {host} (DEEPE_RUNNER_PORT) is taken by another program.",
            notes=("Stop that program, which may be DeepExtension's own runner, or change DEEPE_RUNNER_PORT.",),
        )


@dataclass(frozen=True)
class EmbeddedOptions:
    """What differs between `deepe dev` and its relatives.

    `redis`: possibilities, best first. `log_folder`: children write there instead of our stderr. `environment`:
    variables for the children on top of ours. `start_process`: how children are started.
    """

    command: str = "deepe dev"
    redis: Iterable[RedisChoice] = (NO_REDIS,)
    log_folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    start_process: StartProcess = start_process


class EmbeddedService:
    """Runs the service's processes. `start` and `stop` are called once each, `stop` also after a failed start."""

    def __init__(self, settings: Settings, options: EmbeddedOptions, *, say: Say) -> None:
        self._settings = settings
        self._options = options
        self._say = say
        self._lock = HomeLock(settings.home)
        self._watchdog: Watchdog | None = None
        self._children: list[ManagedProcess] = []
        self.port = settings.port
        self.redis: RedisChoice = NO_REDIS

    @property
    def url(self) -> str:
        """Where the API answers, seen from this machine."""
        host = _EVERY_ADDRESS.get(self._settings.host, self._settings.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def pids(self) -> dict[str, int]:
        """The children that run at this moment, by name."""
        return {child.spec.name: child.pid for child in self._children if child.pid is not None}

    def start(self, *, timeout: float = READY_SECONDS) -> str:
        """Bring everything up and return the URL; on failure nothing stays behind."""
        try:
            make_private_folder(self._settings.home)
            self._lock.take(command=self._options.command)
        except OSError as error:
            raise HomeUnusable(self._settings.home, error) from error
        try:
            self.port = self._listening_port()
            self._watchdog = Watchdog(hold=self._lock.descriptor)
            if self._options.log_folder is not None:
                make_private_folder(self._options.log_folder)
            redis = self._start_redis()
            api = self._child("api", self._python("serve"), self._environment(redis))
            worker = self._child("worker", self._python("worker"), self._environment(redis, without=CALLER_FIELDS))
            api.start()
            self._wait_until_ready(api, timeout=timeout)
            # after the API, which brings the database's schema up to date
            worker.start()
        except BaseException:
            self.stop(grace_seconds=2.0)
            raise
        for child in self._children:
            child.keep()
        self._lock.note(url=self.url)
        return self.url

    def stop(self, *, grace_seconds: float | None = None) -> None:
        """End all children in order; a second call finds nothing to do."""
        stages = ("api", "worker", "redis")
        for child in sorted(self._children, key=lambda child: stages.index(child.spec.name)):
            child.stop(grace_seconds=grace_seconds)
        self._children = []
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        self._lock.release()

    def _listening_port(self) -> int:
        host, port = self._settings.host, self._settings.port
        runner = self._settings.runner_port
        if runner is not None and not is_free(self._settings.runner_host, runner):
            raise RunnerPortTaken(self._settings.runner_host, runner)
        if port == 0:
            return any_free(host)
        if not is_free(host, port):
            raise PortTaken(host, port)
        return port

    def _start_redis(self) -> dict[str, str]:
        """Start the first Redis that works; return the variables by which the children find it."""
        for choice in self._options.redis:
            variables = (
                {"DEEPE_REDIS_URL": choice.url or ""}
                if choice.executable is None
                else self._try_private_redis(choice.executable)
            )
            if variables is not None:
                self.redis = choice
                return variables
            self._say(f"{choice.executable} does not start; going on without it")
        return {"DEEPE_REDIS_URL": ""}

    def _try_private_redis(self, executable: Path) -> dict[str, str] | None:
        try:
            server = PrivateRedis(executable, self._settings.home / "redis")
            # its own chatter never belongs on the console
            redis = self._child(
                "redis",
                server.configure(),
                without_secrets(os.environ),
                log=server.folder / "redis.log",
                umask=0o077,
                stdin=server.configuration,
            )
            redis.start()
        except OSError:
            self._children = []  # Redis is the first one
            return None
        deadline = time.monotonic() + REDIS_SECONDS
        while not server.answers():
            if redis.exit_code() is not None or time.monotonic() > deadline:
                redis.stop()
                self._children.remove(redis)
                return None
            time.sleep(_LOOK_SECONDS)
        return {"DEEPE_REDIS_URL": server.url, **server.script_variables}

    def _wait_until_ready(self, api: ManagedProcess, *, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not is_ready(self.url):
            code = api.exit_code()
            if code is not None:
                raise StartFailed(f"The API ended at its start ({describe_exit(code)}).", notes=api.log_tail())
            if time.monotonic() > deadline:
                raise StartFailed(f"The API was not ready within {timeout:g} s.", notes=api.log_tail())
            time.sleep(_LOOK_SECONDS)

    def _child(
        self,
        name: str,
        argv: tuple[str, ...],
        environment: Mapping[str, str],
        *,
        log: Path | None = None,
        umask: int = -1,
        stdin: Path | None = None,
    ) -> ManagedProcess:
        assert self._watchdog is not None
        folder = self._options.log_folder
        spec = ProcessSpec(
            name=name,
            argv=argv,
            env=environment,
            log=log or (folder / f"{name}.log" if folder is not None else None),
            umask=umask,
            stdin=stdin,
        )
        child = ManagedProcess(spec, watchdog=self._watchdog, say=self._say, start_process=self._options.start_process)
        self._children.append(child)
        return child

    def _environment(self, redis: Mapping[str, str], *, without: Collection[str] = ()) -> dict[str, str]:
        """Return a child's environment: ours, with every choice that was made here spelled out.

        `without`: secrets that the child does not need.
        """
        settings = self._settings
        made = {
            "DEEPE_HOME": str(settings.home),
            "DEEPE_NODE_HOME": str(settings.node_home),
            "DEEPE_NODE_NAME": settings.node_name,
            "DEEPE_HOST": settings.host,
            "DEEPE_PORT": str(self.port),
            **settings.secret_variables(without=without),
            **redis,
        }
        return {**without_secrets(os.environ), **made, **self._options.environment}

    def _python(self, *arguments: str) -> tuple[str, ...]:
        # -P: a folder `app` where the user happens to stand is not ours
        return (sys.executable, "-P", "-m", "app.cli", *arguments)


def is_ready(url: str, *, timeout: float = 5.0) -> bool:
    """Say whether the service at `url` answers that it can work."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
