"""Asking a model over HTTP. A runner plays the node that runs the inference script."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from sqlmodel import col, select

from app.domain.enums import EndReason, JobKind, JobStatus, ModelState, TrainingType
from app.domain.training_types import TYPES
from app.executor.attempts.stage_arguments import Folders, Inputs, call_stage
from app.executor.runs.job_spec import InferenceRequest, JobSpec
from app.presets.sample_pictures import draw
from app.store import job_attempts, jobs, models
from app.store.job_attempts import Claim
from app.store.job_status import End
from app.store.session import Database
from app.store.tables import JobRow
from tests.api.jobs_app import API, JobsApp, codes, jobs_app, parse_events, served
from tests.job_rows import START, SUCCESS, claim
from tests.waiting import until

HELLO = {"messages": [{"role": "user", "content": "Hello?"}]}
INFERENCE = frozenset({JobKind.INFERENCE_CUSTOMIZED, JobKind.INFERENCE_COMPLETE})
CRASH = End(JobStatus.FAILED, EndReason.EXIT_CODE, {"exit_code": 1, "detail": "no weights", "log_tail": []})


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
    async with jobs_app(database, tmp_path / "home") as app:
        yield app


async def _make_model(app: JobsApp, state: ModelState = ModelState.CUSTOMIZED, **changes: Any) -> str:
    """Insert a model of Custom01 and return its id."""
    training = await app.submit(through="customized")
    folder = app.runner.folder(training["id"]).output
    folder.mkdir()
    async with app.database.reading() as session:
        job = await jobs.get(session, training["id"])
    base = JobSpec.of(job).base_model
    assert base is not None
    assert job.method_id is not None
    values: dict[str, Any] = {
        "name": "bicycles",
        "state": state,
        "training_type": TrainingType.CHAT,
        "path": app.services.home.relative(folder),
        "size_bytes": 1,
        "base_model_id": base.id,
        "base_model_name": base.name,
        "base_model_path": base.path,
        "job_id": job.id,
        "method_id": job.method_id,
        "method_version": job.method_version,
        **changes,
    }
    await app.runner.run(job.id)
    app.notifier.notified.clear()
    async with app.database.writing() as session:
        return (await models.create_model(session, models.NewModel(**values), now=START)).id


async def _questions(app: JobsApp) -> list[JobRow]:
    async with app.database.reading() as session:
        statement = select(JobRow).where(col(JobRow.kind).in_(INFERENCE)).order_by(col(JobRow.created_at))
        return list((await session.exec(statement)).all())


async def _next_question(app: JobsApp, environment: str = "base") -> Claim:
    """Claim and start the question as soon as it is there."""
    won = await until(
        lambda: claim(app.database, app.runner.node_id, kinds=INFERENCE, environments=(environment,)), "a question"
    )
    async with app.database.writing() as session:
        assert await job_attempts.mark_running(session, won, now=START)
    return won


async def _ask(
    app: JobsApp, model: str, body: dict[str, Any], *output: str, end: End = SUCCESS, **options: Any
) -> httpx.Response:
    """Ask, print `output` as the script would, end the job and return the response."""
    asking = asyncio.create_task(app.client.post(f"{API}/models/{model}/chat", json=body, **options))
    won = await _next_question(app)
    for line in output:
        app.runner.prints(won.job.id, line)
    await app.runner.end(won, end)
    response = await asking
    assert response.status_code == 200, response.text
    return response


def _said(text: str) -> str:
    return json.dumps({"status": "resp", "text": text}) + "\n"


class TestStream:
    async def test_pieces_come_in_order_and_noise_does_not(self, app: JobsApp) -> None:
        model = await _make_model(app)

        response = await _ask(app, model, HELLO, "Loading weights…\n", _said("Grüß "), _said("Gott 模"), "warning\n")

        events = parse_events(response.text)
        (job,) = await _questions(app)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert [(event.name, event.data) for event in events] == [
            ("piece", {"text": "Grüß "}),
            ("piece", {"text": "Gott 模"}),
            ("done", {"finish_reason": "stop", "job": job.id, "error": None, "reason_detail": None}),
        ]
        assert app.notifier.notified == [job.id]

    async def test_failure_of_the_script_is_told_with_its_reason(self, app: JobsApp) -> None:
        model = await _make_model(app)
        error = json.dumps({"status": "error", "error": "no tokenizer", "traceback": "..."}) + "\n"

        response = await _ask(app, model, HELLO, _said("Well"), error, end=CRASH, headers={"Accept-Language": "de"})

        piece, done = parse_events(response.text)
        assert piece.data == {"text": "Well"}
        assert (done.data["finish_reason"], done.data["error"]) == ("error", "no tokenizer")
        assert "Exit-Code 1" in done.data["reason_detail"]

    async def test_cancelled_question_says_so(self, app: JobsApp) -> None:
        model = await _make_model(app)

        response = await _ask(app, model, HELLO, end=End(JobStatus.CANCELLED, EndReason.CANCELLED, {}))

        (done,) = parse_events(response.text)
        assert done.data["finish_reason"] == "cancelled"


class TestWholeAnswer:
    @pytest.mark.parametrize(
        ("body", "headers"),
        [({**HELLO, "stream": False}, {}), (HELLO, {"Accept": "application/json"})],
        ids=["body", "header"],
    )
    async def test_is_one_document(self, app: JobsApp, body: dict[str, Any], headers: dict[str, str]) -> None:
        model = await _make_model(app)

        response = await _ask(app, model, body, _said("One "), _said("two."), headers=headers)

        (job,) = await _questions(app)
        assert response.headers["content-type"] == "application/json"
        assert response.json() == {
            "text": "One two.", "images": [], "finish_reason": "stop", "job": job.id, "error": None,
            "reason_detail": None,
        }  # fmt: skip

    async def test_body_wins_over_the_header(self, app: JobsApp) -> None:
        model = await _make_model(app)

        response = await _ask(
            app, model, {**HELLO, "stream": True}, _said("One"), headers={"Accept": "application/json"}
        )

        assert [event.name for event in parse_events(response.text)] == ["piece", "done"]


class TestPictures:
    """A model that generates images answers with addresses of pictures, which can be read."""

    PIXELS = b"\x89PNG\r\n\x1a\n..."

    async def _draw(self, app: JobsApp, *names: str, body: dict[str, Any]) -> httpx.Response:
        """Ask, write files as the script would, and end the job; `{job}` in a name is the job's id."""
        model = await _make_model(app, training_type=TrainingType.IMAGE_GENERATION)
        asking = asyncio.create_task(app.client.post(f"{API}/models/{model}/chat", json=HELLO | body))
        won = await _next_question(app)
        for name in names:
            (app.services.home.images / name.format(job=won.job.id)).write_bytes(self.PIXELS)
        await app.runner.end(won, SUCCESS)
        return await asking

    async def test_come_with_the_answer_and_can_be_read(self, app: JobsApp) -> None:
        names = ("{job}_002.png", "{job}_001.png", "{job}-other.png", "someone.png")

        answer = (await self._draw(app, *names, body={"stream": False, "batch_size": 2})).json()

        job = answer["job"]
        assert answer["finish_reason"] == "stop"
        assert answer["images"] == [f"/images/{job}_001.png", f"/images/{job}_002.png"]
        picture = await app.client.get(answer["images"][0])
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
        assert picture.content == self.PIXELS

    async def test_are_events_of_a_stream(self, app: JobsApp) -> None:
        response = await self._draw(app, "{job}.png", body={})

        image, done = parse_events(response.text)
        assert (image.name, image.data) == ("image", {"url": f"/images/{done.data['job']}.png"})

    async def test_that_were_not_drawn_are_an_error(self, app: JobsApp) -> None:
        answer = (await self._draw(app, body={"stream": False})).json()

        assert (answer["finish_reason"], answer["images"]) == ("error", [])
        assert "drew no picture" in answer["error"]

    async def test_wishes_reach_the_script(self, app: JobsApp) -> None:
        wishes = {"negative_prompt": "text", "batch_size": 3, "aspect_ratio": "16:9"}

        await self._draw(app, "{job}_001.png", body=wishes)

        (job,) = await _questions(app)
        question = JobSpec.of(job).question
        assert question is not None
        assert question.model_dump(include=set(wishes)) == wishes

    @pytest.mark.parametrize("name", ["nothing.png", "secret.txt", "..%2Fdeepe.db", "a.svg", ".png"])
    async def test_nothing_else_can_be_read(self, app: JobsApp, name: str) -> None:
        (app.services.home.images / "secret.txt").write_text("x")
        (app.services.home.images / "a.svg").write_text("<svg/>")

        response = await app.client.get(f"/images/{name}")

        assert response.status_code == 404

    @pytest.mark.parametrize("wish", [{"batch_size": 0}, {"aspect_ratio": "wide"}, {"aspect_ratio": "0:1"}])
    async def test_wishes_that_are_none(self, app: JobsApp, wish: dict[str, Any]) -> None:
        model = await _make_model(app)

        problem = await app.post(f"/models/{model}/chat", HELLO | wish, 422)

        assert codes(problem)[0][0] == f"/{next(iter(wish))}"


class TestThinking:
    WISHES: ClassVar[dict[str, Any]] = {"enable_thinking": False, "chat_template_kwargs": {"language": "de"}}

    async def test_reaches_a_script_that_declares_it(self, app: JobsApp) -> None:
        await app.post("/presets/SFT-Demo:install")
        method = (await app.client.get(f"{API}/methods/SFT-Demo")).json()
        model = await _make_model(app, method_id=method["id"], method_version=method["version"])

        asking = asyncio.create_task(app.post(f"/models/{model}/chat", HELLO | self.WISHES | {"stream": False}, 200))
        won = await _next_question(app, "trl")
        await app.runner.end(won, SUCCESS)
        await asking

        (job,) = await _questions(app)
        question = JobSpec.of(job).question
        assert question is not None
        assert question.model_dump(include=set(self.WISHES)) == self.WISHES

    async def test_is_refused_for_a_script_that_does_not(self, app: JobsApp) -> None:
        model = await _make_model(app)

        problem = await app.post(f"/models/{model}/chat", HELLO | self.WISHES, 422)

        assert codes(problem) == [(f"/{name}", "option_not_taken") for name in self.WISHES]
        assert await _questions(app) == []


STRICT_LOOP = """
import argparse
parser = argparse.ArgumentParser()
for name in open("names"):
    parser.add_argument("--" + name)
parser.parse_args()
"""


class TestQuestionJob:
    async def test_a_script_that_may_be_strict_gets_the_arguments_of_the_contract(self, app: JobsApp) -> None:
        (app.services.home.scripts / "ask_custom01.py").write_text(STRICT_LOOP)
        model = await _make_model(app)

        await _ask(app, model, HELLO, _said("Hi"))
        refused = await app.post(f"/models/{model}/chat", HELLO | {"enable_thinking": False}, 422)

        (job,) = await _questions(app)
        home = app.services.home
        inputs = Inputs(home.models / "base", None, home.runs / "model", "mine", home.runs / "out")
        called = call_stage(job, JobSpec.of(job), inputs, Folders(home.scripts, home.runs, home.scripts))
        names = [word.partition("=")[0] for word in called.arguments]
        assert "--base_model_path" in names
        assert "--model_path" not in names
        assert codes(refused) == [("/enable_thinking", "option_not_taken")]

    async def test_is_made_of_the_model_its_method_version_and_the_conversation(self, app: JobsApp) -> None:
        model = await _make_model(app, ModelState.COMPLETE)
        conversation = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Where is my bicycle?"},
        ]
        body = {"messages": conversation, "system_prompt": "Be brief.", "max_tokens": 7, "temperature": 0, "top_k": 1}

        await _ask(app, model, body, _said("Here."))

        (job,) = await _questions(app)
        spec = JobSpec.of(job)
        assert (job.kind, job.priority, job.environment, job.model_id) == (
            JobKind.INFERENCE_COMPLETE, -10, "base", model,
        )  # fmt: skip
        assert job.method_version == 1
        assert spec.script is not None
        assert spec.script.file == "ask_custom01.py"
        assert spec.declared is not None
        assert "prompt" in spec.declared
        assert spec.base_model is not None
        assert spec.base_model.name == "custom01-base"
        assert spec.question == InferenceRequest(
            prompt="Where is my bicycle?",
            history=({"role": "system", "content": "Be brief."}, *conversation),
            session_id=job.id,
            system_prompt="Be brief.",
            max_length=7,
            temperature=0.0,
            top_k=1,
        )

    async def test_script_is_that_of_the_version_which_made_the_model(self, app: JobsApp) -> None:
        model = await _make_model(app)
        script = app.services.home.scripts / "ask_custom01.py"
        pinned = script.stat().st_size
        script.write_text(script.read_text() + "\n# edited\n")
        await app.submit()  # takes the edit up as version 2

        await _ask(app, model, HELLO, _said("Hi"))

        (job,) = await _questions(app)
        used = JobSpec.of(job).script
        assert used is not None
        assert (job.method_version, used.size) == (1, pinned)

    async def test_inference_that_was_switched_on_later_answers_for_older_models(self, app: JobsApp) -> None:
        for switched in (False, True):
            stages = {"inference-customized": {"file": "ask_custom01.py", "conda_env": "base"} if switched else None}
            patch = {"inference": {"customized": switched}, "stages": stages}
            response = await app.client.patch(f"{API}/methods/Custom01", json=patch, headers={"If-Match": "*"})
            assert response.status_code == 200, response.text
            if not switched:
                model = await _make_model(app)
                refused = await app.post(f"/models/{model}/chat", HELLO, 409)
                assert refused["code"] == "model_cannot_be_asked"

        await _ask(app, model, HELLO, _said("Hi"))

        (job,) = await _questions(app)
        assert job.method_version == 3


class TestRefusals:
    async def test_unknown_model_is_404(self, app: JobsApp) -> None:
        assert (await app.post("/models/nobody/chat", HELLO, 404))["code"] == "model_not_found"

    async def test_online_model_is_409(self, app: JobsApp) -> None:
        model = await _make_model(app, ModelState.ONLINE, path=None)

        assert (await app.post(f"/models/{model}/chat", HELLO, 409))["code"] == "online_model_not_asked"

    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            ([], ("/messages", "messages_needed")),
            ([{"role": "user", "content": " \n"}], ("/messages/0/content", "question_empty")),
            ([{"role": "assistant", "content": "Hi"}], ("/messages/0/role", "last_message_not_user")),
            ([{"role": "ghost", "content": "Boo"}], ("/messages/0/role", "unknown_role")),
            ([{"role": "user"}], ("/messages/0/content", "field_required")),
            ([{"role": "user", "content": "a", "audio": []}], ("/messages/0/audio", "field_unknown")),
            ("Hello", ("/messages", "field_type")),
        ],
        ids=lambda value: value[1] if isinstance(value, tuple) else None,
    )
    async def test_conversation_that_is_none(self, app: JobsApp, messages: Any, expected: tuple[str, str]) -> None:
        model = await _make_model(app)

        problem = await app.post(f"/models/{model}/chat", {"messages": messages}, 422)

        assert codes(problem) == [expected]
        assert await _questions(app) == []

    @pytest.mark.parametrize(
        "body",
        [
            {"messages": [{"role": "user", "content": "x" * 128 * 1024}]},
            {"messages": [{"role": "user", "content": "not long, and one of very many of these"}] * 2_000},
            {"messages": [{"role": "user", "content": "模" * 25_000}]},
            {**HELLO, "system_prompt": "x" * 128 * 1024},
        ],
        ids=["one message", "many messages", "escaped characters", "system prompt"],
    )
    async def test_more_than_an_argument_takes_is_refused_before_anything_starts(
        self, app: JobsApp, body: dict[str, Any]
    ) -> None:
        model = await _make_model(app)

        problem = await app.post(f"/models/{model}/chat", body, 422)

        assert problem["code"] == "argument_too_long"
        assert await _questions(app) == []
        assert app.notifier.notified == []

    @pytest.mark.parametrize("option", [{"temperature": -1}, {"max_tokens": 0}, {"top_p": 2}, {"top_k": -1}])
    async def test_option_out_of_bounds(self, app: JobsApp, option: dict[str, float]) -> None:
        problem = await app.post("/models/nobody/chat", {**HELLO, **option}, 422)

        assert codes(problem)[0][0] == f"/{next(iter(option))}"


class TestShownPictures:
    PICTURE = draw("red-ring-16-16-11-128.png")
    URL = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"

    async def test_reach_the_script_as_paths_from_its_root(self, app: JobsApp) -> None:
        model = await _make_model(app, training_type=TrainingType.VISION_LANGUAGE)
        home = app.services.home
        (home.root / "multimodal" / "a.png").write_bytes(self.PICTURE)
        images = [{"data": "multimodal/a.png"}, {"data": self.URL}]

        await _ask(app, model, {"messages": [{"role": "user", "content": "Same?", "images": images}]}, _said("Yes"))

        (job,) = await _questions(app)
        question = JobSpec.of(job).question
        assert question is not None
        (turn,) = question.history
        lying, sent = (image["data"] for image in turn["images"])
        assert lying == "../multimodal/a.png"
        assert (home.scripts / sent).resolve() == (home.runs / job.id / "pictures" / "0-1.png").resolve()
        assert (home.scripts / sent).read_bytes() == self.PICTURE

    @pytest.mark.parametrize(
        ("data", "code"),
        [
            ("scripts/custom01.py", "picture_elsewhere"),
            ("a.png", "picture_elsewhere"),
            ("/etc/passwd", "picture_elsewhere"),
            ("multimodal/../scripts/custom01.py", "path_outside_folder"),
            ("multimodal/none.png", "path_not_found"),
            ("multimodal/", "invalid_path"),
            ("data:text/html;base64,AAAA", "picture_not_readable"),
            ("data:image/png;base64,A", "picture_not_readable"),
            ("data:image/svg;base64,AAAA", "picture_not_readable"),
        ],
    )
    async def test_that_cannot_be_used_leaves_nothing(self, app: JobsApp, data: str, code: str) -> None:
        model = await _make_model(app, training_type=TrainingType.VISION_LANGUAGE)
        before = sorted(app.services.home.runs.iterdir())
        images = [{"data": self.URL}, {"data": data}]

        problem = await app.post(
            f"/models/{model}/chat", {"messages": [{**HELLO["messages"][0], "images": images}]}, 422
        )

        assert codes(problem) == [("/messages/0/images/1/data", code)]
        assert sorted(app.services.home.runs.iterdir()) == before
        assert await _questions(app) == []

    @pytest.mark.parametrize("training_type", [one for one, rule in TYPES.items() if not rule.accepts_images])
    async def test_are_refused_for_a_model_that_cannot_see(self, app: JobsApp, training_type: TrainingType) -> None:
        model = await _make_model(app, training_type=training_type)
        before = sorted(app.services.home.runs.iterdir())
        body = {"messages": [{**HELLO["messages"][0], "images": [{"data": self.URL}]}]}

        problem = await app.post(f"/models/{model}/chat", body, 422)

        assert codes(problem) == [("/messages/0/images", "pictures_not_taken")]
        assert sorted(app.services.home.runs.iterdir()) == before


class TestCallerLeaves:
    @pytest.mark.parametrize("stream", [True, False])
    async def test_caller_who_goes_away_cancels_the_job(self, app: JobsApp, stream: bool) -> None:
        model = await _make_model(app)

        async with served(app) as client:
            asking = asyncio.create_task(client.post(f"{API}/models/{model}/chat", json={**HELLO, "stream": stream}))
            won = await _next_question(app)
            asking.cancel()
            await asyncio.wait({asking})
            await until(lambda: _is_cancelled(app, won.job.id), "the job goes on for nobody")

        assert app.notifier.notified == [won.job.id, won.job.id]


async def _is_cancelled(app: JobsApp, job_id: str) -> bool:
    async with app.database.reading() as session:
        return (await jobs.get(session, job_id)).cancel_requested_at is not None
