"""Attempts that run too long, or have fallen silent: found here, stopped by the agent.

Time is the attempt's own, as the engine tells it. What a script last wrote (output, events, files in its output folder)
is compared by sizes and times of change.
"""

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from app.domain.enums import EndReason, JobStatus
from app.domain.retries import Limits
from app.executor.engines.base import Engine
from app.executor.runs.run_folder import RunFolder
from app.store.home import Home
from app.store.job_attempts import Claim

LOOKS_PER_SILENCE = 20  # how exact the silence is measured, in parts of its limit
LONGEST_PAUSE = 30.0
SHORTEST_PAUSE = 0.25
MOST_FILES = 10_000


class LimitWatch:
    """Knows which of a node's attempts are beyond a limit of their job."""

    def __init__(self, home: Home, engine: Engine, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._home = home
        self._engine = engine
        self._monotonic = monotonic
        self._next_look: dict[str, float] = {}
        self._overdue: dict[str, EndReason] = {}

    def overdue(self, claim: Claim) -> EndReason | None:
        """Return why the attempt is to be stopped, as far as the last look went."""
        return self._overdue.get(claim.attempt.id)

    async def look(self, claims: Iterable[Claim]) -> None:
        """Look at the attempts whose turn it is; forget those that are gone."""
        running = {claim.attempt.id: claim for claim in claims if claim.job.limits}
        self._next_look = {key: due for key, due in self._next_look.items() if key in running}
        self._overdue = {key: reason for key, reason in self._overdue.items() if key in running}
        now = self._monotonic()
        for key, claim in running.items():
            if claim.job.status is not JobStatus.RUNNING or key in self._overdue or now < self._next_look.get(key, 0.0):
                continue
            limits = Limits.of(claim.job.limits)
            self._next_look[key] = now + _pause(limits)
            reason = await asyncio.to_thread(self._judge, claim, limits)
            if reason is not None:
                self._overdue[key] = reason

    def _judge(self, claim: Claim, limits: Limits) -> EndReason | None:
        running_seconds = self._engine.observe(claim.attempt.id).running_seconds
        if running_seconds is None:
            return None
        if limits.seconds is not None and running_seconds > limits.seconds:
            return EndReason.TIMED_OUT
        if limits.silent_seconds is None:
            return None
        run = RunFolder(self._home.run_folder(claim.job.id, claim.attempt.number))
        silent = self._engine.silent_seconds(claim.attempt.id, signature(run))
        return EndReason.STALLED if silent > limits.silent_seconds else None


def limit_seconds(limits: Limits, reason: EndReason) -> float | None:
    """Return the limit that an attempt was stopped by, for the text of the reason."""
    seconds = {EndReason.TIMED_OUT: limits.seconds, EndReason.STALLED: limits.silent_seconds}.get(reason)
    return int(seconds) if seconds is not None and seconds == int(seconds) else seconds


def signature(run: RunFolder) -> str:
    """Return what changes whenever the script writes something, anywhere that is its own."""
    digest = hashlib.sha256()
    for path in (run.output_log, run.events):
        _add(digest, path)
    for path in _files(run.output, run.ranks):
        _add(digest, path)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", path: Path) -> None:
    with contextlib.suppress(OSError):  # gone since it was listed: that is a change, too
        known = path.stat()
        digest.update(f"{path.name}\0{known.st_size}\0{known.st_mtime_ns}\0".encode(errors="surrogateescape"))


def _files(*roots: Path) -> Iterator[Path]:
    """Return files and folders below the roots, a bounded number of them."""
    left = MOST_FILES
    for root in roots:
        for directory, folders, names in os.walk(root):
            for name in (*folders, *names):
                if (left := left - 1) < 0:
                    return
                yield Path(directory, name)


def _pause(limits: Limits) -> float:
    given = [limit for limit in (limits.seconds, limits.silent_seconds) if limit is not None]
    shortest = min(given, default=LONGEST_PAUSE)
    return min(max(shortest / LOOKS_PER_SILENCE, SHORTEST_PAUSE), LONGEST_PAUSE)
