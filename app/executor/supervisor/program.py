"""Own one stage process from its first instruction to the proof that nothing of it is left.

    python -I -S -c "... import program ..." FOLDER [--adopt] | --fork-server     (`client.py`)

A program of its own: standard library only, one per attempt folder, started detached, so that a stage outlives the
worker, the API and Redis. It is imported, not run as a script, so that it comes compiled from the interpreter's cache.
A worker's fork server has imported it once, and forks a supervisor for each attempt; where it is gone, a supervisor
starts on an interpreter of its own. Its working directory is the attempt's folder, which tells people whose it is.
Everything it knows stands in files of the folder, each either absent or complete:

    spec.json     what to run (written by the worker)         stop          request to end it (written by the worker)
    lock          held by flock while a supervisor lives      started       created once: the command runs at most once
    state.json    identity of the process, phase, heartbeat   witness.json  how the process ended, by its parent
    exit.json     the end, after the tree is proven empty     wake          FIFO: "look at `stop` now"
    private.json  secret part of what to run, removed once it was read
    sandbox.json  what bubblewrap says of a contained stage: without "exit-code" the command did not begin
    ../../.bell   FIFO of the worker: "look at the folders now"

Three processes: the supervisor; the *reaper*, its fork, which is the parent of the stage and keeps the exit status
should the supervisor be killed; and the stage itself, leader of its own session. The recorded pid is the stage's own:
killing that pid ends the attempt, and the rest of its tree is swept. The stage is held at a pipe until its identity is
on disk; if the supervisor dies before that, the stage never runs. A contained stage is bubblewrap, and the script its
descendant, in a namespace of pids where bubblewrap's first process takes orphans: all of them are in the tree.

The tree is the union of four nets, looped until empty: the stage's session, descendants, orphans that came to us as
their sub-reaper (Linux), and every process whose environment carries DEEPE_ATTEMPT=<id>.

`fault_point` marks where a fault-injection test may let the process die (`app/faults.py`); it does nothing otherwise.

Exit status: 0 ended or had ended, 74 the folder cannot be written (nothing ran), 75 another supervisor holds the
lock, 76 the command was started before and may not be started again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import os
import select
import signal
import stat
import sys
import time

TYPE_CHECKING = False  # as type checkers know it: `typing` would take a tenth of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    Record = dict[str, Any]

ADOPT = "--adopt"
FORK_SERVER = "--fork-server"

CANNOT_WRITE = 74
ALREADY_SUPERVISED = 75
ALREADY_STARTED = 76

HEARTBEAT_SECONDS = 5.0
POLL_SECONDS = 0.5  # a `stop` made by hand, without the FIFO
SETTLE_SECONDS = 0.5  # helpers that end by themselves when their parent has gone are no leftovers
LEFTOVER_GRACE_SECONDS = 5.0
SHUTDOWN_SECONDS = 0.3  # from the TERM that ended the stage to our own, if both came from a shutdown
KILL_BOUND_SECONDS = 10.0  # a process that survives KILL this long is stuck in the kernel
SUPERVISOR_TERMINATED = "supervisor_terminated"  # the supervisor itself was sent TERM, as when a machine shuts down
# as supervisors of earlier releases call them: one of this release adopts their folders, and the reverse
REAPER_FILE = "witness.json"
REAPER_KEY = "witness"  # in `state.json`
SANDBOX_FILE = "sandbox.json"
SANDBOX_SECONDS = 0.2  # from the end of bubblewrap to that of its first process, if nothing was left behind
NAMED = 5  # of the processes that are left when a script has ended
NAME_LENGTH = 100
OOM_SCORE = 500  # the stage goes first when memory runs out, never the supervisor

if "DEEPE_FAULT_POINT" in os.environ:
    import runpy

    FAULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "faults.py")
    fault_point: Callable[[str], None] = runpy.run_path(FAULTS)["fault_point"]
else:

    def fault_point(name: str) -> None:
        """Do nothing."""


def main(arguments: list[str]) -> int:
    """Leave the starter's session, take the folder's lock and run or adopt its attempt."""
    if arguments == [FORK_SERVER]:
        return serve_forks()
    if os.getpid() != os.getsid(0):
        with contextlib.suppress(OSError):
            os.setsid()
    adopt = ADOPT in arguments
    folder = Folder(next(argument for argument in arguments if not argument.startswith("--")))
    try:
        os.chdir(folder.path)
        lock = folder.lock()
        if lock is None:
            return ALREADY_SUPERVISED
        fault_point("locked")
        if folder.exists("exit.json"):
            return 0
        first = folder.create_once("started")
    except OSError as problem:
        log(f"cannot write in {folder.path}: {problem}")
        return CANNOT_WRITE
    fault_point("started")
    supervisor = Supervisor(folder, lock)
    if adopt:
        supervisor.adopt(never_ran=first)
    elif first:
        supervisor.run()
    else:
        return ALREADY_STARTED
    return 0


def serve_forks() -> int:
    """Fork a supervisor for each line on stdin, the JSON of its arguments. Answer with `.`, or `!` if that failed.

    Ends when the worker does: nothing else holds the other end of stdin.
    """
    if sys.platform == "linux":
        import ctypes  # noqa: F401  what every fork would import (`become_subreaper`)
    gc.freeze()  # a collection in a fork would copy what all share
    while line := read_line(0):
        os.write(1, b"." if fork_detached(json.loads(line)) else b"!")
    return 0


def fork_detached(arguments: list[str]) -> bool:
    """Fork a supervisor that is left to init; False if that failed."""
    try:
        child = os.fork()
    except OSError:
        return False
    if child:
        return os.waitpid(child, 0)[1] == 0
    status = 1
    try:
        os.chdir(arguments[0])  # whatever lives of an attempt can be told by it from its first moment
        if os.fork():
            os._exit(0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        said = os.open("program.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.close(said)
        status = main(arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


class Folder:
    """The attempt's folder on local disk."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def exists(self, name: str) -> bool:
        return os.path.exists(self.file(name))

    def lock(self) -> int | None:
        """Return the held lock, or None if another supervisor has it. Observers hold it for microseconds: ask again."""
        descriptor = os.open(self.file("lock"), os.O_RDWR | os.O_CREAT, 0o600)
        for _ in range(15):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
            else:
                return descriptor
        os.close(descriptor)
        return None

    def create_once(self, name: str) -> bool:
        """Create an empty file; False if it was there. The next durable `write` makes it durable as well."""
        try:
            os.close(os.open(self.file(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        return True

    def read(self, name: str) -> Record | None:
        """Return the JSON object of a file; None if it is absent or no object."""
        try:
            with open(self.file(name), "rb") as file:
                value = json.loads(file.read())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def take(self, name: str) -> Record:
        """Return the JSON object of a file and remove the file; empty if there is none."""
        value = self.read(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.file(name))
        return value or {}

    def write(self, name: str, value: Record, *, durable: bool = True) -> None:
        """Replace a file atomically; `durable` also survives a power cut."""
        temporary = self.file(f".{name}.{os.getpid()}")
        with open(temporary, "w", encoding="utf-8", opener=_private) as file:
            json.dump(value, file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, self.file(name))
        if durable:
            self._sync()

    def notify_worker(self) -> None:
        """Notify the worker, if it listens."""
        with contextlib.suppress(OSError):
            descriptor = os.open(os.path.join(self.path, "..", "..", ".bell"), os.O_WRONLY | os.O_NONBLOCK)
            try:
                if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                    os.write(descriptor, b".")
            finally:
                os.close(descriptor)

    def _sync(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Process:
    """One row of the process table. (pid, start) never names two processes of one boot."""

    __slots__ = ("parent", "pid", "session", "start", "zombie")

    def __init__(self, pid: int, parent: int, session: int, start: str, zombie: bool) -> None:
        self.pid = pid
        self.parent = parent
        self.session = session
        self.start = start
        self.zombie = zombie

    def identity(self) -> Record:
        return {"pid": self.pid, "start": self.start}


class Supervisor:
    """Run or adopt one attempt; write `exit.json` at its end."""

    def __init__(self, folder: Folder, lock: int) -> None:
        self.folder = folder
        self.spec: Record = folder.read("spec.json") or {}
        self.state: Record = {}
        self.ending: Record | None = None
        self.stop_reason: str | None = None
        self.escalation: StopEscalation | None = None
        self.report: int | None = None
        self.report_bytes = b""
        self.watched: list[int] = []
        self.next_beat = 0.0
        self.last_write_failed = False
        self.terminated = False
        self.inbox, wakeup = self._open_inbox()
        self.private = [lock, wakeup, *self.inbox]  # what the reaper must not hold: a copy would keep the lock

    # --- the two ways in

    def run(self) -> None:
        """Start the command of a fresh attempt and see it to its end."""
        try:
            launch = Launch(self.spec | self.folder.take("private.json"))
        except (KeyError, TypeError, ValueError) as error:
            self._finish(why="spawn_failed", error=f"spec.json is not complete: {error!r}")
            return
        self._look_for_stop()
        if self.stop_reason is not None:
            self._finish(why="stopped")
            return
        become_subreaper()
        self.state = {
            "attempt_id": launch.attempt_id,
            "phase": "starting",
            "boot_id": boot_id(),
            "oom_kills": oom_kills(),
            "started_at": time.time(),
            "started_monotonic": time.monotonic(),  # the same for every process until the next boot
        }
        self._save()
        fault_point("before-fork")
        release = self._fork(launch)
        if release is None:
            self._finish(why="spawn_failed", error="fork: Resource temporarily unavailable")
            return
        fault_point("before-record")
        self.state["phase"] = "running"
        while not self._save(durable=True):  # never run unrecorded: a full disk holds the stage at its pipe
            time.sleep(0.5)
            self._look_for_stop()
            if self.stop_reason is not None:
                os.close(release)
                break
        else:
            self.folder.notify_worker()
            fault_point("before-release")
            with contextlib.suppress(BrokenPipeError):
                os.write(release, b"g")
            os.close(release)
            fault_point("after-release")
        self._watch()

    def adopt(self, *, never_ran: bool) -> None:
        """Take over from a supervisor that died. Nothing is ever started here."""
        with contextlib.suppress(OSError):
            self.folder.take("private.json")
        self.state = self.folder.read("state.json") or {}
        self.stop_reason = self.state.get("stop_reason")
        if never_ran or "pid" not in self.state:
            self._conclude_unrecorded(never_ran=never_ran)
            return
        if self.state["boot_id"] != boot_id():
            self.ending = self.folder.read(REAPER_FILE)
            # nothing survives a boot; should the id lie (a container that was moved), nothing survives us
            found, left = end_strays(self.state["attempt_id"])
            self._finish(why=None if self.ending else "reboot", leftovers=found, unkillable=left)
            return
        for identity in (self.state[REAPER_KEY], self.state):
            self._watch_foreign(identity)
        self._watch()

    def _conclude_unrecorded(self, *, never_ran: bool) -> None:
        """Without an identity on disk the stage was never released; unless the disk lost it, and something lives."""
        found, left = (0, 0) if never_ran else end_strays(str(self.spec.get("attempt_id")))
        if found:
            self.ending = {"released": True, "lost": True}
        self._finish(why=None if found else "never_started", leftovers=found, unkillable=left)

    def _fork(self, launch: Launch) -> int | None:
        """Fork the reaper, which forks the stage; return the pipe that releases it, None if that failed."""
        report_read, report_write = os.pipe()
        release_read, release_write = os.pipe()
        reaper = os.fork()
        if reaper == 0:
            for descriptor in (*self.private, report_read):
                os.close(descriptor)
            run_reaper(self.folder, launch, report_write, release_read, release_write)
        os.close(report_write)
        os.close(release_read)
        self.report = report_read
        line = read_line(report_read)
        if not line:
            return None
        os.set_blocking(report_read, False)
        self.state[REAPER_KEY] = identity_of(reaper)
        self.state |= identity_of(int(line))
        return release_write

    # --- the life of the stage

    def _watch(self) -> None:
        while self.ending is None:
            self._wait()
            self._reap()
            self._read_report()
            self._check_presence()
            if self.ending is None:
                self._look_for_stop()
                self._escalate_stop()
                self._beat()
        fault_point("exit-seen")
        leftovers, unkillable = self._sweep()
        self._listen_for_shutdown()
        self._finish(why=None, leftovers=leftovers, unkillable=unkillable)

    def _listen_for_shutdown(self) -> None:
        """A machine that shuts down sends TERM to all in one breath: the stage may end before we learn of our own."""
        if self.stop_reason is not None or not was_terminated(self.ending or {}):
            return
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        while not self.terminated and time.monotonic() < deadline:
            time.sleep(0.01)
        self._look_for_stop()
        if self.stop_reason is not None:
            self.state |= {"phase": "stopping", "stop_reason": self.stop_reason}

    def _wait(self) -> None:
        """Sleep until something happens or is due."""
        now = time.monotonic()
        due = [POLL_SECONDS, self.next_beat - now]
        if self.escalation is not None:
            due.append(self.escalation.next_look - now)
        descriptors = [*self.inbox, *self.watched]
        if self.report is not None:
            descriptors.append(self.report)
        ready, _, _ = select.select(descriptors, [], [], max(0.0, min(due)))
        for descriptor in ready:
            if descriptor in self.inbox:
                with contextlib.suppress(BlockingIOError):
                    os.read(descriptor, 4096)
            elif descriptor in self.watched:
                self.watched.remove(descriptor)
                os.close(descriptor)
        if ready and self.escalation is not None:
            self.escalation.next_look = 0.0

    def _reap(self) -> None:
        """Collect what ended below us: the reaper, orphans, and the stage itself if its reaper was killed."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.state.get("pid"):
                self.ending = self.ending or ending_of(status, usage)

    def _read_report(self) -> None:
        """Take the reaper's last line; at its death without one, the stage has become our own child."""
        if self.report is None:
            return
        try:
            piece = os.read(self.report, 65536)
        except BlockingIOError:
            return
        self.report_bytes += piece
        if self.report_bytes.endswith(b"\n"):
            self.ending = json.loads(self.report_bytes)
        elif not piece:
            os.close(self.report)
            self.report = None

    def _check_presence(self) -> None:
        """Conclude from absence: no reaper to report any more, and the stage is gone."""
        if self.ending is not None or self.report is not None or is_present(self.state):
            return
        ending = self.folder.read(REAPER_FILE)
        if ending is None and is_present(self.state[REAPER_KEY]):
            return
        self.ending = ending or self.folder.read(REAPER_FILE) or {"released": True, "lost": True}

    def _watch_foreign(self, identity: Record) -> None:
        """Be woken by the end of a process that is not our child."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                self.watched.append(os.pidfd_open(identity["pid"]))

    def _look_for_stop(self) -> None:
        if self.stop_reason is not None:
            return
        if self.folder.exists("stop"):
            self.stop_reason = str((self.folder.read("stop") or {}).get("reason") or "stop")
        elif self.terminated:
            self.stop_reason = SUPERVISOR_TERMINATED

    def _escalate_stop(self) -> None:
        """TERM to the whole tree at once, KILL after the grace, until the stage has ended."""
        if self.stop_reason is None:
            return
        if self.escalation is None:
            self.escalation = StopEscalation(float(self.spec.get("grace_seconds", LEFTOVER_GRACE_SECONDS)))
            if self.spec.get("sandboxed"):  # bubblewrap would end, and nobody know how the script did
                self.escalation.signalled.add((self.state["pid"], self.state["start"]))
            self.state |= {"phase": "stopping", "stop_reason": self.stop_reason}
            self._save()  # before the first signal: an adopter must know what ended the stage
            fault_point("stop-recorded")
        if self.escalation.is_due():
            remaining = self.escalation.apply(self._members())
            if self.escalation.is_exhausted() and self.state.get("unkillable") != remaining:
                self.state["unkillable"] = remaining
                self.next_beat = 0.0

    def _sweep(self) -> tuple[int, int]:
        """Prove that nothing of the tree is left: (processes found after the end, processes that even KILL left)."""
        settled = time.monotonic() + SETTLE_SECONDS
        pause = 0.005
        while (members := self._members()) and time.monotonic() < settled:
            if self.escalation is not None and self.escalation.is_due():
                self.escalation.apply(members)
            time.sleep(pause)
            pause = min(pause * 2, 0.1)
            self._reap()
        leftovers = len(members)
        if members and self.stop_reason is None and (self.ending or {}).get("code") is not None:
            self._name(members)
        grace_seconds = min(float(self.spec.get("grace_seconds", 0.0)), LEFTOVER_GRACE_SECONDS)
        escalation = self.escalation or StopEscalation(grace_seconds)
        while members and not escalation.is_exhausted():
            if escalation.is_due():
                escalation.apply(members)
            time.sleep(0.05)
            self._reap()
            self._beat()
            members = self._members()
        return leftovers, len(members)

    def _name(self, members: list[Process]) -> None:
        """Say in the script's own events which of its commands still ran, and are ended now."""
        file = self.spec.get("env", {}).get("DEEPE_EVENTS")
        if self.spec.get("sandboxed"):  # bubblewrap's own first process stays as long as one of the script's
            members = [member for member in members if not is_first_of_namespace(member.pid)]
        commands = [command for command in (command_of(member.pid) for member in members[:NAMED]) if command]
        if not file or not commands:
            return
        shown = ", ".join(commands) + (f" (of {len(members)})" if len(members) > len(commands) else "")
        message = f"Background processes that still ran when the script had ended were ended: {shown}"
        note = json.dumps({"type": "note", "time": time.time(), "message": message})
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, note.encode() + b"\n")
            finally:
                os.close(descriptor)

    def _members(self) -> list[Process]:
        own_pids = {os.getpid(), self.state[REAPER_KEY]["pid"]}
        return tree_of(self.state, own_pids=own_pids, marker=f"DEEPE_ATTEMPT={self.state['attempt_id']}")

    # --- files

    def _beat(self) -> None:
        if time.monotonic() >= self.next_beat:
            self._save()

    def _save(self, *, durable: bool = False) -> bool:
        """Write `state.json`; False on a full or broken disk, which the stage survives."""
        self.next_beat = time.monotonic() + HEARTBEAT_SECONDS
        self.state["supervisor_pid"] = os.getpid()
        self.state["heartbeat"] = {"wall": time.time(), "boot": clock_since_boot()}
        return self._write("state.json", self.state, durable=durable)

    def _finish(self, *, why: str | None, error: str | None = None, leftovers: int = 0, unkillable: int = 0) -> None:
        """Write `exit.json`, for as long as it takes: the end is kept in memory while the disk is full."""
        ending = self.ending or {}
        before, after = self.state.get("oom_kills"), oom_kills()
        record = {
            "attempt_id": self.state.get("attempt_id") or self.spec.get("attempt_id"),
            "why": why or self._why(ending),
            "code": ending.get("code"),
            "signal": ending.get("signal"),
            "error": error or ending.get("error"),
            "stop_reason": self.stop_reason,
            "oom_kills": max(0, after - before) if before is not None and after is not None and ending else None,
            "leftovers": leftovers,
            "unkillable": unkillable,
            "max_rss_bytes": ending.get("max_rss_bytes"),
            "user_seconds": ending.get("user_seconds"),
            "system_seconds": ending.get("system_seconds"),
            "started_at": self.state.get("started_at") if ending.get("released") else None,
            "finished_at": ending.get("finished_at") or time.time(),
            "emptied_at": time.time(),
        }
        fault_point("before-exit")
        while not self._write("exit.json", record, durable=True):
            if not os.path.isdir(self.folder.path):
                return  # the folder was removed: there is nowhere to report
            time.sleep(0.5)
        self.folder.notify_worker()
        fault_point("after-exit")

    def _why(self, ending: Record) -> str:
        if ending.get("error"):
            return "spawn_failed"
        if self.state.get("phase") == "stopping" or (self.stop_reason is not None and not ending.get("released")):
            return "stopped"
        if not ending.get("released"):
            return "never_started"
        return "lost" if ending.get("lost") else "exited"

    def _write(self, name: str, value: Record, *, durable: bool) -> bool:
        try:
            self.folder.write(name, value, durable=durable)
        except OSError as problem:
            if not self.last_write_failed:
                log(f"cannot write {name}, trying again: {problem}")
            self.last_write_failed = True
            return False
        self.last_write_failed = False
        return True

    # --- wake-ups

    def _open_inbox(self) -> tuple[list[int], int]:
        """Open what wakes us: signals (SIGCHLD, SIGTERM) and the FIFO `wake`; also return the signals' other end."""
        signals, wakeup = os.pipe()
        for descriptor in (signals, wakeup):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(ignored, signal.SIG_IGN)
        inbox = [signals]
        with contextlib.suppress(OSError):  # without the FIFO a stop is found by looking
            if not self.folder.exists("wake"):
                os.mkfifo(self.folder.file("wake"), 0o600)
            inbox.append(os.open(self.folder.file("wake"), os.O_RDWR | os.O_NONBLOCK))
        return inbox, wakeup

    def _on_term(self, *_: object) -> None:
        self.terminated = True


class Launch:
    """What `spec.json` says, checked."""

    def __init__(self, spec: Record) -> None:
        self.attempt_id = str(spec["attempt_id"])
        self.argv = [str(part) for part in spec["argv"]]
        self.cwd = str(spec["cwd"])
        self.output = str(spec["output"])
        self.env = {str(key): str(value) for key, value in spec["env"].items()}
        self.env["DEEPE_ATTEMPT"] = self.attempt_id
        self.sandboxed = bool(spec.get("sandboxed"))
        if not self.argv:
            raise ValueError("argv is empty")


class StopEscalation:
    """TERM each process once, KILL what is left after the grace; poll less often as time passes."""

    def __init__(self, grace_seconds: float) -> None:
        self.next_look = time.monotonic()
        self.kill_from = self.next_look + grace_seconds
        self.pause = 0.02
        self.signalled: set[tuple[int, str]] = set()

    def is_due(self) -> bool:
        return time.monotonic() >= self.next_look

    def is_exhausted(self) -> bool:
        return time.monotonic() > self.kill_from + KILL_BOUND_SECONDS

    def apply(self, members: list[Process]) -> int:
        """Signal what is there now; return how many that was."""
        now = time.monotonic()
        for process in members:
            if now >= self.kill_from:
                send(process, signal.SIGKILL)
            elif (process.pid, process.start) not in self.signalled:
                self.signalled.add((process.pid, process.start))
                send(process, signal.SIGTERM, signal.SIGCONT)  # a stopped process would not see the TERM
        self.pause = min(self.pause * 2, POLL_SECONDS)
        self.next_look = now + self.pause
        if now < self.kill_from < self.next_look:
            self.next_look = self.kill_from
        return len(members)


# --- the reaper and the stage


def run_reaper(folder: Folder, launch: Launch, report: int, release: int, release_write: int) -> NoReturn:
    """Be the parent of the stage: report its end to the supervisor and to `REAPER_FILE`, whichever can be reached."""
    with contextlib.suppress(BaseException):
        os.close(release_write)
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        become_subreaper()
        failure_read, failure_write = os.pipe()
        stage = os.fork()
        if stage == 0:
            become_stage(folder, launch, release, failure_write)
        os.close(release)
        os.close(failure_write)
        os.write(report, b"%d\n" % stage)
        with open(failure_read, "rb") as pipe:
            failure = pipe.read().decode(errors="replace")
        ending = wait_for(stage)
        if launch.sandboxed and not failure:
            ending |= ending_of_sandbox(folder, launch, ending)
        if failure:
            released = failure != NOT_RELEASED
            ending = {"released": False, "finished_at": ending["finished_at"], "error": failure if released else None}
        fault_point("stage-ended")
        report_exit(folder, report, ending)
    os._exit(0)


NOT_RELEASED = "not released"


def become_stage(folder: Folder, launch: Launch, release: int, failure: int) -> NoReturn:
    """Wait for the release, then become the command; say on the pipe why that failed."""
    target = "process"
    try:
        os.setsid()
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        if os.read(release, 1) != b"g":  # the supervisor died before it recorded us
            os.write(failure, NOT_RELEASED.encode())
            os._exit(124)
        set_oom_score(max(OOM_SCORE, oom_score()))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        target = launch.output
        output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        target = launch.cwd
        os.chdir(target)
        argv = launch.argv
        if launch.sandboxed:
            target = folder.file(SANDBOX_FILE)
            said = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.set_inheritable(said, True)
            argv = [argv[0], "--json-status-fd", str(said), *argv[1:]]
        target = argv[0]
        os.execvpe(target, argv, launch.env)
    except BaseException as problem:
        text = f"{target}: {getattr(problem, 'strerror', None) or repr(problem)}"
        with contextlib.suppress(OSError):
            os.write(failure, text.encode("utf-8", "backslashreplace")[:4096])  # names need not be UTF-8
    os._exit(127)


def ending_of(status: int, usage: Any) -> Record:
    """Translate a wait status; exactly one of `code` and `signal` is set."""
    code = os.waitstatus_to_exitcode(status)
    return {
        "released": True,
        "code": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "max_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "user_seconds": round(usage.ru_utime, 3),
        "system_seconds": round(usage.ru_stime, 3),
        "finished_at": time.time(),
    }


def was_terminated(ending: Record) -> bool:
    """Say whether a process ended by TERM, or as one that caught it and left in order."""
    return ending.get("signal") == signal.SIGTERM or ending.get("code") == 128 + signal.SIGTERM


def wait_for(stage: int) -> Record:
    """Wait for the end of the stage, collecting orphans meanwhile."""
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == stage:
            return ending_of(status, usage)


def ending_of_sandbox(folder: Folder, launch: Launch, ending: Record) -> Record:
    """Return what the end of bubblewrap does not say of the script's: that it never began, or what it used.

    What the script used is known once the first process of its namespace is collected, which ends with the last one of
    the script's: at once, or it has left some behind.
    """
    said: Record = {}
    with contextlib.suppress(OSError, ValueError), open(folder.file(SANDBOX_FILE), encoding="utf-8") as file:
        for line in file:
            said |= json.loads(line)
    if ending.get("code") and "exit-code" not in said:
        return {"released": False, "error": last_line(launch.output) or "bubblewrap made no sandbox"}
    unknown: Record = dict.fromkeys(("max_rss_bytes", "user_seconds", "system_seconds"))
    deadline = time.monotonic() + SANDBOX_SECONDS
    while "child-pid" in said and time.monotonic() < deadline:
        try:
            pid, status, usage = os.wait4(said["child-pid"], os.WNOHANG)
        except ChildProcessError:
            return unknown
        if pid:
            return {name: ending_of(status, usage)[name] for name in unknown}
        time.sleep(0.002)
    return unknown


def last_line(path: str) -> str:
    """Return the last line of a file as bubblewrap writes its errors; empty if it has none."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 4096))
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.startswith("bwrap: ")]
        return lines[-1] if lines else ""
    return ""


def report_exit(folder: Folder, report: int, ending: Record) -> None:
    """Report the end of the stage through the file and the pipe; one of them is enough."""
    line = json.dumps(ending).encode() + b"\n"
    while True:
        written = reported = False
        with contextlib.suppress(OSError):
            folder.write(REAPER_FILE, ending)
            written = True
        with contextlib.suppress(OSError):
            os.write(report, line)
            reported = True
        if written or reported:
            return
        time.sleep(1.0)


# --- processes


def tree_of(main: Record, *, own_pids: set[int], marker: str) -> list[Process]:
    """Return every living process of the attempt, found by the four nets; never one of `own_pids`."""
    table = process_table()
    found = _descendants(table, {*own_pids, main["pid"]} if _is(table.get(main["pid"]), main) else own_pids)
    leader = table.get(main["pid"])
    if leader is None or _is(leader, main):  # else the number belongs to a foreign process and its session too
        found |= {row.pid for row in table.values() if row.session == main["pid"]}
    # an environment is only read of what is as young as the stage: of a thousand processes beside, hardly any
    foreign = {pid for pid, row in table.items() if pid not in found and not began_before(row, main)}
    found |= processes_with(marker, candidates=foreign)
    return [table[pid] for pid in sorted(found - own_pids) if not table[pid].zombie]


def end_strays(attempt_id: str) -> tuple[int, int]:
    """KILL all that carries the attempt's mark, where no file says any more what belongs to it.

    Return how many were found, and how many even KILL left.
    """
    deadline = time.monotonic() + KILL_BOUND_SECONDS
    found: set[tuple[int, str]] = set()
    while True:
        table = process_table()
        marked = processes_with(f"DEEPE_ATTEMPT={attempt_id}", candidates=set(table) - {os.getpid()})
        strays = [table[pid] for pid in marked if not table[pid].zombie]
        found |= {(stray.pid, stray.start) for stray in strays}
        if not strays or time.monotonic() > deadline:
            return len(found), len(strays)
        for stray in strays:
            send(stray, signal.SIGKILL)
        time.sleep(0.05)


def _descendants(table: dict[int, Process], roots: set[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for row in table.values():
        children.setdefault(row.parent, []).append(row.pid)
    found = {pid for pid in roots if pid in table}
    queue = list(found)
    while queue:
        for child in children.get(queue.pop(), ()):
            if child not in found:
                found.add(child)
                queue.append(child)
    return found


def _is(row: Process | None, identity: Record) -> bool:
    return row is not None and row.start == identity["start"]


def identity_of(pid: int) -> Record:
    """Return the identity of a process that exists now."""
    row = read_process(pid)
    return row.identity() if row is not None else {"pid": pid, "start": ""}


def command_of(pid: int) -> str:
    """Return the program and its first words, up to an option: what follows may hold a secret."""
    words = command_line(pid)[:4]
    named = [os.path.basename(words[0])] if words else []
    for word, before in zip(words[1:], words, strict=False):
        if word.startswith("-") and word not in ("-m", "-u"):
            break
        if word != "-u":
            named.append(word if before == "-m" or word == "-m" else os.path.basename(word))
    return " ".join(named)[:NAME_LENGTH]


def is_present(identity: Record) -> bool:
    """Say whether this very process exists; a zombie only counts while we can still collect its status."""
    row = read_process(identity["pid"])
    return row is not None and _is(row, identity) and (not row.zombie or row.parent == os.getpid())


if sys.platform == "linux":

    def read_process(pid: int) -> Process | None:
        """Return one row of the process table."""
        try:
            descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
        except OSError:
            return None
        try:
            text = os.read(descriptor, 4096)  # not through `open`, which costs as much again: there may be thousands
        except OSError:
            return None
        finally:
            os.close(descriptor)
        fields = text[text.rindex(b")") + 2 :].split(None, 20)
        return Process(pid, int(fields[1]), int(fields[3]), fields[19].decode(), fields[0] in b"ZXx")

    def process_table() -> dict[int, Process]:
        """Return all processes by pid."""
        rows = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
        return {row.pid: row for row in rows if row is not None}

    def processes_with(marker: str, *, candidates: set[int]) -> set[int]:
        """Return those whose environment holds `marker` (an entry NAME=value)."""
        wanted = b"\0" + marker.encode() + b"\0"
        found = set()
        for pid in candidates:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
                if wanted in b"\0" + file.read() + b"\0":
                    found.add(pid)
        return found

    def command_line(pid: int) -> list[str]:
        """Return the words by which a process was started; none if it is gone."""
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(4096).decode("utf-8", "replace").split("\0")[:-1]
        return []

    def is_first_of_namespace(pid: int) -> bool:
        """Say whether a process is the first one of a namespace of pids."""
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith("NSpid:"):
                    return line.split()[-1] == "1" and len(line.split()) > 2
        return False

    def began_before(row: Process, identity: Record) -> bool:
        """Say whether a process is older than another one."""
        return int(row.start) < int(identity["start"] or 0)

    def send(process: Process, *numbers: int) -> None:
        """Send signals to this very process, never to a later one of the same pid."""
        try:
            descriptor = os.pidfd_open(process.pid)
        except OSError as problem:
            if problem.errno == errno.ENOSYS and is_present(process.identity()):
                with contextlib.suppress(OSError):
                    for number in numbers:
                        os.kill(process.pid, number)
            return
        try:
            row = read_process(process.pid)
            if row is not None and row.start == process.start:
                with contextlib.suppress(OSError):
                    for number in numbers:
                        signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)

    def become_subreaper() -> None:
        """Become the parent of orphans below us, so that a double fork hides nothing."""
        import ctypes

        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)

    def oom_score() -> int:
        """Return our own score: who has the highest goes first when memory runs out."""
        try:
            with open("/proc/self/oom_score_adj") as file:
                return int(file.read())
        except (OSError, ValueError):
            return 0

    def set_oom_score(score: int, pid: int | str = "self") -> None:
        """Set a score; one lower than what the process began with needs privileges."""
        with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
            file.write(str(score))

    def oom_kills() -> int | None:
        """Return how often the kernel killed for memory: in our control group, else on the whole machine."""
        for path in [*_memory_counters(), "/proc/vmstat"]:
            with contextlib.suppress(OSError, ValueError), open(path) as file:
                for line in file:
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return int(value)
        return None

    def _memory_counters() -> list[str]:
        found = []
        with contextlib.suppress(OSError), open("/proc/self/cgroup") as file:
            for line in file:
                _, controllers, group = line.rstrip("\n").split(":", 2)
                if not controllers:
                    found += [f"/sys/fs/cgroup{group}/memory.events", "/sys/fs/cgroup/memory.events"]
                elif "memory" in controllers.split(","):
                    counter = "memory.oom_control"
                    found += [f"/sys/fs/cgroup/memory{group}/{counter}", f"/sys/fs/cgroup/memory/{counter}"]
        return found

    def boot_id() -> str:
        """Return what changes with every boot."""
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()

    def clock_since_boot() -> float:
        """Return seconds since the boot, sleep included; the wall clock may be set, this one is not."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

else:  # macOS: no sub-reaper, no pidfd, no session id in `ps`; the process group stands in for the session

    def read_process(pid: int) -> Process | None:
        """Return one row of the process table."""
        return _ps("-p", str(pid)).get(pid)

    def process_table() -> dict[int, Process]:
        """Return all processes by pid."""
        return _ps("-ax")

    def _ps(*selection: str) -> dict[int, Process]:
        rows = {}
        for line in _output("/bin/ps", *selection, "-o", "pid=,ppid=,pgid=,stat=,lstart=,comm=").splitlines():
            pid, parent, group, status, rest = line.split(None, 4)
            start, command = rest[:24], rest[24:].strip()  # `lstart` is 24 characters: "Mon Nov 23 21:40:00 2026"
            if not (int(parent) == os.getpid() and command.endswith("ps")):  # this very `ps`, ours for a moment
                rows[int(pid)] = Process(int(pid), int(parent), int(group), start, status.startswith("Z"))
        return rows

    def processes_with(marker: str, *, candidates: set[int]) -> set[int]:
        """Return those whose environment holds `marker`; `ps` shows the environment of one's own processes."""
        lines = (line.split(None, 1) for line in _output("/bin/ps", "-axEww", "-o", "pid=,command=").splitlines())
        return {int(line[0]) for line in lines if len(line) == 2 and marker in line[1].split()} & candidates

    def command_line(pid: int) -> list[str]:
        """Return the words by which a process was started, as `ps` shows them; none if it is gone."""
        return _output("/bin/ps", "-ww", "-p", str(pid), "-o", "command=").split()

    def is_first_of_namespace(_pid: int) -> bool:
        """Say no: there are no namespaces."""
        return False

    def began_before(_row: Process, _identity: Record) -> bool:
        """Say no: a start time of one second's grain cannot tell, and one `ps` reads all environments."""
        return False

    def send(process: Process, *numbers: int) -> None:
        """Send signals to this very process, as far as a start time of one second's grain can tell."""
        if is_present(process.identity()):
            with contextlib.suppress(OSError):
                for number in numbers:
                    os.kill(process.pid, number)

    def become_subreaper() -> None:
        """There is none; orphans are found by group and environment."""

    def oom_score() -> int:
        """Return nothing of meaning: there is no score."""
        return 0

    def set_oom_score(_score: int, _pid: int | str = "self") -> None:
        """There is no score to set."""

    def oom_kills() -> int | None:
        """Return None: there is no counter."""
        return None

    def boot_id() -> str:
        """Return what changes with every boot."""
        return _output("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid").strip()

    def clock_since_boot() -> float:
        """Return seconds since the boot; the wall clock may be set, this one is not."""
        return time.clock_gettime(time.CLOCK_MONOTONIC)

    def _output(*command: str) -> str:
        """Return what a command prints."""
        import subprocess

        return subprocess.run(command, capture_output=True, text=True, check=False, env={"LC_ALL": "C"}).stdout


def read_line(descriptor: int) -> bytes:
    """Return a line without its end, nothing beyond it being read; empty if the pipe ends before."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(descriptor, 1)
        if not piece:
            return b""
        line += piece
    return line[:-1]


def log(message: str) -> None:
    """Write a line to our own stderr, `supervisor.log` in the folder."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {message}\n")
        sys.stderr.flush()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


if __name__ == "__main__":  # a worker of an earlier release, not yet restarted, starts it as a script
    sys.exit(main(sys.argv[1:]))
