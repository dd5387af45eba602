"""Jobs that go on from a customized model: handed to the script, kept in copies and retries, refused."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app.domain.enums import ModelState, TrainingType
from app.store.session import Database
from app.store.tables import ModelRow
from tests.api.jobs_app import SUBMIT, JobsApp, codes, jobs_app
from tests.job_rows import FAILURE

ARGUMENT = 'parser.add_argument("--adapter_name_or_path", default=None)'


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as app:
        await app.add_model("taught", ModelState.CUSTOMIZED, kind="adapter")
        script = app.services.home.scripts / "custom01.py"
        head, found, tail = script.read_text().partition('    parser.add_argument("--train_id')
        script.write_text(f"{head}    {ARGUMENT}\n{found}{tail}")
        yield app


class TestSubmit:
    async def test_script_is_given_the_folder_and_the_job_names_the_model(self, app: JobsApp) -> None:
        taught = await app.get("/models/taught")

        made = await app.submit(adapter_name_or_path="taught")

        job = await app.get(f"/jobs/{made['id']}")
        assert job["model"] == taught["id"]
        assert job["effective_parameters"]["adapter_name_or_path"] == f"../{taught['path']}"
        assert "adapter_name_or_path" not in job["parameters"]
        (saving,) = [link for link in job["chain"] if link["stage"] == "saving"]
        assert (await app.get(f"/jobs/{saving['id']}"))["model"] is None

    async def test_model_is_not_deleted_while_a_training_needs_it(self, app: JobsApp) -> None:
        await app.submit(adapter_name_or_path="taught", through="customized")

        response = await app.client.delete("/api/v1/models/taught")

        assert (response.status_code, response.json()["code"]) == (409, "model_in_use")

    async def test_copies_and_retries_go_on_from_it_too(self, app: JobsApp) -> None:
        made = await app.submit(adapter_name_or_path="taught")
        first = await app.get(f"/jobs/{made['id']}")
        await app.runner.run(made["id"], FAILURE)

        copy = await app.post(f"/jobs/{made['id']}:copy", {}, 201)
        retry = await app.post(f"/jobs/{made['id']}:retry", {"parameters": {"max_steps": 7}}, 201)
        anew = await app.post(f"/jobs/{made['id']}:copy", {"adapter_name_or_path": None}, 201)

        for other in (copy, retry):
            job = await app.get(f"/jobs/{other['id']}")
            assert (job["model"], len(job["chain"])) == (first["model"], 2)
            given = [one["effective_parameters"]["adapter_name_or_path"] for one in (first, job)]
            assert given[0] == given[1]
        assert (await app.get(f"/jobs/{anew['id']}"))["model"] is None

    @pytest.mark.parametrize(
        ("given", "row", "found"),
        [
            ({"adapter_name_or_path": "nobody"}, {}, "unknown_model"),
            ({"parameters": {"adapter_name_or_path": "../x"}}, {}, "adapter_named_twice"),
            ({}, {"state": ModelState.COMPLETE}, "model_in_other_state"),
            ({}, {"details": {"kind": "mlx-adapter"}}, "adapter_of_other_kind"),
            ({}, {"training_type": TrainingType.EMBEDDING}, "adapter_of_other_kind"),
            ({}, {"base_model_id": "another", "base_model_name": "other-base"}, "adapter_of_other_base"),
            ({}, {"path": "runs/gone"}, "files_missing"),
        ],
    )
    async def test_refuses(self, app: JobsApp, given: dict[str, Any], row: dict[str, Any], found: str) -> None:
        if row:
            async with app.database.writing() as session:
                await session.exec(sa.update(ModelRow).values(**row))
        problem = await app.post("/jobs", {**SUBMIT, "adapter_name_or_path": "taught", **given}, 422)

        assert codes(problem) == [("/adapter_name_or_path", found)]
        if found == "adapter_of_other_base":
            detail = problem["errors"][0]["detail"]
            assert "from the base model other-base, this training is of custom01-base" in detail

    async def test_refuses_where_the_script_declares_no_such_argument(self, app: JobsApp) -> None:
        script = app.services.home.scripts / "custom01.py"
        script.write_text(script.read_text().replace(ARGUMENT, "pass"))

        problem = await app.post("/jobs", {**SUBMIT, "adapter_name_or_path": "taught"}, 422)

        assert ("/adapter_name_or_path", "adapter_not_taken") in codes(problem)
