"""Retry policies, limits, attempts and fixes over HTTP; retries that resume, change parameters or take the fix."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.domain.enums import EndReason, JobStatus
from app.domain.retries import Again
from app.executor.runs.job_spec import JobSpec
from app.store import job_attempts, jobs
from app.store.job_attempts import UNCHARGED
from app.store.job_status import End
from app.store.session import Database
from tests.api.jobs_app import SUBMIT, JobsApp, jobs_app
from tests.executor.test_checkpoints import declared
from tests.job_rows import FAILURE, START

OUT_OF_MEMORY = End(
    status=JobStatus.FAILED, reason=EndReason.CUDA_OUT_OF_MEMORY, params={"detail": "CUDA out of memory."}
)


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as app:
        yield app


async def failed(app: JobsApp, end: End = FAILURE, **members: Any) -> str:
    job_id: str = (await app.submit(through="customized", **members))["id"]
    await app.runner.run(job_id, end)
    return job_id


async def resumes_of(app: JobsApp, job_id: str) -> str | None:
    async with app.database.reading() as session:
        return JobSpec.of(await jobs.get(session, job_id)).resume_of


class TestSubmit:
    async def test_policy_and_limits_are_kept_and_shown(self, app: JobsApp) -> None:
        retry = {"max_retries": 3, "on": ["signal", "stalled"]}

        job = await app.submit(retry=retry, limits={"seconds": 60, "silent_seconds": 20})

        for link in job["chain"]:
            shown = await app.get(f"/jobs/{link['id']}")
            assert shown["retry"] == {"backoff_seconds": 30.0, "max_backoff_seconds": 3600.0, **retry}
            assert shown["limits"] == {"seconds": 60, "silent_seconds": 20}
            assert (shown["retries"], shown["recoveries"], shown["history"]) == (0, 0, [])

    async def test_reason_that_no_policy_repeats_is_pointed_at(self, app: JobsApp) -> None:
        problem = await app.post(
            "/jobs", {**SUBMIT, "retry": {"max_retries": 1, "on": ["signal", "cuda_out_of_memory"]}}, 422
        )

        assert [(error["pointer"], error["code"]) for error in problem["errors"]] == [
            ("/retry/on/1", "retry_reason_refused")
        ]

    @pytest.mark.parametrize(
        ("member", "pointer"),
        [
            ({"retry": {"max_retries": 21}}, "/retry/max_retries"),
            ({"retry": {"often": 2}}, "/retry/often"),
            ({"retry": {"on": ["boredom"]}}, "/retry/on/0"),
            ({"limits": {"seconds": 0}}, "/limits/seconds"),
        ],
    )
    async def test_wrong_values_are_pointed_at(self, app: JobsApp, member: dict[str, Any], pointer: str) -> None:
        problem = await app.post("/jobs", {**SUBMIT, **member}, 422)

        assert [error["pointer"] for error in problem["errors"]] == [pointer]

    async def test_copy_keeps_them_unless_it_brings_its_own(self, app: JobsApp) -> None:
        job = await app.submit(retry={"max_retries": 3}, limits={"seconds": 60})

        same = await app.post(f"/jobs/{job['id']}:copy", {}, 201)
        other = await app.post(f"/jobs/{job['id']}:copy", {"retry": {"max_retries": 1}, "limits": {}}, 201)

        kept, changed = [await app.get(f"/jobs/{one['id']}") for one in (same, other)]
        assert (kept["retry"]["max_retries"], kept["limits"]["seconds"]) == (3, 60)
        assert (changed["retry"]["max_retries"], changed["limits"]["seconds"]) == (1, None)


class TestHistory:
    async def test_every_attempt_says_why_it_ended_and_where_the_next_began(self, app: JobsApp) -> None:
        job_id = (await app.submit(retry={"max_retries": 3}))["id"]
        first = await app.runner.start(job_id)
        crash = {"detail": "ValueError: no", "exit_code": 3}
        async with app.database.writing() as session:
            again = Again(charged=True, delay=UNCHARGED.delay)
            await job_attempts.requeue(session, first, reason=EndReason.EXIT_CODE, params=crash, now=START, again=again)
        second = await app.runner.start(job_id)
        resumed = {"job": job_id, "attempt": 1, "checkpoint": "checkpoint-40", "step": 40}
        async with app.database.writing() as session:
            await job_attempts.record_resume(session, second, resumed)

        shown = await app.get(f"/jobs/{job_id}")

        assert (shown["attempts"], shown["retries"], shown["recoveries"]) == (2, 1, 0)
        one, two = shown["history"]
        assert (one["number"], one["live"], one["reason"], one["resumed_from"]) == (1, False, "exit_code", None)
        assert "ValueError: no" in one["reason_detail"]
        assert (two["live"], two["reason"], two["resumed_from"]) == (True, None, resumed)
        assert one["node"] == two["node"] == "node-1"

    async def test_stream_tells_why_the_job_is_queued_again(self, app: JobsApp) -> None:
        job_id = (await app.submit(through="customized"))["id"]
        won = await app.runner.start(job_id)
        async with app.database.writing() as session:
            crash = {"detail": "ValueError: no", "exit_code": 3}
            await job_attempts.requeue(session, won, reason=EndReason.EXIT_CODE, params=crash, now=START)
        await app.post(f"/jobs/{job_id}:cancel")

        events = await app.events(f"/jobs/{job_id}/events")

        told = [event.data for event in events if event.name == "state"]
        assert [one["status"] for one in told] == ["queued", "launching", "running", "queued", "cancelled"]
        assert (told[3]["reason"], told[3]["attempt"]) == ("exit_code", 1)
        assert "ValueError: no" in told[3]["reason_detail"]


class TestTogether:
    async def test_of_many_retries_at_once_one_makes_a_job(self, app: JobsApp) -> None:
        job_id = await failed(app)

        answers = await asyncio.gather(*(app.client.post(f"/api/v1/jobs/{job_id}:retry", json={}) for _ in range(8)))

        assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
        assert {a.json()["code"] for a in answers if a.status_code == 409} == {"job_being_retried"}

    async def test_job_is_retried_again_when_its_retry_has_ended(self, app: JobsApp) -> None:
        job_id = await failed(app)
        first = await app.post(f"/jobs/{job_id}:retry", {}, 201)
        await app.post(f"/jobs/{first['id']}:cancel")

        await app.post(f"/jobs/{job_id}:retry", {}, 201)


class TestFix:
    async def test_failed_job_offers_what_its_script_can_change(self, app: JobsApp) -> None:
        job_id = await failed(app, OUT_OF_MEMORY, parameters={"batch_size": 16})

        fix = (await app.get(f"/jobs/{job_id}"))["fix"]

        assert fix["changes"] == {"batch_size": 8}
        assert "batch_size 8" in fix["detail"]

    async def test_retry_makes_the_change(self, app: JobsApp) -> None:
        job_id = await failed(app, OUT_OF_MEMORY, parameters={"batch_size": 16, "epochs": 3})

        answer = await app.post(f"/jobs/{job_id}:retry", {"fix": True}, 201)

        assert (await app.get(f"/jobs/{answer['id']}"))["parameters"] == {"batch_size": 8, "epochs": 3}

    async def test_other_failures_offer_none(self, app: JobsApp) -> None:
        job_id = await failed(app)

        problem = await app.post(f"/jobs/{job_id}:retry", {"fix": True}, 409)

        assert (await app.get(f"/jobs/{job_id}"))["fix"] is None
        assert problem["code"] == "no_fix_known"


class TestChangedParameters:
    async def test_are_checked_like_those_of_a_submit(self, app: JobsApp) -> None:
        job_id = await failed(app)

        problem = await app.post(f"/jobs/{job_id}:retry", {"parameters": {"epochs": "many"}}, 422)

        assert [error["pointer"] for error in problem["errors"]] == ["/parameters/epochs"]

    async def test_null_leaves_one_out(self, app: JobsApp) -> None:
        job_id = await failed(app, parameters={"epochs": 3, "batch_size": 4})

        answer = await app.post(f"/jobs/{job_id}:retry", {"parameters": {"epochs": None, "seed": 7}}, 201)

        assert (await app.get(f"/jobs/{answer['id']}"))["parameters"] == {"batch_size": 4, "seed": 7}


class TestResume:
    async def test_retry_goes_on_from_a_whole_checkpoint(self, app: JobsApp) -> None:
        job_id = await failed(app)
        declared(app.services.home, 1, 40, job=job_id)

        answer = await app.post(f"/jobs/{job_id}:retry", {}, 201)

        assert await resumes_of(app, answer["id"]) == job_id

    @pytest.mark.parametrize(
        ("body", "resumes"),
        [
            ({"resume": False}, False),
            ({"parameters": {"save_steps": 7}}, True),
            ({"parameters": {"learning_rate": 0.1}}, False),
            ({"parameters": {"learning_rate": 0.1}, "resume": True}, True),
        ],
    )
    async def test_only_when_it_fits_or_is_demanded(self, app: JobsApp, body: dict[str, Any], resumes: bool) -> None:
        job_id = await failed(app)
        declared(app.services.home, 1, 40, job=job_id)

        answer = await app.post(f"/jobs/{job_id}:retry", body, 201)

        assert await resumes_of(app, answer["id"]) == (job_id if resumes else None)

    async def test_retry_of_a_retry_that_left_nothing_goes_back_to_the_first(self, app: JobsApp) -> None:
        first = await failed(app)
        declared(app.services.home, 1, 40, job=first)
        second = (await app.post(f"/jobs/{first}:retry", {}, 201))["id"]
        await app.runner.run(second, FAILURE)

        third = await app.post(f"/jobs/{second}:retry", {}, 201)

        assert await resumes_of(app, third["id"]) == first

    async def test_checkpoint_that_is_demanded_and_not_there_is_409(self, app: JobsApp) -> None:
        job_id = await failed(app)

        problem = await app.post(f"/jobs/{job_id}:retry", {"resume": True}, 409)

        assert problem["code"] == "no_checkpoint_to_resume"
