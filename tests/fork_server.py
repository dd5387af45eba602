"""Run Python programs in forks of a process that has imported what they need: most of a short run is that import.

    python -u fork_server.py SOCKET MODULE[:NAME]...

A run is a process of its own, as one that was started: its arguments, environment, working directory, output, signals
and exit code. It shares nothing with the runs before; only what was imported is there already. A run of several
processes has an environment for each; when one fails, the others get SIGTERM, as from torchrun. Orders come over a Unix
socket, one connection each: a JSON document with the descriptors of stdout and stderr. Answers are the pids and, at the
end, the exit code, which is that of the first process that failed. The program runs in the environment of what it
forks, knows the standard library only, and ends when the other end of its stdin is closed, so that it never outlives
who started it.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class ForkServer:
    """The server's process. Use it as a context manager."""

    def __init__(self, python: Path, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")  # the addresses of sockets are short
        self._address, log_file = (Path(self._folder.name) / name for name in ("socket", "log"))
        command = [str(python), "-u", __file__, str(self._address), *modules]
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", log_file.read_text()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._folder.cleanup()

    def start(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        output: IO[bytes],
        new_session: bool = False,
    ) -> "Fork":
        """Start `python -u ARGUMENTS` in this folder and environment, all its output going to a file."""
        order = {**_order(arguments, cwd, [environment]), "new_session": new_session}
        return Fork(self._address, order, [output.fileno()] * 2)

    def start_with_pipes(
        self, arguments: Sequence[str], *, cwd: Path, environments: Sequence[Mapping[str, str]]
    ) -> "ForkWithPipes":
        """Start `python -u ARGUMENTS` in this folder, once in each environment, the output to be read here."""
        return ForkWithPipes(self._address, _order(arguments, cwd, environments))


def fork_workers() -> ForkServer:
    """Return what forks workers and APIs of this tree, whatever is installed: mutants are copies of it."""
    environment = {"PATH": os.defpath, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return ForkServer(
        Path(sys.executable), ("app.cli", "app.cli.service", "app.worker", "app.main", "uvicorn"), environment
    )


def _order(arguments: Sequence[str], cwd: Path, environments: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    return {"argv": [*arguments], "cwd": str(cwd), "environments": [{**each} for each in environments]}


class Fork:
    """A run, with what the tests need of `subprocess.Popen`."""

    def __init__(self, address: Path, order: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(address))
        socket.send_fds(self._connection, [json.dumps(order).encode() + b"\n"], [*descriptors])
        self._answers = self._connection.makefile()
        self.pids = [int(pid) for pid in self._answers.readline().split()]
        self.returncode: int | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """The only process, or the first one."""
        return self.pids[0]

    def poll(self) -> int | None:
        if self.returncode is None and self._lock.acquire(blocking=False):  # else somebody waits already
            try:
                if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
                    self._take_answer()
            finally:
                self._lock.release()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or raise `subprocess.TimeoutExpired`."""
        until = None if timeout is None else time.monotonic() + timeout
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        try:
            if self.returncode is None:
                left = None if until is None else max(0.0, until - time.monotonic())
                if not select.select([self._connection], [], [], left)[0]:
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
                self._take_answer()
        finally:
            self._lock.release()
        assert self.returncode is not None
        return self.returncode

    def _take_answer(self) -> None:
        self.returncode = int(self._answers.readline())
        self._answers.close()
        self._connection.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):  # of several, one may have ended
                    os.kill(pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkWithPipes(Fork):
    """A run whose output is read here."""

    def __init__(self, address: Path, order: Mapping[str, Any]) -> None:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        super().__init__(address, order, [out_end, err_end])
        os.close(out_end)
        os.close(err_end)
        self.stdout: IO[str] = os.fdopen(out)
        self.stderr: IO[str] = os.fdopen(err)

    def communicate(self) -> tuple[str, str]:
        """Return the rest of the output."""
        from concurrent.futures import ThreadPoolExecutor

        with self.stdout, self.stderr, ThreadPoolExecutor(1) as pool:
            errors = pool.submit(self.stderr.read)
            output = self.stdout.read()
            told = output, errors.result()
        self.wait()
        return told


def serve(address: str, modules: Sequence[str]) -> None:
    """Import the modules and fork for each connection; return in the forks that are to run a program."""
    del sys.path[0]  # the folder of this file, which no program looks into
    for name in modules:
        module, _, attribute = name.partition(":")
        getattr(importlib.import_module(module), attribute or "__name__")  # packages of today load when asked
    gc.collect()
    gc.freeze()  # else each collection of a fork visits, and so copies, all that was imported
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener.fileno(), 0], [], [])
            if listener.fileno() not in ready:
                sys.exit()
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    order, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    asked = json.loads(order)
    prepared, preparing = os.pipe()
    pids = []
    for environment in asked["environments"]:
        pid = os.fork()
        if not pid:
            connection.close()
            if asked.get("new_session"):
                os.setsid()
            for descriptor in (prepared, preparing):
                os.close(descriptor)
            become(asked, environment, descriptors)
            return
        pids.append(pid)
    os.close(preparing)
    os.read(prepared, 1)
    connection.sendall(b"%s\n" % b" ".join(b"%d" % pid for pid in pids))
    for descriptor in (*descriptors, 1, 2):
        os.close(descriptor)
    connection.sendall(b"%d\n" % reap(pids))
    os._exit(0)


def reap(pids: Sequence[int]) -> int:
    """Wait for all processes of a run; return the exit code."""
    running, code = {*pids}, 0
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGTERM)
    return code


def become(order: Mapping[str, Any], environment: Mapping[str, str], descriptors: Sequence[int]) -> None:
    """Take on arguments, environment, folder and output of the run."""
    for descriptor, place in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(order["cwd"])
    sys.argv = order["argv"]
    first = os.getcwd() if sys.argv[0] == "-m" else os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]


def run_and_exit() -> None:
    """Run what `sys.argv` names and end as `python` would, without taking down what was imported."""
    code: object = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
        if not (code is None or isinstance(code, int)):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or the program closed it
            stream.flush()
    os._exit(int(code or 0) & 0xFF)  # type: ignore[call-overload]


def run() -> None:
    """Run what `sys.argv` names, as `python` would."""
    if sys.argv[0] != "-m":
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    del sys.argv[0]
    if not hasattr(sys.modules.get(sys.argv[0]), "__path__"):  # of a package, its `__main__` is run
        sys.modules.pop(sys.argv[0], None)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
    run_and_exit()
