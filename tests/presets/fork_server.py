"""Run scripts in forks of a process that has imported torch and its friends: most of a short training is that import.

    python -u fork_server.py SOCKET MODULE[:NAME]...

A run is a process of its own, as one that was started: its arguments, environment, working directory, output, signals
and exit code. It shares nothing with the runs before; only what was imported is there already. Orders come over a Unix
socket, one connection each: a JSON document with the descriptors of stdout and stderr. Answers are the pid and, at the
end, the exit code. The program runs in the stage's environment and knows the standard library only.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class ForkServer:
    """The server's process. Use it as a context manager."""

    def __init__(self, python: Path, folder: Path, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._address = folder / "forks"
        self._log = folder / "forks.log"
        command = [str(python), "-u", __file__, str(self._address), *modules]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", self._log.read_text()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def start(self, script: str, arguments: Sequence[str], *, cwd: Path, environment: Mapping[str, str]) -> "Fork":
        """Start `python -u SCRIPT ARGUMENTS` in this folder and environment."""
        order = {"argv": [script, *arguments], "cwd": str(cwd), "environment": dict(environment)}
        return Fork(self._address, order)


class Fork:
    """A run, with what the tests need of `subprocess.Popen`."""

    def __init__(self, address: Path, order: Mapping[str, Any]) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(address))
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        socket.send_fds(self._connection, [json.dumps(order).encode() + b"\n"], [out_end, err_end])
        os.close(out_end)
        os.close(err_end)
        self.stdout: IO[str] = os.fdopen(out)
        self.stderr: IO[str] = os.fdopen(err)
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                if self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    self.wait()
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Return the rest of the output."""
        from concurrent.futures import ThreadPoolExecutor

        with self.stdout, self.stderr, ThreadPoolExecutor(1) as pool:
            errors = pool.submit(self.stderr.read)
            output = self.stdout.read()
            told = output, errors.result()
        self.wait()
        self._answers.close()
        self._connection.close()
        return told

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve(address: str, modules: Sequence[str]) -> None:
    """Import the modules and fork for each connection; return in the forks that are to run a script."""
    for name in modules:
        module, _, attribute = name.partition(":")
        getattr(importlib.import_module(module), attribute or "__name__")  # packages of today load when asked
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    order, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    pid = os.fork()
    if pid:  # tells of the other's end
        connection.sendall(b"%d\n" % pid)
        for descriptor in (*descriptors, 1, 2):
            os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    connection.close()
    become(json.loads(order), descriptors)


def become(order: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Take on arguments, environment, folder and output of the run."""
    for descriptor, place in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    sys.argv = order["argv"]
    paths = order["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [os.path.dirname(os.path.abspath(sys.argv[0])), *paths]


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
    import runpy

    runpy.run_path(sys.argv[0], run_name="__main__")
