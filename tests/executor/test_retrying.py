"""What becomes of a job when an attempt of it failed: another one, or the end. Through the finalizer and the
database."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.domain.enums import EndReason, JobKind, JobStatus
from app.executor.runs.job_spec import JobSpec, RunnerCall
from app.executor.runs.run_folder import RunFolder
from app.executor.supervisor.client import ExitWhy
from app.store import job_status
from app.store import jobs as store
from app.store.job_attempts import Claim
from app.store.job_status import End
from app.store.session import Database
from tests import job_rows
from tests.executor.test_finalize import Desk, exit_record

TWICE = {"max_retries": 2, "backoff_seconds": 60}
REBOOT = exit_record(why=ExitWhy.REBOOT, code=None)
CRASH = exit_record(code=1)


@pytest.fixture
async def desk(tmp_path: Path, database: Database) -> Desk:
    desk = Desk(tmp_path / "home", database)
    desk.node_id = await job_rows.add_node(database)
    return desk


async def attempts(desk: Desk, claim: Claim) -> list[Any]:
    async with desk.database.reading() as session:
        return [attempt.row for attempt in await store.attempts_of(session, claim.job.id)]


def prints(desk: Desk, claim: Claim, text: str) -> None:
    run = RunFolder(desk.home.run_folder(claim.job.id, claim.attempt.number))
    run.output.mkdir(parents=True)
    run.output_log.write_text(text)


class TestLostNode:
    async def test_training_is_queued_again_and_nothing_charged(self, desk: Desk) -> None:
        claim = await desk.claim()

        await desk.finalizer.finalize(claim, REBOOT)

        row = await desk.row(claim)
        assert (row.status, row.token, row.retries, row.recoveries, row.not_before) == (
            JobStatus.QUEUED, None, 0, 1, None,
        )  # fmt: skip
        (attempt,) = await attempts(desk, claim)
        assert (attempt.live, attempt.reason, attempt.exit["why"]) == (False, EndReason.NODE_LOST, "reboot")
        assert desk.status.ends == []

    async def test_machine_that_shuts_down_in_order_is_a_lost_one_too(self, desk: Desk) -> None:
        claim = await desk.claim()

        await desk.finalizer.finalize(
            claim, exit_record(why=ExitWhy.STOPPED, code=143, stop_reason="supervisor_terminated")
        )

        row = await desk.row(claim)
        assert (row.status, row.retries, row.recoveries) == (JobStatus.QUEUED, 0, 1)
        assert (await attempts(desk, claim))[0].reason is EndReason.SIGNAL

    async def test_deployment_that_had_begun_is_not_repeated(self, desk: Desk) -> None:
        claim = await desk.claim(JobKind.DEPLOYMENT, retry=TWICE)

        await desk.finalizer.finalize(claim, REBOOT)

        row = await desk.row(claim)
        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.NODE_LOST)

    async def test_call_of_deepextensions_backend_that_had_begun_is_not_repeated(self, desk: Desk) -> None:
        call = JobSpec(runner_call=RunnerCall(status_key="theirs")).document()
        await job_rows.add_job(desk.database, kind=JobKind.TRAINING, launch=call)
        claim = await job_rows.claim(desk.database, desk.node_id)
        assert claim is not None

        await desk.finalizer.finalize(claim, REBOOT)

        assert ((await desk.row(claim)).status, desk.status.ends) == (JobStatus.FAILED, [("theirs", False)])

    async def test_job_that_somebody_wants_to_stop_is_not_queued_again(self, desk: Desk) -> None:
        claim = await desk.claim()
        async with desk.database.writing() as session:  # the node has not seen the wish yet
            await job_status.request_cancel(session, claim.job.id, now=job_rows.START)

        await desk.finalizer.finalize(claim, exit_record(why=ExitWhy.NEVER_STARTED, code=None, started_at=None))

        row = await desk.row(claim)
        assert (row.status, row.reason) == (JobStatus.CANCELLED, EndReason.CANCELLED)


class TestPolicy:
    async def test_failure_without_a_policy_is_the_end(self, desk: Desk) -> None:
        claim = await desk.claim()

        await desk.finalizer.finalize(claim, CRASH)

        assert (await desk.row(claim)).status is JobStatus.FAILED

    async def test_budget_is_used_up_with_longer_and_longer_pauses(self, desk: Desk) -> None:
        claim = await desk.claim(retry=TWICE)
        begun = datetime.now(UTC)
        prints(desk, claim, "Traceback\n  x\nValueError: first\n")

        await desk.finalizer.finalize(claim, CRASH)
        once = await desk.row(claim)
        assert await job_rows.claim(desk.database, desk.node_id, now=begun + timedelta(seconds=59)) is None
        claim = await desk.claim_again()
        await desk.finalizer.finalize(claim, CRASH)
        twice = await desk.row(claim)
        claim = await desk.claim_again()
        await desk.finalizer.finalize(claim, CRASH)
        ended = await desk.row(claim)

        assert (once.status, once.retries) == (JobStatus.QUEUED, 1)
        assert 59 < (once.not_before - begun).total_seconds() < 90
        assert 119 < (twice.not_before - begun).total_seconds() < 180
        assert (ended.status, ended.reason, ended.retries) == (JobStatus.FAILED, EndReason.EXIT_CODE, 2)
        rows = await attempts(desk, claim)
        assert [row.reason for row in rows] == [EndReason.EXIT_CODE] * 3
        assert rows[0].reason_params["detail"] == "ValueError: first"
        assert desk.status.ends == [(claim.job.id, False)]

    async def test_memory_that_ran_out_is_never_repeated(self, desk: Desk) -> None:
        claim = await desk.claim(retry=TWICE)
        prints(desk, claim, "Traceback\n  x\ntorch.OutOfMemoryError: CUDA out of memory.\n")

        await desk.finalizer.finalize(claim, CRASH)

        row = await desk.row(claim)
        assert (row.status, row.reason, row.retries) == (JobStatus.FAILED, EndReason.CUDA_OUT_OF_MEMORY, 0)

    async def test_what_keeps_a_script_from_starting_counts_too(self, desk: Desk) -> None:
        claim = await desk.claim(retry=TWICE)
        end = End(status=JobStatus.FAILED, reason=EndReason.DISK_FULL, params={"detail": "No space left"})

        await desk.finalizer.end_unlaunched(claim, end, final=False)

        row = await desk.row(claim)
        assert (row.status, row.retries) == (JobStatus.QUEUED, 1)

    async def test_final_end_is_final(self, desk: Desk) -> None:
        claim = await desk.claim(retry=TWICE)
        end = End(status=JobStatus.FAILED, reason=EndReason.SUPERVISOR_LOST, params={"detail": ""})

        await desk.finalizer.end_unlaunched(claim, end, final=True)

        assert (await desk.row(claim)).status is JobStatus.FAILED
