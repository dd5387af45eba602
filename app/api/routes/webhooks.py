"""Webhooks: addresses that receive a message when a job ends, and the messages written for them."""

from typing import Annotated, Final

from fastapi import Depends, Path, Query, Response
from sqlmodel.ext.asyncio.session import AsyncSession

from app.api.conditional import IfMatch, etag_of
from app.api.dependencies import ReadSession, Services, ServicesDep, WriteSession, after_commit
from app.api.errors import problem_responses
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routing import Router
from app.api.schemas.webhooks import (
    DeliveryRead,
    WebhookChange,
    WebhookCreate,
    WebhookRead,
    delivery_read,
    webhook_read,
)
from app.domain.access import Permission
from app.domain.enums import DeliveryState
from app.domain.errors import InvalidRequest
from app.executor.maintenance.webhooks import WebhookInactive, version_of
from app.store.webhooks import DeliveryNotFound, WebhookNotFound

# an address often holds a secret
router = Router(changes=Permission.MANAGE, reads=Permission.MANAGE, prefix="/api/v1", tags=["webhooks"])

Paging = Annotated[PageParams, Depends(page_params("created_at", default="-created_at"))]
WebhookId = Annotated[
    str, Path(description="Id of the webhook.", examples=["7a1c0b52-3d4e-4f5a-8b6c-9d8e7f6a5b4c"], max_length=100)
]
"""`{webhook}` in the addresses."""
DeliveryId = Annotated[
    str, Path(description="Id of the message.", examples=["msg_3f1e5d7c9b8a4f6e8d7c6b5a49382716"], max_length=100)
]
"""`{delivery}` in the addresses."""

_NOT_FOUND: Final = (WebhookNotFound,)


@router.get("/webhooks", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_webhooks(session: ReadSession, services: ServicesDep, paging: Paging) -> Page[WebhookRead]:
    """List the webhooks."""
    found = await services.webhooks.page(session, paging)
    return paging.page([webhook_read(row) for row in found.rows], found.next_position)


@router.post(
    "/webhooks",
    status_code=201,
    response_model=WebhookRead,
    responses=problem_responses(InvalidRequest, IdempotencyKeyReused),
)
async def create_webhook(
    webhook: WebhookCreate, session: WriteSession, services: ServicesDep, creation: CreationDep
) -> Response:
    """Register an address that receives a message when jobs end. Only the first response shows the secret.

    Messages are POSTed as JSON and signed by the specification Standard Webhooks. They come at least once, always
    under the same `webhook-id`, in no particular order.
    """

    async def create() -> WebhookRead:
        row = await services.webhooks.create(
            session, url=webhook.url, events=webhook.events, active=webhook.active, secret=webhook.secret
        )
        return webhook_read(row, with_secret=True)

    return await creation.answer(
        create, headers=lambda body: {"Location": f"/api/v1/webhooks/{body['id']}"}, shown_once=("secret",)
    )


@router.get("/webhooks/{webhook}", responses=problem_responses(*_NOT_FOUND))
async def get_webhook(
    webhook: WebhookId, session: ReadSession, services: ServicesDep, response: Response
) -> WebhookRead:
    """Read a webhook; its secret is not shown."""
    row = await services.webhooks.get(session, webhook)
    response.headers["ETag"] = etag_of(version_of(row))
    return webhook_read(row)


@router.patch("/webhooks/{webhook}", responses=problem_responses(*_NOT_FOUND, InvalidRequest))
async def update_webhook(
    webhook: WebhookId,
    change: WebhookChange,
    session: WriteSession,
    services: ServicesDep,
    if_match: IfMatch,
    response: Response,
) -> WebhookRead:
    """Change a webhook. A secret that changed is shown once; what still waits is signed with the new one."""
    row = await services.webhooks.change(session, webhook, change.patch(), check=if_match.require)
    response.headers["ETag"] = etag_of(version_of(row))
    return webhook_read(row, with_secret=change.rotate_secret or change.secret is not None)


@router.delete("/webhooks/{webhook}", status_code=204, responses=problem_responses(*_NOT_FOUND))
async def delete_webhook(webhook: WebhookId, session: WriteSession, services: ServicesDep, if_match: IfMatch) -> None:
    """Delete a webhook and its messages; what still waits is not sent."""
    await services.webhooks.delete(session, webhook, check=if_match.require)


@router.post("/webhooks/{webhook}:test", status_code=201, responses=problem_responses(*_NOT_FOUND, WebhookInactive))
async def test_webhook(webhook: WebhookId, session: WriteSession, services: ServicesDep) -> DeliveryRead:
    """Send a message of the type `webhook.test`, as every other is sent; look at it to see what came of it."""
    row = await services.webhooks.test(session, webhook)
    _wake_after_commit(session, services)
    return delivery_read(row)


@router.get("/webhooks/{webhook}/deliveries", responses=problem_responses(*_NOT_FOUND, InvalidCursor, InvalidSort))
async def list_deliveries(
    webhook: WebhookId,
    session: ReadSession,
    services: ServicesDep,
    paging: Paging,
    state: Annotated[DeliveryState | None, Query(description="Only messages in this state.")] = None,
) -> Page[DeliveryRead]:
    """List the messages of a webhook."""
    found = await services.webhooks.deliveries(session, webhook, paging, state=state)
    return paging.page([delivery_read(row) for row in found.rows], found.next_position)


@router.post(
    "/webhooks/{webhook}/deliveries/{delivery}:redeliver",
    responses=problem_responses(*_NOT_FOUND, DeliveryNotFound, WebhookInactive),
)
async def redeliver_delivery(
    webhook: WebhookId, delivery: DeliveryId, session: WriteSession, services: ServicesDep
) -> DeliveryRead:
    """Send a message again, now, under the same id; also one that was delivered or given up."""
    row = await services.webhooks.redeliver(session, webhook, delivery)
    _wake_after_commit(session, services)
    return delivery_read(row)


def _wake_after_commit(session: AsyncSession, services: Services) -> None:
    """Have this process look for what is due once it can be seen."""

    async def wake() -> None:
        services.webhook_sender.wake()

    after_commit(session, wake)
