"""Forks workers and APIs from a process that has imported them: a start costs a tenth of the CPU time.

    python -m tests.chaos.fork_server

Long runs start a thousand of them. Each is a process of its own with its own environment, log and main function, and
is killed like any other; only the import is shared. Reads orders as JSON lines, answers each with the pid.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from app.executor.supervisor.program import read_process, send
from tests.waiting import wait_until


class Forked:
    """A process that somebody else reaps, seen as `subprocess.Popen` shows one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._born = read_process(pid)

    def poll(self) -> int | None:
        """Return None while it runs; nobody tells us its exit status."""
        now = read_process(self.pid)
        runs = self._born is not None and now is not None and now.start == self._born.start and not now.zombie
        return None if runs else 0

    def wait(self) -> int:
        wait_until(lambda: self.poll() is not None, f"the end of process {self.pid}")
        return 0

    def send_signal(self, number: int) -> None:
        if self._born is not None:
            send(self._born, number)


class ForkServer:
    """The process that forks, and the orders to it."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        with (folder / "fork_server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.fork_server"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
            )

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Forked:
        """Fork a process that does what `python ARGUMENTS` would."""
        order = {"arguments": [*arguments], "environment": {**environment}, "log": str(log)}
        orders, answers = self._pipes()
        orders.write(json.dumps(order).encode() + b"\n")
        orders.flush()
        return Forked(int(answers.readline()))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


def main() -> None:
    """Fork what is ordered until there are no more orders."""
    import uvicorn  # noqa: F401 - imported for the children

    import app.main
    import app.worker  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
        sys.stdout.buffer.write(b"%d\n" % pid)
        sys.stdout.buffer.flush()


def become(order: Mapping[str, Any]) -> NoReturn:
    """Be the ordered process and end as it does."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, place)
    os.environ.clear()
    os.environ.update(order["environment"])
    _, module, *options = order["arguments"]
    sys.argv = [module, *options]
    status = 1
    try:
        if module == "app.worker":
            from app.worker import main as work

            status = work()
        else:
            from uvicorn import main as serve

            serve(options, standalone_mode=False)
            status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
