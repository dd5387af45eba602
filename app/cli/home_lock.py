"""Only one embedded service per home: two workers of one node would adopt each other's attempts."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, Final

from app.cli.exits import CliFailure

LOCK_FILE: Final = "dev.lock"
LEFTOVER_SECONDS: Final = 15.0
"""How long the processes of a service that was killed may need to end."""


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

    The guardian of the processes holds it, too: when we are killed, it is free once everything we started has ended.
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
        """Write down what whoever comes second should know."""
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
