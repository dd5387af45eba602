"""Messages are written with what they tell and sent at least once, to a receiver that is a process of its own."""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlmodel import col, select

from app.domain.enums import DeliveryState, JobKind
from app.domain.webhooks import DEFAULT_EVENTS, WebhookEvent
from app.executor.maintenance import webhook_sender
from app.executor.maintenance.background import in_background
from app.executor.maintenance.webhook_post import WebhookClient
from app.executor.maintenance.webhook_sender import WebhookSender
from app.executor.maintenance.webhooks import Webhooks
from app.presets.shared.helpers.deepe_addresses import AddressPolicy
from app.store import job_attempts, job_status
from app.store import webhooks as store
from app.store.session import Database
from app.store.tables import DeliveryRow, WebhookRow
from tests.job_rows import FAILURE, SUCCESS, add_job, add_node, claim, insert, new_chain
from tests.waiting import until
from tests.webhook_receiver import Receiver, receiving

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    with receiving(tmp_path) as running:
        yield running


@pytest.fixture
async def sender(database: Database) -> AsyncIterator[WebhookSender]:
    """Send in the background, from this process."""
    client = partial(WebhookClient, policy=AddressPolicy.ANY, seconds=300)
    sender = WebhookSender(database, client, poll_seconds=0.05)
    async with in_background(sender.run):
        yield sender


async def add_webhook(
    database: Database, url: str, *, events: tuple[WebhookEvent, ...] = DEFAULT_EVENTS, active: bool = True
) -> WebhookRow:
    async with database.writing() as session:
        return await Webhooks(policy=AddressPolicy.ANY).create(
            session, url=url, events=events, active=active, secret=None
        )


async def messages(database: Database, webhook: WebhookRow) -> list[DeliveryRow]:
    async with database.reading() as session:
        statement = select(DeliveryRow).where(DeliveryRow.webhook_id == webhook.id)
        return list((await session.exec(statement.order_by(col(DeliveryRow.created_at)))).all())


async def add_messages(database: Database, webhook: WebhookRow, count: int) -> set[str]:
    async with database.writing() as session:
        now = datetime.now(UTC) - timedelta(seconds=1)
        return {(await store.add_test(session, webhook, "webhook.test", now=now)).id for _ in range(count)}


async def end_one(database: Database, end: job_status.End = SUCCESS, **job: Any) -> str:
    job_id = await add_job(database, **job)
    node_id = await add_node(database)
    won = await claim(database, node_id, kinds=[job.get("kind", JobKind.TRAINING)])
    assert won is not None
    async with database.writing() as session:
        await job_attempts.mark_running(session, won, now=NOW)
    async with database.writing() as session:
        assert await job_attempts.finish(session, won, end, now=NOW)
    return job_id


def is_signed(request: dict[str, Any], secret: str) -> bool:
    """Verify as a receiver does that knows the specification and nothing of ours."""
    headers = request["headers"]
    key = base64.b64decode(secret.split("_", 1)[1])
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{request['body']}"
    expected = base64.b64encode(hmac.digest(key, content.encode(), hashlib.sha256)).decode()
    is_fresh = abs(time.time() - int(headers["webhook-timestamp"])) < 300
    return is_fresh and f"v1,{expected}" in headers["webhook-signature"].split(" ")


class TestOutbox:
    async def test_writes_one_message_for_each_end_that_is_asked_for(self, database: Database) -> None:
        all_ends = await add_webhook(database, "http://example.com/a")
        failures = await add_webhook(database, "http://example.com/b", events=(WebhookEvent.JOB_FAILED,))
        starts = await add_webhook(database, "http://example.com/c", events=(WebhookEvent.JOB_STARTED,))
        off = await add_webhook(database, "http://example.com/d", active=False)

        job_id = await end_one(database)

        (message,) = await messages(database, all_ends)
        assert (message.event, message.job_id, message.state) == ("job.succeeded", job_id, DeliveryState.PENDING)
        assert message.body["type"] == "job.succeeded"
        assert message.body["data"]["id"] == job_id
        assert message.body["data"]["status"] == "succeeded"
        assert await messages(database, failures) == []
        assert [row.event for row in await messages(database, starts)] == ["job.started"]
        assert await messages(database, off) == []

    async def test_tells_questions_only_to_who_names_them(self, database: Database) -> None:
        jobs_only = await add_webhook(database, "http://example.com/a")
        questions = await add_webhook(database, "http://example.com/b", events=(WebhookEvent.QUESTION_SUCCEEDED,))

        await end_one(database, kind=JobKind.INFERENCE_CUSTOMIZED)

        assert await messages(database, jobs_only) == []
        assert len(await messages(database, questions)) == 1

    async def test_tells_what_ended_with_it(self, database: Database) -> None:
        webhook = await add_webhook(database, "http://example.com/a")
        chain = new_chain()
        await insert(database, *chain)
        won = await claim(database, await add_node(database))
        assert won is not None

        async with database.writing() as session:
            await job_attempts.finish(session, won, FAILURE, now=NOW)

        told = {row.job_id: row.event for row in await messages(database, webhook)}
        assert told == {chain[0].id: "job.failed", chain[1].id: "job.cancelled", chain[2].id: "job.cancelled"}

    async def test_is_rolled_back_with_what_it_tells(self, database: Database) -> None:
        webhook = await add_webhook(database, "http://example.com/a")
        job_id = await add_job(database)

        async def cancel_and_fail() -> None:
            async with database.writing() as session:
                await job_status.request_cancel(session, job_id, now=NOW)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            await cancel_and_fail()

        assert await messages(database, webhook) == []

    async def test_costs_no_statement_where_nobody_listens(self, database: Database) -> None:
        await add_job(database)
        won = await claim(database, await add_node(database))
        assert won is not None
        statements: list[str] = []
        event.listen(
            database.engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2].lower())
        )

        async with database.writing() as session:
            await job_attempts.finish(session, won, SUCCESS, now=NOW)

        assert any(statement.startswith("update job") for statement in statements)
        assert not any("delivery" in statement or statement.startswith("select webhook") for statement in statements)


class TestSend:
    async def test_is_signed_and_recorded(self, database: Database, receiver: Receiver, sender: WebhookSender) -> None:
        webhook = await add_webhook(database, receiver.url("/ok"))

        job_id = await end_one(database)

        await until(lambda: self.all_are(database, webhook, DeliveryState.DELIVERED), "deliveries")
        (request,) = receiver.received()
        (message,) = await messages(database, webhook)
        assert is_signed(request, webhook.secret)
        assert not is_signed({**request, "body": request["body"] + " "}, webhook.secret)
        assert request["headers"]["webhook-id"] == message.id
        assert request["headers"]["content-type"] == "application/json"
        assert json.loads(request["body"])["data"]["id"] == job_id
        assert (message.tries, message.last_status, message.last_error) == (1, 200, None)

    async def test_tries_again_under_the_same_id_with_the_same_bytes(
        self, database: Database, receiver: Receiver, sender: WebhookSender, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(webhook_sender, "next_delay", lambda *args, **kwargs: timedelta(milliseconds=50))
        webhook = await add_webhook(database, receiver.url("/once/3"))

        await end_one(database)

        await until(lambda: self.all_are(database, webhook, DeliveryState.DELIVERED), "deliveries")
        requests = receiver.received()
        assert len(requests) == 4
        assert len({request["headers"]["webhook-id"] for request in requests}) == 1
        assert len({request["body"] for request in requests}) == 1
        assert all(is_signed(request, webhook.secret) for request in requests)

    async def test_does_as_the_receiver_asks(
        self, database: Database, receiver: Receiver, sender: WebhookSender
    ) -> None:
        later = await add_webhook(database, receiver.url("/later"))
        gone = await add_webhook(database, receiver.url("/gone"))
        await add_messages(database, later, 1)
        await add_messages(database, gone, 1)

        await until(lambda: self.all_are(database, gone, DeliveryState.GIVEN_UP), "deliveries")
        await until(lambda: self.has_status(database, later, 503), "deliveries")

        (message,) = await messages(database, later)
        assert message.state is DeliveryState.PENDING
        assert message.next_try_at is not None
        assert message.next_try_at > datetime.now(UTC) + timedelta(minutes=50)

    async def test_follows_no_redirect(self, database: Database, receiver: Receiver, sender: WebhookSender) -> None:
        webhook = await add_webhook(database, receiver.url("/away"))
        await add_messages(database, webhook, 1)

        await until(lambda: self.has_status(database, webhook, 307), "deliveries")

        assert [request["path"] for request in receiver.received()] == ["/away"]

    async def test_a_name_that_leads_to_a_metadata_service_is_refused(
        self, database: Database, sender: WebhookSender, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def lead_astray(*args: Any, **kwargs: Any) -> Any:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lead_astray)
        client = WebhookClient(policy=AddressPolicy.ANY)

        answer = await client.post("http://innocent.example/", headers={}, body=b"{}")
        await client.close()

        assert answer.status is None
        assert "169.254.169.254" in (answer.error or "")

    async def test_gives_up_a_receiver_that_says_nothing(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = WebhookClient(policy=AddressPolicy.ANY, seconds=0.2)

            answer = await client.post(f"http://127.0.0.1:{silent.getsockname()[1]}/", headers={}, body=b"{}")
            await client.close()

        assert answer.error == "no answer within 0.2 s"

    async def test_a_slow_receiver_holds_up_nobody(
        self, database: Database, receiver: Receiver, sender: WebhookSender
    ) -> None:
        slow = await add_webhook(database, receiver.url("/slow"))
        quick = await add_webhook(database, receiver.url("/ok"))
        await add_messages(database, slow, 12)
        await add_messages(database, quick, 12)

        await until(lambda: self.all_are(database, quick, DeliveryState.DELIVERED), "deliveries")

        assert len(receiver.received("/slow")) <= webhook_sender.AT_ONCE  # none of them is ever answered

    async def test_nothing_is_sent_where_it_is_switched_off(
        self, database: Database, receiver: Receiver, sender: WebhookSender
    ) -> None:
        off = await add_webhook(database, receiver.url("/off"), active=False)
        on = await add_webhook(database, receiver.url("/ok"))
        await add_messages(database, off, 1)
        await add_messages(database, on, 1)

        await until(lambda: self.all_are(database, on, DeliveryState.DELIVERED), "deliveries")

        assert receiver.received("/off") == []

    @staticmethod
    async def all_are(database: Database, webhook: WebhookRow, state: DeliveryState) -> bool:
        rows = await messages(database, webhook)
        return bool(rows) and all(row.state is state for row in rows)

    @staticmethod
    async def has_status(database: Database, webhook: WebhookRow, status: int) -> bool:
        return any(row.last_status == status for row in await messages(database, webhook))


class TestProcesses:
    async def test_nothing_is_lost_by_kills_of_two_apis(
        self, database: Database, receiver: Receiver, tmp_path: Path
    ) -> None:
        webhook = await add_webhook(database, receiver.url("/ok"))
        await end_one(database)
        expected = {row.id for row in await messages(database, webhook)} | await add_messages(database, webhook, 40)
        processes = []
        try:
            # one dies with what it has just taken, one after sending and before it could say so
            processes = [api(database, tmp_path, point=point) for point in ("message-taken", "message-sent")]
            ends = [await asyncio.to_thread(process.wait) for process in processes]
            async with database.writing() as session:  # the leases are over
                await session.exec(sa.update(DeliveryRow).values(next_try_at=datetime.now(UTC) - timedelta(seconds=1)))
            processes += [api(database, tmp_path), api(database, tmp_path)]
            await until(lambda: TestSend.all_are(database, webhook, DeliveryState.DELIVERED), "deliveries")
        finally:
            for process in processes:
                process.kill()
                process.wait()

        requests = receiver.received()
        times = Counter(request["headers"]["webhook-id"] for request in requests)
        assert ends == [-signal.SIGKILL, -signal.SIGKILL]
        assert set(times) == expected
        assert sum(times.values()) <= len(expected) + webhook_sender.AT_ONCE  # what was sent but not recorded
        assert all(is_signed(request, webhook.secret) for request in requests)


def api(database: Database, home: Path, *, point: str = "") -> "subprocess.Popen[bytes]":
    """Start an API process."""
    environ = os.environ | {"DEEPE_DATABASE_URL": database.url, "DEEPE_HOME": str(home / "api"), "DEEPE_PORT": "0"}
    if point:
        environ["DEEPE_FAULT_POINT"] = point
    return subprocess.Popen([sys.executable, "-m", "app.cli", "serve"], env=environ, stderr=subprocess.DEVNULL)
