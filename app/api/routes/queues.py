"""Queues: how many jobs may run at once, together and for each user."""

from typing import Annotated

from fastapi import Depends, Path, Response

from app.api.conditional import IfMatch, StaleVersion, etag_of
from app.api.dependencies import ReadSession, ServicesDep, WriteSession
from app.api.errors import PreconditionRequired, problem_responses
from app.api.list_response import page_by_name
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routing import Router
from app.api.schemas.queues import QueueLimitsWrite, QueueRead, queue_read
from app.domain.access import Permission
from app.registry.nodes.queues import QueueNotFound, QueueView

router = Router(changes=Permission.ADMINISTER, prefix="/api/v1", tags=["queues"])

Paging = Annotated[PageParams, Depends(page_params("name", default="name"))]
QueueRef = Annotated[str, Path(description="Name of the queue.", examples=["default"])]
"""`{queue}` in the addresses."""


@router.get("/queues", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_queues(session: ReadSession, services: ServicesDep, paging: Paging) -> Page[QueueRead]:
    """List the queues that have limits or jobs."""
    views = await services.queues.views(session)
    return page_by_name([queue_read(view) for view in views], paging, name=lambda view: view.name)


@router.get("/queues/{queue}", responses=problem_responses(QueueNotFound))
async def get_queue(queue: QueueRef, session: ReadSession, services: ServicesDep, response: Response) -> QueueRead:
    """Read a queue. Every name is one: jobs may be submitted to it, without limits until some are set."""
    return _tagged(await services.queues.get(session, queue), response)


@router.put("/queues/{queue}", responses=problem_responses(QueueNotFound, PreconditionRequired, StaleVersion))
async def set_queue_limits(
    queue: QueueRef,
    limits: QueueLimitsWrite,
    session: WriteSession,
    services: ServicesDep,
    if_match: IfMatch,
    response: Response,
) -> QueueRead:
    """Set the limits of a queue. They hold from the next start on; what runs already goes on."""
    view = await services.queues.set_limits(
        session,
        queue,
        max_live=limits.max_live,
        max_live_per_user=limits.max_live_per_user,
        check=if_match.require,
    )
    return _tagged(view, response)


@router.delete(
    "/queues/{queue}", status_code=204, responses=problem_responses(QueueNotFound, PreconditionRequired, StaleVersion)
)
async def delete_queue_limits(queue: QueueRef, session: WriteSession, services: ServicesDep, if_match: IfMatch) -> None:
    """Remove the limits of a queue. Its jobs stay."""
    await services.queues.delete_limits(session, queue, check=if_match.require)


def _tagged(view: QueueView, response: Response) -> QueueRead:
    response.headers["ETag"] = etag_of(view.version)
    return queue_read(view)
