"""Wait for what a test needs, however long that takes.

No wait has a bound of its own: a test that judges how quick the machine is fails on a busy one. What never comes is
ended by pytest's limit of a test (`timeout` in pyproject.toml), and the report then says what was awaited.
"""

import asyncio
import contextlib
import inspect
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar, overload

import psutil

T = TypeVar("T")
Report = Callable[[], str]


_awaited: list[tuple[str, Report]] = []


@overload
async def until(look: Callable[[], Awaitable[T | None]], what: str, report: Report = str) -> T: ...
@overload
async def until(look: Callable[[], T | None], what: str, report: Report = str) -> T: ...
async def until(look: Callable[[], Any], what: str, report: Report = str) -> Any:
    """Return the first true answer of `look`, which may be a coroutine function."""
    with _awaiting(what, report):
        begun = time.monotonic()
        while True:
            found = look()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(_pause(begun))


def wait_until(look: Callable[[], T | None], what: str, report: Report = str) -> T:
    """Return the first true answer of `look`."""
    with _awaiting(what, report):
        begun = time.monotonic()
        while not (found := look()):
            time.sleep(_pause(begun))
    return found


def awaited_in_vain() -> str:
    """Return what is still awaited, with the reports; forget it."""
    found = "\n".join(f"waited for {what}\n{report()}" for what, report in _awaited)
    _awaited.clear()
    return found


def is_gone(pid: int) -> bool:
    """Say whether a process has ended; one that is not reaped yet counts as ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(pids: Iterable[int]) -> bool:
    """Say whether all processes have ended."""
    return all(is_gone(pid) for pid in pids)


def _pause(begun: float) -> float:
    """Return a pause that grows with the wait: to look takes time from those who are waited for."""
    return min(max((time.monotonic() - begun) / 20, 0.005), 0.2)


@contextlib.contextmanager
def _awaiting(what: str, report: Report) -> Iterator[None]:
    """Keep the wait in the list when it is broken off: pytest's limit may end it anywhere in the event loop."""
    wait = (what, report)
    _awaited.append(wait)
    yield
    with contextlib.suppress(ValueError):
        _awaited.remove(wait)
