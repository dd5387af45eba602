"""Warm starts on a real node: used where they fit, and never left behind."""

import contextlib
import sys

import psutil
import pytest

from app.domain.enums import JobStatus
from app.presets.catalogue import helpers_dir
from tests.executor.warming import waiting
from tests.worker.harness import ENDED_WELL, Site, Worker, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm starts are for Linux")

SCRIPT = """
DEEPE_WARM = "warm_trl"
import os
import play
play.journal("warm" if "HF_HUB_OFFLINE" in os.environ else "cold")
print("hello", flush=True)
play.wait_for("go")
play.adapter()
"""


class WarmSite:
    """A site with one node that keeps interpreters ready."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def start_worker(self) -> Worker:
        return self.site.start_worker(DEEPE_WARM_START_SECONDS="40", DEEPE_SLOTS="4")

    async def make_ready(self) -> psutil.Process:
        """Let a first job run, and wait for the interpreter that the next one will have."""
        await self.run("cold")
        return await until(self.interpreter, "an interpreter that waits", 60, self.site.report)

    async def run(self, way: str) -> str:
        """Start a job and wait until its script runs, in the way that is expected."""
        job_id = await self.site.submit(SCRIPT)
        await self.site.wait_for_journal(job_id, way)
        return job_id

    async def interpreter(self) -> psutil.Process | None:
        return next(iter(self.waiting()), None)

    async def none_waits(self) -> bool:
        return self.waiting() == []

    def waiting(self) -> list[psutil.Process]:
        """Return the interpreters of this site's nodes that wait."""
        found = waiting(helpers_dir() / "warm_trl.py")
        return [one for one in found if any(word.startswith(f"{self.site.root}/") for word in words(one))]


def words(process: psutil.Process) -> list[str]:
    """Return its command line; of one that has ended meanwhile none."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


@pytest.fixture
def warm(site: Site) -> WarmSite:
    return WarmSite(site)


class TestNode:
    @pytest.mark.timeout(120)
    async def test_starts_the_second_job_warm_and_loses_none_when_its_worker_is_killed(self, warm: WarmSite) -> None:
        site = warm.site
        first = warm.start_worker()
        await warm.make_ready()
        job_id = await warm.run("warm")
        await site.wait(job_id, JobStatus.RUNNING)

        await until(warm.interpreter, "the next interpreter", 60, site.report)
        first.kill()
        await until(warm.none_waits, "its end with the worker")
        site.start_worker()
        site.open("go")
        row = await site.wait(job_id)

        assert (row.status, row.reason, row.attempts) == (*ENDED_WELL, 1), site.story(row)
        assert site.journal(job_id) == ["warm"]
        assert site.output(job_id) == "hello\n"
        assert len(first.events("started_warm")) == 1

    @pytest.mark.timeout(120)
    async def test_leaves_nothing_when_it_stops_and_can_cancel_what_began_warm(self, warm: WarmSite) -> None:
        site = warm.site
        worker = warm.start_worker()
        await warm.make_ready()
        job_id = await warm.run("warm")
        await site.wait(job_id, JobStatus.RUNNING)
        await site.cancel(job_id)

        row = await site.wait(job_id)
        await until(warm.interpreter, "the next interpreter", 60, site.report)
        worker.stop()

        assert row.status is JobStatus.CANCELLED, site.story(row)
        await until(warm.none_waits, "its end with the worker")

    async def test_that_is_not_asked_to_keeps_none(self, warm: WarmSite) -> None:
        site = warm.site
        worker = site.start_worker()
        site.open("go")

        rows = await site.wait_for_end(await warm.run("cold"), await warm.run("cold"))

        assert {(row.status, row.reason) for row in rows} == {ENDED_WELL}
        assert warm.waiting() == []
        assert worker.events("making_warm") == []
