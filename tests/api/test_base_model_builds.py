"""A sample base model is made by one job, before the first trainings that start from it."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest

from app.domain.enums import EndReason, JobStatus
from app.store import base_models, jobs
from app.store.job_status import End
from app.store.session import Database
from tests import base_model_folders
from tests.api.jobs_app import JobsApp, codes, jobs_app

SUBMIT = {"method": "SFT-Demo", "base_model": "tiny-base", "dataset": "sft-demo", "through": "complete"}
BROKEN = End(status=JobStatus.FAILED, reason=EndReason.MODULE_MISSING, params={"detail": "no torch", "log_tail": ["x"]})


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home", samples=True) as running:
        yield running


async def submit(app: JobsApp, **changes: Any) -> dict[str, Any]:
    answer: dict[str, Any] = await app.post("/jobs", {**SUBMIT, **changes}, 201)
    return answer


def build_of(submitted: dict[str, Any]) -> str | None:
    """Return the job that a submit said comes first."""
    told = [warning for warning in submitted["warnings"] if warning["code"] == "base_model_made_first"]
    return told[0]["detail"].partition("by job ")[2].partition(";")[0] if told else None


async def builds(app: JobsApp) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = (await app.get("/jobs?stage=base-model"))["items"]
    return items


async def make(app: JobsApp, job: str, name: str = "tiny-base") -> None:
    """Play the node that makes the base model."""
    won = await app.runner.start(job)
    base = await app.get(f"/base-models/{name}")
    folder = app.services.home.absolute(base["path"])
    base_model_folders.model(folder, dtype="float32")
    async with app.database.writing() as session:
        card = {**base["card"], "dtype": "float32"}
        await base_models.record_built(session, base["id"], card=card, now=datetime.now(UTC))
    await app.runner.end(won)


class TestSubmit:
    async def test_the_making_comes_first_and_is_told(self, app: JobsApp) -> None:
        before = await app.get("/base-models/tiny-base")

        submitted = await submit(app)

        training, saving = [await app.get(f"/jobs/{link['id']}") for link in submitted["chain"]]
        (build,) = await builds(app)
        assert before["made_on_first_use"]
        assert build_of(submitted) == build["id"] == training["waiting_for"]
        assert (training["waiting"]["code"], saving["waiting"]["code"]) == ("waiting_base_model", "waiting_predecessor")
        assert (build["name"], build["environment"], build["method"]) == ("tiny-base", "trl", None)
        assert build["base_model"]["name"] == "tiny-base"

    async def test_once_for_all_who_submit_at_once(self, app: JobsApp) -> None:
        submitted = await asyncio.gather(*(submit(app, name=f"job {number}") for number in range(4)))

        (build,) = await builds(app)
        assert {build_of(one) for one in submitted} == {build["id"]}

    async def test_made_it_is_there_for_those_that_waited_and_all_later_ones(self, app: JobsApp) -> None:
        waited = [await submit(app), await submit(app)]
        build = build_of(waited[0])
        assert build is not None

        await make(app, build)
        later = await submit(app)

        codes_ = [(await app.get(f"/jobs/{one['id']}"))["waiting"]["code"] for one in (*waited, later)]
        assert set(codes_).isdisjoint({"waiting_base_model", "waiting_predecessor"})
        assert build_of(later) is None
        base = await app.get("/base-models/tiny-base")
        assert (base["made_on_first_use"], base["card"]["dtype"]) == (False, "float32")

    async def test_files_that_are_gone_are_made_again(self, app: JobsApp) -> None:
        first = build_of(await submit(app))
        assert first is not None
        await make(app, first)
        shutil.rmtree(app.services.home.absolute((await app.get("/base-models/tiny-base"))["path"]))

        again = build_of(await submit(app))

        assert again not in (None, first)

    async def test_a_copy_waits_as_well(self, app: JobsApp) -> None:
        submitted = await submit(app)

        copied = await app.post(f"/jobs/{submitted['id']}:copy", {}, 201)

        assert build_of(copied) == build_of(submitted)

    async def test_a_base_model_is_not_deleted_while_it_is_made(self, app: JobsApp) -> None:
        submitted = await submit(app)
        await app.post(f"/jobs/{submitted['id']}:cancel")

        response = await app.client.delete("/api/v1/base-models/tiny-base")

        assert (response.status_code, response.json()["code"]) == (409, "base_model_in_use")

    async def test_what_no_program_makes_is_refused_as_before(self, app: JobsApp) -> None:
        base = await app.get("/base-models/custom01-base")
        shutil.rmtree(app.services.home.absolute(base["path"]))

        problem = await app.post(
            "/jobs", {**SUBMIT, "method": "Custom01", "base_model": "custom01-base", "dataset": "custom01"}, 422
        )

        assert codes(problem) == [("/base_model", "files_missing")]

    async def test_what_another_version_of_the_product_made_is_not_made_by_this_one(self, app: JobsApp) -> None:
        base = await app.get("/base-models/tiny-base")
        async with app.database.writing() as session:
            row = await base_models.get_base_model(session, base["id"])
            row.recipe = {"sample": "tiny-base", "digest": "0" * 64}
            session.add(row)

        problem = await app.post("/jobs", SUBMIT, 422)

        assert codes(problem) == [("/base_model", "files_missing")]


class TestEnd:
    async def test_a_failure_is_the_end_of_those_that_wait(self, app: JobsApp) -> None:
        chains = [await submit(app), await submit(app)]
        build = build_of(chains[0])
        assert build is not None

        await app.runner.run(build, BROKEN)

        for chain in chains:
            training, saving = [await app.get(f"/jobs/{link['id']}") for link in chain["chain"]]
            assert (training["status"], training["reason"]) == ("failed", "base_model_build_failed")
            assert "no torch" in training["reason_detail"]
            assert training["log_tail"] == ["x"]
            assert (saving["status"], saving["reason"]) == ("cancelled", "predecessor_failed")

    async def test_a_retry_orders_it_anew(self, app: JobsApp) -> None:
        submitted = await submit(app)
        build = build_of(submitted)
        assert build is not None
        await app.runner.run(build, BROKEN)

        retried = await app.post(f"/jobs/{submitted['id']}:retry", {}, 201)

        again = build_of(retried)
        assert again not in (None, build)
        assert (await app.get(f"/jobs/{retried['id']}"))["waiting_for"] == again
        assert len(retried["chain"]) == 2

    async def test_itself_it_is_neither_retried_nor_copied(self, app: JobsApp) -> None:
        build = build_of(await submit(app))
        assert build is not None
        await app.runner.run(build, BROKEN)

        for action in ("retry", "copy"):
            problem = await app.post(f"/jobs/{build}:{action}", {}, 409)
            assert problem["code"] == "job_is_base_model_build"

    async def test_cancelled_it_takes_those_that_wait_with_it(self, app: JobsApp) -> None:
        submitted = await submit(app)

        await app.post(f"/jobs/{build_of(submitted)}:cancel")

        ends = [await app.get(f"/jobs/{link['id']}") for link in submitted["chain"]]
        assert [(end["status"], end["reason"]) for end in ends] == [("cancelled", "predecessor_failed")] * 2

    async def test_a_cancelled_training_leaves_it_to_the_others(self, app: JobsApp) -> None:
        one, other = await submit(app), await submit(app)

        await app.post(f"/jobs/{one['id']}:cancel")
        build = build_of(other)
        assert build is not None
        await make(app, build)

        assert (await app.get(f"/jobs/{one['id']}"))["status"] == "cancelled"
        assert (await app.get(f"/jobs/{other['id']}"))["waiting_for"] is None

    async def test_no_job_waits_for_one_that_has_ended(self, app: JobsApp) -> None:
        """A submit and the end of the making at the same moment, in either order."""
        for number in range(4):
            first = await submit(app, name=f"first {number}")
            build = build_of(first)
            assert build is not None
            won = await app.runner.start(build)

            later, _ = await asyncio.gather(submit(app), app.runner.end(won, BROKEN))

            job = await app.get(f"/jobs/{later['id']}")
            if job["status"] == "queued":
                async with app.database.reading() as session:
                    waited_for = await jobs.get(session, job["waiting_for"])
                assert waited_for.status is JobStatus.QUEUED
                await app.post(f"/jobs/{waited_for.id}:cancel")
            else:
                assert job["reason"] == "base_model_build_failed"


class TestDownload:
    WANTED: ClassVar = {"name": "Qwen", "repository": "Qwen/Qwen2.5-1.5B"}

    async def test_registers_the_model_and_orders_one_job(self, app: JobsApp) -> None:
        job = await app.post("/base-models:download", self.WANTED, 201)
        again = await app.post("/base-models:download", self.WANTED, 200)
        base = await app.get("/base-models/Qwen")
        waiting = await submit(app, base_model="Qwen")

        assert (job["stage"], job["status"], job["environment"]) == ("base-model", "queued", "base")
        assert again["id"] == job["id"] == build_of(waiting)
        assert (base["made_on_first_use"], base["path"]) == (True, "models/Qwen")
        assert not any(base["findings"].values())
        assert app.notifier.notified.count(job["id"]) == 2

    async def test_another_model_under_the_name_is_refused(self, app: JobsApp) -> None:
        await app.post("/base-models:download", self.WANTED, 201)

        taken = await app.post("/base-models:download", {**self.WANTED, "revision": "v2"}, 409)

        assert taken["code"] == "name_taken"

    async def test_one_that_is_there_is_not_downloaded_again(self, app: JobsApp) -> None:
        await app.post("/base-models:download", self.WANTED, 201)
        (build,) = await builds(app)
        await make(app, build["id"], "Qwen")

        there = await app.post("/base-models:download", self.WANTED, 409)

        assert there["code"] == "base_model_there"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("repository", "../x"),
            ("repository", "a/b/c"),
            ("repository", "--x"),
            ("revision", "../main"),
            ("revision", ""),
        ],
    )
    async def test_names_of_hubs_are_checked(self, app: JobsApp, field: str, value: str) -> None:
        refused = await app.post("/base-models:download", {**self.WANTED, field: value}, 422)

        assert [(one["pointer"], one["code"]) for one in refused["errors"]] == [(f"/{field}", "invalid_hub_name")]
