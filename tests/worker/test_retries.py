"""Attempts that fail, are killed, run too long or fall silent: the job goes on from its newest checkpoint, or ends."""

import json
import os
import signal

import psutil

from app.domain.enums import EndReason, JobStatus
from tests.worker.harness import ENDED_WELL, Site, kill

SOON = {"max_retries": 3, "backoff_seconds": 0}
# counts to six, a checkpoint for every number; what the helper declares whole is where the next attempt begins
COUNTING = """
import deepe, play, sys, time
deepe.catch_stop()
begun = deepe.resume_from()
step = int((begun / "step").read_text()) if begun else 0
play.journal(f"from-{step}")
while step < 6:
    step += 1
    folder = play.OUT / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "step").write_text(str(step))
    deepe.checkpoint(folder, step)
    play.journal(f"step-{step}")
    %s
play.adapter()
"""


async def last_attempt(site: Site, job_id: str) -> dict[str, object] | None:
    attempts = sorted(await site.attempts(job_id), key=lambda attempt: attempt.number)
    return attempts[-1].resumed_from


class TestResume:
    async def test_killed_script_goes_on_from_its_newest_checkpoint(self, any_site: Site) -> None:
        wait = "if step in (2, 4): play.wait_for(f'{step}-{begun is None}')"
        job_id = await any_site.submit(COUNTING % wait, retry=SOON)
        any_site.start_worker()

        await any_site.wait_for_journal(job_id, "step-2")
        kill(stage_of(any_site))
        await any_site.wait_for_journal(job_id, "step-4")
        kill(stage_of(any_site))
        any_site.open("4-False")
        row = await any_site.wait(job_id)

        assert (row.status, row.reason, row.attempts, row.retries) == (*ENDED_WELL, 3, 2), any_site.story(row)
        numbers = [word for word in any_site.journal(job_id) if word.startswith(("step", "from"))]
        assert numbers == [
            *("from-0", "step-1", "step-2", "from-2", "step-3", "step-4", "from-4", "step-5", "step-6"),
        ]  # fmt: skip
        assert await last_attempt(any_site, job_id) == {
            "job": job_id, "attempt": 2, "checkpoint": "checkpoint-4", "step": 4,
        }  # fmt: skip

    async def test_without_a_policy_the_first_failure_is_the_end(self, site: Site) -> None:
        job_id = await site.submit("import sys\nsys.exit(3)\n")
        site.start_worker()

        row = await site.wait(job_id)

        assert (row.status, row.reason, row.attempts) == (JobStatus.FAILED, EndReason.EXIT_CODE, 1)

    async def test_supervisor_and_script_lost_together_are_replaced_without_a_policy(self, site: Site) -> None:
        """As after the loss of everything on a node: nobody knows how the script ended."""
        job_id = await site.submit(COUNTING % "if begun is None and step == 3: play.wait_for('never')")
        site.start_worker()
        await site.wait_for_journal(job_id, "step-3")
        await site.wait(job_id, JobStatus.RUNNING)

        kill_everything_of_the_attempt(site)
        row = await site.wait(job_id)

        assert (row.status, row.reason, row.retries, row.recoveries) == (*ENDED_WELL, 0, 1), site.story(row)
        assert site.journal(job_id)[3:6] == ["step-3", "from-3", "step-4"]

    async def test_cancel_leaves_a_checkpoint_and_no_further_attempt(self, site: Site) -> None:
        wait = "while step == 2 and not deepe.stop_requested(): time.sleep(0.02)"
        script = COUNTING % f"{wait}\n    if step == 2: sys.exit(deepe.STOPPED)"
        job_id = await site.submit(script, retry=SOON)
        site.start_worker()
        await site.wait_for_journal(job_id, "step-2")

        await site.cancel(job_id)
        row = await site.wait(job_id)

        assert (row.status, row.reason, row.attempts) == (JobStatus.CANCELLED, EndReason.CANCELLED, 1)
        assert (site.run_folder(job_id).output / "checkpoint-2" / "deepe-checkpoint.json").is_file()


class TestLimits:
    async def test_attempt_that_runs_too_long_is_stopped_and_goes_on_from_where_it_was(self, any_site: Site) -> None:
        """Its time goes on while no worker is there."""
        script = COUNTING % "if step == 3 and begun is None: play.wait_for('never')"
        job_id = await any_site.submit(script, retry=SOON, limits={"seconds": 900})
        first = any_site.start_worker()
        await any_site.wait_for_journal(job_id, "step-3")
        await any_site.wait(job_id, JobStatus.RUNNING)

        first.kill()
        make_older(any_site, seconds=1000)
        any_site.start_worker()  # which looks at once: one that has looked does so again after half a minute
        row = await any_site.wait(job_id)

        assert (row.status, row.reason, row.retries) == (*ENDED_WELL, 1), any_site.story(row)
        assert any_site.journal(job_id)[3:6] == ["step-3", "from-3", "step-4"]
        stopped = min(await any_site.attempts(job_id), key=lambda attempt: attempt.number)
        assert (stopped.reason, stopped.reason_params["limit_seconds"]) == (EndReason.TIMED_OUT, 900)
        assert "stopping" in await any_site.statuses(job_id)

    async def test_attempt_that_came_no_farther_is_the_last(self, site: Site) -> None:
        job_id = await site.submit("import play\nplay.wait_for('never')\n", retry=SOON, limits={"seconds": 1})
        site.start_worker()

        row = await site.wait(job_id)

        assert (row.status, row.reason, row.attempts) == (JobStatus.FAILED, EndReason.TIMED_OUT, 1)

    async def test_silent_attempt_is_stopped_and_one_that_writes_is_not(self, site: Site) -> None:
        talking = (
            "import play, time\nwhile not (play.HERE / 'gates' / 'go').exists():\n"
            "    print('x', flush=True)\n    time.sleep(0.05)\nplay.adapter()\n"
        )
        quiet = "import play\nprint('x', flush=True)\nplay.wait_for('never')\n"
        limits = {"silent_seconds": 4}
        talks, is_quiet = [await site.submit(text, limits=limits) for text in (talking, quiet)]
        site.start_worker(DEEPE_SLOTS="2")

        stalled = await site.wait(is_quiet)
        site.open("go")
        completed = await site.wait(talks)

        assert (stalled.reason, completed.reason) == (EndReason.STALLED, EndReason.COMPLETED)


def make_older(site: Site, *, seconds: float) -> None:
    """Let the attempt have begun so much earlier; its supervisor, which knows better, is replaced."""
    (file,) = site.root.glob("nodes/*/attempts/*/state.json")
    (supervisor,) = site.supervisor_pids()
    os.kill(supervisor, signal.SIGSTOP)
    state = json.loads(file.read_bytes())
    state["started_monotonic"] -= seconds
    draft = file.with_name(".older")
    draft.write_text(json.dumps(state))
    draft.replace(file)
    kill(supervisor)


def stage_of(site: Site) -> int:
    # the script itself: the youngest, where it is contained
    found = [process for process in site.processes() if "training-" in " ".join(process.cmdline())]
    return max(found, key=lambda process: (process.create_time(), process.pid)).pid


def kill_everything_of_the_attempt(site: Site) -> None:
    """End supervisor, reaper and script at once, each stopped first so that none sees the other's end."""
    (supervisor,) = site.supervisor_pids()
    victims = [psutil.Process(supervisor), *psutil.Process(supervisor).children(recursive=True)]
    for process in victims:
        os.kill(process.pid, signal.SIGSTOP)
    for process in victims:
        os.kill(process.pid, signal.SIGKILL)
