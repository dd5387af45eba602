"""Wait for a condition, never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], *, seconds: float = 15.0) -> T:
    """Return the first true answer; fails after the deadline."""
    deadline = time.monotonic() + seconds
    while not (answer := look()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return answer


def is_gone(pid: int) -> bool:
    """Say whether a process has ended; one that nobody reaped counts."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(pids: list[int]) -> bool:
    """Say whether all processes have ended."""
    return all(is_gone(pid) for pid in pids)
