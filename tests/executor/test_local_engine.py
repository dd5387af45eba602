"""The engine of a node's own machine: what it adds to the supervisors that `test_supervisor` tests."""

import sys
from pathlib import Path
from uuid import uuid4

import pytest

from app.executor.engines import local
from app.executor.engines.base import AttemptPhase, LaunchSpec
from app.executor.engines.local import STARTING_SECONDS, LocalEngine
from app.executor.supervisor import client
from app.store.home import NodeHome
from tests.waiting import wait_until

ONE = uuid4().hex  # processes are found by it on the whole machine


class Clock:
    """A monotonic clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def home(tmp_path: Path) -> NodeHome:
    home = NodeHome(tmp_path / "node")
    home.create()
    return home


def spec(home: NodeHome, source: str) -> LaunchSpec:
    return LaunchSpec(
        attempt_id=ONE,
        argv=(sys.executable, "-c", source),
        cwd=home.root,
        env={"PATH": "/usr/bin:/bin"},
        output=home.root / "one.log",
    )


class TestPlacing:
    async def test_runs_once_however_often_it_is_placed_and_leaves_nothing_when_discarded(self, home: NodeHome) -> None:
        engine = LocalEngine(home)
        assert engine.observe(ONE).phase is AttemptPhase.ABSENT

        await engine.prepare(ONE, spec(home, "print('ran')"))
        for _ in range(3):
            await engine.place(ONE)
        wait_until(lambda: engine.observe(ONE).phase is AttemptPhase.EXITED, "the end")

        assert (home.root / "one.log").read_text() == "ran\n"
        assert await engine.is_empty(ONE)
        assert list(await engine.known_attempts()) == [ONE]
        await engine.discard(ONE)
        assert list(await engine.known_attempts()) == []

    async def test_first_specification_stays(self, home: NodeHome) -> None:
        engine = LocalEngine(home)
        for word in ("first", "second"):
            await engine.prepare(ONE, spec(home, f"print({word!r})"))
        await engine.place(ONE)
        wait_until(lambda: engine.observe(ONE).phase is AttemptPhase.EXITED, "the end")

        assert (home.root / "one.log").read_text() == "first\n"

    async def test_is_pending_until_its_supervisor_came_or_had_its_time(
        self, home: NodeHome, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock()
        engine = LocalEngine(home, monotonic=clock)
        monkeypatch.setattr(client, "start", lambda *_: None)  # a supervisor that never comes
        await engine.prepare(ONE, spec(home, "pass"))
        assert not engine.observe(ONE).pending

        await engine.place(ONE)

        assert engine.observe(ONE).pending
        clock.now += STARTING_SECONDS
        assert not engine.observe(ONE).pending

    async def test_stop_reaches_what_was_prepared_only(self, home: NodeHome) -> None:
        """Its supervisor may be late: it must find the request and run nothing."""
        engine = LocalEngine(home)
        await engine.stop(ONE, "cancelled")  # nothing there: nothing happens
        assert list(await engine.known_attempts()) == []
        await engine.prepare(ONE, spec(home, "print('ran')"))

        await engine.stop(ONE, "cancelled")
        await engine.place(ONE)
        wait_until(lambda: engine.observe(ONE).phase is AttemptPhase.EXITED, "the end")

        assert not (home.root / "one.log").exists()


class TestSilence:
    """It is measured on the machine's own clock, kept over a restart of the worker, and never taken over a boot."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def engine(self, home: NodeHome, clock: Clock) -> LocalEngine:
        (home.attempts / ONE).mkdir()
        return LocalEngine(home, monotonic=clock)

    def test_grows_until_something_changes(self, engine: LocalEngine, clock: Clock) -> None:
        told = []
        for seen, clock.now in (("x", 5.0), ("x", 8.0), ("y", 9.0), ("y", 12.0)):
            told.append(engine.silent_seconds(ONE, seen))

        assert told == [0, 3, 0, 3]

    def test_goes_on_with_the_next_worker(self, engine: LocalEngine, home: NodeHome, clock: Clock) -> None:
        engine.silent_seconds(ONE, "x")
        clock.now += 20

        assert LocalEngine(home, monotonic=clock).silent_seconds(ONE, "x") == 20

    def test_does_not_count_over_a_boot(
        self, engine: LocalEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock.now = 5_000
        engine.silent_seconds(ONE, "x")
        monkeypatch.setattr(local, "boot_id", lambda: "another")

        clock.now = 10
        assert engine.silent_seconds(ONE, "x") == 0
        clock.now = 30
        assert engine.silent_seconds(ONE, "x") == 20

    def test_broken_memory_is_forgotten(self, engine: LocalEngine, home: NodeHome) -> None:
        (home.attempts / ONE / "activity.json").write_text('{"seen": 3}')

        assert engine.silent_seconds(ONE, "x") == 0
