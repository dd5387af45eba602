"""Jobs whose answers a registered reward model judges: handed to the script, kept, protected, refused."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.domain.enums import ModelState
from app.executor.runs.job_spec import JobSpec
from app.store import jobs
from app.store.session import Database
from tests.api.jobs_app import SUBMIT, JobsApp, codes, jobs_app
from tests.job_rows import FAILURE

ARGUMENT = 'parser.add_argument("--reward_model_path", default=None)'
CLASSIFIER = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as app:
        script = app.services.home.scripts / "custom01.py"
        head, found, tail = script.read_text().partition('    parser.add_argument("--train_id')
        script.write_text(f"{head}    {ARGUMENT}\n{found}{tail}")
        await make_judge(app, "judge", {"config.json": json.dumps(CLASSIFIER), "chat_template.jinja": "{{ messages }}"})
        yield app


async def make_judge(app: JobsApp, name: str, files: dict[str, str]) -> None:
    await app.add_model(name, ModelState.COMPLETE, kind="model", files=files)


async def test_script_is_given_the_folder_and_the_job_names_the_model(app: JobsApp) -> None:
    judge = await app.get("/models/judge")

    made = await app.submit(reward_model="judge")

    job = await app.get(f"/jobs/{made['id']}")
    assert job["reward_model"] == {"id": judge["id"], "name": "judge"}
    assert job["model"] is None
    assert job["effective_parameters"]["reward_model_path"] == f"../{judge['path']}"
    assert "reward_model_path" not in job["parameters"]
    async with app.database.reading() as session:
        named = JobSpec.of(await jobs.get(session, made["id"])).reward_model
    assert named is not None
    assert (named.id, named.path) == (judge["id"], judge["path"])


async def test_model_is_not_deleted_while_it_judges(app: JobsApp) -> None:
    made = await app.submit(reward_model="judge", through="customized")

    in_use = await app.client.delete("/api/v1/models/judge")
    await app.runner.run(made["id"], FAILURE)
    free = await app.client.delete("/api/v1/models/judge")
    retried = await app.client.post(f"/api/v1/jobs/{made['id']}:retry", json={})

    assert (in_use.status_code, in_use.json()["code"]) == (409, "model_in_use")
    assert free.status_code == 204
    assert (retried.status_code, retried.json()["code"]) == (409, "job_inputs_gone")


@pytest.mark.parametrize(("changes", "name"), [({}, "judge"), ({"reward_model": None}, None)])
async def test_copies_and_retries_have_the_same_judge(app: JobsApp, changes: dict[str, Any], name: str | None) -> None:
    made = await app.submit(reward_model="judge", through="customized")
    await app.runner.run(made["id"], FAILURE)

    copied = await app.post(f"/jobs/{made['id']}:copy", changes, 201)
    retried = await app.post(f"/jobs/{made['id']}:retry", {"parameters": {"epochs": 3}}, 201)

    found = [await app.get(f"/jobs/{one['id']}") for one in (copied, retried)]
    assert (found[0]["reward_model"] or {}).get("name") == name
    assert found[1]["reward_model"]["name"] == "judge"
    assert found[1]["effective_parameters"]["reward_model_path"].startswith("../")


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"config.json": json.dumps({"architectures": ["Qwen3ForCausalLM"]})}, "reward_model_is_none"),
        ({"config.json": json.dumps(CLASSIFIER | {"id2label": {"0": "a", "1": "b"}})}, "reward_model_is_none"),
        ({"adapter_config.json": json.dumps({"task_type": "CAUSAL_LM"})}, "reward_model_is_none"),
        ({"adapter_config.json": json.dumps({"task_type": "SEQ_CLS"})}, "reward_model_without_template"),
        ({"config.json": json.dumps(CLASSIFIER)}, "reward_model_without_template"),
        ({"config.json": "{"}, "model_file_not_json"),
    ],
)
async def test_model_that_cannot_judge_is_refused(app: JobsApp, files: dict[str, str], code: str) -> None:
    await make_judge(app, "other", files)

    problem = await app.post("/jobs", {**SUBMIT, "reward_model": "other"}, 422)

    assert codes(problem) == [("/reward_model", code)]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"reward_model": "nobody"}, "unknown_model"),
        ({"parameters": {"reward_model_path": "elsewhere"}}, "reward_model_named_twice"),
    ],
)
async def test_what_cannot_be_is_refused(app: JobsApp, changes: dict[str, Any], code: str) -> None:
    problem = await app.post("/jobs", {**SUBMIT, "reward_model": "judge", **changes}, 422)

    assert codes(problem) == [("/reward_model", code)]


async def test_script_that_takes_no_reward_model_is_refused(app: JobsApp) -> None:
    script = app.services.home.scripts / "custom01.py"
    script.write_text(script.read_text().replace(ARGUMENT, "pass"))

    problem = await app.post("/jobs", {**SUBMIT, "reward_model": "judge"}, 422)

    assert ("/reward_model", "reward_model_not_taken") in codes(problem)
