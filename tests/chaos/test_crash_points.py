"""Every process of the service dies at every point of an attempt's life; the job still ends once and runs once.

One worker after the other: each is told where to die (or where its supervisor shall), and the next one, which meets
what was left, is told the next point. So every start is the recovery from one crash and the way to another.
"""

import asyncio
import signal
from pathlib import Path

import pytest

from app.domain.enums import EndReason, JobStatus
from tests.chaos.evidence import collect
from tests.chaos.stage import JOURNAL, SCRIPT
from tests.chaos.verdict import judge
from tests.waiting import until
from tests.worker.harness import Site, Worker

WORKER_POINTS = (
    *("claimed", "before-spec", "after-spec", "supervisor-asked", "running"),
    *("before-publish", "after-publish", "before-finish", "after-finish", "finalized", "removal-begun"),
)
KEEPER_POINTS = (
    *("locked", "started", "before-fork", "before-record", "before-release", "after-release"),
    *("exit-seen", "before-exit", "after-exit"),
)
STOPPED_AT = ("stop-asked", "stopping", "stop-recorded")  # of a job that is cancelled
NEVER_RAN = {"started", "before-fork", "before-record", "before-release"}  # the attempt is given up, the job is not


class Chain:
    """Workers that follow one another on one node."""

    def __init__(self, site: Site, *, delay: float) -> None:
        self.site = site
        self.delay = delay
        self.jobs: dict[str, str] = {}
        self.worker: Worker | None = None

    async def crash_at(self, point: str) -> None:
        """Submit a job and let a worker, or a supervisor of it, die there."""
        marker = self.site.root / f"died-{point}"
        job = await self.site.submit(SCRIPT, parameters={"ticks": 3 if point not in STOPPED_AT else 100_000})
        self.jobs[point] = job
        self.worker = self.site.start_worker(DEEPE_FAULT_POINT=f"{point}={marker}", DEEPE_SLOTS="4")
        if point in STOPPED_AT:
            await self.site.wait(job, JobStatus.RUNNING)
            await self.site.cancel(job)

        async def died() -> bool:
            return marker.exists()

        await until(died, f"death at {point}", report=self.site.report)
        await self.end_worker(point)

    async def end_worker(self, point: str) -> None:
        """Without a delay a worker that lives recovers from the death of its supervisor, with one its successor."""
        assert self.worker is not None
        if point in WORKER_POINTS or point in ("stop-asked", "stopping"):
            assert await asyncio.to_thread(self.worker.process.wait) == -signal.SIGKILL
        elif not self.delay:
            await self.site.wait_for_end(self.jobs[point])
        self.worker.kill()
        await asyncio.sleep(self.delay)

    async def finish(self) -> None:
        """Let a worker that nobody kills end everything."""
        self.site.start_worker(DEEPE_SLOTS="4")
        await self.site.wait_for_end(*self.jobs.values())
        await until(self.nothing_runs, "the end of everything", report=self.site.report)

    async def nothing_runs(self) -> bool:
        return not self.site.control_folders() and not self.site.processes()


@pytest.fixture(params=[0.0, 1.0], ids=["at-once", "after-1s"])
def delay(request: pytest.FixtureRequest) -> float:
    """Return how long nobody is there after a crash."""
    seconds: float = request.param
    return seconds


async def check(chain: Chain) -> None:
    """Demand a clean verdict, one run of each job, and another attempt for each one that never ran.

    It need not be that of the job that was submitted for the point: the one before may come by it on its recovery.
    """
    site = chain.site
    cancelled = {chain.jobs[point] for point in STOPPED_AT if point in chain.jobs}
    evidence = await collect(
        site.database,
        journal=site.root / JOURNAL,
        acknowledged=list(chain.jobs.values()),
        cancelled=frozenset(cancelled),
        leftovers=[str(process) for process in site.processes()],
    )
    assert judge(evidence).violations() == {}, site.report()
    assert len(evidence.attempts) == len(chain.jobs) + len(NEVER_RAN & set(chain.jobs)), site.report()
    assert len(await site.models()) == len(chain.jobs) - len(cancelled)
    for point, job in chain.jobs.items():
        row = await site.row(job)
        wanted = JobStatus.CANCELLED if job in cancelled else JobStatus.SUCCEEDED
        starts = [line for line in evidence.journal if line.job == job and line.word == "start"]
        ran = (1,) if wanted is JobStatus.SUCCEEDED else (0, 1)  # the stop may come before the script's first line
        assert row.status is wanted, (point, site.story(row))
        assert len(starts) in ran, (point, site.story(row))


class TestWorker:
    @pytest.mark.parametrize("half", ["launch", "end"])
    async def test_dies_at_every_point(self, site: Site, delay: float, half: str) -> None:
        await self.die_at_every_point(site, delay, half)

    @pytest.mark.parametrize("database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
    @pytest.mark.parametrize("half", ["launch", "end"])
    async def test_dies_at_every_point_on_postgres(self, any_site: Site, half: str) -> None:
        await self.die_at_every_point(any_site, 0.0, half)

    async def die_at_every_point(self, site: Site, delay: float, half: str) -> None:
        points = WORKER_POINTS[:6] if half == "launch" else (*WORKER_POINTS[6:], "stop-asked", "stopping")
        chain = Chain(site, delay=delay)

        for point in points:
            await chain.crash_at(point)
        await chain.finish()

        await check(chain)


class TestSupervisor:
    @pytest.mark.parametrize("half", ["launch", "end"])
    async def test_dies_at_every_point(self, site: Site, delay: float, half: str) -> None:
        chain = Chain(site, delay=delay)

        for point in KEEPER_POINTS[:5] if half == "launch" else (*KEEPER_POINTS[5:], "stop-recorded"):
            await chain.crash_at(point)
        await chain.finish()

        await check(chain)

    async def test_reaper_dies_before_it_could_report_the_exit(self, site: Site) -> None:
        """Nobody knows how the script ended, so this attempt is no success, whatever it left."""
        job = await site.submit(SCRIPT, parameters={"ticks": 3})
        site.start_worker(DEEPE_FAULT_POINT=f"stage-ended={site.root / 'once'}")
        row = await site.wait(job)

        first, *more = await site.attempts(job)
        assert first.exit is not None
        assert (first.exit["why"], first.exit["code"], first.reason) == ("lost", None, EndReason.SUPERVISOR_LOST)
        assert row.status is (JobStatus.SUCCEEDED if more else JobStatus.FAILED)

    async def test_worker_dies_after_it_gave_an_attempt_up(self, any_site: Site) -> None:
        """The second attempt belongs to whoever finds the job."""
        job = await any_site.submit(SCRIPT, parameters={"ticks": 3})
        first = any_site.start_worker(DEEPE_FAULT_POINT=f"before-record={any_site.root / 'once'}")
        await until(lambda: _exists(any_site.root / "once"), "the supervisor's death", report=any_site.report)
        first.kill()
        second = any_site.start_worker(DEEPE_FAULT_POINT="requeued")
        assert await asyncio.to_thread(second.process.wait) == -signal.SIGKILL
        any_site.start_worker()
        row = await any_site.wait(job)

        assert (row.status, row.attempts) == (JobStatus.SUCCEEDED, 2), any_site.story(row)
        assert await any_site.statuses(job) == ["queued", "launching", "queued", "launching", "running", "succeeded"]


async def _exists(path: Path) -> bool:
    return path.exists()
