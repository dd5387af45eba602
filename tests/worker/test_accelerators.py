"""Real workers with simulated accelerators: who runs at once, and what scripts are told."""

from app.domain.enums import JobStatus
from tests.worker.harness import Site

WAIT = "import play, os\nprint(os.environ['DEEPE_ACCELERATORS'], flush=True)\nplay.wait_for('end')\nplay.adapter()\n"


async def test_jobs_run_side_by_side_on_accelerators_of_their_own(site: Site) -> None:
    """One slot, two accelerators: two trainings at once, and a third one when the first are done."""
    site.start_worker(DEEPE_SIMULATED_ACCELERATORS="2", DEEPE_SLOTS="1")
    first, second = [await site.submit(WAIT) for _ in range(2)]
    for job_id in (first, second):
        await site.wait(job_id, JobStatus.RUNNING)
    third = await site.submit(WAIT)
    held = [attempt.accelerators for job_id in (first, second) for attempt in await site.attempts(job_id)]

    site.open("end")
    await site.wait_for_end(first, second, third)

    assert sorted(len(ids) for ids in held) == [1, 1]
    assert held[0] != held[1]
    for job_id in (first, second, third):
        (attempt,) = await site.attempts(job_id)
        assert site.output(job_id).split() == attempt.accelerators
