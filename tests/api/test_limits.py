"""What one caller may ask of the API: requests a minute, streams at once; and the headers of every answer."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, Request, Response

from app.api.limits import CallerLimits
from app.api.sse import ServerEvent, event_stream
from app.domain.access import Caller, CallerKind, Role
from app.domain.errors import Unauthenticated
from tests.api.foundation import client_of, make_app
from tests.waiting import until

ADA = Caller(CallerKind.KEY, Role.ADMIN, "ada", key_id="1")
BEN = Caller(CallerKind.KEY, Role.ADMIN, "ben", key_id="2")


async def by_key(secret: str) -> Caller:
    return {"deepe_ada": ADA, "deepe_ben": BEN}[secret]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TestRequests:
    async def test_more_than_the_minute_allows_are_told_when_to_come_back(self) -> None:
        clock = Clock()
        app = make_app(limits=CallerLimits(requests_per_minute=2, clock=clock))
        async with client_of(app) as client, client_of(app, client=("127.0.0.2", 1)) as other:
            taken = [(await client.get("/api/v1/nothing")).status_code for _ in range(2)]
            refused = await client.get("/api/v1/nothing")
            probe = await client.get("/healthz")
            others = await other.get("/api/v1/nothing")
            clock.now += int(refused.headers["Retry-After"])
            again = await client.get("/api/v1/nothing")
            and_again = await client.get("/api/v1/nothing")

        assert taken == [404, 404]
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_requests")
        assert refused.headers["Retry-After"] == "30"
        assert "30 seconds" in refused.json()["detail"]
        assert (probe.status_code, others.status_code) == (404, 404)
        assert (again.status_code, and_again.status_code) == (404, 429)

    async def test_callers_with_names_are_told_apart_by_them(self) -> None:
        limits = CallerLimits(requests_per_minute=1, clock=Clock())
        app = make_app(limits=limits, token="0123456789abcdef0123", keys=by_key)
        async with client_of(app) as client:
            answers = [
                (await client.get("/api/v1/nothing", headers={"Authorization": f"Bearer {secret}"})).status_code
                for secret in ("deepe_ada", "deepe_ben", "deepe_ada", "deepe_ben")
            ]

        assert answers == [404, 404, 429, 429]

    async def test_without_a_limit_nothing_is_counted(self) -> None:
        async with client_of(make_app()) as client:
            assert {(await client.get("/api/v1/nothing")).status_code for _ in range(50)} == {404}


class TestStreams:
    @pytest.fixture
    def let_go(self) -> asyncio.Event:
        return asyncio.Event()

    def app(self, let_go: asyncio.Event, **options: object) -> FastAPI:
        async def events() -> AsyncIterator[ServerEvent]:
            self.open += 1
            await let_go.wait()
            yield ServerEvent(1)

        app = make_app(limits=CallerLimits(streams=2), **options)

        @app.get("/api/v1/stream")
        async def read_stream(request: Request) -> Response:
            return event_stream(request, events())

        return app

    async def test_one_more_than_allowed_is_refused_until_one_ends(self, let_go: asyncio.Event) -> None:
        self.open = 0
        async with client_of(self.app(let_go)) as client:
            held = [asyncio.create_task(client.get("/api/v1/stream")) for _ in range(2)]
            await until(lambda: self.open == 2, "the streams begin")

            refused = await client.get("/api/v1/stream")
            let_go.set()
            ended = await asyncio.gather(*held)
            taken = await client.get("/api/v1/stream")

        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert refused.headers["Retry-After"] == "5"
        assert [answer.status_code for answer in (*ended, taken)] == [200, 200, 200]


class TestHeaders:
    EVERYWHERE = {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-site",
    }

    @pytest.mark.parametrize("path", ["/openapi.json", "/api/v1/nothing", "/api/v1/fails/bug"])
    async def test_stand_on_every_answer(self, path: str) -> None:
        async with client_of(make_app()) as client:
            answer = await client.get(path)

        assert self.EVERYWHERE.items() <= dict(answer.headers).items()

    async def test_of_a_refusal_as_well(self) -> None:
        async def nobody(secret: str) -> Caller:
            raise Unauthenticated

        async with client_of(make_app(token="0123456789abcdef0123", keys=nobody)) as client:
            answer = await client.get("/api/v1/nothing")

        assert answer.status_code == 401
        assert self.EVERYWHERE.items() <= dict(answer.headers).items()

    async def test_the_page_of_the_documentation_keeps_its_policy(self) -> None:
        async with client_of(make_app()) as client:
            answer = await client.get("/docs")

        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-frame-options"] == "DENY"
