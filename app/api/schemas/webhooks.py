"""Over the wire: webhooks and their messages."""

from datetime import datetime
from typing import Any

from pydantic import Field, StrictBool

from app.api.schemas.common import RequestBody
from app.domain.enums import DeliveryState
from app.domain.values import Value
from app.domain.webhooks import DEFAULT_EVENTS, MAX_URL_LENGTH, WebhookEvent
from app.executor.maintenance.webhooks import WebhookPatch
from app.store.tables import DeliveryRow, WebhookRow

_ID = "7a1c0b52-3d4e-4f5a-8b6c-9d8e7f6a5b4c"
_MESSAGE = "msg_3f1e5d7c9b8a4f6e8d7c6b5a49382716"
_URL = "https://example.com/hooks/deepe"
_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"  # noqa: S105 - an example
_MAX_EVENTS = 100
_KEY_RULE = "`whsec_` and 24 to 64 random bytes in base64."
_BODY = {
    "type": "job.succeeded",
    "timestamp": "2026-05-04T12:00:00+00:00",
    "data": {"id": "0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c", "name": "SFT-Demo", "stage": "training"},
}


class WebhookCreate(RequestBody):
    """An address to which events are published."""

    url: str = Field(description="http or https.", max_length=MAX_URL_LENGTH, examples=[_URL])
    events: list[WebhookEvent] = Field(
        default=list(DEFAULT_EVENTS),
        max_length=_MAX_EVENTS,
        description="What to tell. `job` is a training, a saving or a deployment; inference requests and builds of "
        "environments are published only when they are named.",
        examples=[["job.succeeded", "job.failed", "job.cancelled"]],
    )
    active: StrictBool = True
    secret: str | None = Field(
        default=None, description=f"{_KEY_RULE} Default: a new one.", examples=[None], max_length=200
    )


class WebhookChange(RequestBody):
    """What changes; members that are missing stay."""

    url: str | None = Field(default=None, max_length=MAX_URL_LENGTH, examples=[_URL])
    events: list[WebhookEvent] | None = Field(default=None, max_length=_MAX_EVENTS, examples=[["job.failed"]])
    active: StrictBool | None = Field(
        default=None, description="False: nothing is written or sent; what waits is sent when it is true again."
    )
    secret: str | None = Field(default=None, description=_KEY_RULE, examples=[_SECRET], max_length=200)
    rotate_secret: StrictBool = Field(default=False, description="Make a new secret; the answer shows it once.")

    def patch(self) -> WebhookPatch:
        """Return the change as a value."""
        return WebhookPatch(
            url=self.url,
            events=self.events,
            active=self.active,
            secret=self.secret,
            rotate_secret=self.rotate_secret,
        )


class WebhookRead(Value):
    """An address to which events are published."""

    id: str = Field(examples=[_ID])
    url: str = Field(examples=[_URL])
    events: list[WebhookEvent]
    active: bool
    secret: str | None = Field(
        description="The key of the signatures; shown when it is made or changed, else null.", examples=[_SECRET]
    )
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime
    updated_at: datetime


class DeliveryRead(Value):
    """A message of a webhook, and how far it has come."""

    id: str = Field(description="Sent as `webhook-id`; the same at every try.", examples=[_MESSAGE])
    event: str = Field(examples=["job.succeeded"])
    job: str | None = Field(description="Id of the job; null: a test.")
    state: DeliveryState = Field(description="`given_up`: it is not sent again automatically.")
    tries: int = Field(description="How often it was sent, or the sending was begun.", examples=[1])
    next_try_at: datetime | None = Field(description="Null: delivered, or given up.")
    last_status: int | None = Field(description="HTTP status of the last answer.", examples=[200])
    last_error: str | None = Field(description="Why the last try failed.", examples=[None])
    body: dict[str, Any] = Field(description="What is sent.", examples=[_BODY])
    created_at: datetime
    delivered_at: datetime | None


def webhook_read(row: WebhookRow, *, with_secret: bool = False) -> WebhookRead:
    """Return the webhook as callers see it."""
    return WebhookRead(
        id=row.id,
        url=row.url,
        events=[WebhookEvent(event) for event in row.events],
        active=row.active,
        secret=row.secret if with_secret else None,
        created_by=row.created_by,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def delivery_read(row: DeliveryRow) -> DeliveryRead:
    """Return the message as callers see it."""
    return DeliveryRead(
        id=row.id,
        event=row.event,
        job=row.job_id or None,
        state=row.state,
        tries=row.tries,
        next_try_at=row.next_try_at,
        last_status=row.last_status,
        last_error=row.last_error,
        body=row.body,
        created_at=row.created_at,
        delivered_at=row.delivered_at,
    )
