"""API keys, roles and the permissions of routes over HTTP, on SQLite and on Postgres."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError
from sqlmodel import select

from app.api.application import HttpOptions, new_application
from app.api.guards import AccessPolicy
from app.api.routes import access, deploy_targets, queues, system
from app.main import build_services
from app.settings import load_settings
from app.store.home import Home
from app.store.session import Database
from app.store.tables import AccessKeyRow, IdempotencyRow
from tests.api.client import SwitchableLicence, tag_of
from tests.api.jobs_app import SUBMIT, jobs_app
from tests.api.resources import codes

URL = "/api/v1/keys"
OWNER = "the-token-of-the-installation"
LIMITS = {"max_live": 1, "max_live_per_user": None}


class Service:
    """The service with a token and keys, called with the secret of one's choice, on a clock of the test's."""

    def __init__(self, database: Database, root: Path) -> None:
        Home(root).create()
        self.now = datetime.now(UTC)
        self.database = database
        settings = load_settings(home=root, database_url=database.url)
        services = build_services(settings, database, licence=SwitchableLicence(), clock=lambda: self.now)
        self._services = services
        self.client = self.client_with(token=OWNER)

    def client_with(self, **policy: Any) -> httpx.AsyncClient:
        options = HttpOptions(version="1", access=AccessPolicy(keys=self._services.access_keys.caller, **policy))
        app: FastAPI = new_application(options)
        app.state.services = self._services
        for module in (access, queues, deploy_targets, system):
            app.include_router(module.router)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1:8000")

    async def call(self, method: str, path: str, *, secret: str = OWNER, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {secret}", **options.pop("headers", {})}
        return await self.client.request(method, path, headers=headers, **options)

    async def make(self, name: str = "ada", role: str = "operator", **members: Any) -> dict[str, Any]:
        response = await self.call("POST", URL, json={"name": name, "role": role, **members})
        assert response.status_code == 201, response.text
        body: dict[str, Any] = response.json()
        return body

    async def change(self, method: str, key: str, **options: Any) -> httpx.Response:
        tag = tag_of(await self.call("GET", f"{URL}/{key}"))
        return await self.call(method, f"{URL}/{key}", headers=tag, **options)

    async def me(self, secret: str) -> tuple[int, str]:
        response = await self.call("GET", "/api/v1/me", secret=secret)
        body = response.json()
        return response.status_code, body.get("role") or body["code"]


@pytest.fixture
async def service(database: Database, tmp_path: Path) -> AsyncIterator[Service]:
    running = Service(database, tmp_path / "home")
    async with running.client:
        yield running


class TestKey:
    async def test_gives_its_name_and_its_role(self, service: Service) -> None:
        made = await service.make(expires_at=(service.now + timedelta(days=1)).isoformat())

        me = (await service.call("GET", "/api/v1/me", secret=made["secret"])).json()

        assert (me["name"], me["kind"], me["role"]) == ("ada", "key", "operator")
        assert me["permissions"] == ["read", "run", "observe"]
        assert (me["key"], me["expires_at"]) == (made["id"], made["expires_at"])
        assert me["principal"] == f"key:{made['id']}"

    async def test_secret_is_shown_once_and_kept_nowhere(self, service: Service) -> None:
        headers = {"Idempotency-Key": "one"}
        body = {"name": "ada", "role": "viewer"}
        made = (await service.call("POST", URL, json=body, headers=headers)).json()
        again = (await service.call("POST", URL, json=body, headers=headers)).json()
        read = (await service.call("GET", f"{URL}/ada")).json()
        listed = (await service.call("GET", URL)).json()["items"]

        async with service.database.reading() as session:
            kept = [(await session.exec(select(table))).all() for table in (AccessKeyRow, IdempotencyRow)]

        assert made["secret"].startswith(made["prefix"])
        assert made["secret"] not in repr(kept)
        assert again == read == listed[0] == {**made, "secret": None}
        assert made["created_by"] == "token"

    async def test_ends_when_it_expires_and_lives_again_when_it_is_prolonged(self, service: Service) -> None:
        made = await service.make(expires_at=(service.now + timedelta(hours=1)).isoformat())
        service.now += timedelta(hours=2)

        expired = await service.me(made["secret"])
        await service.change("PATCH", "ada", json={"expires_at": None, "role": "viewer"})

        assert expired == (401, "key_expired")
        assert await service.me(made["secret"]) == (200, "viewer")

    async def test_ends_with_the_request_after_its_revocation(self, service: Service) -> None:
        made = await service.make()
        calls = [asyncio.create_task(service.me(made["secret"])) for _ in range(8)]

        assert (await service.change("DELETE", "ada")).status_code == 204

        after = await service.me(made["secret"])
        assert {outcome[0] for outcome in await asyncio.gather(*calls)} <= {200, 401}
        assert after == (401, "key_revoked")

    async def test_revoked_key_stays_listed_and_gives_its_name_away(self, service: Service) -> None:
        first = await service.make()
        await service.change("DELETE", "ada")

        second = await service.make()
        listed = (await service.call("GET", URL, params={"revoked": True})).json()["items"]
        again = await service.call("DELETE", f"{URL}/{first['id']}", headers={"If-Match": "*"})

        assert [(one["id"], one["revoked_at"] is None) for one in listed] == [
            (one["id"], one is second) for one in sorted((first, second), key=lambda one: one["id"])
        ]
        assert again.json()["code"] == "access_key_not_found"

    async def test_rotation_ends_the_old_secret_at_once(self, service: Service) -> None:
        made = await service.make()

        rotated = (await service.call("POST", f"{URL}/ada:rotate")).json()

        assert await service.me(made["secret"]) == (401, "key_unknown")
        assert await service.me(rotated["secret"]) == (200, "operator")
        assert (rotated["id"], rotated["prefix"] == made["prefix"]) == (made["id"], False)

    async def test_use_is_noted_by_the_minute_and_is_no_change(self, service: Service) -> None:
        made = await service.make()
        used = []
        for seconds in (0, 30, 31):
            service.now += timedelta(seconds=seconds)
            await service.me(made["secret"])
            used.append((await service.call("GET", f"{URL}/ada")).json()["last_used_at"])

        assert used[0] == used[1] != used[2]
        assert (await service.change("PATCH", "ada", json={})).json()["last_used_at"] == used[2]

    async def test_changes_need_the_version_that_was_read(self, service: Service) -> None:
        await service.make()
        old = tag_of(await service.call("GET", f"{URL}/ada"))
        service.now += timedelta(seconds=1)
        await service.change("PATCH", "ada", json={"role": "admin"})

        stale = await service.call("DELETE", f"{URL}/ada", headers=old)
        without = await service.call("DELETE", f"{URL}/ada")

        assert (stale.status_code, without.status_code) == (412, 428)

    async def test_says_everything_that_is_wrong(self, service: Service) -> None:
        await service.make()
        past = (service.now - timedelta(days=1)).isoformat()

        both = await service.call("POST", URL, json={"name": "token", "role": "viewer", "expires_at": past})
        taken = await service.call("POST", URL, json={"name": "ADA", "role": "viewer"})
        shapes = await service.call("POST", URL, json={"role": "root", "expires_at": "2030-01-01T00:00:00"})
        beyond = await service.call(
            "POST", URL, json={"name": "b", "role": "viewer", "expires_at": "9999-12-31T23:59:59-12:00"}
        )

        assert codes(both.json()) == [("/name", "name_reserved"), ("/expires_at", "expiry_in_the_past")]
        assert (taken.status_code, taken.json()["code"]) == (409, "name_taken")
        assert {place for place, _ in codes(shapes.json())} == {"/name", "/role", "/expires_at"}
        assert codes(beyond.json()) == [("/expires_at", "field_too_large")]


class TestRoles:
    @pytest.mark.parametrize(
        ("role", "statuses"),
        [
            ("viewer", [200, 403, 403, 403, 403]),
            ("operator", [200, 404, 403, 403, 403]),
            ("developer", [200, 404, 422, 403, 403]),
            ("admin", [200, 404, 422, 200, 200]),
        ],
    )
    async def test_permit_what_those_before_them_do_and_more(
        self, service: Service, role: str, statuses: list[int]
    ) -> None:
        secret = (await service.make(role=role))["secret"]

        answers = [
            await service.call("GET", "/api/v1/queues", secret=secret),
            await service.call("POST", "/api/v1/deploy-targets/nowhere:test", secret=secret),
            await service.call("POST", "/api/v1/deploy-targets", secret=secret, json={}),
            await service.call("PUT", "/api/v1/queues/night", secret=secret, json=LIMITS, headers={"If-Match": "*"}),
            await service.call("GET", URL, secret=secret),
        ]

        assert [answer.status_code for answer in answers] == statuses

    async def test_refusal_names_the_role_that_is_needed_and_reads_no_body(self, service: Service) -> None:
        secret = (await service.make(role="viewer"))["secret"]

        refused = await service.call("POST", URL, secret=secret, content=b"{ no json")

        assert (refused.status_code, refused.json()["code"]) == (403, "permission_missing")
        assert "ada has the role viewer; this needs the role admin" in refused.json()["detail"]

    async def test_address_without_the_method_is_no_matter_of_roles(self, service: Service) -> None:
        secret = (await service.make(role="viewer"))["secret"]

        assert (await service.call("DELETE", "/api/v1/me", secret=secret)).status_code == 405


class TestCaller:
    async def test_is_the_token_or_this_machine_where_there_is_no_key(self, service: Service) -> None:
        local = await service.client_with().get("/api/v1/me")

        assert await service.me(OWNER) == (200, "admin")
        assert (local.json()["kind"], local.json()["role"]) == ("local", "admin")

    async def test_with_a_key_has_its_role_also_where_no_token_is_needed(self, service: Service) -> None:
        made = await service.make(role="viewer")
        client = service.client_with()
        key, wrong = (
            {"Authorization": f"Bearer {secret}"} for secret in (made["secret"], "deepe_eyJhbGciOiJub25lIn0.e30.")
        )
        through_proxy = {"X-Forwarded-For": "203.0.113.9"}

        answers = [
            await client.get("/api/v1/me", headers=headers)
            for headers in (key, {**key, **through_proxy}, wrong, through_proxy)
        ]

        assert [answer.json().get("role") or answer.json()["code"] for answer in answers] == [
            "viewer",
            "viewer",
            "key_unknown",
            "through_proxy",
        ]

    async def test_is_the_owner_whose_token_looks_like_a_key(self, service: Service) -> None:
        token = "deepe_token_of_an_older_installation"
        client = service.client_with(token=token)

        me = await client.get("/api/v1/me", headers={"Authorization": f"Bearer {token}"})

        assert (me.status_code, me.json()["kind"]) == (200, "token")

    async def test_is_let_in_while_the_database_cannot_be_written_to(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = await service.make()

        @asynccontextmanager
        async def refused() -> AsyncIterator[None]:
            raise OperationalError("UPDATE", {}, Exception("database is locked"))
            yield

        monkeypatch.setattr(service.database, "writing", refused)

        assert await service.me(made["secret"]) == (200, "operator")

    async def test_is_asked_for_where_no_path_is_open(self, service: Service) -> None:
        open_path = await service.client.get("/healthz")
        closed = await service.client.get("/api/v1/me")

        assert open_path.status_code == 200
        assert (closed.status_code, closed.json()["code"]) == (401, "token_missing")

    async def test_key_opens_no_page_of_others(self, service: Service) -> None:
        secret = (await service.make(role="admin"))["secret"]

        refused = await service.call("GET", "/api/v1/me", secret=secret, headers={"Origin": "https://evil.example"})

        assert refused.json()["code"] == "foreign_origin"


class TestSubmit:
    async def test_runs_for_whom_the_key_is_unless_it_says_for_whom(self, database: Database, tmp_path: Path) -> None:
        async with jobs_app(database, tmp_path / "home") as app:
            key = await app.post("/keys", {"name": "ada", "role": "operator"}, 201)
            headers = {"Authorization": f"Bearer {key['secret']}"}

            users = []
            for body in (SUBMIT, {**SUBMIT, "user": "bob"}, {**SUBMIT, "user": ""}):
                made = await app.post("/jobs", body, 201, headers=headers)
                users.append((await app.get(f"/jobs/{made['id']}"))["user"])
            without = await app.get(f"/jobs/{(await app.submit())['id']}")

        assert users == ["ada", "bob", ""]
        assert without["user"] == ""
