"""The nine routes of DeepExtension's runner.

Bodies are read here and not by FastAPI: which status, and which form of error, a bad body gets depends on the route.
A caller that goes away ends nothing: what it asked for runs on as a job.
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from app.api.runner.answers import (
    HEARTBEAT,
    MISSING,
    STREAM_HEADERS,
    STREAM_TYPE,
    accepted,
    bad_request,
    deployment_answer,
    frame,
    html_answer,
    json_answer,
    saving_answer,
)
from app.domain import runner_calls as calls
from app.domain.plain_text import storable
from app.domain.runner_calls import MAX_KEY_LENGTH, Body, Call, missing
from app.domain.texts import DEFAULT_LANGUAGE, text
from app.executor.attempts.script_status import FAILED, RUNNING, SUCCESS
from app.executor.jobs.chat_service import AnswerEnd, AnswerText, ChatService
from app.executor.jobs.runner_calls import RunnerCalls
from app.executor.runs.inference_protocol import FinishReason
from app.store.home import Home

HEARTBEAT_SECONDS: Final = 2.0
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
_NOT_JSON = (
    "Did not attempt to load JSON data because the request Content-Type was not &#39;application/json&#39;.",
    "The browser (or proxy) sent a request that this server could not understand.",
    "The server encountered an internal error: the body must be a JSON object.",
)
_NO_OBJECT: Final = 500
_STATUSES = {415: "Unsupported Media Type", 400: "Bad Request", 500: "Internal Server Error"}


@dataclass(frozen=True)
class BodyUnusable(Exception):
    """The body is no JSON object: the status and the sentence of the web framework that the backend was written for."""

    status: int
    sentence: str

    @property
    def line(self) -> str:
        """What the routes say that report it in a JSON answer."""
        sentence = self.sentence.replace("&#39;", "'")
        return f"{self.status} {_STATUSES[self.status]}: {sentence}"


class RunnerRoutes:
    """Answers the backend. `heartbeat_seconds`: how long a stream is silent at most."""

    def __init__(
        self, *, runner: RunnerCalls, chat: ChatService, home: Home, heartbeat_seconds: float = HEARTBEAT_SECONDS
    ) -> None:
        self._runner = runner
        self._chat = chat
        self._home = home
        self._heartbeat_seconds = heartbeat_seconds

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/health", self.health, methods=["GET"]),
            Route("/transferTrain", _or_html(self.train), methods=["POST"]),
            Route("/trainingStatus/{task}", self.status, methods=["GET"]),
            Route("/mergeModel", _or_html(self.save), methods=["POST"]),
            Route("/deployModel", _or_html(self.deploy), methods=["POST"]),
            Route("/chat", self.ask, methods=["POST"]),
            Route("/chatTest", self.ask, methods=["POST"]),
            Route("/imageProcessingByModel", self.draw, methods=["POST"]),
            Route("/getGeneratedImages/{task}", self.pictures, methods=["GET"]),
        ]

    async def health(self, request: Request) -> Response:
        return json_answer({"status": "OK"})

    async def train(self, request: Request) -> Response:
        """Begin a training; how it goes stands in its status."""
        body = await _body(request)
        task = body.get("train_id")
        if refusal := await self._refusal(body, calls.TRAINING_REQUIRED, task):
            return refusal
        await self._runner.start(calls.training_call(body))
        return accepted(task)

    async def status(self, request: Request) -> Response:
        """Return the status of a training, saving, deployment or generation of pictures."""
        return json_answer(await self._runner.status(request.path_params["task"]))

    async def save(self, request: Request) -> Response:
        """Merge an adapter into its base model; answer when that has ended."""
        body = await _body(request)
        task = body.get("trainId")
        if refusal := await self._refusal(body, calls.SAVING_REQUIRED, task, started=calls.SAVING_LABEL):
            return refusal
        return saving_answer(await self._ended(calls.saving_call(body)), task)

    async def deploy(self, request: Request) -> Response:
        """Deploy a model; answer when that has ended."""
        body = await _body(request)
        task = body.get("trainId")
        label = calls.DEPLOYMENT_LABEL
        if refusal := await self._refusal(body, calls.DEPLOYMENT_REQUIRED, task, started=label, as_failed=True):
            return refusal
        folder = self._home.seen_by_scripts(str(body["folderPath"]))
        if not await asyncio.to_thread(folder.is_dir):
            key = calls.key_of(task)
            await self._runner.refuse(["folderPath"], key=key, seq=body["seq"], started=label, as_failed=True)
            return bad_request(task, f"folderPath: {body['folderPath']} is not a folder")
        return deployment_answer(await self._ended(calls.deployment_call(body, folder=str(folder))), task)

    async def ask(self, request: Request) -> Response:
        """Stream the answer of a model."""
        try:
            body = await _body(request)
        except BodyUnusable as error:
            if error.status != _NO_OBJECT:
                return json_answer({"status": "error", "error": f"Request parsing failed: {error.line}"}, 400)
            body = {}  # an array lacks the members
        if missing(body, calls.QUESTION_REQUIRED):
            return json_answer({"status": "error", "error": f"{MISSING}: modelName and prompt"}, 400)
        if lacking := missing(body, ["baseModelPath"]):
            frames = _one(frame(finish_reason=f"{MISSING}: {', '.join(lacking)}", text=""))
        else:
            job = await self._runner.start(calls.question_call(body))
            frames = self._answer(job.id)
        return StreamingResponse(frames, media_type=STREAM_TYPE, headers=STREAM_HEADERS)

    async def draw(self, request: Request) -> Response:
        """Begin to generate pictures; they are asked for by the address in the answer."""
        try:
            body = await _body(request)
        except BodyUnusable as error:
            return json_answer({"code": -1, "message": error.line})
        task = str(uuid4())
        await self._runner.start(calls.pictures_call(body, task=task), job_id=task)
        return json_answer({"code": 0, "message": "", "data": {"imageUrlList": [f"/getGeneratedImages/{task}"]}})

    async def pictures(self, request: Request) -> Response:
        """Return the addresses of generated pictures, or how far they are."""
        task = request.path_params["task"]
        record = await self._runner.status(task)
        if record is None:
            message = "Error: 'NoneType' object has no attribute 'get'"
            return json_answer({"code": -1, "message": message, "data": {"imageUrlList": []}}, 500)
        nothing = {"message": "", "data": {}}
        match record.get("status"):
            case int(status) if status == SUCCESS:
                try:
                    names = await asyncio.to_thread(_pictures_of, self._home.images, task)
                except FileNotFoundError:
                    return json_answer({"code": -1, **nothing}, 404)
                addresses = [f"/images/{name}" for name in names]
                return json_answer(
                    {"code": 0, "message": f"Find {len(names)} images", "data": {"imageUrlList": addresses}}
                )
            case int(status) if status == RUNNING:
                return json_answer({"code": 2, **nothing})
            case int(status) if status == FAILED:
                return json_answer({"code": -1, **nothing}, 400)
            case _:
                return json_answer({"code": 5, **nothing})

    # ---- inside -----------------------------------------------------------------------------------------------------

    async def _refusal(
        self, body: Body, required: Sequence[str], task: Any, *, started: str | None = None, as_failed: bool = False
    ) -> Response | None:
        """Return the answer to a call that cannot be a job; None if it can."""
        key = calls.key_of(task)
        if key is not None and (len(key) > MAX_KEY_LENGTH or key != storable(key)):
            return bad_request(task, f"The id of the task must be text of at most {MAX_KEY_LENGTH} characters")
        if not missing(body, required):
            return None
        await self._runner.refuse(required, key=key, seq=body.get("seq"), started=started, as_failed=as_failed)
        return bad_request(task)

    async def _ended(self, call: Call) -> Any:
        job = await self._runner.start(call)
        return await self._runner.wait(job.id)

    async def _answer(self, job_id: str) -> AsyncGenerator[bytes, None]:
        """Yield the frames of an answer, and a newline whenever nothing came for a while."""
        coming: asyncio.Task[Any] | None = None
        async with aclosing(self._chat.follow(job_id, cancel_if_left=False)) as events:
            try:
                while True:
                    coming = coming or asyncio.ensure_future(anext(events))
                    await asyncio.wait({coming}, timeout=self._heartbeat_seconds)
                    if not coming.done():
                        yield HEARTBEAT
                        continue
                    event, coming = coming.result(), None
                    match event:
                        case AnswerText():
                            yield frame(text=event.text)
                        case AnswerEnd():
                            if event.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
                                yield frame(finish_reason=await self._why(event))
                            return
            finally:
                if coming is not None:
                    coming.cancel()
                    await asyncio.wait({coming})

    async def _why(self, end: AnswerEnd) -> str:
        """Return why there is no whole answer, never nothing."""
        if end.error is not None:
            return end.error
        outcome = await self._runner.wait(end.job_id)
        return text(f"reason_{outcome.job.reason}", DEFAULT_LANGUAGE, **outcome.job.reason_params)


async def _body(request: Request) -> dict[str, Any]:
    """Return the body, a JSON object. Raise `BodyUnusable` for anything else."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not (
        content_type.startswith("application/") and content_type.endswith("+json")
    ):
        raise BodyUnusable(415, _NOT_JSON[0])
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise BodyUnusable(400, _NOT_JSON[1]) from error
    if not isinstance(body, dict):
        raise BodyUnusable(_NO_OBJECT, _NOT_JSON[2])
    return body


def _or_html(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Return the route with a page of HTML for a body that cannot be used."""

    async def answer(request: Request) -> Response:
        try:
            return await route(request)
        except BodyUnusable as error:
            return html_answer(error.status, error.sentence)

    return answer


async def _one(content: bytes) -> AsyncGenerator[bytes, None]:
    yield content


def _pictures_of(folder: Path, task: str) -> list[str]:
    """Return the names of the pictures that begin with the id of the task, in order. Blocks."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.startswith(task) and entry.name.lower().endswith(_PICTURES) and entry.is_file()
    )
