"""Remove unneeded environments: builds that did not finish, unused for long, and more while the disk is full.

Only own builds are touched, never what the operator placed or conda made. The node's agent calls `turn` between two
claims, so that nothing is being claimed or launched meanwhile: what is condemned there loses its marker, and with it is
a build that did not finish. Such are deleted in a thread, under the lock that a build would hold; a crash leaves them
to the next turn. What a queued job will run in, and every build of an environment that a live job of this node names,
stays.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from app.executor.environments.conda import CondaSearch
from app.executor.environments.environments import MARKER, EnvironmentFinder, Scan, forget_use, last_use, lock_path
from app.executor.environments.local_environments import Look
from app.store.environments import environments_in_use
from app.store.session import Database

logger = logging.getLogger(__name__)

TURN_SECONDS = 600.0
CLEANUP_REQUEST = "clean-environments"  # a file in the node's home that asks for a turn now
DAY = 86_400.0


class Why(StrEnum):
    """Why a prefix goes."""

    UNFINISHED = "unfinished"  # a build that was broken off
    UNUSED = "unused"
    DISK_FULL = "disk-full"


@dataclass(frozen=True)
class CleaningRules:
    """What the operator wants to keep."""

    keep_seconds: float
    min_free_bytes: int


@dataclass(frozen=True)
class OwnBuild:
    """A prefix that this node built. `current`: the one that stages of this name would run in."""

    name: str
    prefix: Path
    used_at: float  # or built
    size_bytes: int
    current: bool


@dataclass(frozen=True)
class Needs:
    """Names of environments that queued jobs wait for, and that live jobs of this node run in."""

    queued: Collection[str]
    live: Collection[str]

    def keep(self, build: OwnBuild) -> bool:
        return build.name in self.live or (build.current and build.name in self.queued)


def choose(
    builds: Sequence[OwnBuild], needs: Needs, rules: CleaningRules, *, now: float, free_bytes: int
) -> Sequence[tuple[OwnBuild, Why]]:
    """Return what goes, the longest unused first: all that is too old, then as much as the disk lacks."""
    chosen: list[tuple[OwnBuild, Why]] = []
    # unusable environments go before those that may be needed again
    order = sorted((build for build in builds if not needs.keep(build)), key=lambda one: (one.current, one.used_at))
    for build in order:
        if now - build.used_at > rules.keep_seconds:
            why = Why.UNUSED
        elif free_bytes < rules.min_free_bytes:
            why = Why.DISK_FULL
        else:
            continue
        chosen.append((build, why))
        free_bytes += build.size_bytes
    return chosen


def own_builds(scan: Scan, current: Collection[Path]) -> Sequence[OwnBuild]:
    """Return what this node built; `current` are the prefixes that stages run in now."""
    return [
        OwnBuild(
            name=name,
            prefix=prefix,
            used_at=max(build.built_at, last_use(scan.envs_dir, prefix) or 0.0),
            size_bytes=build.size_bytes or 0,
            current=prefix in current,
        )
        for name, builds in scan.builds.items()
        for prefix, build in builds
    ]


class EnvironmentCleaning:
    """The clean-up of one node."""

    def __init__(self, *, database: Database, envs_dir: Path, search: CondaSearch, rules: CleaningRules) -> None:
        self._database = database
        self._envs_dir = envs_dir
        self._finder = EnvironmentFinder(envs_dir=envs_dir, search=search)
        self._rules = rules
        self._due = time.monotonic()
        self._removing: threading.Thread | None = None

    async def turn(self, node_id: str, seen: Look) -> None:
        """Condemn what goes, and let it be deleted in the background; called where no claim is under way."""
        if self._removing is not None and self._removing.is_alive():
            return
        request = self._envs_dir.parent / CLEANUP_REQUEST
        if time.monotonic() < self._due and not request.exists():
            return
        self._due = time.monotonic() + TURN_SECONDS
        request.unlink(missing_ok=True)
        for build, why in await self.plan(node_id, seen):
            (build.prefix / MARKER).unlink(missing_ok=True)
            forget_use(self._envs_dir, build.prefix)
            fields = {"environment": build.name, "prefix": str(build.prefix), "why": why}
            logger.info("environment_removed", extra=fields)
        # a daemon: a worker that stops does not wait for gigabytes to be deleted
        self._removing = threading.Thread(target=remove_unfinished, args=(self._envs_dir,), daemon=True)
        self._removing.start()

    async def plan(self, node_id: str, seen: Look) -> Sequence[tuple[OwnBuild, Why]]:
        """Return what the next turn would condemn."""
        current = {found.prefix for found in seen.found.values() if found.prefix is not None}
        scan = await asyncio.to_thread(self._finder.scan)
        builds = await asyncio.to_thread(own_builds, scan, current)
        if not builds:
            return []
        async with self._database.reading() as session:
            queued, live = await environments_in_use(session, node_id)
        free = shutil.disk_usage(self._envs_dir).free
        return choose(builds, Needs(queued, live), self._rules, now=time.time(), free_bytes=free)


def unfinished(envs_dir: Path) -> Sequence[Path]:
    """Return the prefixes without a marker that are not being built."""
    found = []
    for lock in sorted(envs_dir.glob(".*.lock")):
        prefix = lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))
        if prefix.is_dir() and not prefix.is_symlink() and not (prefix / MARKER).exists():
            with _held(lock) as acquired:
                if acquired:
                    found.append(prefix)
    return found


def remove_unfinished(envs_dir: Path) -> None:
    """Delete them; blocks, perhaps for minutes."""
    try:
        for prefix in unfinished(envs_dir):
            with _held(lock_path(prefix)) as acquired:
                if acquired and not (prefix / MARKER).exists():
                    shutil.rmtree(prefix, ignore_errors=True)
    except OSError as error:
        logger.warning("environments_not_removed", extra={"error": str(error)})


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[bool]:
    """Hold the lock of a prefix if no build runs there. The file stays: a build may have it open already."""
    descriptor = os.open(lock, os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            acquired = True
        except BlockingIOError:
            acquired = False
        yield acquired
    finally:
        os.close(descriptor)
