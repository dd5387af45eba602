"""The agent's own promises, with everything around it slowed down, broken or counted. Folders and database are real."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.accelerators import Accelerator
from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.projects import DEFAULT_SCOPE
from app.executor.attempts.forecast import Forecasts
from app.executor.attempts.launch import LaunchError
from app.executor.attempts.limits import LimitWatch
from app.executor.attempts.projections import Projections
from app.executor.engines.base import ExitRecord, LaunchSpec
from app.executor.engines.local import LocalEngine
from app.executor.nodes import agent as agent_module
from app.executor.nodes import node_lock
from app.executor.nodes.agent import SURE_SECONDS, NodeAgent, Pool, Timing
from app.executor.nodes.node_lock import NodeIsTaken, exclusive
from app.executor.runs.run_folder import RunFolder
from app.executor.supervisor import client
from app.store import job_attempts, job_status
from app.store import jobs as store
from app.store.home import Home, NodeHome
from app.store.job_attempts import Claim
from app.store.job_status import End
from app.store.session import Database
from tests import job_rows
from tests.job_rows import ENVIRONMENT
from tests.waiting import until

QUICK = Timing(poll_seconds=0.05, watch_seconds=0.01, beat_seconds=0.2, lease=timedelta(seconds=60))


class WatchedDatabase(Database):
    """Lets a test act between the read of rows and their use, and break reads."""

    after_read: Callable[[], Awaitable[None]] | None = None
    broken = False
    reads = 0
    writes = 0

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        self.reads += 1
        if self.broken:
            raise OperationalError("SELECT", {}, Exception("database is locked"))
        async with super().reading() as session:
            yield session
        if self.after_read is not None:
            await self.after_read()

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        self.writes += 1
        async with super().writing() as session:
            yield session


class Launcher:
    """Launches a script, or raises what it is told to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.resolved: list[str] = []
        self.raises: dict[str, Exception] = {}
        self.script = "true"

    async def resolve(self, claim: Claim) -> LaunchSpec:
        self.resolved.append(claim.job.id)
        if claim.job.id in self.raises:
            raise self.raises[claim.job.id]
        return LaunchSpec(
            attempt_id=claim.attempt.id,
            argv=("/bin/sh", "-c", self.script),
            cwd=self.root,
            env={"PATH": "/usr/bin:/bin"},
            output=self.root / f"{claim.attempt.id}.log",
        )

    async def launched(self, claim: Claim, pid: int) -> None:
        """Nobody wants to know."""


class Finalizer:
    """Ends attempts as succeeded, when it is allowed to."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.allowed = asyncio.Event()
        self.allowed.set()
        self.finalized: list[str] = []
        self.unlaunched: list[str] = []
        self.failures = 0

    async def finalize(self, claim: Claim, exit_record: ExitRecord) -> None:
        await self.allowed.wait()
        if self.failures:
            self.failures -= 1
            raise OSError("disk trouble")
        await self._finish(claim, job_rows.SUCCESS)
        self.finalized.append(claim.job.id)

    async def end_unlaunched(self, claim: Claim, end: End, *, final: bool) -> None:
        self.unlaunched.append(claim.job.id)
        await self._finish(claim, end)

    async def _finish(self, claim: Claim, end: End) -> None:
        async with self.database.writing() as session:
            await job_attempts.finish(session, claim, end, now=datetime.now(UTC))

    async def follow_up(self, attempt_id: str) -> None:
        """Nothing follows."""


class Reporter:
    """A node with one environment that counts its beats."""

    def __init__(self) -> None:
        self.beats = 0
        self.accelerators: Sequence[Accelerator] = ()

    async def beat(self) -> None:
        self.beats += 1

    async def ready_environments(self, _specs: Mapping[str, str | None]) -> Collection[str]:
        return [ENVIRONMENT]

    async def usable_accelerators(self) -> Sequence[Accelerator]:
        return self.accelerators

    async def request_builds(self) -> None:
        """Nothing to build."""


class Bench:
    """An agent and its surroundings."""

    def __init__(self, root: Path, url: str) -> None:
        self.root = root
        self.database = WatchedDatabase(url, scope=DEFAULT_SCOPE)
        self.plain = Database(url, scope=DEFAULT_SCOPE)
        self.home = NodeHome(root / "node")
        self.home.create()
        self.launcher = Launcher(root)
        self.finalizer = Finalizer(self.plain)
        self.reporter = Reporter()
        self.timing = QUICK
        self.node_id = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[NodeAgent]:
        """Run the agent while the block runs; its crash is the test's failure."""
        engine = LocalEngine(self.home)
        agent = NodeAgent(
            database=self.database,
            node_id=self.node_id,
            engine=engine,
            pools=[Pool(frozenset({JobKind.TRAINING}), 2)],
            launcher=self.launcher,
            finalizer=self.finalizer,
            reporter=self.reporter,
            projections=Projections(Home(self.root)),
            forecasts=Forecasts(Home(self.root)),
            limits=LimitWatch(Home(self.root), engine),
            timing=self.timing,
        )
        stopping = asyncio.Event()
        task = asyncio.create_task(agent.run(stopping))
        try:
            yield agent
            assert not task.done(), task
        finally:
            stopping.set()
            agent.wake()
            await task

    async def status(self, job_id: str) -> JobStatus:
        async with self.plain.reading() as session:
            return (await store.get(session, job_id)).status

    async def reaches(self, job_id: str, status: JobStatus) -> None:
        async def look() -> bool:
            return await self.status(job_id) is status

        await until(look, f"{job_id} {status}")


@pytest.fixture
async def bench(tmp_path: Path, sqlite_url: str) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, sqlite_url)
    bench.node_id = await job_rows.add_node(bench.plain)
    yield bench
    await bench.database.close()
    await bench.plain.close()


class TestNothingRunsTwice:
    async def test_row_that_was_read_before_the_end_is_not_acted_upon(self, bench: Bench) -> None:
        """The end is written, and the folder removed, while a round holds what it read before."""
        job_id = await job_rows.add_job(bench.plain)
        bench.finalizer.allowed.clear()
        stale = asyncio.Event()

        async def end_meanwhile() -> None:
            if not await is_finalizing() or stale.is_set():
                return
            (attempt,) = client.list_attempts(bench.home.attempts)
            stale.set()
            bench.finalizer.allowed.set()
            await until(lambda: removed(attempt), "the folder's end")

        bench.database.after_read = end_meanwhile
        async with bench.running() as agent:
            await stale.wait()
            reads = bench.database.reads
            agent.wake()

            async def a_few_rounds_later() -> bool:
                return bench.database.reads > reads + 5

            await until(a_few_rounds_later, "rounds")

        assert bench.launcher.resolved == [job_id]
        assert (bench.finalizer.finalized, bench.finalizer.unlaunched) == ([job_id], [])
        assert client.list_attempts(bench.home.attempts) == []

    async def test_second_agent_of_a_node_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(node_lock, "LOCK_SECONDS", 0.1)
        with exclusive(tmp_path / "agent.lock"), pytest.raises(NodeIsTaken), exclusive(tmp_path / "agent.lock"):
            pass

        with exclusive(tmp_path / "agent.lock"):
            pass

    async def test_lock_that_a_dying_agent_still_holds_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A child that it was about to start has a copy of the descriptor until it becomes another program."""
        monkeypatch.setattr(node_lock, "LOCK_SECONDS", 3600)
        held = exclusive(tmp_path / "agent.lock")
        held.__enter__()
        threading.Timer(0.2, held.__exit__, (None, None, None)).start()

        with exclusive(tmp_path / "agent.lock"):
            pass


class TestTrouble:
    async def test_one_attempt_does_not_hold_up_the_others(
        self, bench: Bench, caplog: pytest.LogCaptureFixture
    ) -> None:
        broken, sound = await job_rows.add_job(bench.plain), await job_rows.add_job(bench.plain)
        bench.launcher.raises[broken] = RuntimeError("a fault of ours")

        async with bench.running():
            await bench.reaches(sound, JobStatus.SUCCEEDED)
            tries = bench.launcher.resolved.count(broken)

        assert await bench.status(broken) is JobStatus.LAUNCHING
        assert tries < 10
        assert "attempt_failed" in caplog.messages

    async def test_trouble_with_the_files_of_one_attempt_lets_the_others_end(self, bench: Bench) -> None:
        """Also if that one comes first."""
        ids = [await job_rows.add_job(bench.plain) for _ in range(2)]
        bench.finalizer.allowed.clear()

        async with bench.running():
            for job_id in ids:
                await bench.reaches(job_id, JobStatus.RUNNING)
        async with bench.plain.reading() as session:
            broken, sound = await job_attempts.live_attempts(session, bench.node_id)
        (bench.home.attempts / broken.attempt.id / "lock").unlink()
        (bench.home.attempts / broken.attempt.id / "lock").mkdir()
        bench.finalizer.allowed.set()

        async with bench.running():
            await bench.reaches(sound.job.id, JobStatus.SUCCEEDED)

        assert await bench.status(broken.job.id) is JobStatus.RUNNING

    async def test_attempt_that_rested_goes_on(self, bench: Bench) -> None:
        job_id = await job_rows.add_job(bench.plain)
        bench.launcher.raises[job_id] = RuntimeError("for a moment")

        async with bench.running():

            async def tried() -> bool:
                return bool(bench.launcher.resolved)

            await until(tried, "a try")
            bench.launcher.raises.clear()
            await bench.reaches(job_id, JobStatus.SUCCEEDED)

    async def test_launch_that_is_refused_ends_the_job_with_its_reason(self, bench: Bench) -> None:
        job_id = await job_rows.add_job(bench.plain)
        bench.launcher.raises[job_id] = LaunchError(EndReason.ENV_MISSING, environment="trl")

        async with bench.running():
            await bench.reaches(job_id, JobStatus.FAILED)

        async with bench.plain.reading() as session:
            row = await store.get(session, job_id)
        assert (row.reason, row.reason_params) == (EndReason.ENV_MISSING, {"environment": "trl"})

    async def test_database_is_not_pestered_while_it_is_away(
        self, bench: Bench, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Also while a folder says that there is something to write down."""
        job_id = await job_rows.add_job(bench.plain)
        bench.finalizer.allowed.clear()

        async with bench.running():

            async def ended() -> bool:
                folders = client.list_attempts(bench.home.attempts)
                return bool(folders) and client.observe(folders[0]).exit is not None

            await until(ended, "the script's end")
            bench.database.broken = True
            bench.finalizer.allowed.set()

            async def noticed() -> bool:
                return caplog.messages.count("agent_round_failed") >= 2

            before = bench.database.reads
            await until(noticed, "two failed rounds")
            assert bench.database.reads - before < 10
            bench.database.broken = False
            await bench.reaches(job_id, JobStatus.SUCCEEDED)

        failed = [record for record in caplog.records if record.message == "agent_round_failed"]
        assert all(record.exc_info is None for record in failed)
        assert {vars(record)["error"] for record in failed} == {"database is locked"}

    async def test_finalizing_that_failed_is_tried_again(self, bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
        job_id = await job_rows.add_job(bench.plain)
        bench.finalizer.failures = 1

        async with bench.running():
            await bench.reaches(job_id, JobStatus.SUCCEEDED)

        assert caplog.messages.count("finalize_failed") == 1
        assert bench.launcher.resolved == [job_id]

    async def test_projection_that_fails_ends_nothing(self, bench: Bench) -> None:
        broken, sound = await job_rows.add_job(bench.plain), await job_rows.add_job(bench.plain)
        bench.launcher.script = "sleep 60"
        runs = {job_id: RunFolder(Home(bench.root).run_folder(job_id, 1)) for job_id in (broken, sound)}
        runs[broken].projected_events.mkdir(parents=True)
        runs[sound].path.mkdir(parents=True)
        runs[sound].output_log.write_text('[log_data]: {"msg": 200004, "level": "INFO"}\n')

        async def projected() -> bool:
            return runs[sound].projected_events.exists()

        async with bench.running():
            await until(projected, "the events of the sound one")
            for job_id in runs:
                async with bench.plain.writing() as session:
                    await job_status.request_cancel(session, job_id, now=datetime.now(UTC))
            await bench.reaches(broken, JobStatus.SUCCEEDED)


class TestFinalizing:
    async def test_takes_no_slot(self, bench: Bench) -> None:
        """Weights of a large model are hashed for many minutes."""
        ids = [await job_rows.add_job(bench.plain) for _ in range(4)]
        bench.finalizer.allowed.clear()

        async with bench.running():
            for job_id in ids:
                await bench.reaches(job_id, JobStatus.RUNNING)
            bench.finalizer.allowed.set()
            for job_id in ids:
                await bench.reaches(job_id, JobStatus.SUCCEEDED)

    async def test_is_broken_off_by_a_stop_and_done_by_the_next_agent(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(agent_module, "STOPPING_SECONDS", 0.05)
        job_id = await job_rows.add_job(bench.plain)
        bench.finalizer.allowed.clear()

        async with bench.running():
            await bench.reaches(job_id, JobStatus.RUNNING)
            await until(is_finalizing, "the finalizing")
        bench.finalizer.allowed.set()
        assert await bench.status(job_id) is JobStatus.RUNNING

        async with bench.running():
            await bench.reaches(job_id, JobStatus.SUCCEEDED)

        assert bench.launcher.resolved == [job_id]


async def rounds(bench: Bench, count: int) -> bool:
    """Say whether the agent has looked at the database often enough for so many rounds."""
    return bench.database.reads >= 2 * count


class TestWaiting:
    async def test_beats_between_rare_rounds(self, bench: Bench) -> None:
        bench.timing = Timing(poll_seconds=300, watch_seconds=0.01, beat_seconds=0.05)

        async with bench.running():

            async def beaten() -> bool:
                return bench.reporter.beats >= 4

            await until(beaten, "beats")

        assert bench.database.reads == 3  # what runs, what is quarantined, what waits

    async def test_round_in_which_nobody_waits_writes_nothing(self, bench: Bench) -> None:
        bench.timing = replace(QUICK, beat_seconds=600)

        async with bench.running():
            await until(lambda: rounds(bench, 2), "rounds")
            writes = bench.database.writes
            await until(lambda: rounds(bench, 20), "rounds")

            assert bench.database.writes == writes
            await bench.reaches(await job_rows.add_job(bench.plain), JobStatus.SUCCEEDED)

    async def test_wake_looks_at_once(self, bench: Bench) -> None:
        bench.timing = Timing(poll_seconds=300, watch_seconds=0.01, beat_seconds=300)

        async with bench.running() as agent:

            async def looked() -> bool:
                return bench.database.reads > 0

            await until(looked, "the first round")
            job_id = await job_rows.add_job(bench.plain)
            agent.wake()
            await bench.reaches(job_id, JobStatus.SUCCEEDED)


async def is_finalizing() -> bool:
    return any(task.get_name().startswith("finalize") for task in asyncio.all_tasks())


async def removed(folder: Path) -> bool:
    return not folder.exists()


class TestStoodStill:
    async def test_process_that_stood_still_starts_nothing_of_before(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Meanwhile its node was declared dead, and the job is another's."""
        now = [0.0]
        monkeypatch.setattr(agent_module, "clock_since_boot", lambda: now[0])
        resolve = bench.launcher.resolve

        async def resolve_and_stand_still(claim: Claim) -> LaunchSpec:
            spec = await resolve(claim)
            now[0] += SURE_SECONDS + 1
            async with bench.plain.writing() as session:
                end = End(status=JobStatus.FAILED, reason=EndReason.NODE_LOST, params={})
                assert await job_attempts.finish(session, claim, end, now=datetime.now(UTC))
            return spec

        monkeypatch.setattr(bench.launcher, "resolve", resolve_and_stand_still)
        job_id = await job_rows.add_job(bench.plain)
        async with bench.running():
            await bench.reaches(job_id, JobStatus.FAILED)
            reads = bench.database.reads

            async def a_few_rounds_later() -> bool:
                return bench.database.reads > reads + 5

            await until(a_few_rounds_later, "rounds")

        assert bench.launcher.resolved == [job_id]
        assert list(bench.root.glob("*.log")) == []
