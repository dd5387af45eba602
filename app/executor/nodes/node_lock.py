"""The lock of a node: one worker for each, and a crash releases it."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

LOCK_SECONDS: Final = 3.0  # how long a worker waits for the lock of its node


class NodeIsTaken(Exception):
    """Another agent holds this node's lock."""


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; raise `NodeIsTaken` when another process does. A crash releases it.

    Not always at once: a child that the dead one was about to start holds it until it has become another program.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise NodeIsTaken(str(path)) from error
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
