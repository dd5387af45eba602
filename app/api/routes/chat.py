"""Ask a model."""

from typing import Annotated, Final

from fastapi import Header, Request, Response

from app.api.answers import answer_events, whole_answer
from app.api.dependencies import ServicesDep
from app.api.errors import problem_responses
from app.api.language import RequestLanguage
from app.api.routes.models import ModelRef
from app.api.routing import Router
from app.api.schemas.chat import ChatAnswer, ChatRequest
from app.api.sse import event_stream
from app.domain.access import Permission
from app.domain.errors import InvalidRequest
from app.domain.rendering import ArgumentTooLong
from app.executor.jobs.inference_requests import ModelCannotBeAsked, OnlineModelNotAsked
from app.store import job_status, jobs
from app.store.clock import database_now
from app.store.models import ModelNameAmbiguous, ModelNotFound

router = Router(changes=Permission.RUN, prefix="/api/v1", tags=["models"])

_EVENTS: Final = """retry: 2000

event: piece
data: {"text":"8 is"}

event: piece
data: {"text":" larger."}

event: done
data: {"finish_reason":"stop","job":"0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c","error":null,"reason_detail":null}

"""


@router.post(
    "/models/{model}/chat",
    response_class=Response,
    responses={
        200: {
            "description": "The answer: events `piece` (`image` from image models) and at last `done`, or one JSON "
            "document. An error on the way is an event `problem`.",
            "model": ChatAnswer,
            # generated clients read the first kind
            "content": {
                "application/json": {},
                "text/event-stream": {"schema": {"type": "string"}, "example": _EVENTS},
            },
        },
        **problem_responses(
            ModelNotFound, ModelNameAmbiguous, OnlineModelNotAsked, ModelCannotBeAsked, ArgumentTooLong, InvalidRequest
        ),
    },
)
async def chat_with_model(
    model: ModelRef,
    chat: ChatRequest,
    request: Request,
    services: ServicesDep,
    language: RequestLanguage,
    accept: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Response:
    """Send messages to a model and stream its answer. The method's inference script runs.

    Every inference request is a job of its own. Disconnecting before the end cancels it.
    """
    async with services.inference_requests.received(chat.conversation()) as received:
        job = await services.inference_requests.plan(model, received)
        async with services.database.writing() as session:
            given_way = await job_status.cancel_comparisons(session, now=await database_now(session))
            await jobs.insert(session, [job])
    for waiting in (*given_way, job.id):
        services.notifier.notify(waiting)
    if _wants_stream(chat, accept):
        return event_stream(request, answer_events(services, job.id, language))
    answer = await whole_answer(request, services, job.id, language)
    return Response(answer.model_dump_json(), media_type="application/json")


def _wants_stream(chat: ChatRequest, accept: str | None) -> bool:
    if chat.stream is not None:
        return chat.stream
    kinds = accept or ""
    return "application/json" not in kinds or "text/event-stream" in kinds
