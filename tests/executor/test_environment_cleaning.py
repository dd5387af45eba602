"""Which environments go, and that nothing goes that somebody needs."""

import asyncio
import fcntl
import os
import threading
from pathlib import Path

import pytest

from app.domain.enums import JobStatus
from app.executor.environments import environment_cleaning
from app.executor.environments.environment_cleaning import (
    CLEANUP_REQUEST,
    DAY,
    CleaningRules,
    EnvironmentCleaning,
    Needs,
    OwnBuild,
    Why,
    choose,
    unfinished,
)
from app.executor.environments.environments import MARKER, USES, last_use, lock_path, mark_used, planned_prefix
from app.registry.environments.specs import parse_spec
from app.store.session import Database
from tests import job_rows
from tests.executor.test_local_environments import NEWER, SPEC, Node, python

RULES = CleaningRules(keep_seconds=30 * DAY, min_free_bytes=100)
NOW = 1000 * DAY
NOBODY = Needs(queued=(), live=())


def build(name: str = "trl", *, days: float = 0, size: int = 10, current: bool = True) -> OwnBuild:
    return OwnBuild(name, Path(f"/envs/{name}-{days}"), NOW - days * DAY, size, current)


class TestChoose:
    def test_unused_for_too_long(self) -> None:
        builds = [build(days=29), build(days=31), build(days=40, current=False)]

        chosen = choose(builds, NOBODY, RULES, now=NOW, free_bytes=1000)

        assert [(one.used_at, why) for one, why in chosen] == [
            (NOW - 40 * DAY, Why.UNUSED),
            (NOW - 31 * DAY, Why.UNUSED),
        ]

    @pytest.mark.parametrize(
        ("needs", "left"),
        [
            (NOBODY, []),
            (Needs(queued=["trl"], live=()), [True]),
            (Needs(queued=(), live=["trl"]), [False, True]),  # a running job may be in the older one
            (Needs(queued=["other"], live=["other"]), []),
        ],
    )
    def test_never_what_a_job_needs(self, needs: Needs, left: list[bool]) -> None:
        builds = [build(days=90, current=False), build(days=50)]

        chosen = choose(builds, needs, RULES, now=NOW, free_bytes=0)

        gone = [one for one, _ in chosen]
        assert [one.current for one in builds if one not in gone] == left

    def test_full_disk_takes_as_many_as_it_lacks_older_specifications_first(self) -> None:
        builds = [
            build("a", days=20, size=60),
            build("b", days=10, size=60),
            build("c", days=1, size=30, current=False),
        ]

        chosen = choose(builds, NOBODY, RULES, now=NOW, free_bytes=20)

        assert [(one.name, why) for one, why in chosen] == [("c", Why.DISK_FULL), ("a", Why.DISK_FULL)]

    def test_nothing_while_there_is_room(self) -> None:
        assert choose([build(days=29)], NOBODY, RULES, now=NOW, free_bytes=100) == []


class Cleaner:
    """The clean-up of a node whose environments were used long ago."""

    def __init__(self, root: Path, database: Database) -> None:
        self.node = Node(root)
        self.database = database
        self.id = ""
        rules = CleaningRules(keep_seconds=DAY, min_free_bytes=0)
        self.cleaning = EnvironmentCleaning(
            database=database, envs_dir=self.node.envs, search=self.node.search, rules=rules
        )

    def old(self, spec: str) -> Path:
        prefix = self.node.build("trl", spec)
        marker = prefix / MARKER
        marker.write_text(marker.read_text().replace('"built_at": ', '"built_at": 0.0, "was": '))
        return prefix

    async def turn(self, **specs: str) -> None:
        (self.node.envs.parent / CLEANUP_REQUEST).touch()
        await self.cleaning.turn(self.id, self.node.local.look({**specs}))
        assert self.cleaning._removing is not None
        await asyncio.to_thread(self.cleaning._removing.join)


@pytest.fixture
async def cleaner(tmp_path: Path, database: Database) -> Cleaner:
    cleaner = Cleaner(tmp_path, database)
    cleaner.id = await job_rows.add_node(database)
    return cleaner


class TestTurn:
    async def test_removes_what_is_old_and_nothing_else(self, cleaner: Cleaner) -> None:
        old, used = cleaner.old(SPEC), cleaner.old(NEWER)
        mark_used(cleaner.node.envs, used)
        placed = python(cleaner.node.envs / "placed")
        users = python(cleaner.node.search.home / ".conda" / "envs" / "users")
        (users / "conda-meta").mkdir()

        await cleaner.turn(trl=NEWER)

        assert (old.exists(), used.exists(), placed.exists(), users.exists()) == (False, True, True, True)
        assert lock_path(old).exists()
        assert last_use(cleaner.node.envs, old) is None
        assert not (cleaner.node.envs.parent / CLEANUP_REQUEST).exists()

    @pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.RUNNING])
    async def test_keeps_what_a_job_needs(self, cleaner: Cleaner, status: JobStatus) -> None:
        prefix = cleaner.old(SPEC)
        job_id = await job_rows.add_job(cleaner.database, environment="trl")
        if status is JobStatus.RUNNING:
            claim = await job_rows.claim(cleaner.database, cleaner.id)
            assert claim is not None
            assert claim.job.id == job_id

        await cleaner.turn(trl=SPEC)

        assert (prefix / MARKER).exists()

    async def test_looks_only_now_and_then(self, cleaner: Cleaner) -> None:
        await cleaner.turn()
        old = cleaner.old(SPEC)

        await cleaner.cleaning.turn(cleaner.id, cleaner.node.local.look({}))

        assert old.exists()

    async def test_waits_for_a_deletion_that_takes_long(
        self, cleaner: Cleaner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await cleaner.turn()
        gate = threading.Event()
        cleaner.cleaning._removing = threading.Thread(target=gate.wait, daemon=True)
        cleaner.cleaning._removing.start()
        monkeypatch.setattr(environment_cleaning, "TURN_SECONDS", 0.0)
        old = cleaner.old(SPEC)
        (cleaner.node.envs.parent / CLEANUP_REQUEST).touch()

        await cleaner.cleaning.turn(cleaner.id, cleaner.node.local.look({}))
        gate.set()

        assert old.exists()


def test_builds_under_way_are_not_unfinished(tmp_path: Path) -> None:
    node = Node(tmp_path)
    left = planned_prefix("left", parse_spec(SPEC), node.envs)
    building = planned_prefix("building", parse_spec(SPEC), node.envs)
    for prefix in (left, building):
        prefix.mkdir()
        lock_path(prefix).touch()
    python(node.envs / "placed")
    node.build("ready", SPEC)
    (node.envs / USES).mkdir(exist_ok=True)
    descriptor = os.open(lock_path(building), os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        found = unfinished(node.envs)
    finally:
        os.close(descriptor)

    assert found == [left]
