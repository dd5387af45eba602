"""The parent-death watchdog: a program that ends the embedded service's processes when `deepe dev` is killed.

It reads `+PID` and `-PID` lines (leaders of process groups that began and ended) from stdin. When stdin closes, because
our end of the pipe is gone for any reason, it ends the groups that are left: TERM, a grace, KILL. Standard library
only, run with `python -I -S`; on Linux and macOS alike.
"""

import contextlib
import os
import signal
import sys
import time

GRACE_SECONDS = 8.0


def main() -> None:
    """Read until the pipe closes, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the parent, whose death closes the pipe
    groups: list[int] = []
    for line in sys.stdin:
        group = int(line[1:])
        if line.startswith("+"):
            groups.append(group)
        else:
            groups.remove(group)
    end(groups)


def end(groups: list[int]) -> None:
    """End process groups; the last one that was started goes first."""
    for group in reversed(groups):
        _signal(group, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(_exists(group) for group in groups) and time.monotonic() < deadline:
        time.sleep(0.05)
    for group in groups:
        _signal(group, signal.SIGKILL)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS says so for a group of zombies
        return False
    return True


if __name__ == "__main__":
    main()
