"""Child processes of the embedded service: started in sessions of their own, kept alive, ended in order.

Each child leads its own process group, so that Ctrl-C in a terminal reaches us alone and we end the others in order.
A child that dies while it is kept is started again after a pause that doubles. If we are killed ourselves, the
watchdog (see `app.cli.watchdog`) ends what we left.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

from app.cli import watchdog
from app.store.home import PRIVATE_FILE

Say = Callable[[str], None]

LAST_PORT: Final = 65535
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 15.0
STEADY_SECONDS: Final = 30.0
"""A child that lived this long did not fail because it was just started: the pauses begin anew."""


def is_free(host: str, port: int) -> bool:
    """Say whether a server could listen on `host:port` now."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # as servers do: a port whose old connections are still closing is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    # macOS lets us bind 127.0.0.1 beside a program that listens on every address
    with socket.socket(family, kind, protocol) as caller:
        caller.settimeout(0.5)
        return caller.connect_ex(address) != 0


def next_free(host: str, port: int) -> int:
    """Return the first free port from `port` on, or one that the system chooses."""
    for candidate in range(port, min(port + 100, LAST_PORT + 1)):
        if is_free(host, candidate):
            return candidate
    return any_free(host)


def any_free(host: str) -> int:
    """Return a free port that the system chooses."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(address)
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class ProcessSpec:
    """What to run. `stdin`: a file that it reads; `umask`: -1 is ours.

    `log` gets stdout and stderr; without one they go to our stderr.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path | None = None
    umask: int = -1
    stdin: Path | None = None
    grace_seconds: float = 10.0


class Process(Protocol):
    """What is needed of a `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...


StartProcess = Callable[[ProcessSpec, IO[Any]], Process]
"""Starts a process as the leader of a session of its own, its output going to the file."""


def start_process(spec: ProcessSpec, output: IO[Any]) -> Process:
    """Start the process."""
    with (spec.stdin or Path(os.devnull)).open("rb") as given:
        return subprocess.Popen(
            spec.argv,
            env=dict(spec.env),
            stdin=given,
            stdout=output,
            stderr=output,
            start_new_session=True,
            umask=spec.umask,
        )


class Watchdog:
    """Our end of the watchdog's pipe. `hold`: a descriptor that it keeps open until everything has ended."""

    def __init__(self, *, hold: int | None = None) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            pass_fds=() if hold is None else (hold,),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, pid: int) -> None:
        """Have the group that `pid` leads ended when we are gone."""
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        """The group has ended; its number may soon be another's."""
        self._tell(f"-{pid}\n")

    def close(self) -> None:
        """Let the watchdog end what it still watches, and wait for it."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        # OSError: the watchdog was killed, and the service goes on without; ValueError: it was closed
        with self._lock, contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


class ManagedProcess:
    """One child. `start`, look at it until it is ready, `keep` it alive, `stop` it."""

    def __init__(
        self, spec: ProcessSpec, *, watchdog: Watchdog, say: Say, start_process: StartProcess = start_process
    ) -> None:
        self.spec = spec
        self._watchdog = watchdog
        self._say = say
        self._start_process = start_process
        self._process: Process | None = None
        self._started_at = 0.0
        self._changing = threading.Lock()
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """The running child, if there is one at this moment."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> None:
        """Start the child; an old log of a run before is replaced."""
        self._spawn(mode="wb")

    def exit_code(self) -> int | None:
        """Return how the child ended before it was kept, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def keep(self) -> None:
        """From now on start the child again whenever it ends."""
        self._keeper = threading.Thread(target=self._keep, name=f"keep-{self.spec.name}", daemon=True)
        self._keeper.start()

    def stop(self, *, grace_seconds: float | None = None) -> None:
        """End the child: TERM, a grace, KILL to its whole group. Safe to call twice and before `start`."""
        self._stopping.set()
        with self._changing:
            process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(self.spec.grace_seconds if grace_seconds is None else grace_seconds)
        except subprocess.TimeoutExpired:
            self._say(f"{self.spec.name} does not end; killing it")
        self._end_group(process)
        if self._keeper is not None:
            self._keeper.join()

    def log_tail(self, lines: int = 15) -> list[str]:
        """Return the last lines of the child's log."""
        if self.spec.log is None or not self.spec.log.is_file():
            return []
        return self.spec.log.read_text("utf-8", "replace").splitlines()[-lines:]

    def _keep(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            process = self._process
            assert process is not None
            code = process.wait()
            if self._stopping.is_set():
                return
            self._end_group(process)
            if time.monotonic() - self._started_at > STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            self._say(f"{self.spec.name} ended ({describe_exit(code)}); starting it again in {pause:g} s")
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            with self._changing:
                if self._stopping.is_set():
                    return
                self._spawn(mode="ab")

    def _spawn(self, *, mode: str) -> None:
        with contextlib.ExitStack() as files:
            output = files.enter_context(_open_log(self.spec.log, mode)) if self.spec.log else sys.stderr
            self._process = self._start_process(self.spec, output)
        self._started_at = time.monotonic()
        self._watchdog.watch(self._process.pid)

    def _end_group(self, process: Process) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._watchdog.forget(process.pid)


def _open_log(path: Path, mode: str) -> IO[bytes]:
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, PRIVATE_FILE))


def describe_exit(code: int) -> str:
    """Return `exit code 1` or `SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
