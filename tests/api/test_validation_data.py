"""Jobs with rows of their own for the score: refused, counted, kept, repeated and protected like the data set."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.executor.runs.job_spec import JobSpec
from app.presets.catalogue import script_path
from app.registry.datasets import row_surveys
from app.store import jobs
from app.store.session import Database
from tests.api.jobs_app import API, SUBMIT, JobsApp, codes, jobs_app
from tests.job_rows import FAILURE

NEW = {"question": "New?", "answer": "Yes."}


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as app:
        await app.register_data("held-out", [NEW])
        yield app


async def spec_of(app: JobsApp, job: str) -> JobSpec:
    async with app.database.reading() as session:
        return JobSpec.of(await jobs.get(session, job))


class TestSubmit:
    async def test_job_names_the_rows_and_hands_their_file_to_the_script(self, app: JobsApp) -> None:
        made = await app.submit(validation_dataset="held-out")

        assert made["warnings"] == []
        job = await app.get(f"/jobs/{made['id']}")
        assert job["validation_dataset"]["name"] == "held-out"
        assert job["effective_parameters"]["validation_path"] == "../datasets/held-out.jsonl"
        assert "validation_path" not in job["parameters"]
        named = (await spec_of(app, made["id"])).validation_dataset
        data = await app.get("/datasets/held-out")
        assert named is not None
        assert (named.id, named.digest) == (data["id"], data["digest"])

    @pytest.mark.parametrize("child", [False, True], ids=["at once", "in a process"])
    async def test_rows_that_are_learned_as_well_are_counted(
        self, app: JobsApp, monkeypatch: pytest.MonkeyPatch, *, child: bool
    ) -> None:
        if child:
            monkeypatch.setattr(row_surveys, "INLINE_BYTES", 0)
        (learned,) = (await app.get("/datasets/custom01/preview?limit=1"))["items"]
        await app.register_data(
            "leaking", [NEW, {**learned, "answer": "Another answer to the same question."}, learned]
        )

        made = await app.submit(validation_dataset="leaking")

        (warning,) = made["warnings"]
        assert (warning["pointer"], warning["code"]) == ("/validation_dataset", "validation_rows_learned")
        assert "2 of the 3 rows" in warning["detail"]

    async def test_equal_rows_are_counted_where_nothing_is_known_of_the_script(self, app: JobsApp) -> None:
        script = app.services.home.scripts / "custom01.py"
        script.write_text(script.read_text("utf-8") + "\n")
        (learned,) = (await app.get("/datasets/custom01/preview?limit=1"))["items"]
        other_order = dict(reversed(learned.items()))
        await app.register_data("leaking", [NEW, {**learned, "answer": "Another answer."}, other_order])

        (warning,) = (await app.submit(validation_dataset="leaking"))["warnings"]

        assert warning["code"] == "validation_rows_learned"
        assert "1 of the 3 rows" in warning["detail"]

    async def test_plan_holds_out_no_row_of_the_data_set(self, app: JobsApp) -> None:
        without = (await app.post("/jobs:validate", SUBMIT))["plan"]["rows"]
        found = await app.post("/jobs:validate", {**SUBMIT, "validation_dataset": "held-out"})

        assert without["held_out"] > 1
        assert (found["valid"], found["plan"]["rows"]["held_out"]) == (True, 1)

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"validation_dataset": "nobody"}, "unknown_dataset"),
            ({"parameters": {"validation_path": "../mine.jsonl"}}, "validation_named_twice"),
            ({"validation_dataset": "drawn"}, "pictures_not_learned"),
            ({"validation_dataset": "texts"}, "columns_missing"),
            ({"validation_dataset": "empty"}, "dataset_nothing_to_learn"),
        ],
    )
    async def test_refuses(self, app: JobsApp, changes: dict[str, Any], code: str) -> None:
        await app.register_data("drawn", [NEW | {"images": ["a.png"]}])
        await app.register_data("texts", [{"text": "a"}])
        await app.register_data("empty", [{"question": "a", "answer": None}])

        problem = await app.post("/jobs", {**SUBMIT, "validation_dataset": "held-out", **changes}, 422)

        assert ("/validation_dataset", code) in codes(problem)

    async def test_refuses_for_a_script_that_takes_none(self, app: JobsApp) -> None:
        text = script_path("custom01.py").read_text("utf-8")
        assert "--validation_path" in text
        (app.services.home.scripts / "custom01.py").write_text(text.replace("--validation_path", "--other_path"))

        problem = await app.post("/jobs", {**SUBMIT, "validation_dataset": "held-out"}, 422)

        assert codes(problem) == [("/validation_dataset", "validation_not_taken")]
        assert "--validation_path" in problem["errors"][0]["detail"]

    async def test_takes_them_for_a_script_that_takes_a_folder(self, app: JobsApp) -> None:
        text = script_path("custom01.py").read_text("utf-8")
        (app.services.home.scripts / "custom01.py").write_text(text.replace("--validation_path", "--other_path"))
        url = "/api/v1/methods/Custom01"
        tag = {"If-Match": (await app.client.get(url)).headers["etag"]}
        call = {"arguments": ["--dataset_path={dataset_dir}", "{parameters}"]}
        assert (await app.client.patch(url, json={"stages": {"training": call}}, headers=tag)).status_code == 200

        made = await app.submit(validation_dataset="held-out")

        named = (await spec_of(app, made["id"])).validation_dataset
        assert named is not None
        assert named.name == "held-out"

    async def test_rows_that_were_edited_are_taken_as_they_are_now(self, app: JobsApp) -> None:
        (app.services.home.datasets / "held-out.jsonl").write_text(json.dumps(NEW | {"answer": "No."}) + "\n")

        made = await app.submit(validation_dataset="held-out")

        named = (await spec_of(app, made["id"])).validation_dataset
        assert named is not None
        assert named.digest == (await app.get("/datasets/held-out"))["digest"]


class TestHeldOutPart:
    """A folder that is split: its rows for the score are read as the others are."""

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [
            ('{"question": "New?", "answer": "Yes."}\n', []),
            ('{"question": "New?", "answer": "Yes."}\n{"question"', ["held_out_rows_wrong", "line_not_json"]),
            ('{"text": "a"}\n', ["held_out_rows_wrong", "columns_missing"]),
            ('{"question": "a", "answer": null}\n', ["held_out_rows_wrong", "dataset_nothing_to_learn"]),
            (None, []),
        ],
    )
    async def test_is_checked_where_the_script_gets_it(
        self, app: JobsApp, rows: str | None, expected: list[str]
    ) -> None:
        folder = app.services.home.datasets / "split"
        folder.mkdir()
        for name, text in (("train", json.dumps(NEW) + "\n"), ("valid", rows), ("test", json.dumps(NEW) + "\n")):
            if text is not None:
                (folder / f"{name}.jsonl").write_text(text)
        await app.post("/datasets", {"name": "split", "path": "split"}, 201)

        found = await app.post("/jobs:validate", {**SUBMIT, "dataset": "split"})
        elsewhere = {**SUBMIT, "dataset": "split", "parameters": {"eval_samples": 0}}

        assert [one["code"] for one in found["violations"]] == expected
        assert all("valid.jsonl" in one["detail"] for one in found["violations"][:1])
        assert (await app.post("/jobs:validate", elsewhere))["valid"] is True

    async def test_is_read_again_once_it_was_mended(self, app: JobsApp) -> None:
        folder = app.services.home.datasets / "split"
        folder.mkdir()
        for name, text in (("train", json.dumps(NEW)), ("valid", "{")):
            (folder / f"{name}.jsonl").write_text(f"{text}\n")
        await app.post("/datasets", {"name": "split", "path": "split"}, 201)
        url = "/api/v1/methods/Custom01"
        text = script_path("custom01.py").read_text("utf-8")
        (app.services.home.scripts / "custom01.py").write_text(text.replace("--validation_path", "--other_path"))
        call = {"arguments": ["--dataset_path={dataset_dir}", "{parameters}"]}
        tag = {"If-Match": (await app.client.get(url)).headers["etag"]}
        assert (await app.client.patch(url, json={"stages": {"training": call}}, headers=tag)).status_code == 200

        wrong = await app.post("/jobs:validate", {**SUBMIT, "dataset": "split"})
        (folder / "valid.jsonl").write_text(json.dumps(NEW | {"answer": "No."}) + "\n")
        mended = await app.post("/jobs:validate", {**SUBMIT, "dataset": "split"})

        assert [one["code"] for one in wrong["violations"]] == ["held_out_rows_wrong", "line_not_json"]
        assert mended["violations"] == []


class TestAgain:
    async def test_retry_with_changes_keeps_the_rows(self, app: JobsApp) -> None:
        first = await app.submit(validation_dataset="held-out")
        await app.runner.run(first["id"], FAILURE)

        again = await app.post(f"/jobs/{first['id']}:retry", {"parameters": {"epochs": 2}}, 201)

        job = await app.get(f"/jobs/{again['id']}")
        assert job["validation_dataset"]["name"] == "held-out"
        assert job["effective_parameters"]["validation_path"] == "../datasets/held-out.jsonl"

    async def test_retry_on_other_rows_is_409(self, app: JobsApp) -> None:
        first = await app.submit(validation_dataset="held-out")
        await app.runner.run(first["id"], FAILURE)
        (app.services.home.datasets / "held-out.jsonl").write_text(json.dumps(NEW | {"answer": "No."}) + "\n")
        await app.submit(validation_dataset="held-out")  # looks at the file again

        problem = await app.post(f"/jobs/{first['id']}:retry", status=409)

        assert problem["code"] == "job_dataset_changed"
        assert "held-out" in problem["detail"]

    @pytest.mark.parametrize(
        ("changes", "name"),
        [({}, "held-out"), ({"validation_dataset": "others"}, "others"), ({"validation_dataset": None}, None)],
    )
    async def test_copy_keeps_changes_or_drops_the_rows(
        self, app: JobsApp, changes: dict[str, Any], name: str | None
    ) -> None:
        await app.register_data("others", [NEW])
        first = await app.submit(validation_dataset="held-out")

        copy = await app.post(f"/jobs/{first['id']}:copy", changes, 201)

        job = await app.get(f"/jobs/{copy['id']}")
        assert (job["validation_dataset"] or {}).get("name") == name

    async def test_data_set_is_not_deleted_while_a_job_needs_it(self, app: JobsApp) -> None:
        made = await app.submit(validation_dataset="held-out", through="customized")

        refused = await app.client.delete(f"{API}/datasets/held-out")
        await app.post(f"/jobs/{made['id']}:cancel")
        allowed = await app.client.delete(f"{API}/datasets/held-out")

        assert (refused.status_code, refused.json()["code"]) == (409, "dataset_in_use")
        assert made["id"] in refused.json()["detail"]
        assert allowed.status_code == 204
