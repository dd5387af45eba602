"""Webhooks over HTTP, on SQLite and on Postgres."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlmodel import select

from app.api.routes import webhooks
from app.store.session import Database
from app.store.tables import IdempotencyRow
from tests.api.client import MethodsApp, methods_app, tag_of
from tests.api.resources import codes

URL = "/api/v1/webhooks"
RECEIVER = "http://receiver.example/hooks?key=1"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home", routers=(webhooks.router,)) as running:
        yield running


async def create(app: MethodsApp, **members: Any) -> dict[str, Any]:
    response = await app.client.post(URL, json={"url": RECEIVER, **members})
    assert response.status_code == 201, response.text
    body: dict[str, Any] = response.json()
    return body


async def read(app: MethodsApp, webhook: dict[str, Any]) -> httpx.Response:
    return await app.client.get(f"{URL}/{webhook['id']}")


async def change(app: MethodsApp, webhook: dict[str, Any], **members: Any) -> httpx.Response:
    tag = tag_of(await read(app, webhook))
    return await app.client.patch(f"{URL}/{webhook['id']}", json=members, headers=tag)


class TestCreate:
    async def test_shows_the_secret_once(self, app: MethodsApp) -> None:
        made = await create(app)

        assert made["secret"].startswith("whsec_")
        assert made["events"] == ["job.cancelled", "job.failed", "job.succeeded"]
        assert (await read(app, made)).json() == {**made, "secret": None}
        assert (await app.client.get(URL)).json()["items"] == [{**made, "secret": None}]

    async def test_keeps_the_secret_out_of_the_kept_answer(self, app: MethodsApp, database: Database) -> None:
        headers = {"Idempotency-Key": "one"}
        made = (await app.client.post(URL, json={"url": RECEIVER}, headers=headers)).json()

        again = await app.client.post(URL, json={"url": RECEIVER}, headers=headers)

        async with database.reading() as session:
            kept = (await session.exec(select(IdempotencyRow))).all()
        assert (again.status_code, again.json()) == (201, {**made, "secret": None})
        assert made["secret"]
        assert [row.body["secret"] for row in kept] == [None]

    async def test_says_everything_that_is_wrong(self, app: MethodsApp) -> None:
        response = await app.client.post(
            URL, json={"url": "http://169.254.169.254/", "events": [], "secret": "whsec_short"}
        )

        assert response.status_code == 422
        assert codes(response.json()) == [
            ("/url", "webhook_address_refused"),
            ("/events", "webhook_without_events"),
            ("/secret", "invalid_webhook_secret"),
        ]

    async def test_refuses_an_unknown_event(self, app: MethodsApp) -> None:
        response = await app.client.post(URL, json={"url": RECEIVER, "events": ["job.exploded"]})

        assert [place for place, _ in codes(response.json())] == ["/events/0"]


class TestChange:
    async def test_changes_what_is_named(self, app: MethodsApp) -> None:
        made = await create(app)

        response = await change(app, made, active=False)

        assert response.status_code == 200
        assert response.json()["active"] is False
        assert (response.json()["url"], response.json()["secret"]) == (RECEIVER, None)

    async def test_rotates_the_secret_and_shows_it(self, app: MethodsApp) -> None:
        made = await create(app)

        rotated = (await change(app, made, rotate_secret=True)).json()

        assert rotated["secret"].startswith("whsec_")
        assert rotated["secret"] != made["secret"]

    async def test_demands_the_version_that_was_read(self, app: MethodsApp) -> None:
        made = await create(app)
        read_before = tag_of(await read(app, made))
        await change(app, made, active=False)

        without = await app.client.patch(f"{URL}/{made['id']}", json={})
        stale = await app.client.patch(f"{URL}/{made['id']}", json={}, headers=read_before)
        deletion = await app.client.delete(f"{URL}/{made['id']}", headers=read_before)

        assert (without.status_code, stale.status_code, deletion.status_code) == (428, 412, 412)


class TestMessages:
    async def test_test_message_waits_to_be_sent(self, app: MethodsApp) -> None:
        made = await create(app)

        message = await app.client.post(f"{URL}/{made['id']}:test")
        page = (await app.client.get(f"{URL}/{made['id']}/deliveries", params={"state": "pending"})).json()

        assert message.status_code == 201
        assert page["items"] == [message.json()]
        assert (message.json()["event"], message.json()["job"]) == ("webhook.test", None)

    async def test_redelivers_under_the_same_id(self, app: MethodsApp) -> None:
        made = await create(app)
        message = (await app.client.post(f"{URL}/{made['id']}:test")).json()

        again = await app.client.post(f"{URL}/{made['id']}/deliveries/{message['id']}:redeliver")

        assert (again.status_code, again.json()["id"], again.json()["state"]) == (200, message["id"], "pending")

    async def test_is_refused_where_it_is_switched_off(self, app: MethodsApp) -> None:
        made = await create(app, active=False)

        response = await app.client.post(f"{URL}/{made['id']}:test")

        assert (response.status_code, response.json()["code"]) == (409, "webhook_inactive")

    async def test_pages(self, app: MethodsApp) -> None:
        made = await create(app)
        for _ in range(3):
            await app.client.post(f"{URL}/{made['id']}:test")

        first = (await app.client.get(f"{URL}/{made['id']}/deliveries", params={"limit": 2})).json()
        second = (
            await app.client.get(f"{URL}/{made['id']}/deliveries", params={"limit": 2, "cursor": first["next_cursor"]})
        ).json()

        assert len({entry["id"] for entry in first["items"] + second["items"]}) == 3
        assert second["next_cursor"] is None


class TestDelete:
    async def test_takes_its_messages_along(self, app: MethodsApp) -> None:
        made = await create(app)
        await app.client.post(f"{URL}/{made['id']}:test")

        response = await app.client.delete(f"{URL}/{made['id']}", headers=tag_of(await read(app, made)))

        assert response.status_code == 204
        assert (await read(app, made)).json()["code"] == "webhook_not_found"
        assert (await app.client.get(f"{URL}/{made['id']}/deliveries")).status_code == 404

    async def test_unknown_ones_are_404(self, app: MethodsApp) -> None:
        made = await create(app)

        for response in (
            await app.client.get(f"{URL}/nope"),
            await app.client.post(f"{URL}/nope:test"),
            await app.client.delete(f"{URL}/nope", headers={"If-Match": "*"}),
            await app.client.post(f"{URL}/{made['id']}/deliveries/nope:redeliver"),
        ):
            assert response.status_code == 404
