"""Previews of rows over HTTP. A runner plays the node; tests/e2e/test_preview.py runs the real program."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlmodel import select

from app.domain.enums import JobKind, JobStatus
from app.executor.jobs import row_previews
from app.executor.runs.job_spec import JobSpec, RowsToPreview
from app.store import job_attempts, nodes
from app.store.job_attempts import Claim
from app.store.session import Database
from app.store.tables import JobRow
from tests.api.jobs_app import API, JobsApp, codes, jobs_app, served
from tests.job_rows import FAILURE, START, SUCCESS, claim
from tests.waiting import until

PREVIEW = {"base_model": "custom01-base", "dataset": "custom01"}
SPAN = {"text": "Hello", "characters": 5, "tokens": 2, "learned": True, "weight": 1, "cut": False}
SEQUENCE = {
    "role": "answer", "used": True, "exceeded": {}, "tokens": 2, "given": 0, "learned": 2, "spans": [SPAN],
}  # fmt: skip
ROW: dict[str, Any] = {
    "line": 1,
    "form": "messages",
    "kind": "conversation",
    "left_out": None,
    "notes": [["bos_missing", ""]],
}
LENGTHS: dict[str, Any] = {
    "rows": [[1, 6, 10, 6, 4, 10, False]] * 99 + [[1, 300, 700, 300, 400, 700, False]],
    "measured": 100,
    "total": 144,
    "refused": 0,
    "refused_lines": [],
    "pictures": 0,
}
ANSWER: dict[str, Any] = {
    "rows": [ROW | {"sequences": [SEQUENCE], "sequence_count": 1}], "own_template": True, "lengths": LENGTHS,
}  # fmt: skip
REFUSED = {"line": 2, "problem": {"code": "turn_role_unknown", "pointer": "/messages/0/role", "params": {
    "role": "ghost", "known": "user"}}, "notes": [], "raw": "{}", "raw_characters": 2}  # fmt: skip


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as app:
        async with app.database.writing() as session:
            assert await nodes.heartbeat(session, app.runner.node_id, now=datetime.now(UTC))
        yield app


async def jobs_of(app: JobsApp) -> list[JobRow]:
    async with app.database.reading() as session:
        return list((await session.exec(select(JobRow).where(JobRow.kind == JobKind.PREVIEW))).all())


async def previewed(app: JobsApp, answer: Any, status: int = 200, *, ended: Any = SUCCESS, **members: Any) -> Any:
    """Ask for a preview, write `answer` as the program would, end the job and return the response."""
    asking = asyncio.create_task(app.post("/methods/Custom01:preview", PREVIEW | members, status))

    async def claimed() -> Claim | None:
        assert not asking.done(), asking.result()
        return await claim(app.database, app.runner.node_id, kinds={JobKind.PREVIEW}, environments=("base",))

    won = await until(claimed, "the job")
    async with app.database.writing() as session:
        assert await job_attempts.mark_running(session, won, now=START)
    folder = app.runner.folder(won.job.id)
    folder.output.mkdir()
    folder.preview.write_text(json.dumps(answer))
    await app.runner.end(won, ended)
    return await asking


class TestJob:
    async def test_runs_in_the_environment_of_the_training(self, app: JobsApp) -> None:
        await previewed(app, ANSWER, rows=[7, 1, 7], parameters={"input_train_name": "answer"})

        (job,) = await jobs_of(app)
        spec = JobSpec.of(job)
        assert (job.environment, job.method_name, job.priority) == ("base", "Custom01", -10)
        assert spec.preview == RowsToPreview(
            kinds=("conversation",), tools=False, columns=("answer", "answer"), lines=(1, 7)
        )
        assert spec.base_model is not None
        assert spec.base_model.name == "custom01-base"
        assert app.notifier.notified == [job.id]
        assert (await app.get("/jobs"))["items"] == []

    async def test_is_not_run_again_for_the_same_preview(self, app: JobsApp) -> None:
        first = await previewed(app, ANSWER)

        assert await app.post("/methods/custom01:preview", PREVIEW) == first
        assert len(await jobs_of(app)) == 1

    @pytest.mark.parametrize("change", ["rows", "data", "base model", "script"])
    async def test_is_run_again_when_something_has_changed(self, app: JobsApp, change: str) -> None:
        await previewed(app, ANSWER)
        home = app.services.home
        match change:
            case "data":
                (home.datasets / "custom01.jsonl").write_text('{"question": "a", "answer": "b"}\n')
            case "base model":
                config = home.models / "custom01-base/config.json"
                config.write_text(config.read_text() + "\n")
            case "script":
                declared = {"learns_from": ["conversation"]}
                patch = await app.client.patch(
                    f"{API}/methods/Custom01", json={"data": declared}, headers={"If-Match": "*"}
                )
                assert patch.status_code == 200, patch.text

        await previewed(app, ANSWER, rows=[2] if change == "rows" else None)

        assert len(await jobs_of(app)) == 2

    async def test_failure_is_told_with_its_words(self, app: JobsApp) -> None:
        problem = await previewed(app, ANSWER, 409, ended=FAILURE)

        assert (problem["code"], "ValueError: no" in problem["detail"]) == ("preview_failed", True)

    async def test_that_does_not_end_is_cancelled(self, app: JobsApp, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(row_previews, "PATIENCE_SECONDS", 0)

        problem = await app.post("/methods/Custom01:preview", PREVIEW, 503)

        (job,) = await jobs_of(app)
        assert (problem["code"], job.status) == ("preview_took_too_long", JobStatus.CANCELLED)

    async def test_of_a_caller_who_goes_away_is_cancelled(self, app: JobsApp) -> None:
        async with served(app) as client:
            asking = asyncio.create_task(client.post(f"{API}/methods/Custom01:preview", json=PREVIEW))
            await until(lambda: jobs_of(app), "the job")
            asking.cancel()
            await asyncio.wait({asking})

            async def cancelled() -> bool:
                return [job.status for job in await jobs_of(app)] == [JobStatus.CANCELLED]

            await until(cancelled, "the job goes on for nobody")

    async def test_is_not_retried(self, app: JobsApp) -> None:
        await previewed(app, ANSWER, 409, ended=FAILURE)
        (job,) = await jobs_of(app)

        assert (await app.post(f"/jobs/{job.id}:retry", {}, 409))["code"] == "job_is_preview"
        assert (await app.post(f"/jobs/{job.id}:copy", {}, 409))["code"] == "job_is_preview"


class TestStart:
    async def test_waits_for_the_first_report_of_a_worker(self, app: JobsApp, monkeypatch: pytest.MonkeyPatch) -> None:
        previews, looked = app.services.row_previews, asyncio.Event()
        look = previews._without_node

        async def watched(environment: str) -> Any:
            found = await look(environment)
            looked.set()
            return found

        monkeypatch.setattr(previews, "_without_node", watched)
        monkeypatch.setattr(previews, "_nodes_expected_until", math.inf)
        async with app.database.writing() as session:
            await nodes.heartbeat(session, app.runner.node_id, now=START)

        asking = asyncio.create_task(previewed(app, ANSWER))
        await looked.wait()
        async with app.database.writing() as session:
            assert await nodes.heartbeat(session, app.runner.node_id, now=datetime.now(UTC))

        assert (await asking)["rows"][0]["line"] == 1


class TestLengths:
    async def test_are_of_all_rows_and_compared_with_the_limits(self, app: JobsApp) -> None:
        wrong = LENGTHS | {"refused": 7, "refused_lines": [3, 9, 11, 12, 20], "pictures": 2}

        preview = await previewed(app, ANSWER | {"lengths": wrong}, parameters={"max_seq_length": 512})

        assert preview["lengths"] == {
            "measured": 100,
            "total": 144,
            "tokens": {"p50": 10, "p90": 10, "p99": 10, "p100": 700},
            "learned_share": round((99 * 4 + 400) / (99 * 10 + 700), 4),
            "too_long": [{"parameter": "max_seq_length", "value": 512, "rows": 1}],
            "refused": 7,
        }
        notes = {note["code"]: note for note in preview["notes"]}
        assert notes["measured_rows_too_long"]["pointer"] == "/parameters/max_seq_length"
        assert "1 of 100 measured rows (of 144)" in notes["measured_rows_too_long"]["detail"]
        assert "lines 3, 9, 11, 12, 20, ...)" in notes["measured_rows_refused"]["detail"]
        assert "measured_without_pictures" in notes

    async def test_are_measured_once_for_all_lines_and_limits(self, app: JobsApp) -> None:
        first = await previewed(app, ANSWER)
        later = await previewed(
            app, ANSWER | {"lengths": None}, rows=[2], parameters={"max_seq_length": 5, "max_content_length": 2}
        )

        assert [JobSpec.of(job).preview.measure for job in await jobs_of(app)] == [True, False]  # type: ignore[union-attr]
        assert later["lengths"]["tokens"] == first["lengths"]["tokens"]
        assert later["lengths"]["too_long"] == [
            {"parameter": "max_content_length", "value": 2, "rows": 100},
            {"parameter": "max_seq_length", "value": 5, "rows": 100},
        ]  # fmt: skip

    async def test_stand_in_the_plan_of_a_submission(self, app: JobsApp) -> None:
        submit = {"method": "Custom01", **PREVIEW, "through": "customized", "parameters": {"max_seq_length": 512}}
        before = await app.post("/jobs:validate", submit)
        await previewed(app, ANSWER)

        after = await app.post("/jobs:validate", submit)

        assert before["plan"]["lengths"] is None
        assert after["plan"]["lengths"]["too_long"] == [{"parameter": "max_seq_length", "value": 512, "rows": 1}]
        assert "measured_rows_too_long" in {warning["code"] for warning in after["warnings"]}
        sequences, used = after["plan"]["rows"]["sequences"], after["plan"]["rows"]["used"]
        learned = round(round(sequences * (1 - after["plan"]["rows"]["held_out"] / used)) * 0.99)
        assert after["plan"]["estimated_tokens"] % learned == 0
        assert after["plan"]["estimated_tokens"] != before["plan"]["estimated_tokens"]

    async def test_belong_to_a_profile_as_well(self, app: JobsApp) -> None:
        await previewed(app, ANSWER)

        found = await app.get("/datasets/custom01/profile?method=Custom01&base_model=custom01-base")

        assert found["lengths"]["tokens"]["p100"] == 700
        assert (await app.get("/datasets/custom01/profile"))["lengths"] is None
        half = await app.client.get(f"{API}/datasets/custom01/profile?method=Custom01")
        assert codes(half.json()) == [("/base_model", "tokenizer_half_named")]


class TestAnswer:
    async def test_has_spans_and_notes_in_the_callers_language(self, app: JobsApp) -> None:
        rows = [ANSWER["rows"][0], REFUSED, {**ROW, "line": 3, "left_out": "no_answer", "raw": "{}"}]
        app.client.headers["Accept-Language"] = "de"

        preview = await previewed(app, ANSWER | {"rows": rows, "own_template": False})

        first, second, third = preview["rows"]
        assert first["sequences"][0]["spans"] == [SPAN]
        assert (first["notes"], third["left_out"]) == (["bos_missing"], "no_answer")
        assert second["problem"]["pointer"] == "/messages/0/role"
        assert second["problem"]["detail"].startswith("Zeile 2, /messages/0/role: „ghost“")
        notes = {note["code"]: note["detail"] for note in preview["notes"]}
        assert list(notes) == ["preview_of_other_script", "preview_with_plain_template", "bos_missing", "no_answer"]
        assert notes["bos_missing"].startswith("2 von 3 Zeilen (Zeilen 1, 3)")
        assert (preview["exact"], preview["total"], preview["learns_from"]) == (False, 144, ["conversation"])

    async def test_without_a_tokenizer_in_the_environment_is_what_was_read(self, app: JobsApp) -> None:
        refused = {"code": "preview_without_transformers", "params": {"error": "No module named 'transformers'"}}

        preview = await previewed(app, {"refused": refused})

        assert [row["line"] for row in preview["rows"]] == [1, 2, 3]
        assert {row["kind"] for row in preview["rows"]} == {"conversation"}
        assert json.loads(preview["rows"][0]["raw"]).keys() == {"question", "answer"}
        assert "preview_without_tokens" in {note["code"] for note in preview["notes"]}

    async def test_without_a_usable_tokenizer_is_a_refusal(self, app: JobsApp) -> None:
        refused = {"code": "preview_tokenizer_unreadable", "params": {"error": "no vocabulary"}}

        problem = await previewed(app, {"refused": refused}, 422)

        assert codes(problem) == [("/base_model", "preview_tokenizer_unreadable")]

    async def test_for_a_script_that_says_nothing_is_the_file(self, app: JobsApp) -> None:
        script = app.services.home.scripts / "custom01.py"
        script.write_text(script.read_text() + "\n# edited\n")

        preview = await app.post("/methods/Custom01:preview", PREVIEW | {"rows": [2, 999]})

        known, missing = preview["rows"]
        assert json.loads(known["raw"]).keys() == {"question", "answer"}
        assert missing["problem"]["code"] == "line_without_row"
        assert [note["code"] for note in preview["notes"]] == ["preview_of_unknown_rows"]
        assert await jobs_of(app) == []

    async def test_of_pairs_needs_no_environment(self, app: JobsApp) -> None:
        patched = await app.client.patch(
            f"{API}/methods/Custom01", json={"data": {"learns_from": ["pair"]}}, headers={"If-Match": "*"}
        )
        assert patched.status_code == 200, patched.text

        preview = await app.post("/methods/Custom01:preview", PREVIEW | {"rows": [1]})

        (row,) = preview["rows"]
        assert (row["form"], row["kind"], row["sequences"]) == ("question-answer", "pair", [])
        assert await jobs_of(app) == []


class TestRefusals:
    async def test_without_a_worker_says_how_to_start_one(self, app: JobsApp, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(app.services.row_previews, "_nodes_expected_until", 0)
        async with app.database.writing() as session:
            await nodes.heartbeat(session, app.runner.node_id, now=START)

        assert (await app.post("/methods/Custom01:preview", PREVIEW, 409))["code"] == "no_node_alive"

    async def test_all_that_is_unknown_comes_at_once(self, app: JobsApp) -> None:
        problem = await app.post("/methods/Custom01:preview", {"base_model": "a", "dataset": "b"}, 422)

        assert codes(problem) == [("/dataset", "unknown_dataset"), ("/base_model", "unknown_base_model")]

    @pytest.mark.parametrize("rows", [[], [0], [1] * 21, ["one"]])
    async def test_rows_that_are_none(self, app: JobsApp, rows: list[Any]) -> None:
        problem = await app.post("/methods/Custom01:preview", PREVIEW | {"rows": rows}, 422)

        assert codes(problem)[0][0].startswith("/rows")

    async def test_unknown_method(self, app: JobsApp) -> None:
        assert (await app.post("/methods/nobody:preview", PREVIEW, 404))["code"] == "method_not_found"

    async def test_wrong_parameters(self, app: JobsApp) -> None:
        problem = await app.post("/methods/Custom01:preview", PREVIEW | {"parameters": {"epochs": "many"}}, 422)

        assert codes(problem)[0][0] == "/parameters/epochs"

    async def test_environment_that_is_not_built_says_how_to_build_it(
        self, app: JobsApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(app.services.row_previews, "_nodes_expected_until", 0)
        await app.post("/environments", {"name": "mine", "spec": None}, 201)
        stages = {"training": {"file": "custom01.py", "conda_env": "mine"}}
        patched: httpx.Response = await app.client.patch(
            f"{API}/methods/Custom01", json={"stages": stages}, headers={"If-Match": "*"}
        )
        assert patched.status_code == 200, patched.text

        problem = await app.post("/methods/Custom01:preview", PREVIEW, 409)

        assert problem["code"] == "preview_environment_not_built"
        assert "environments/mine:build" in problem["detail"]
        assert await jobs_of(app) == []

    async def test_base_model_that_is_not_made_yet(self, database: Database, tmp_path: Path) -> None:
        async with jobs_app(database, tmp_path / "samples", samples=True) as app:
            body = {"base_model": "tiny-base", "dataset": "sft-demo"}

            problem = await app.post("/methods/SFT-Demo:preview", body, 409)

        assert problem["code"] == "base_model_not_made"
