"""Sends the messages that wait; a task of every API process, which share the work by conditional updates.

Every webhook has its own few places, so a slow receiver does not hold up the others. A process that dies leaves
what it had taken to the others once the lease is over: nothing is lost, and what was sent but not recorded is sent
again under the same id. No session is open while something is sent.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from app.domain.webhooks import POST_SECONDS, Answer, body_bytes, next_delay, signed_headers
from app.executor.maintenance.background import Stopping, keep_doing
from app.executor.nodes.backoff import TRANSIENT, log_failure
from app.faults import fault_point
from app.store import webhooks as store
from app.store.clock import database_now
from app.store.session import Database
from app.store.tables import WebhookRow
from app.store.webhooks import Message, Outcome

if TYPE_CHECKING:
    from app.executor.maintenance.webhook_post import WebhookClient

logger = logging.getLogger(__name__)

AT_ONCE = 4  # to one webhook, from one process
POLL_SECONDS = 2.0
LEASE = timedelta(seconds=4 * POST_SECONDS)
GONE = 410  # the receiver wants no more of it


class WebhookSender:
    """Sends messages until stopped; then lets those under way end."""

    def __init__(
        self, database: Database, client: "Callable[[], WebhookClient]", *, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self._database = database
        self._new_client = client
        self._client: WebhookClient | None = None  # made for the first message: most installations have no webhook
        self._poll_seconds = poll_seconds
        self._busy: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Look now: something is due, or a place is free."""
        self._woken.set()

    async def run(self, stopping: Stopping) -> None:
        """Send what is due until `stopping` is set."""
        await keep_doing(
            self.look, every=self._poll_seconds, stopping=stopping, event="webhooks_failed", woken=self._woken
        )
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=POST_SECONDS)
        for task in self._tasks:
            task.cancel()
        if self._client is not None:
            await self._client.close()

    async def look(self) -> None:
        """Take what is due, as far as there are places, and begin to send it."""
        async with self._database.reading() as session:
            webhooks = [hook for hook in await store.active(session) if self._busy[hook.id] < AT_ONCE]
            # asked without a write: most looks find nothing, and SQLite has one writer
            now = await database_now(session)
            webhooks = [hook for hook in webhooks if await store.has_due(session, hook.id, now=now)]
        for webhook in webhooks:
            for message in await self._take(webhook):
                self._begin(webhook, message)

    async def _take(self, webhook: WebhookRow) -> Sequence[Message]:
        async with self._database.writing() as session:
            now = await database_now(session)
            free = AT_ONCE - self._busy[webhook.id]
            return await store.take_due(session, webhook.id, limit=free, now=now, lease=LEASE)

    def _begin(self, webhook: WebhookRow, message: Message) -> None:
        self._busy[webhook.id] += 1
        task = asyncio.create_task(self._send(webhook, message), name=f"webhook {message.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, webhook: WebhookRow, message: Message) -> None:
        fields: dict[str, object] = {"webhook": webhook.id, "delivery": message.id, "try": message.tries}
        try:
            fault_point("message-taken")
            outcome = _outcome(await self._post(webhook, message), message)
            fault_point("message-sent")
            async with self._database.writing() as session:
                await store.record(session, message, outcome, now=await database_now(session))
            event = "webhook_delivered" if outcome.delivered else "webhook_failed"
            logger.info(event, extra=fields | {"status": outcome.status, "error": outcome.error})
        except TRANSIENT as error:  # sent again when the lease is over
            log_failure(logger, "webhook_not_recorded", error, fields)
        except Exception:
            logger.exception("webhook_not_sent", extra=fields)
        finally:
            self._busy[webhook.id] -= 1
            self.wake()

    async def _post(self, webhook: WebhookRow, message: Message) -> Answer:
        body = body_bytes(message.body)
        headers = signed_headers(webhook.secret, message=message.id, timestamp=int(time.time()), body=body)
        self._client = self._client or self._new_client()
        return await self._client.post(webhook.url, headers=headers, body=body)


def _outcome(answer: Answer, message: Message) -> Outcome:
    if answer.error is None:
        return Outcome(delivered=True, status=answer.status, error=None)
    delay = next_delay(message.tries, chance=random.random(), requested=answer.retry_after)  # noqa: S311 - no secret
    return Outcome(
        delivered=False,
        status=answer.status,
        error=answer.error,
        next_delay=None if answer.status == GONE else delay,
    )
