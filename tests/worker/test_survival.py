"""What dies must not take a training with it, and nothing must run twice."""

import json
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import psutil

from app.domain.enums import EndReason, JobStatus
from app.executor.runs.events import MetricsEvent, RunEvents
from app.executor.supervisor.client import LaunchSpec, observe, prepare, start
from app.store import claims, job_attempts
from app.store.claims import Offer
from app.store.nodes import all_nodes
from tests.waiting import until
from tests.worker.harness import ENDED_WELL, TRAIN, Site, alive, kill, pids_alive

# a point of the curve for every step, in the form that the worker has to find in the output
LONG = """
import json, play, time
play.journal("run")
step = 0
def point():
    global step
    step += 1
    record = {"msg": 200009, "msgDetail": "1", "details": {"step": step, "train_loss": 1.0 / step}}
    print("[log_data]: " + json.dumps(record), flush=True)
while not (play.HERE / "gates" / "go").exists():
    point()
    time.sleep(0.02)
point()
play.journal("end")
play.adapter()
"""


def steps(site: Site, job_id: str) -> list[int]:
    """Return the steps of the curve, in the order in which they were written."""
    return [event.step for event in RunEvents(site.run_folder(job_id)).read() if isinstance(event, MetricsEvent)]


class TestWorkerIsKilled:
    async def test_script_goes_on_and_is_adopted(self, any_site: Site) -> None:
        job_id = await any_site.submit(LONG)
        first = any_site.start_worker()
        await any_site.wait(job_id, JobStatus.RUNNING)
        await any_site.wait_for_journal(job_id)

        first.kill()
        while_away = len(any_site.output(job_id))
        await until(lambda: grown(any_site, job_id, while_away), "output while no worker was there")
        any_site.start_worker()
        any_site.open("go")
        row = await any_site.wait(job_id)

        assert (row.status, row.reason, row.attempts) == (*ENDED_WELL, 1), any_site.story(row)
        assert any_site.journal(job_id) == ["run", "end"]
        curve = steps(any_site, job_id)
        assert curve == list(range(1, any_site.output(job_id).count("[log_data]") + 1))

    async def test_supervisor_too_and_the_exit_is_still_known(self, site: Site) -> None:
        job_id = await site.submit("import play, sys\nplay.journal('run')\nplay.wait_for('go')\nsys.exit(3)\n")
        first = site.start_worker()
        await site.wait_for_journal(job_id)
        await site.wait(job_id, JobStatus.RUNNING)

        first.kill()
        (supervisor,) = site.supervisor_pids()
        kill(supervisor)
        site.start_worker()
        await until(lambda: other_supervisor(site, supervisor), "another supervisor", report=site.report)
        site.open("go")
        row = await site.wait(job_id)

        assert (row.status, row.reason, row.reason_params["exit_code"]) == (JobStatus.FAILED, EndReason.EXIT_CODE, 3)
        assert (site.journal(job_id), row.attempts) == (["run"], 1)

    async def test_supervisor_alone_while_the_worker_watches(self, site: Site) -> None:
        job_id = await site.submit("import play\nplay.journal('run')\nplay.wait_for('go')\nplay.adapter()\n")
        site.start_worker()
        await site.wait_for_journal(job_id)
        await site.wait(job_id, JobStatus.RUNNING)

        (supervisor,) = site.supervisor_pids()
        kill(supervisor)
        await until(lambda: other_supervisor(site, supervisor), "another supervisor", site.report)
        site.open("go")
        row = await site.wait(job_id)

        assert (row.status, row.reason) == ENDED_WELL, site.story(row)
        assert site.journal(job_id) == ["run"]

    async def test_end_that_nobody_saw_is_finalized_later(self, site: Site) -> None:
        job_id = await site.submit("import play\nplay.journal('run')\nplay.wait_for('go')\nplay.adapter()\n")
        first = site.start_worker()
        await site.wait_for_journal(job_id)
        first.kill()

        site.open("go")
        await until(lambda: nothing_runs(site), "the end of the script and its supervisor")
        site.start_worker()
        row = await site.wait(job_id)

        assert (row.status, row.reason) == ENDED_WELL, site.story(row)
        assert site.journal(job_id) == ["run"]

    async def test_many_kills_run_each_job_once(self, site: Site) -> None:
        ids = [await site.submit() for _ in range(12)]

        for _ in range(4):
            worker = site.start_worker(DEEPE_SLOTS="4")
            ended = await count_ended(site, ids)
            await until(partial(more_ended, site, ids, ended), "progress", report=site.report)
            worker.kill()
        site.start_worker(DEEPE_SLOTS="4")
        rows = await site.wait_for_end(*ids)

        assert {(row.status, row.reason) for row in rows} == {ENDED_WELL}
        assert [site.journal(job_id) for job_id in ids] == [["run"]] * 12
        assert len(await site.models()) == 12


class TestClaimWithoutLaunch:
    """A worker died between its claim and the start of the script."""

    async def claim(self, site: Site, text: str) -> job_attempts.Claim:
        worker = site.start_worker()
        await until(lambda: registered(site), "the node", report=site.report)
        worker.stop()
        await site.submit(text)
        async with site.database.writing() as session:
            (node,) = await all_nodes(session)
            offer = Offer(node_id=node.id, environments=["base"], slots=1)
            kinds, lease = {(await site.job()).kind}, timedelta(seconds=60)
            claim = await claims.claim(session, offer, kinds=kinds, now=datetime.now(UTC), lease=lease)
        assert claim is not None
        return claim

    async def test_is_rolled_forward_once(self, site: Site) -> None:
        claim = await self.claim(site, TRAIN)

        site.start_worker()
        row = await site.wait(claim.job.id)

        assert (row.status, row.reason, row.attempts) == (*ENDED_WELL, 1), site.story(row)
        assert site.journal(row.id) == ["run"]

    async def test_that_shall_be_cancelled_never_starts(self, site: Site) -> None:
        claim = await self.claim(site, TRAIN)
        await site.cancel(claim.job.id)

        site.start_worker()
        row = await site.wait(claim.job.id)

        assert (row.status, row.reason) == (JobStatus.CANCELLED, EndReason.CANCELLED)
        assert site.journal(row.id) == []

    async def test_running_row_whose_folder_is_gone_is_lost_not_repeated(self, site: Site) -> None:
        claim = await self.claim(site, TRAIN)
        async with site.database.writing() as session:
            await job_attempts.mark_running(session, claim, now=datetime.now(UTC))

        site.start_worker()
        row = await site.wait(claim.job.id)

        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.SUPERVISOR_LOST)
        assert site.journal(row.id) == []


class TestTerm:
    async def test_worker_ends_while_the_script_goes_on(self, site: Site) -> None:
        job_id = await site.submit("import play\nplay.journal('run')\nplay.wait_for('go')\nplay.adapter()\n")
        worker = site.start_worker()
        await site.wait(job_id, JobStatus.RUNNING)
        await site.wait_for_journal(job_id)

        worker.stop()

        assert worker.process.returncode == 0, worker.log
        scripts = [p for p in site.processes() if "training-" in " ".join(p.cmdline())]
        assert any(alive(process) for process in scripts)
        assert "Traceback" not in worker.log
        site.start_worker()
        site.open("go")
        row = await site.wait(job_id)
        assert (row.status, site.journal(job_id)) == (JobStatus.SUCCEEDED, ["run"])


class TestOrphans:
    async def test_script_without_a_live_row_is_stopped_and_its_folder_removed(self, site: Site) -> None:
        """As after a backup of the database was restored."""
        home = site.node_home()
        home.root.parent.mkdir()
        home.create()
        folder = home.attempts / "00000000-0000-0000-0000-000000000001"
        spec = LaunchSpec(
            attempt_id=folder.name,
            argv=("/bin/sh", "-c", "sleep 300"),
            cwd=site.root,
            env={"PATH": "/usr/bin:/bin"},
            output=site.root / "orphan.log",
            grace_seconds=1,
        )
        prepare(folder, spec)
        start(folder)
        await until(lambda: runs(folder), "the orphan")
        process = observe(folder).process
        assert process is not None

        worker = site.start_worker()
        await until(lambda: gone(folder), "the folder's end", report=site.report)

        assert pids_alive([process.pid]) == []
        assert [event["attempt"] for event in worker.events("orphan_stopped")] == [folder.name]

    async def test_end_that_was_written_but_not_cleared_is_made_up_for(self, site: Site) -> None:
        """A worker died right behind its transaction: the card is missing, the folder is still there."""
        job_id = await site.submit()
        first = site.start_worker()
        await site.wait(job_id, JobStatus.SUCCEEDED)
        await until(lambda: folders_cleared(site), "the folder's end")
        first.stop()
        (attempt,) = await site.attempts(job_id)
        path = (await site.models())[job_id].path
        assert path is not None
        card = site.home.absolute(path) / "README.md"
        card.unlink()
        folder = site.node_home().attempts / attempt.id
        folder.mkdir()
        (folder / "spec.json").write_text("{}")
        (folder / "exit.json").write_text(json.dumps({"why": "exited"} | dict(attempt.exit or {})))

        site.start_worker()
        await until(lambda: folders_cleared(site), "the folder's end", report=site.report)

        assert card.is_file()
        assert await site.statuses(job_id) == ["queued", "launching", "running", "succeeded"]


async def grown(site: Site, job_id: str, size: int) -> bool:
    return len(site.output(job_id)) > size + 200


async def other_supervisor(site: Site, old: int) -> bool:
    pids = site.supervisor_pids()
    return bool(pids) and pids != [old] and psutil.pid_exists(pids[0])


async def nothing_runs(site: Site) -> bool:
    return site.processes() == []


async def count_ended(site: Site, ids: list[str]) -> int:
    return sum([(await site.row(job_id)).finished_at is not None for job_id in ids])


async def more_ended(site: Site, ids: list[str], before: int) -> bool:
    ended = await count_ended(site, ids)
    return ended > before or ended == len(ids)


async def registered(site: Site) -> bool:
    async with site.database.reading() as session:
        return bool(await all_nodes(session))


async def runs(folder: Path) -> bool:
    return observe(folder).process is not None


async def gone(folder: Path) -> bool:
    return not folder.exists()


async def folders_cleared(site: Site) -> bool:
    return site.control_folders() == []
