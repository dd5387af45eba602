"""The worker's view of an attempt: write what to run, start or adopt its supervisor, look at what the files say.

One folder per attempt on the node's local disk (`program.py` describes its files). Every function is a few file
operations; none waits for the stage. A folder's command runs at most once: `start` may be called again and
again, by any process, and only the first has an effect.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from app.domain.plain_text import storable_document
from app.executor.supervisor import program
from app.faults import fault_point

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0  # how long a fork server may take for a fork, its own start included
# What an interpreter may need to start at all, and where a test wants it to die; the stage's own environment stands in
# `spec.json`.
_SUPERVISOR_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DEEPE_FAULT_POINT")
_REMOVED = ".removed"
_NOT_PRIVATE = ("DEEPE_EVENTS",)
# A module comes compiled from the interpreter's cache; a script is compiled at each start, a third of its CPU time.
# The interpreter compares the cache with the source. -I leaves the standard library on the path, and it goes first.
_RUN_MODULE = "import sys; sys.path.append(sys.argv.pop(1)); sys.exit(__import__(sys.argv.pop(1)).main(sys.argv[1:]))"


class AttemptPhase(StrEnum):
    """How far an attempt's folder has come."""

    ABSENT = "absent"
    PREPARED = "prepared"
    STARTED = "started"  # a supervisor took it; the stage is not recorded, so it did not run yet
    RUNNING = "running"
    EXITED = "exited"


class ExitWhy(StrEnum):
    """What ended an attempt. Only `exited` says that the script ended by itself."""

    EXITED = "exited"
    STOPPED = "stopped"
    NEVER_STARTED = "never_started"  # nothing ran: a new attempt repeats nothing
    SPAWN_FAILED = "spawn_failed"  # interpreter, working directory or output could not be opened; see `error`
    REBOOT = "reboot"
    LOST = "lost"  # it ran and is gone; how it ended is unknown


@dataclass(frozen=True)
class LaunchSpec:
    """What to run. `env` is the whole environment; DEEPE_ATTEMPT is added. `output` gets stdout and stderr.

    `private`: `argv` and `env` hold secrets, so they stay on the disk only until the supervisor has read them.
    `sandboxed`: `argv` is bubblewrap's, and the script its descendant.
    """

    attempt_id: str
    argv: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str]
    output: Path
    grace_seconds: float = 30.0
    private: bool = False
    sandboxed: bool = False


@dataclass(frozen=True)
class ProcessIdentity:
    """The stage's own process; pid alone is no identity."""

    pid: int
    start: str
    boot_id: str


@dataclass(frozen=True)
class ExitRecord:
    """The end of an attempt, written after the process tree was found empty.

    `code` and `signal` are both None when the exit is unknown, which is never success. `started_at` is None if the
    command did not run. `oom_kills` counts kills in the control group during the attempt, not necessarily ours.
    `finished_at` is the end of the script itself, `emptied_at` that of the last process of its tree.
    """

    attempt_id: str | None
    why: ExitWhy
    code: int | None
    signal: int | None
    error: str | None
    stop_reason: str | None
    oom_kills: int | None
    leftovers: int
    unkillable: int
    max_rss_bytes: int | None
    user_seconds: float | None
    system_seconds: float | None
    started_at: float | None
    finished_at: float
    emptied_at: float | None = None


@dataclass(frozen=True)
class Observation:
    """What the files of an attempt say now. `supervised`: a supervisor is alive (it holds the lock).

    `heartbeat_age` is in seconds and survives clock changes; None before the first beat and after a reboot.
    `running_seconds`: its own time, without what the machine slept; None before the start and after a reboot.
    `unkillable` counts processes that a stop could not end so far.
    """

    phase: AttemptPhase
    supervised: bool
    stopping: bool = False
    process: ProcessIdentity | None = None
    started_at: float | None = None
    heartbeat_at: float | None = None
    heartbeat_age: float | None = None
    running_seconds: float | None = None
    unkillable: int = 0
    exit: ExitRecord | None = None


class AttemptIsSupervised(Exception):
    """A folder whose supervisor lives cannot be removed."""


def prepare(folder: Path, spec: LaunchSpec) -> None:
    """Write the spec. The first spec of a folder stays: what may be running already is not rewritten."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    spec.output.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "spec.json").exists():
        record = _as_record(spec)
        if spec.private:  # first: a folder with a specification is one that can be started
            _write_atomically(folder, "private.json", {name: record[name] for name in ("argv", "env")})
            # what the supervisor itself needs of it later
            record |= {"argv": [], "env": {name: spec.env[name] for name in _NOT_PRIVATE if name in spec.env}}
        _write_atomically(folder, "spec.json", record)


def start(folder: Path, forks: "ForkServer | None" = None) -> None:
    """Start a detached supervisor that runs the prepared attempt; it does nothing if one did before."""
    if forks is None or not forks.fork(str(folder)):
        _spawn(str(folder), log=folder / "program.log")


def adopt(folder: Path, forks: "ForkServer | None" = None) -> None:
    """Start a detached supervisor for an attempt whose own one died. This never starts the stage."""
    if forks is None or not forks.fork(str(folder), program.ADOPT):
        _spawn(str(folder), program.ADOPT, log=folder / "program.log")


class ForkServer:
    """A process that has imported the supervisor's program and forks it: a start in a tenth of the time.

    One for each worker. It ends with the worker, of whatever the worker dies. One that was killed or does not answer is
    replaced at the next fork; supervisors never depend on it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def __enter__(self) -> "ForkServer":
        with self._lock:
            self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._end()

    def fork(self, *arguments: str) -> bool:
        """Fork a supervisor. False if it is not sure that there is one: then start another, only one has an effect."""
        with self._lock:
            if self._channel is None:
                return False
            with contextlib.suppress(OSError):
                self._channel.sendall(json.dumps(arguments).encode() + b"\n")
                if answer := self._channel.recv(1):
                    return answer == b"."
            logger.warning("fork_server_lost")
            self._end()
            self._begin()
            return False

    def _begin(self) -> None:
        ours, its = socket.socketpair()
        with its:
            ours.settimeout(ANSWER_SECONDS)
            try:
                self._process = subprocess.Popen(
                    _command(program.FORK_SERVER),
                    stdin=its.fileno(),
                    stdout=its.fileno(),
                    env=_environment(),
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                logger.warning("fork_server_unavailable", extra={"error": str(error)})
            else:
                self._channel = ours

    def _end(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def request_stop(folder: Path, reason: str) -> None:
    """Request the end of an attempt: TERM to its whole tree, KILL after the grace. The first reason stays."""
    if not (folder / "stop").exists():
        _write_atomically(folder, "stop", {"reason": reason, "time": time.time()})
    with contextlib.suppress(OSError):  # no listener: the supervisor, once there, finds the file
        descriptor = os.open(folder / "wake", os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(descriptor, b".")
        finally:
            os.close(descriptor)


def observe(folder: Path) -> Observation:
    """Return what the folder says. The lock is looked at first: free, and no exit after that, means unsupervised."""
    if not (folder / "spec.json").exists():
        return Observation(phase=AttemptPhase.ABSENT, supervised=False)
    supervised = _is_locked(folder / "lock")
    ended = _read(folder / "exit.json")
    state = _read(folder / "state.json") or {}
    if ended is not None:
        phase = AttemptPhase.EXITED
    elif "pid" in state:
        phase = AttemptPhase.RUNNING
    else:
        phase = AttemptPhase.STARTED if (folder / "started").exists() else AttemptPhase.PREPARED
    beat = state.get("heartbeat", {})
    return Observation(
        phase=phase,
        supervised=supervised,
        stopping=state.get("phase") == "stopping",
        process=ProcessIdentity(state["pid"], state["start"], state["boot_id"]) if "pid" in state else None,
        started_at=state.get("started_at"),
        heartbeat_at=beat.get("wall"),
        heartbeat_age=_age(beat, state.get("boot_id")),
        running_seconds=_running_seconds(state),
        unkillable=state.get("unkillable", 0),
        exit=_exit_record(ended) if ended is not None else None,
    )


def has_processes(attempt_id: str) -> bool:
    """Say whether a process of the attempt lives, wherever it went: its environment names the attempt."""
    table = program.process_table()
    candidates = {pid for pid, row in table.items() if not row.zombie}
    return bool(program.processes_with(f"DEEPE_ATTEMPT={attempt_id}", candidates=candidates))


def list_attempts(root: Path) -> Sequence[Path]:
    """Return the attempt folders under `root`, sorted by name."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def finish_removals(root: Path) -> None:
    """Delete what a crash in the middle of `remove` left."""
    for grave in root.glob(f".*{_REMOVED}"):
        shutil.rmtree(grave, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete the folder of an unsupervised attempt; absent is fine."""
    if not folder.exists():
        return
    if _is_locked(folder / "lock"):
        raise AttemptIsSupervised(folder.name)
    # Out of sight first, so that no reader meets a half-deleted folder.
    grave = folder.with_name(f".{folder.name}{_REMOVED}")
    shutil.rmtree(grave, ignore_errors=True)
    folder.rename(grave)
    fault_point("removal-begun")
    shutil.rmtree(grave)


def _spawn(*arguments: str, log: Path) -> None:
    """Start the supervisor in its own session and leave it to init, so that we keep neither a child nor a zombie."""
    with log.open("ab") as said:
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *_command(*arguments)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=_environment(),
            cwd="/",
            start_new_session=True,
            check=True,
        )


def _command(*arguments: str) -> list[str]:
    source = Path(program.__file__)
    return [sys.executable, "-I", "-S", "-c", _RUN_MODULE, str(source.parent), source.stem, *arguments]


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _SUPERVISOR_VARIABLES if name in os.environ}


def _is_locked(path: Path) -> bool:
    """Say whether a supervisor holds the lock; taking it for an instant is why supervisors ask more than once."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _age(beat: Mapping[str, Any], boot_id: str | None) -> float | None:
    if "boot" not in beat or boot_id != program.boot_id():
        return None
    return max(0.0, program.clock_since_boot() - float(beat["boot"]))


def _running_seconds(state: Mapping[str, Any]) -> float | None:
    if "pid" not in state or "started_monotonic" not in state or state.get("boot_id") != program.boot_id():
        return None
    return max(0.0, time.monotonic() - float(state["started_monotonic"]))


def _as_record(spec: LaunchSpec) -> dict[str, Any]:
    return {
        "attempt_id": spec.attempt_id,
        "argv": list(spec.argv),
        "cwd": str(spec.cwd),
        "env": dict(spec.env),
        "output": str(spec.output),
        "grace_seconds": spec.grace_seconds,
        "sandboxed": spec.sandboxed,
    }


def _exit_record(record: Mapping[str, Any]) -> ExitRecord:
    return ExitRecord(**{**storable_document(record), "why": ExitWhy(record["why"])})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write_atomically(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    program.Folder(str(folder)).write(name, dict(record))
