"""A bell: a FIFO that wakes its listener on the same machine at once, and costs nothing in between.

Strokes may be lost (nobody listens, a disk without FIFOs, another machine on a network disk) or run into one; whoever
listens looks by itself every now and then as well.
"""

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_MANY_STROKES = 4096


def strike(path: Path) -> None:
    """Wake the listener, if there is one; never waits, never raises."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.write(descriptor, b".")
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def listening(path: Path, heard: Callable[[], None]) -> Iterator[None]:
    """Call `heard` in the running loop whenever the bell at `path` is struck; one listener for each bell."""
    try:
        descriptor = _open(path)
    except OSError as error:
        logger.warning("no_bell", extra={"path": str(path), "error": str(error)})
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, _hear, descriptor, heard)
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


def _hear(descriptor: int, heard: Callable[[], None]) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(descriptor, _MANY_STROKES)
    heard()
