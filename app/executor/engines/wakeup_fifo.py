"""A FIFO that wakes its listener on the same machine at once, and costs nothing in between.

Notifications may be lost (no listener, a disk without FIFOs, another machine on a network disk) or merged into one. A
listener therefore polls as well.
"""

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_DRAIN_BYTES = 4096


def notify(path: Path) -> None:
    """Wake the listener if there is one. Never wait, never raise."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.write(descriptor, b".")
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def listening(path: Path, wake: Callable[[], None]) -> Iterator[None]:
    """Call `wake` in the running loop at every notification through the FIFO at `path`. One listener for each FIFO."""
    try:
        descriptor = _open(path)
    except OSError as error:
        logger.warning("wakeup_fifo_unavailable", extra={"path": str(path), "error": str(error)})
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, _drain, descriptor, wake)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _open(path: Path) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    # for writing as well: else it would be at its end, and so readable, whenever no writer has it open
    return os.open(path, os.O_RDWR | os.O_NONBLOCK)


def _drain(descriptor: int, wake: Callable[[], None]) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(descriptor, _DRAIN_BYTES)
    wake()
