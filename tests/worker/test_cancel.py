"""Cancel: at once what is queued, and the whole tree of what runs."""

import contextlib

import psutil
import pytest

from app.domain.enums import EndReason, JobKind, JobStatus
from app.store.job_status import JobAlreadyFinished
from tests.waiting import until
from tests.worker.harness import SAVE, TRAIN, Site

# a child in a session of its own, a grandchild left to init, and one that ignores TERM
TREE = """
import play, subprocess, sys
subprocess.Popen(["sleep", "300"], start_new_session=True)
subprocess.run(["/bin/sh", "-c", "sleep 301 &"])
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(302)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
play.journal("run")
play.wait_for("never")
"""


class TestQueued:
    async def test_ends_at_once_with_what_waits_for_it(self, any_site: Site) -> None:
        ids = await any_site.submit_chain((JobKind.TRAINING, TRAIN), (JobKind.SAVING, SAVE))

        await any_site.cancel(ids[0])

        rows = [await any_site.row(job_id) for job_id in ids]
        assert [(row.status, row.reason) for row in rows] == [
            (JobStatus.CANCELLED, EndReason.CANCELLED),
            (JobStatus.CANCELLED, EndReason.PREDECESSOR_FAILED),
        ]
        any_site.start_worker()
        other = await any_site.submit()
        await any_site.wait(other, JobStatus.SUCCEEDED)
        assert [any_site.journal(job_id) for job_id in ids] == [[], []]


class TestRunning:
    async def test_nothing_of_the_tree_is_left(self, any_site: Site) -> None:
        ids = await any_site.submit_chain((JobKind.TRAINING, TREE), (JobKind.SAVING, SAVE))
        any_site.start_worker(DEEPE_STOP_GRACE_SECONDS="0.5")
        await any_site.wait_for_journal(ids[0])
        await any_site.wait(ids[0], JobStatus.RUNNING)
        whole = {"300", "301", "302"}
        await until(lambda: whole <= {sleeping(one) for one in any_site.processes()}, "the tree", any_site.report)

        await any_site.cancel(ids[0])
        row = await any_site.wait(ids[0])

        assert (row.status, row.reason) == (JobStatus.CANCELLED, EndReason.CANCELLED), any_site.story(row)
        assert await any_site.statuses(ids[0]) == ["queued", "launching", "running", "stopping", "cancelled"]
        left = [process for process in any_site.processes() if sleeping(process)]
        assert left == []
        following = await any_site.row(ids[1])
        assert (following.status, following.reason) == (JobStatus.CANCELLED, EndReason.PREDECESSOR_FAILED)

    async def test_script_may_use_the_grace_to_leave_a_checkpoint(self, site: Site) -> None:
        text = (
            "import deepe, play, sys\ndeepe.catch_stop()\nplay.journal('run')\n"
            "while not deepe.stop_requested():\n    play.time.sleep(0.01)\n"
            "play.journal('checkpoint')\nsys.exit(deepe.STOPPED)\n"
        )
        job_id = await site.submit(text)
        site.start_worker(DEEPE_STOP_GRACE_SECONDS="3600")
        await site.wait_for_journal(job_id)

        await site.cancel(job_id)
        row = await site.wait(job_id)

        assert (row.status, site.journal(job_id)) == (JobStatus.CANCELLED, ["run", "checkpoint"])

    async def test_end_that_was_faster_than_the_wish_stays_an_end(self, site: Site) -> None:
        job_id = await site.submit()
        site.start_worker()
        await site.wait(job_id, JobStatus.SUCCEEDED)

        with pytest.raises(JobAlreadyFinished):
            await site.cancel(job_id)

        assert (await site.row(job_id)).status is JobStatus.SUCCEEDED

    async def test_script_that_obeys_is_not_left_its_grace(self, site: Site) -> None:
        """How long that takes is measured by `benchmarks.cancel`."""
        job_id = await site.submit("import play\nplay.journal('run')\nplay.wait_for('never')\n")
        site.start_worker(DEEPE_STOP_GRACE_SECONDS="3600")
        await site.wait_for_journal(job_id)
        await site.wait(job_id, JobStatus.RUNNING)

        await site.cancel(job_id)

        await site.wait(job_id, JobStatus.CANCELLED)


class TestWhileNobodyWorks:
    async def test_wish_is_met_when_the_worker_is_back(self, site: Site) -> None:
        job_id = await site.submit("import play\nplay.journal('run')\nplay.wait_for('never')\n")
        worker = site.start_worker()
        await site.wait_for_journal(job_id)
        await site.wait(job_id, JobStatus.RUNNING)
        worker.kill()

        await site.cancel(job_id)
        site.start_worker()
        row = await site.wait(job_id)

        assert (row.status, row.reason) == (JobStatus.CANCELLED, EndReason.CANCELLED)

        async def look() -> bool:
            return site.processes() == []

        await until(look, "an empty tree")


def sleeping(process: psutil.Process) -> str:
    """Return for how long a process of the tree sleeps, empty if it is none of them."""
    with contextlib.suppress(psutil.Error):
        line = " ".join(process.cmdline())
        return next((number for number in ("300", "301", "302") if number in line), "")
    return ""
