"""Webhooks and their messages: an outbox that is filled in the transaction of the change itself.

`publish` is called by the one writer of a job's status. A message is taken by a conditional update that says when it is
due again, so a sender that dies leaves it to the others; it is sent at least once, always under the same id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import DeliveryState
from app.domain.errors import NotFound
from app.domain.webhooks import WebhookEvent
from app.store.paging import PageRequest, Slice, page_slice
from app.store.tables import PENDING_DELIVERY, DeliveryRow, JobRow, WebhookRow


class WebhookNotFound(NotFound):
    """No webhook has this id."""

    code = "webhook_not_found"


class DeliveryNotFound(NotFound):
    """The webhook has no message of this id."""

    code = "delivery_not_found"


@dataclass(frozen=True)
class Message:
    """A message that this process may send now; `tries` guards the writing of its outcome."""

    id: str
    webhook_id: str
    body: Mapping[str, Any]
    tries: int


@dataclass(frozen=True)
class Outcome:
    """The outcome of a try. Neither delivered nor `next_delay`: it is not tried again."""

    delivered: bool
    status: int | None
    error: str | None
    next_delay: timedelta | None = None


# ---- the outbox -----------------------------------------------------------------------------------------------------


def has_subscribers() -> sa.ScalarSelect[bool]:
    """Return the expression that says whether a webhook is active; it costs no statement of its own."""
    return sa.select(sa.exists(sa.select(sa.literal(1)).where(col(WebhookRow.active).is_(True)))).scalar_subquery()


async def publish(session: AsyncSession, job: JobRow, event: WebhookEvent, *, now: datetime) -> None:
    """Write one message for every active webhook of the job's project that asked for the event."""
    # locked against deletion: a message must not refer to a webhook that goes in the same moment
    subscribed = (
        select(WebhookRow)
        # said here: a worker's session sees those of all projects
        .where(col(WebhookRow.active).is_(True), WebhookRow.project_id == job.project_id)
        .order_by(col(WebhookRow.id))
    )
    for webhook in (await session.exec(subscribed.with_for_update(read=True, key_share=True))).all():
        if event in webhook.events:
            body = {"type": event.value, "timestamp": now.isoformat(), "data": _job_data(job)}
            session.add(_delivery(webhook.id, event=event.value, job_id=job.id, body=body, now=now))
    await session.flush()


async def add_test(session: AsyncSession, webhook: WebhookRow, event: str, *, now: datetime) -> DeliveryRow:
    """Write a test message."""
    body = {"type": event, "timestamp": now.isoformat(), "data": {"webhook": webhook.id}}
    row = _delivery(webhook.id, event=event, job_id="", body=body, now=now)
    session.add(row)
    await session.flush()
    return row


def _delivery(webhook_id: str, *, event: str, job_id: str, body: dict[str, Any], now: datetime) -> DeliveryRow:
    return DeliveryRow(
        id=f"msg_{uuid4().hex}",
        webhook_id=webhook_id,
        job_id=job_id,
        event=event,
        body=body,
        state=DeliveryState.PENDING,
        next_try_at=now,
        created_at=now,
    )


def _job_data(job: JobRow) -> dict[str, Any]:
    """Return the job's data in a message; its members are named as in the API."""
    return {
        "id": job.id,
        "name": job.name,
        "stage": job.kind.value,
        "status": job.status.value,
        "reason": job.reason.value if job.reason else None,
        "chain": job.chain_id,
        "attempts": job.attempts,
        "method": job.method_name,
        "method_version": job.method_version,
        "environment": job.environment,
        "model": job.model_id,
        "result_model": job.result_model_id,
        "queue": job.queue,
        "submitted_by": job.submitted_by,
        "created_at": job.created_at.isoformat(),
        "started_at": job.started_at.isoformat() if job.started_at else None,
        "finished_at": job.finished_at.isoformat() if job.finished_at else None,
    }


# ---- webhooks -------------------------------------------------------------------------------------------------------


async def insert(session: AsyncSession, webhook: WebhookRow) -> None:
    """Insert the webhook."""
    session.add(webhook)
    await session.flush()


async def get(session: AsyncSession, webhook_id: str, *, lock: bool = False) -> WebhookRow:
    """Return the webhook or raise `WebhookNotFound`. With `lock`, the row is locked until the transaction ends."""
    row = await session.get(WebhookRow, webhook_id, populate_existing=True, with_for_update={} if lock else None)
    if row is None:
        raise WebhookNotFound(webhook=webhook_id)
    return row


async def update(session: AsyncSession, webhook: WebhookRow, **values: Any) -> None:
    """Change columns of the row."""
    for name, value in values.items():
        setattr(webhook, name, value)
    session.add(webhook)
    await session.flush()


async def delete(session: AsyncSession, webhook: WebhookRow) -> None:
    """Delete the webhook, which the caller has locked, and all its messages."""
    await session.exec(sa.delete(DeliveryRow).where(col(DeliveryRow.webhook_id) == webhook.id))
    await session.exec(sa.delete(WebhookRow).where(col(WebhookRow.id) == webhook.id))


async def page(session: AsyncSession, wanted: PageRequest) -> Slice[WebhookRow]:
    """Return one page of the webhooks."""
    return await page_slice(session, select(WebhookRow), wanted, column=WebhookRow.created_at, tie=WebhookRow.id)


# ---- messages -------------------------------------------------------------------------------------------------------


async def get_delivery(session: AsyncSession, webhook_id: str, delivery_id: str) -> DeliveryRow:
    """Return the message of the webhook or raise `DeliveryNotFound`."""
    row = await session.get(DeliveryRow, delivery_id, populate_existing=True)
    if row is None or row.webhook_id != webhook_id:
        raise DeliveryNotFound(delivery=delivery_id, webhook=webhook_id)
    return row


async def deliveries(
    session: AsyncSession, webhook_id: str, wanted: PageRequest, *, state: DeliveryState | None
) -> Slice[DeliveryRow]:
    """Return one page of the webhook's messages."""
    statement = select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id)
    if state is not None:
        statement = statement.where(DeliveryRow.state == state)
    return await page_slice(session, statement, wanted, column=DeliveryRow.created_at, tie=DeliveryRow.id)


async def send_again(session: AsyncSession, delivery_id: str, *, now: datetime) -> None:
    """Make the message due now, whatever its outcome was."""
    await session.exec(
        sa.update(DeliveryRow)
        .where(col(DeliveryRow.id) == delivery_id)
        .values(state=DeliveryState.PENDING, next_try_at=now, delivered_at=None)
    )


async def switch_all_off(session: AsyncSession, *, now: datetime) -> int:
    """Switch off every webhook that is active; return how many there were."""
    active = col(WebhookRow.active).is_(True)
    result = await session.exec(sa.update(WebhookRow).where(active).values(active=False, updated_at=now))
    assert isinstance(result, CursorResult)
    return result.rowcount


async def active(session: AsyncSession) -> Sequence[WebhookRow]:
    """Return the active webhooks."""
    return (await session.exec(select(WebhookRow).where(col(WebhookRow.active).is_(True)))).all()


async def has_due(session: AsyncSession, webhook_id: str, *, now: datetime) -> bool:
    """Say whether a message of the webhook is due."""
    return (await session.exec(_due(webhook_id, now=now).limit(1))).first() is not None


async def take_due(
    session: AsyncSession, webhook_id: str, *, limit: int, now: datetime, lease: timedelta
) -> Sequence[Message]:
    """Take messages that are due; unless their outcome is recorded, they are due again after the lease."""
    due = (await session.exec(_due(webhook_id, now=now).limit(limit))).all()
    return [message for row in due if (message := await _take(session, row, now=now, lease=lease)) is not None]


def _due(webhook_id: str, *, now: datetime) -> Any:
    """Return the query of what is due: the front of one stretch of the index, however long the backlog is."""
    return (
        select(DeliveryRow)
        .where(DeliveryRow.webhook_id == webhook_id, sa.text(PENDING_DELIVERY), col(DeliveryRow.next_try_at) <= now)
        .order_by(col(DeliveryRow.next_try_at))
    )


async def _take(session: AsyncSession, row: DeliveryRow, *, now: datetime, lease: timedelta) -> Message | None:
    result = await session.exec(
        sa.update(DeliveryRow)
        .where(
            col(DeliveryRow.id) == row.id,
            sa.text(PENDING_DELIVERY),
            col(DeliveryRow.tries) == row.tries,
            col(DeliveryRow.next_try_at) <= now,
        )
        .values(tries=DeliveryRow.tries + 1, next_try_at=now + lease)
        .execution_options(synchronize_session=False)
    )
    assert isinstance(result, CursorResult)
    if result.rowcount != 1:
        return None
    return Message(id=row.id, webhook_id=row.webhook_id, body=row.body, tries=row.tries + 1)


async def record(session: AsyncSession, message: Message, outcome: Outcome, *, now: datetime) -> bool:
    """Record the outcome of the try. False: another sender has taken the message since, or it is gone."""
    values: dict[str, Any] = {"last_status": outcome.status, "last_error": outcome.error}
    if outcome.delivered:
        values |= {"state": DeliveryState.DELIVERED, "delivered_at": now, "next_try_at": None}
    elif outcome.next_delay is None:
        values |= {"state": DeliveryState.GIVEN_UP, "next_try_at": None}
    else:
        values |= {"next_try_at": now + outcome.next_delay}
    result = await session.exec(
        sa.update(DeliveryRow)
        .where(col(DeliveryRow.id) == message.id, col(DeliveryRow.tries) == message.tries, sa.text(PENDING_DELIVERY))
        .values(**values)
    )
    assert isinstance(result, CursorResult)
    return result.rowcount == 1
