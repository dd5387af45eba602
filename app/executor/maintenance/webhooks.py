"""Webhooks: subscriptions to ends of jobs. `app.store.webhooks` writes the messages, `WebhookSender` sends them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import DeliveryState
from app.domain.errors import Conflict, InvalidRequest, Violation
from app.domain.webhooks import (
    TEST_EVENT,
    WebhookEvent,
    new_secret,
    normal_url,
    secret_violations,
    url_violations,
)
from app.presets.shared.helpers.deepe_addresses import AddressPolicy, refused_literal
from app.store import webhooks as store
from app.store.clock import database_now
from app.store.paging import PageRequest, Slice
from app.store.tables import DeliveryRow, WebhookRow

CheckVersion = Callable[[str], None]


class WebhookInactive(Conflict):
    """Nothing is sent to a webhook that is switched off."""

    code = "webhook_inactive"


@dataclass(frozen=True)
class WebhookPatch:
    """What changes; None leaves a member as it is. A secret is the caller's own, or a new one is made."""

    url: str | None = None
    events: Sequence[WebhookEvent] | None = None
    active: bool | None = None
    secret: str | None = None
    rotate_secret: bool = False


class Webhooks:
    """What can be done with webhooks."""

    def __init__(self, *, policy: AddressPolicy) -> None:
        self._policy = policy

    async def create(
        self, session: AsyncSession, *, url: str, events: Sequence[WebhookEvent], active: bool, secret: str | None
    ) -> WebhookRow:
        """Register a receiver without calling it."""
        self._check(url=url, events=events, secret=secret)
        now = await database_now(session)
        row = WebhookRow(
            id=str(uuid4()),
            url=normal_url(url),
            secret=secret or new_secret(),
            events=sorted(set(events)),
            active=active,
            created_at=now,
            updated_at=now,
        )
        await store.insert(session, row)
        return row

    async def get(self, session: AsyncSession, webhook: str) -> WebhookRow:
        """Return the webhook with this id."""
        return await store.get(session, webhook)

    async def page(self, session: AsyncSession, wanted: PageRequest) -> Slice[WebhookRow]:
        """Return one page of the webhooks."""
        return await store.page(session, wanted)

    async def change(
        self, session: AsyncSession, webhook: str, patch: WebhookPatch, *, check: CheckVersion
    ) -> WebhookRow:
        """Change the webhook; messages that wait go to the new address, signed with the new secret."""
        row = await store.get(session, webhook, lock=True)
        check(version_of(row))
        self._check(url=patch.url, events=patch.events, secret=patch.secret)
        secret = patch.secret or (new_secret() if patch.rotate_secret else row.secret)
        await store.update(
            session,
            row,
            url=row.url if patch.url is None else normal_url(patch.url),
            events=row.events if patch.events is None else sorted(set(patch.events)),
            active=row.active if patch.active is None else patch.active,
            secret=secret,
            updated_at=await database_now(session),
        )
        return row

    async def delete(self, session: AsyncSession, webhook: str, *, check: CheckVersion) -> None:
        """Delete the webhook and its messages, those that wait among them."""
        row = await store.get(session, webhook, lock=True)
        check(version_of(row))
        await store.delete(session, row)

    async def test(self, session: AsyncSession, webhook: str) -> DeliveryRow:
        """Write a test message; it is sent like every other."""
        row = await store.get(session, webhook)
        if not row.active:
            raise WebhookInactive(webhook=webhook)
        return await store.add_test(session, row, TEST_EVENT, now=await database_now(session))

    async def deliveries(
        self, session: AsyncSession, webhook: str, wanted: PageRequest, *, state: DeliveryState | None
    ) -> Slice[DeliveryRow]:
        """Return one page of the webhook's messages."""
        await store.get(session, webhook)
        return await store.deliveries(session, webhook, wanted, state=state)

    async def redeliver(self, session: AsyncSession, webhook: str, delivery: str) -> DeliveryRow:
        """Send a message again, now, under the id that it has."""
        if not (await store.get(session, webhook)).active:
            raise WebhookInactive(webhook=webhook)
        await store.get_delivery(session, webhook, delivery)
        await store.send_again(session, delivery, now=await database_now(session))
        return await store.get_delivery(session, webhook, delivery)

    def _check(self, *, url: str | None, events: Sequence[WebhookEvent] | None, secret: str | None) -> None:
        found = [] if url is None else url_violations(url)
        if url is not None and not found and (refused := refused_literal(normal_url(url), self._policy)):
            found.append(Violation("/url", "webhook_address_refused", {"address": str(refused)}))
        if events is not None and not events:
            found.append(Violation("/events", "webhook_without_events"))
        if secret is not None:
            found += secret_violations(secret)
        if found:
            raise InvalidRequest(found)


def version_of(webhook: WebhookRow) -> str:
    """Return what distinguishes a version of the webhook from others."""
    return str(int(webhook.updated_at.timestamp() * 1_000_000))
