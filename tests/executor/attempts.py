"""Real attempts for the tests: a short script under a real supervisor, and nothing left of it afterwards."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psutil

from app.executor.supervisor import client, program
from app.executor.supervisor.client import AttemptPhase, ExitRecord, LaunchSpec, Observation
from tests.waiting import wait_until


class Attempt:
    """One attempt folder, its output and its processes."""

    def __init__(self, root: Path) -> None:
        self.id = uuid4().hex
        self.root = root
        self.folder = root / "attempts" / self.id
        self.output = root / "runs" / f"{self.id}.log"
        self.journal = root / f"{self.id}.journal"

    def prepare(self, script: str, *, grace_seconds: float = 5.0, **changes: object) -> None:
        """Prepare `script` (Python source; `JOURNAL` is a file it may append to)."""
        source = f"JOURNAL = {str(self.journal)!r}\n{script}"
        spec = LaunchSpec(
            attempt_id=self.id,
            argv=(sys.executable, "-u", "-c", source),
            cwd=self.root,
            env={"PATH": os.environ["PATH"]},
            output=self.output,
            grace_seconds=grace_seconds,
        )
        client.prepare(self.folder, LaunchSpec(**{**vars(spec), **changes}))

    def start(self, script: str, *, grace_seconds: float = 5.0, **changes: object) -> None:
        """Prepare and start."""
        self.prepare(script, grace_seconds=grace_seconds, **changes)
        client.start(self.folder)

    def supervise(self, *options: str, fault_point: str = "") -> "subprocess.Popen[bytes]":
        """Run a supervisor as a child of the test, to see its exit status."""
        command = [sys.executable, "-I", "-S", program.__file__, str(self.folder), *options]
        return subprocess.Popen(command, env=os.environ | {"DEEPE_FAULT_POINT": fault_point})

    def observe(self) -> Observation:
        return client.observe(self.folder)

    def wait_for_line(self, line: str) -> None:
        """Wait until the script has printed `line`."""
        wait_until(lambda: self.output.exists() and line in self.output.read_text().splitlines(), f"line {line!r}")

    def wait_for_end(self) -> ExitRecord:
        """Wait for the exit record and the supervisor's own end."""
        wait_until(lambda: self.observe().phase is AttemptPhase.EXITED, "exit record")
        wait_until(lambda: not self.observe().supervised, "free lock")
        record = self.observe().exit
        assert record is not None
        return record

    def supervisor(self) -> psutil.Process:
        """Return the living supervisor."""
        state = program.Folder(str(self.folder)).read("state.json")
        assert state is not None
        return psutil.Process(state["supervisor_pid"])

    def reaper(self) -> psutil.Process:
        """Return the stage's parent."""
        state = program.Folder(str(self.folder)).read("state.json")
        assert state is not None
        return psutil.Process(state[program.REAPER_KEY]["pid"])

    def stage(self) -> psutil.Process:
        """Return the stage's own process."""
        process = self.observe().process
        assert process is not None
        return psutil.Process(process.pid)

    def runs(self) -> int:
        """Return how often the script wrote `run` to its journal."""
        return self.journal.read_text().count("run\n") if self.journal.exists() else 0

    def survivors(self) -> list[psutil.Process]:
        """Return what lives of the attempt: its supervisor and reaper, and what carries its id."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                marked = process.environ().get("DEEPE_ATTEMPT") == self.id
                if (marked or supervises(process, self.folder)) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def clean_up(self) -> None:
        """End what a failed test left."""
        for process in self.survivors():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)


def supervises(process: psutil.Process, root: Path) -> bool:
    """Say whether a process is a supervisor or reaper of the attempt in `root`, or of one with its folder below it."""
    place = Path(process.cwd().removesuffix(" (deleted)"))
    return place.parent.name == "attempts" and place.is_relative_to(root)


def attempts(root: Path) -> Iterator[Callable[[], Attempt]]:
    """Yield a maker of attempts and clean up after them (the body of a fixture)."""
    made: list[Attempt] = []

    def make() -> Attempt:
        made.append(Attempt(root))
        return made[-1]

    yield make
    for attempt in made:
        attempt.clean_up()
