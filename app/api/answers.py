"""Answer with what a job does: the job that was ordered, a model's answer, a preview of rows."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from sqlmodel.ext.asyncio.session import AsyncSession

from app.api.dependencies import Services, notify_after_commit
from app.api.schemas.chat import ChatAnswer, ChatEnd
from app.api.schemas.jobs import JobRead, job_read, reason_detail
from app.api.sse import ServerEvent
from app.domain.enums import EndReason
from app.domain.errors import InvalidRequest, Violation
from app.domain.texts import Language
from app.executor.jobs.chat_service import AnswerEnd, AnswerImage, AnswerText
from app.executor.jobs.job_views import JobDetails
from app.executor.jobs.row_previews import Preview, PreviewRequest
from app.executor.runs.inference_protocol import FinishReason
from app.store import jobs

Answer = TypeVar("Answer")


def ordered(
    details: JobDetails,
    session: AsyncSession,
    services: Services,
    language: Language,
    response: Response,
    *,
    is_new: bool,
) -> JobRead:
    """Return the job that was ordered (201), or is at it already (200)."""
    notify_after_commit(session, services.notifier, details.view.job.id)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/api/v1/jobs/{details.view.job.id}"
    return job_read(details, language)


async def answer_events(services: Services, job_id: str, language: Language) -> AsyncGenerator[ServerEvent, None]:
    """Yield the answer as it grows. Closing the generator before the end cancels the job."""
    async with aclosing(services.chat.follow(job_id)) as answer:
        async for event in answer:
            match event:
                case AnswerText():
                    yield ServerEvent({"text": event.text}, event="piece")
                case AnswerImage():
                    yield ServerEvent({"url": event.url}, event="image")
                case AnswerEnd():
                    yield ServerEvent(await _end(services, event, language), event="done")


async def whole_answer(request: Request, services: Services, job_id: str, language: Language) -> ChatAnswer:
    """Return the complete answer. Cancel the job if the caller disconnects."""
    gone = ChatAnswer(
        text="", images=[], finish_reason=FinishReason.CANCELLED, job=job_id, error=None, reason_detail=None
    )
    return await while_connected(request, _collect(services, job_id, language), otherwise=gone)


async def preview_answer(request: Request, services: Services, wanted: PreviewRequest) -> Preview:
    """Return the preview. Cancel its job if the caller disconnects."""
    gone = Preview(wanted.method, wanted.base_model, wanted.dataset, environment="", rows=(), total=0)
    return await while_connected(request, services.row_previews.preview(wanted), otherwise=gone)


async def measured_rows(
    request: Request, services: Services, dataset: str, method: str | None, base_model: str | None
) -> Preview | None:
    """Return a preview for its lengths; None where neither a method nor a base model is named."""
    if method is None and base_model is None:
        return None
    if method is None or base_model is None:
        missing = "method" if method is None else "base_model"
        raise InvalidRequest([Violation(f"/{missing}", "tokenizer_half_named", {})])
    await request.body()  # empty; only what comes after it is the news that the caller is gone
    return await preview_answer(request, services, PreviewRequest(method, base_model, dataset, None, {}))


async def while_connected(request: Request, work: Coroutine[Any, Any, Answer], *, otherwise: Answer) -> Answer:
    """Return the result of `work`. Cancel it if the caller disconnects, and return `otherwise`, which is not read."""
    answering = asyncio.create_task(work)
    # the body was read: what comes next is the news that the caller is gone
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.wait({answering, leaving})
    return otherwise if answering.cancelled() else answering.result()


async def _collect(services: Services, job_id: str, language: Language) -> ChatAnswer:
    texts: list[str] = []
    images: list[str] = []
    end: ChatEnd | None = None
    async with aclosing(services.chat.follow(job_id)) as answer:
        async for event in answer:
            match event:
                case AnswerText():
                    texts.append(event.text)
                case AnswerImage():
                    images.append(event.url)
                case AnswerEnd():
                    end = await _end(services, event, language)
    assert end is not None, "an answer always has an end"
    return ChatAnswer(text="".join(texts), images=images, **end.model_dump())


async def _end(services: Services, end: AnswerEnd, language: Language) -> ChatEnd:
    detail = None
    if end.reason not in (None, EndReason.COMPLETED):
        async with services.database.reading() as session:
            detail = reason_detail(await jobs.get(session, end.job_id), language)
    return ChatEnd(finish_reason=end.finish_reason, job=end.job_id, error=end.error, reason_detail=detail)
