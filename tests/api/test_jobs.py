"""Jobs over HTTP. A runner plays the node: it claims and ends jobs and writes what their scripts would have printed."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app.domain.enums import EndReason, JobKind, JobStatus, ModelState, TrainingType
from app.executor.runs.job_spec import JobSpec, Named
from app.store import job_attempts, jobs, models, nodes
from app.store.job_status import End
from app.store.session import Database
from app.store.tables import DatasetRow
from tests.api.jobs_app import API, SUBMIT, JobsApp, codes, jobs_app, parse_events
from tests.job_rows import FAILURE, START, add_job, add_method, insert, new_chain

KEY = {"Idempotency-Key": "one-and-only"}


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as app:
        yield app


async def _make_model(app: JobsApp, job: str, **changes: Any) -> str:
    """Insert the model that the job made, with its folder, and return its id."""
    folder = app.runner.folder(job).output
    folder.mkdir(exist_ok=True)
    async with app.database.reading() as session:
        row = await jobs.get(session, job)
    base = JobSpec.of(row).base_model
    values: dict[str, Any] = {
        "name": f"model of {job[:8]}",
        "state": ModelState.CUSTOMIZED,
        "training_type": TrainingType.CHAT,
        "path": app.services.home.relative(folder),
        "size_bytes": 1,
        "base_model_id": base.id if base else "b",
        "base_model_name": base.name if base else "b",
        "base_model_path": base.path if base else "models/b",
        "job_id": job,
        "method_id": row.method_id or "",
        "method_version": row.method_version or 1,
        **changes,
    }
    async with app.database.writing() as session:
        model = await models.create_model(session, models.NewModel(**values), now=START)
    return model.id


async def _trained(app: JobsApp, job: str) -> str:
    """Run the training to success and return its model."""
    won = await app.runner.start(job)
    model = await _make_model(app, job)
    await app.runner.end(won, End(JobStatus.SUCCEEDED, EndReason.COMPLETED, {}, result_model_id=model))
    return model


async def _count(app: JobsApp) -> int:
    return len((await app.get("/jobs"))["items"])


class TestSubmit:
    async def test_makes_the_chain_and_rings(self, app: JobsApp) -> None:
        wanted = {"through": "online", "name": "first try", "parameters": {"epochs": 3}}

        response = await app.client.post(f"{API}/jobs", json={**SUBMIT, **wanted})

        assert response.status_code == 201, response.text
        body = response.json()
        assert response.headers["location"] == f"/api/v1/jobs/{body['id']}"
        assert (body["status"], body["stage"]) == ("queued", "training")
        assert [link["stage"] for link in body["chain"]] == ["training", "saving", "deployment"]
        assert body["chain"][0]["id"] == body["id"]
        assert app.notifier.notified == [body["id"]]
        job = await app.get(f"/jobs/{body['id']}")
        assert (job["name"], job["base_model"]["name"], job["dataset"]["name"]) == (
            "first try", "custom01-base", "custom01",
        )  # fmt: skip
        assert job["method"]["name"] == "Custom01"
        assert job["parameters"] == {"epochs": 3}
        assert job["effective_parameters"]["epochs"] == 3

    async def test_says_everything_that_is_wrong_at_once_and_queues_nothing(self, app: JobsApp) -> None:
        wrong = {"method": "Custom01", "dataset": "no-data", "through": "complete", "parameters": {"epochs": "many"}}

        problem = await app.post("/jobs", wrong, 422)

        assert set(codes(problem)) >= {
            ("/base_model", "base_model_needed"),
            ("/dataset", "unknown_dataset"),
            ("/parameters/epochs", "parameter_wrong_type"),
        }
        assert all(not entry["detail"].startswith(entry["code"]) for entry in problem["errors"])
        assert app.notifier.notified == []
        assert await _count(app) == 0

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"method": "nobody"}, ("/method", "unknown_method")),
            ({"through": "perfect"}, ("/through", "state_not_on_path")),
            ({"stage": "saving"}, ("/through", "through_or_stage")),
            ({"through": None}, ("/through", "through_or_stage")),
            ({"model": "some"}, ("/model", "model_without_stage")),
            ({"through": None, "stage": "saving"}, ("/model", "model_needed")),
            ({"through": None, "stage": "training", "model": "some"}, ("/model", "model_not_taken")),
            ({"through": None, "stage": "saving", "model": "nobody"}, ("/model", "unknown_model")),
            ({"through": None, "stage": "inference-customized"}, ("/stage", "stage_not_runnable")),
            ({"base_model": "nobody"}, ("/base_model", "unknown_base_model")),
            ({"surprise": 1}, ("/surprise", "field_unknown")),
            ({"parameters": []}, ("/parameters", "field_type")),
            ({"name": ""}, ("/name", "field_too_short")),
        ],
        ids=lambda value: value[1] if isinstance(value, tuple) else None,
    )
    async def test_refuses(self, app: JobsApp, changes: dict[str, Any], expected: tuple[str, str]) -> None:
        body = {key: value for key, value in {**SUBMIT, **changes}.items() if value is not None}

        problem = await app.post("/jobs", body, 422)

        assert expected in codes(problem)

    async def test_validate_says_what_a_submit_would_do_and_queues_nothing(self, app: JobsApp) -> None:
        found = await app.post("/jobs:validate", {**SUBMIT, "through": "complete", "parameters": {"epochs": 3}}, 200)

        assert (found["valid"], found["violations"], found["warnings"]) == (True, [], [])
        plan = found["plan"]
        assert [stage["stage"] for stage in plan["stages"]] == ["training", "saving"]
        rows = plan["rows"]
        assert (rows["read"], rows["used"], rows["sequences"]) == (144, 144, 144)
        assert rows["forms"] == {"question-answer": 144}
        assert plan["estimated_tokens"] is None or plan["estimated_tokens"] > 0
        assert app.notifier.notified == []
        assert await _count(app) == 0

    async def test_validate_says_everything_that_is_wrong(self, app: JobsApp) -> None:
        wrong = {"method": "Custom01", "dataset": "no-data", "through": "complete", "parameters": {"epochs": "many"}}

        found = await app.post("/jobs:validate", wrong, 200)

        assert (found["valid"], found["plan"]) == (False, None)
        assert {(entry["pointer"], entry["code"]) for entry in found["violations"]} == {
            ("/base_model", "base_model_needed"),
            ("/dataset", "unknown_dataset"),
            ("/parameters/epochs", "parameter_wrong_type"),
        }
        assert found["violation_count"] == 3

    async def test_same_key_makes_one_job(self, app: JobsApp) -> None:
        first = await app.client.post(f"{API}/jobs", json=SUBMIT, headers=KEY)
        second = await app.client.post(f"{API}/jobs", json=SUBMIT, headers=KEY)

        assert second.status_code == 201
        assert second.json() == first.json()
        assert second.headers["location"] == first.headers["location"]
        assert second.headers["idempotency-replayed"] == "true"
        assert app.notifier.notified == [first.json()["id"]]

    async def test_data_set_that_changed_on_disk_is_taken_up_under_a_key(self, app: JobsApp) -> None:
        file = app.services.home.datasets / "custom01.jsonl"
        file.write_text(json.dumps({"question": "new?", "answer": "yes"}) + "\n")

        answer = await app.post("/jobs", SUBMIT, 201, headers=KEY)

        job = await app.get(f"/jobs/{answer['id']}")
        async with app.database.reading() as session:
            row = await session.get(DatasetRow, job["dataset"]["id"])
            digest = JobSpec.of(await jobs.get(session, answer["id"])).dataset
        assert row is not None
        assert digest is not None
        assert row.rows == 1
        assert digest.digest == row.digest

    async def test_data_set_that_changed_on_disk_is_taken_up_by_a_copy_under_a_key(self, app: JobsApp) -> None:
        job = await app.submit()
        (app.services.home.datasets / "custom01.jsonl").write_text('{"question": "new?", "answer": "yes"}\n')

        copy = await app.post(f"/jobs/{job['id']}:copy", {}, 201, headers=KEY)

        async with app.database.reading() as session:
            old, new = [JobSpec.of(await jobs.get(session, made["id"])).dataset for made in (job, copy)]
        assert old is not None
        assert new is not None
        assert (old.id, old.digest != new.digest) == (new.id, True)

    async def test_data_set_that_broke_on_disk_is_refused(self, app: JobsApp) -> None:
        (app.services.home.datasets / "custom01.jsonl").write_text('{"question": "a", "answer": "b"}\nno JSON\n')

        problem = await app.post("/jobs", SUBMIT, 422)

        assert "line_not_json" in [code for _, code in codes(problem)]

    async def test_data_set_that_is_gone_is_said_with_all_else(self, app: JobsApp) -> None:
        (app.services.home.datasets / "custom01.jsonl").unlink()

        problem = await app.post("/jobs", {**SUBMIT, "base_model": "nobody"}, 422)

        assert codes(problem) == [("/base_model", "unknown_base_model"), ("/dataset", "files_missing")]

    async def test_single_stage_works_on_a_model(self, app: JobsApp) -> None:
        training = await app.submit(through="customized")
        model = await _trained(app, training["id"])

        saving = await app.post("/jobs", {"method": "Custom01", "stage": "saving", "model": model}, 201)

        job = await app.get(f"/jobs/{saving['id']}")
        assert (job["stage"], job["model"], job["base_model"]["name"]) == ("saving", model, "custom01-base")


class TestParameters:
    @pytest.mark.parametrize(
        "parameters",
        [{f"p{number}": 1 for number in range(1001)}, {"text": "x" * 1024 * 1024}],
        ids=["many", "much"],
    )
    async def test_of_a_job_are_bounded(self, app: JobsApp, parameters: dict[str, Any]) -> None:
        refused = await app.post("/jobs", {**SUBMIT, "parameters": parameters}, 422)
        previewed = await app.post("/methods/Custom01:preview", {"parameters": parameters}, 422)

        assert ("/parameters", "field_too_long") in codes(refused)
        assert ("/parameters", "field_too_long") in codes(previewed)


class TestList:
    async def test_walks_all_pages_newest_first(self, app: JobsApp) -> None:
        ids = [await add_job(app.database, name=f"job {n}", created_at=START.replace(minute=n)) for n in range(5)]
        seen: list[str] = []
        cursor: dict[str, str] = {}

        while True:
            page = await app.get("/jobs", params={"limit": 2, **cursor})
            seen += [item["id"] for item in page["items"]]
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}

        assert seen == ids[::-1]

    async def test_filters(self, app: JobsApp) -> None:
        method = await add_method(app.database, "finance")
        training, saving = await insert(
            app.database,
            *new_chain(JobKind.TRAINING, JobKind.SAVING, method_id=method, method_version=1, name="Ünique"),
        )
        other = await add_job(app.database, name="other", created_at=START.replace(hour=4))
        await app.runner.run(training)

        async def found(**params: Any) -> set[str]:
            return {item["id"] for item in (await app.get("/jobs", params=params))["items"]}

        assert await found() == {training, saving, other}
        assert await found(status=["succeeded"]) == {training}
        assert await found(status=["succeeded", "queued"]) == {training, saving, other}
        assert await found(stage="saving") == {saving}
        assert await found(method="finance") == await found(method=method) == await found(chain=training)
        assert await found(method=method) == {training, saving}
        assert await found(method="nobody") == set()
        assert await found(q="niq") == {training, saving}

    async def test_questions_are_listed_only_when_asked_for(self, app: JobsApp) -> None:
        question = await add_job(app.database, kind=JobKind.INFERENCE_CUSTOMIZED)
        build = await add_job(app.database, kind=JobKind.ENVIRONMENT, node_id=app.runner.node_id)

        listed = await app.get("/jobs")
        asked_for = await app.get("/jobs", params={"stage": "inference-customized"})

        assert [item["id"] for item in listed["items"]] == [build]
        assert [item["id"] for item in asked_for["items"]] == [question]

    async def test_row_with_text_that_cannot_be_sent_does_not_break_the_list(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)
        await app.runner.run(job_id, FAILURE)
        # as a version wrote it that did not make names printable
        raw = r'{"exit_code": 3, "detail": "it holds \udcfc.txt", "log_tail": ["\u0000"]}'
        statement = sa.text("UPDATE job SET reason_params = :raw WHERE id = :id")
        async with app.database.writing() as session:
            await (await session.connection()).execute(statement, {"raw": raw, "id": job_id})

        page, job = await app.get("/jobs"), await app.get(f"/jobs/{job_id}")

        assert [item["id"] for item in page["items"]] == [job_id]
        assert r"it holds \xfc.txt" in job["reason_detail"]
        assert job["log_tail"] == [r"\x00"]

    @pytest.mark.parametrize("params", [{"status": "happy"}, {"stage": "cooking"}, {"sort": "shoe-size"}, {"limit": 0}])
    async def test_refuses_unknown_words(self, app: JobsApp, params: dict[str, Any]) -> None:
        problem = await app.get("/jobs", 422, params=params)

        assert codes(problem)[0][0] == f"?{next(iter(params))}"


class TestRead:
    async def test_queued_job_waits_for_its_environment(self, app: JobsApp) -> None:
        build = await add_job(app.database, kind=JobKind.ENVIRONMENT, node_id=app.runner.node_id, environment="new")
        first, second = await insert(app.database, *new_chain(JobKind.TRAINING, JobKind.SAVING, environment="new"))

        waiting, blocked = await app.get(f"/jobs/{first}"), await app.get(f"/jobs/{second}")

        assert waiting["waiting_for"] == build
        assert blocked["waiting_for"] is None
        assert [link["id"] for link in blocked["chain"]] == [first, second]
        assert (waiting["progress"], waiting["metrics"], waiting["log_tail"], waiting["reason_detail"]) == (
            None, {}, [], None,
        )  # fmt: skip
        assert (await app.get(f"/jobs/{build}"))["stage"] == "environment"

    async def test_running_job_shows_how_far_it_is(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)
        await app.runner.start(job_id)
        app.runner.reports(
            job_id,
            {"type": "progress", "time": 1.0, "step": 1, "total": 4},
            {"type": "progress", "time": 2.0, "step": 2, "total": 4, "message": "training"},
            {"type": "metrics", "time": 2.0, "step": 2, "values": {"loss": 0.5}},
            {"type": "evaluation", "time": 0.5, "name": "exact_match", "phase": "before", "value": 0.1, "samples": 10},
        )

        job = await app.get(f"/jobs/{job_id}")

        assert job["status"] == "running"
        assert (job["progress"]["percent"], job["progress"]["eta_seconds"], job["progress"]["message"]) == (
            50.0, 2.0, "training",
        )  # fmt: skip
        assert job["metrics"] == {"loss": 0.5}
        assert job["evaluations"] == [{"name": "exact_match", "before": 0.1, "after": None, "samples": 10}]
        assert job["started_at"] is not None

    @pytest.mark.parametrize(("language", "word"), [("en", "exit code 3"), ("zh", "退出码 3"), ("de", "Exit-Code 3")])
    async def test_failed_job_says_why(self, app: JobsApp, language: str, word: str) -> None:
        job_id = await add_job(app.database)
        await app.runner.run(job_id, FAILURE)

        job = await app.get(f"/jobs/{job_id}", headers={"Accept-Language": language})

        assert (job["status"], job["reason"]) == ("failed", "exit_code")
        assert word in job["reason_detail"]
        assert job["log_tail"] == ["Traceback", "ValueError: no"]

    @pytest.mark.parametrize("path", ["", "/logs", "/metrics", "/events"])
    async def test_unknown_job_is_not_found(self, app: JobsApp, path: str) -> None:
        problem = await app.get(f"/jobs/nobody{path}", 404)

        assert problem["code"] == "job_not_found"


class TestLog:
    async def test_pages_put_together_are_the_whole_output(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)
        won = await app.runner.start(job_id)
        whole = "".join(f"Zeile {n}: 模型 \U0001f600 ü\n" for n in range(300))
        app.runner.prints(job_id, whole)
        text, offset, pages = "", 0, 0
        await app.runner.end(won)

        while True:
            page = await app.get(f"/jobs/{job_id}/logs", params={"offset": offset, "limit": 1001})
            assert page["offset"] == offset
            assert page["next_offset"] - offset <= 1001
            text, offset, pages = text + page["text"], page["next_offset"], pages + 1
            if page["end"]:
                break

        assert text == whole
        assert pages > 5
        assert offset == page["size"] == len(whole.encode())

    async def test_end_is_said_only_after_the_job_has_ended(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)
        before = await app.get(f"/jobs/{job_id}/logs")
        won = await app.runner.start(job_id)
        app.runner.prints(job_id, "all\n")
        during = await app.get(f"/jobs/{job_id}/logs")
        await app.runner.end(won)
        after = await app.get(f"/jobs/{job_id}/logs", params={"offset": during["next_offset"]})

        assert before == {"text": "", "offset": 0, "next_offset": 0, "size": 0, "end": False, "attempt": 0}
        assert (during["text"], during["end"], during["attempt"]) == ("all\n", False, 1)
        assert (after["text"], after["end"]) == ("", True)

    async def test_progress_bars_show_their_last_state_unless_raw(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)
        won = await app.runner.start(job_id)
        app.runner.prints(job_id, "10%\r50%\r100%\n\x1b[32mgreen\x1b[0m\n")
        await app.runner.end(won)

        shown = await app.get(f"/jobs/{job_id}/logs")
        raw = await app.get(f"/jobs/{job_id}/logs", params={"raw": True})

        assert shown["text"] == "100%\ngreen\n"
        assert raw["text"] == "10%\r50%\r100%\n\x1b[32mgreen\x1b[0m\n"
        assert shown["next_offset"] == raw["next_offset"]

    @pytest.mark.parametrize(
        ("output", "lines", "expected"),
        [
            ("1\n2\n3\n", 2, "2\n3\n"),
            ("1\n2\n3", 2, "2\n3"),
            ("1\n2\n3\n", 3, "1\n2\n3\n"),
            ("1\n2\n3\n", 99, "1\n2\n3\n"),
            ("\n\n\n", 1, "\n"),
            ("", 5, ""),
            ("x" * 70_000 + "\n" + "y" * 70_000 + "\nlast\n", 2, "y" * 70_000 + "\nlast\n"),
        ],
    )
    async def test_tail_begins_where_the_last_lines_begin(
        self, app: JobsApp, output: str, lines: int, expected: str
    ) -> None:
        job_id = await add_job(app.database)
        won = await app.runner.start(job_id)
        app.runner.prints(job_id, output)

        page = await app.get(f"/jobs/{job_id}/logs", params={"tail": lines})
        app.runner.prints(job_id, "more\n")
        await app.runner.end(won)
        following = await app.get(f"/jobs/{job_id}/logs", params={"offset": page["next_offset"]})

        assert page["text"] == expected
        assert page["offset"] == len(output) - len(expected)
        assert following["text"] == "more\n"

    async def test_earlier_attempts_can_be_read(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)
        first = await app.runner.start(job_id)
        app.runner.prints(job_id, "first\n", attempt=1)
        async with app.database.writing() as session:
            await job_attempts.requeue(session, first, reason=EndReason.SUPERVISOR_LOST, now=START)
        await app.runner.start(job_id)
        app.runner.prints(job_id, "second\n", attempt=2)

        newest = await app.get(f"/jobs/{job_id}/logs")
        earlier = await app.get(f"/jobs/{job_id}/logs", params={"attempt": 1})

        assert (newest["text"], newest["attempt"], newest["end"]) == ("second\n", 2, False)
        assert (earlier["text"], earlier["attempt"], earlier["end"]) == ("first\n", 1, True)

    @pytest.mark.parametrize("params", [{"limit": 2**20 + 1}, {"limit": 0}, {"offset": -1}, {"tail": 0}])
    async def test_refuses_what_is_out_of_bounds(self, app: JobsApp, params: dict[str, int]) -> None:
        job_id = await add_job(app.database)

        await app.get(f"/jobs/{job_id}/logs", 422, params=params)


class TestMetrics:
    async def test_curves_are_reduced_to_the_points_wanted(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)
        await app.runner.start(job_id)
        app.runner.reports(
            job_id,
            *(
                {
                    "type": "metrics",
                    "time": step,
                    "step": step,
                    "values": {"loss": 9.0 if step == 500 else 1.0, "lr": 1},
                }
                for step in range(1000)
            ),
        )

        whole = await app.get(f"/jobs/{job_id}/metrics", params={"points": 10_000})
        reduced = await app.get(f"/jobs/{job_id}/metrics", params={"points": 20, "names": "loss"})

        assert {series["name"]: len(series["points"]) for series in whole["series"]} == {"loss": 1000, "lr": 1000}
        (loss,) = reduced["series"]
        assert len(loss["points"]) <= 20
        assert loss["points"][0] == [0, 1.0]
        assert loss["points"][-1] == [999, 1.0]
        assert [500, 9.0] in loss["points"]

    async def test_queued_job_has_none(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)

        assert await app.get(f"/jobs/{job_id}/metrics") == {
            "series": [], "evaluations": [], "samples": [], "progress": None,
        }  # fmt: skip

    async def test_answers_are_joined_by_number(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)
        await app.runner.start(job_id)
        asked = {"type": "sample", "prompt": "1 + 1?", "wanted": "2"}
        app.runner.reports(
            job_id,
            {**asked, "phase": "before", "number": 1, "answer": "3"},
            {**asked, "phase": "before", "number": 0, "prompt": "0 + 1?", "wanted": "1", "answer": "x"},
            {**asked, "phase": "after", "number": 1, "answer": "2"},
            {**asked, "phase": "during", "number": 1, "answer": "no such phase"},
        )

        measured = await app.get(f"/jobs/{job_id}/metrics")

        assert measured["samples"] == [
            {"prompt": "0 + 1?", "wanted": "1", "before": "x", "after": None},
            {"prompt": "1 + 1?", "wanted": "2", "before": "3", "after": "2"},
        ]


class TestEvents:
    async def _finished(self, app: JobsApp) -> tuple[str, str]:
        job_id = await add_job(app.database)
        won = await app.runner.start(job_id)
        text = "".join(f"Zeile {n}: 模型\n" for n in range(30_000))
        app.runner.prints(job_id, text)
        app.runner.reports(job_id, {"type": "metrics", "time": 1.0, "step": 1, "values": {"loss": 1.0}})
        await app.runner.end(won, FAILURE)
        return job_id, text

    async def test_read_to_the_end_gives_everything(self, app: JobsApp) -> None:
        job_id, text = await self._finished(app)

        events = await app.events(f"/jobs/{job_id}/events")

        assert "".join(event.data["text"] for event in events if event.name == "log") == text
        states = [event.data["status"] for event in events if event.name == "state"]
        assert states == ["queued", "launching", "running", "failed"]
        assert (events[-1].name, events[-1].data) == ("end", {"status": "failed"})
        assert all(event.id for event in events)
        assert [event.data["values"] for event in events if event.name == "metrics"] == [{"loss": 1.0}]

    async def test_end_explains_itself_in_the_callers_language(self, app: JobsApp) -> None:
        job_id, _ = await self._finished(app)

        events = await app.events(f"/jobs/{job_id}/events", headers={"Accept-Language": "de"})

        details = [event.data["reason_detail"] for event in events if event.name == "state"]
        assert details[:3] == [None, None, None]
        assert "Exit-Code 3" in details[3]

    @pytest.mark.parametrize("how", ["header", "query", "header wins"])
    async def test_resumed_in_the_middle_loses_and_doubles_no_byte(self, app: JobsApp, how: str) -> None:
        job_id, text = await self._finished(app)
        whole = await app.events(f"/jobs/{job_id}/events")
        logs = [index for index, event in enumerate(whole) if event.name == "log"]
        assert len(logs) > 1
        read, last = whole[: logs[0] + 1], whole[logs[0]].id
        assert last is not None
        options: dict[str, Any] = {
            "header": {"headers": {"Last-Event-ID": last}},
            "query": {"params": {"last_event_id": last}},
            "header wins": {"headers": {"Last-Event-ID": last}, "params": {"last_event_id": ""}},
        }[how]

        rest = await app.events(f"/jobs/{job_id}/events", **options)

        assert "".join(event.data["text"] for event in [*read, *rest] if event.name == "log") == text
        assert [event.data["status"] for event in rest if event.name == "state"] == ["failed"]

    async def test_id_of_another_stream_is_refused_before_it_begins(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)

        problem = await app.get(f"/jobs/{job_id}/events", 422, headers={"Last-Event-ID": "yesterday"})

        assert codes(problem) == [("Last-Event-ID:", "invalid_event_id")]
        assert "yesterday" in problem["detail"]


class TestCancel:
    async def test_queued_job_ends_at_once_with_its_chain(self, app: JobsApp) -> None:
        chain = await app.submit(through="online")

        job = await app.post(f"/jobs/{chain['id']}:cancel")

        assert (job["status"], job["reason"]) == ("cancelled", "cancelled")
        assert [link["status"] for link in job["chain"]] == ["cancelled"] * 3
        assert app.notifier.notified == [chain["id"], chain["id"]]

    async def test_running_job_is_asked_to_stop_twice_is_fine(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)
        await app.runner.start(job_id)

        first = await app.post(f"/jobs/{job_id}:cancel", {})
        second = await app.post(f"/jobs/{job_id}:cancel")

        assert (first["status"], first["cancel_requested"]) == ("running", True)
        assert second == first

    async def test_ended_job_is_409(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)
        await app.runner.run(job_id)

        problem = await app.post(f"/jobs/{job_id}:cancel", status=409)

        assert problem["code"] == "job_already_finished"
        assert app.notifier.notified == []

    async def test_unknown_job_is_404(self, app: JobsApp) -> None:
        await app.post("/jobs/nobody:cancel", status=404)


class TestRetry:
    async def test_repeats_the_job_and_the_rest_of_its_chain_as_submitted(self, app: JobsApp) -> None:
        chain = await app.submit(through="online", parameters={"epochs": 3}, name="mine")
        await app.runner.run(chain["id"], FAILURE)
        (app.services.home.scripts / "custom01.py").write_text("print('edited since')\n")

        answer = await app.post(f"/jobs/{chain['id']}:retry", status=201)

        assert [link["stage"] for link in answer["chain"]] == ["training", "saving", "deployment"]
        assert [link["status"] for link in answer["chain"]] == ["queued"] * 3
        old, new = await app.get(f"/jobs/{chain['id']}"), await app.get(f"/jobs/{answer['id']}")
        assert new["retry_of"] == old["id"]
        for same in ("name", "method", "parameters", "base_model", "dataset", "environment"):
            assert new[same] == old[same]
        async with app.database.reading() as session:
            rows = [await jobs.get(session, job_id) for job_id in (old["id"], new["id"])]
        assert rows[0].launch == rows[1].launch
        assert app.notifier.notified[-1] == new["id"]
        assert old["status"] == "failed"

    async def test_middle_of_a_chain_goes_on_with_the_model_that_is_there(self, app: JobsApp) -> None:
        chain = await app.submit(through="online")
        model = await _trained(app, chain["id"])
        saving = chain["chain"][1]["id"]
        await app.runner.run(saving, FAILURE)

        answer = await app.post(f"/jobs/{saving}:retry", status=201)

        assert [link["stage"] for link in answer["chain"]] == ["saving", "deployment"]
        assert (await app.get(f"/jobs/{answer['id']}"))["model"] == model
        won = await app.runner.start(answer["id"])
        assert won.job.model_id == model

    async def test_job_whose_predecessor_failed_is_409(self, app: JobsApp) -> None:
        chain = await app.submit()
        await app.runner.run(chain["id"], FAILURE)
        saving = chain["chain"][1]["id"]

        problem = await app.post(f"/jobs/{saving}:retry", status=409)

        assert problem["code"] == "predecessor_not_succeeded"
        assert chain["id"] in problem["detail"]

    async def test_job_that_was_cancelled_before_its_turn_takes_the_model_of_its_predecessor(
        self, app: JobsApp
    ) -> None:
        chain = await app.submit()
        saving = chain["chain"][1]["id"]
        await app.post(f"/jobs/{saving}:cancel")
        model = await _trained(app, chain["id"])

        answer = await app.post(f"/jobs/{saving}:retry", status=201)

        assert (await app.get(f"/jobs/{answer['id']}"))["model"] == model

    async def test_same_key_retries_once(self, app: JobsApp) -> None:
        chain = await app.submit()
        await app.runner.run(chain["id"], FAILURE)

        first = await app.post(f"/jobs/{chain['id']}:retry", {}, 201, headers=KEY)
        second = await app.post(f"/jobs/{chain['id']}:retry", {}, 201, headers=KEY)

        assert first == second

    @pytest.mark.parametrize("status", ["queued", "running", "succeeded"])
    async def test_only_what_failed_or_was_cancelled(self, app: JobsApp, status: str) -> None:
        chain = await app.submit()
        if status != "queued":
            won = await app.runner.start(chain["id"])
            if status == "succeeded":
                await app.runner.end(won)

        problem = await app.post(f"/jobs/{chain['id']}:retry", status=409)

        assert (problem["code"], status in problem["detail"]) == ("job_not_retryable", True)

    async def test_data_set_that_changed_is_409(self, app: JobsApp) -> None:
        chain = await app.submit()
        await app.runner.run(chain["id"], FAILURE)
        (app.services.home.datasets / "custom01.jsonl").write_text('{"question": "a", "answer": "b"}\n')
        await app.submit()  # looks at the file again

        problem = await app.post(f"/jobs/{chain['id']}:retry", status=409)

        assert problem["code"] == "job_dataset_changed"

    async def test_base_model_that_is_gone_is_409(self, app: JobsApp) -> None:
        chain = await app.submit()
        await app.runner.run(chain["id"], FAILURE)
        folder = app.services.home.models / "custom01-base"
        folder.rename(folder.with_name("elsewhere"))

        problem = await app.post(f"/jobs/{chain['id']}:retry", status=409)

        assert problem["code"] == "job_inputs_gone"
        assert "models/custom01-base" in problem["detail"]

    async def test_deleted_method_is_409(self, app: JobsApp) -> None:
        chain = await app.submit()
        await app.runner.run(chain["id"], FAILURE)
        await app.client.delete(f"{API}/methods/Custom01", headers={"If-Match": "*"})

        problem = await app.post(f"/jobs/{chain['id']}:retry", status=409)

        assert problem["code"] == "job_method_deleted"

    @pytest.mark.parametrize("action", ["retry", "copy"])
    @pytest.mark.parametrize(
        ("kind", "code"), [(JobKind.INFERENCE_COMPLETE, "job_is_question"), (JobKind.ENVIRONMENT, "job_is_build")]
    )
    async def test_questions_and_builds_have_their_own_ways(
        self, app: JobsApp, action: str, kind: JobKind, code: str
    ) -> None:
        job_id = await add_job(app.database, kind=kind, node_id=app.runner.node_id)

        problem = await app.post(f"/jobs/{job_id}:{action}", status=409)

        assert problem["code"] == code


class TestCopy:
    async def test_submits_the_chain_again_with_changes_and_the_method_as_it_is(self, app: JobsApp) -> None:
        chain = await app.submit(parameters={"epochs": 3, "batch_size": 4})
        script = app.services.home.scripts / "custom01.py"
        script.write_text(script.read_text() + "\n# edited\n")

        changed = {"parameters": {"epochs": 5, "batch_size": None}, "name": "again"}
        answer = await app.post(f"/jobs/{chain['id']}:copy", changed, 201)

        old, new = await app.get(f"/jobs/{chain['id']}"), await app.get(f"/jobs/{answer['id']}")
        assert [link["stage"] for link in answer["chain"]] == ["training", "saving"]
        assert (new["copied_from"], new["name"], new["parameters"]) == (old["id"], "again", {"epochs": 5})
        assert new["method"]["version"] == old["method"]["version"] + 1
        assert app.notifier.notified[-1] == new["id"]

    async def test_without_a_body_copies_as_it_is(self, app: JobsApp) -> None:
        chain = await app.submit(parameters={"epochs": 3})

        answer = await app.post(f"/jobs/{chain['chain'][1]['id']}:copy", status=201)

        assert [link["stage"] for link in answer["chain"]] == ["training", "saving"]
        assert (await app.get(f"/jobs/{answer['id']}"))["parameters"] == {"epochs": 3}

    async def test_job_on_a_model_is_copied_alone_on_the_same_model(self, app: JobsApp) -> None:
        chain = await app.submit(through="online")
        model = await _trained(app, chain["id"])

        answer = await app.post(f"/jobs/{chain['chain'][1]['id']}:copy", {}, 201)

        assert [link["stage"] for link in answer["chain"]] == ["saving"]
        assert (await app.get(f"/jobs/{answer['id']}"))["model"] == model

    async def test_other_inputs_are_for_jobs_that_begin_with_them(self, app: JobsApp) -> None:
        chain = await app.submit()
        await _trained(app, chain["id"])

        problem = await app.post(f"/jobs/{chain['chain'][1]['id']}:copy", {"dataset": "other"}, 422)

        assert codes(problem) == [("/dataset", "model_keeps_inputs")]

    async def test_is_checked_like_any_submission(self, app: JobsApp) -> None:
        chain = await app.submit()

        problem = await app.post(f"/jobs/{chain['id']}:copy", {"parameters": {"epochs": "x"}, "dataset": "gone"}, 422)

        assert set(codes(problem)) >= {("/parameters/epochs", "parameter_wrong_type"), ("/dataset", "unknown_dataset")}


class TestCompare:
    async def _measured(self, app: JobsApp, loss: float, **parameters: Any) -> str:
        spec = JobSpec(
            base_model=Named(id="b", name="tiny", path="models/tiny"), effective={"batch_size": 2, **parameters}
        )
        job_id = await add_job(app.database, parameters=parameters, launch=spec.document())
        won = await app.runner.start(job_id)
        app.runner.reports(
            job_id,
            *({"type": "metrics", "time": n, "step": n, "values": {"loss": loss}} for n in range(100)),
            {"type": "evaluation", "time": 1.0, "name": "exact_match", "phase": "after", "value": loss, "samples": 10},
        )
        await app.runner.end(won)
        return job_id

    async def test_shows_what_differs_and_what_came_of_it(self, app: JobsApp) -> None:
        first = await self._measured(app, 0.5, rank=8, seed=1, same=True)
        second = await self._measured(app, 0.25, rank=16, same=True)

        compared = await app.get("/jobs:compare", params={"ids": f"{second}, {first}", "points": 10})

        assert [job["id"] for job in compared["jobs"]] == [second, first]
        assert compared["differences"] == [
            {"name": "rank", "values": [16, 8]},
            {"name": "seed", "values": [None, 1]},
        ]
        assert [job["metrics"] for job in compared["jobs"]] == [{"loss": 0.25}, {"loss": 0.5}]
        assert [job["evaluations"][0]["after"] for job in compared["jobs"]] == [0.25, 0.5]
        assert [job["seconds"] for job in compared["jobs"]] == [1.0, 1.0]
        (curve,) = compared["curves"]
        assert curve["name"] == "loss"
        assert [series["job"] for series in curve["series"]] == [second, first]
        assert all(2 <= len(series["points"]) <= 10 for series in curve["series"])

    @pytest.mark.parametrize("ids", ["", "a", "a,a", ",".join(str(n) for n in range(11))])
    async def test_needs_two_to_ten_different_jobs(self, app: JobsApp, ids: str) -> None:
        problem = await app.get("/jobs:compare", 422, params={"ids": ids})

        assert codes(problem) == [("?ids", "compare_needs_ids")]

    async def test_unknown_job_is_404(self, app: JobsApp) -> None:
        job_id = await add_job(app.database)

        await app.get("/jobs:compare", 404, params={"ids": [job_id, "nobody"]})


class TestBuildEnvironment:
    async def _register(self, app: JobsApp, name: str, spec: str | None = "dependencies:\n  - python\n") -> None:
        await app.post("/environments", {"name": name, "spec": spec}, 201)

    async def _beat(self, app: JobsApp) -> None:
        async with app.database.writing() as session:
            await nodes.heartbeat(session, app.runner.node_id, now=datetime.now(UTC), environments=["base", "found"])

    async def test_makes_one_job_however_often_it_is_asked(self, app: JobsApp) -> None:
        await self._register(app, "new")
        await self._beat(app)

        first = await app.client.post(f"{API}/environments/new:build")
        second = await app.client.post(f"{API}/environments/new:build")

        assert (first.status_code, second.status_code) == (201, 200)
        assert first.json()["id"] == second.json()["id"]
        assert (first.json()["stage"], first.json()["environment"], first.json()["method"]) == (
            "environment", "new", None,
        )  # fmt: skip
        assert first.headers["location"] == f"/api/v1/jobs/{first.json()['id']}"
        assert first.json()["id"] in app.notifier.notified

    async def test_is_built_anew_after_its_end(self, app: JobsApp) -> None:
        await self._register(app, "new")
        await self._beat(app)
        first = await app.post("/environments/new:build", status=201)
        await app.runner.run(first["id"], FAILURE)

        second = await app.post("/environments/new:build", status=201)

        assert second["id"] != first["id"]

    async def test_base_needs_no_entry(self, app: JobsApp) -> None:
        await self._beat(app)

        assert (await app.post("/environments/base:build", status=201))["environment"] == "base"

    async def test_without_a_living_node_is_409(self, app: JobsApp) -> None:
        await self._register(app, "new")

        assert (await app.post("/environments/new:build", status=409))["code"] == "no_node"

    async def test_named_node_must_exist(self, app: JobsApp) -> None:
        await self._register(app, "new")

        await app.post("/environments/new:build?node=nobody", status=404)
        assert (await app.post("/environments/new:build?node=node-1", status=201))["stage"] == "environment"

    async def test_unknown_environment_is_404_and_one_without_spec_409(self, app: JobsApp) -> None:
        await self._register(app, "bare", None)
        await self._beat(app)

        assert (await app.post("/environments/nobody:build", status=404))["code"] == "environment_not_found"
        assert (await app.post("/environments/bare:build", status=409))["code"] == "environment_without_spec"
        assert (await app.post("/environments/found:build", status=409))["code"] == "environment_without_spec"


class TestDocumentation:
    async def test_streams_and_actions_are_documented(self, app: JobsApp) -> None:
        paths = (await app.client.get("/openapi.json")).json()["paths"]

        events = paths["/api/v1/jobs/{job}/events"]["get"]
        assert list(events["responses"]["200"]["content"]) == ["text/event-stream"]
        example = events["responses"]["200"]["content"]["text/event-stream"]["example"]
        assert [event.name for event in parse_events(example)] == ["state", "log", "end"]
        assert set(paths["/api/v1/jobs/{job}:retry"]["post"]["responses"]) >= {"201", "404", "409"}
        assert paths["/api/v1/jobs:compare"]["get"]["operationId"] == "compare_jobs"
