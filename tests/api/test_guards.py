import json
from collections.abc import AsyncIterator
from ipaddress import ip_network
from typing import Any

import httpx
import pytest

from app.api.bodies import JsonTooManyValues, parse_json
from app.api.guards import SlowDown, TokenWrong, host_name
from app.domain.access import TOKEN as OWNER
from app.domain.access import Caller
from tests.api.foundation import LIMIT, UPLOAD_LIMIT, client_of, make_app

TOKEN = "k3J9-very-random-token"


async def get(path: str = "/api/v1/things", *, access: dict[str, Any] | None = None, **options: Any) -> httpx.Response:
    client_options = {key: options.pop(key) for key in ("base_url", "client") if key in options}
    async with client_of(make_app(**(access or {})), **client_options) as client:
        return await client.get(path, **options)


async def send(method: str, path: str, **options: Any) -> httpx.Response:
    async with client_of(make_app()) as client:
        return await client.request(method, path, **options)


class TestRequestId:
    async def test_is_new_for_every_request(self) -> None:
        first, second = await get(), await get()

        assert first.headers["x-request-id"] != second.headers["x-request-id"]

    async def test_keeps_the_callers(self) -> None:
        assert (await get(headers={"X-Request-Id": "from-frontend.1"})).headers["x-request-id"] == "from-frontend.1"

    async def test_refuses_one_that_could_forge_log_lines(self) -> None:
        assert (await get(headers={"X-Request-Id": 'a" b'})).headers["x-request-id"] != 'a" b'


class TestToken:
    @pytest.mark.parametrize("authorization", [f"Bearer {TOKEN}", f"bearer  {TOKEN}"])
    async def test_opens(self, authorization: str) -> None:
        response = await get(access={"token": TOKEN}, headers={"Authorization": authorization})

        assert response.status_code == 200

    @pytest.mark.parametrize(
        ("authorization", "code"),
        [
            (None, "token_missing"),
            ("", "token_missing"),
            ("Bearer", "token_missing"),
            (f"Basic {TOKEN}", "token_missing"),
            ("Bearer wrong", "token_wrong"),
            (f"Bearer {TOKEN}x", "token_wrong"),
        ],
    )
    async def test_returns_401_without_the_right_one(self, authorization: str | None, code: str) -> None:
        headers = {} if authorization is None else {"Authorization": authorization}

        response = await get(access={"token": TOKEN}, headers=headers)

        assert (response.status_code, response.json()["code"]) == (401, code)
        assert response.headers["www-authenticate"].startswith("Bearer")

    async def test_bytes_that_are_no_ascii_are_just_wrong(self) -> None:
        response = await get(access={"token": TOKEN}, headers=[(b"Authorization", b"Bearer \xff\xfe")])

        assert response.json()["code"] == "token_wrong"

    @pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/docs/static/start.js"])
    async def test_documentation_is_open(self, path: str) -> None:
        assert (await get(path, access={"token": TOKEN})).status_code == 200

    async def test_static_prefix_opens_nothing_else(self) -> None:
        assert (await get("/docs/static/../../api/v1/things", access={"token": TOKEN})).status_code == 401

    async def test_unknown_addresses_are_not_told_apart_without_it(self) -> None:
        assert (await get("/api/v1/nothing", access={"token": TOKEN})).status_code == 401

    async def test_with_token_any_host_may_be_named(self) -> None:
        response = await get(
            access={"token": TOKEN},
            base_url="http://gpu.example.com",
            client=("203.0.113.9", 1),
            headers={"Authorization": f"Bearer {TOKEN}"},
        )

        assert response.status_code == 200


class TestWrongTokens:
    async def test_slow_down_the_address_that_tries_them(self) -> None:
        """After a few, each answer takes longer, up to a limit; a minute of quiet is a new beginning."""
        slept: list[float] = []
        now = 0.0

        async def sleep(seconds: float) -> None:
            slept.append(seconds)

        async def wrong() -> Caller:
            raise TokenWrong

        async def right() -> Caller:
            return OWNER

        guard = SlowDown(clock=lambda: now, sleep=sleep)

        async def try_one(address: str) -> None:
            with pytest.raises(TokenWrong):
                await guard.owner({"client": (address, 1)}, wrong())

        for _ in range(30):
            await try_one("203.0.113.9")
        await try_one("203.0.113.10")
        first = [round(one, 1) for one in slept]
        slept.clear()

        assert await guard.owner({"client": ("203.0.113.9", 1)}, right()) is OWNER
        assert slept == []
        assert first == [0.0] * 5 + [round(0.1 * step, 1) for step in range(1, 21)] + [2.0] * 5 + [0.0]

        now = 61.0
        await try_one("203.0.113.9")
        assert slept == [0.0]


class TestHostWithoutToken:
    @pytest.mark.parametrize(
        "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "127.1.2.3", "a.localhost:80"]
    )
    async def test_loopback_is_answered(self, host: str) -> None:
        assert (await get(headers={"Host": host})).status_code == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "10.0.0.1", "", "a@127.0.0.1", "::1"],
    )
    async def test_returns_403_for_a_foreign_host(self, host: str) -> None:
        response = await get(headers={"Host": host})

        assert (response.status_code, response.json()["code"]) == (403, "foreign_host")

    async def test_allowed_host_is_answered(self) -> None:
        response = await get(access={"allowed_hosts": ["gpu.lab"]}, headers={"Host": "GPU.lab:8000"})

        assert response.status_code == 200

    async def test_probes_of_foreign_hosts_are_refused_too(self) -> None:
        assert (await get("/docs", headers={"Host": "evil.example"})).status_code == 403

    @pytest.mark.parametrize(
        ("client", "headers", "status"),
        [
            ("10.1.2.3", {"Host": "deepe:5555"}, 200),
            ("::ffff:10.1.2.3", {"Host": "deepe:5555"}, 200),
            ("10.2.0.1", {"Host": "deepe:5555"}, 401),
            ("10.1.2.3", {"X-Forwarded-For": "10.1.2.3"}, 401),
            ("10.1.2.3", {"Origin": "http://127.0.0.1:8000"}, 401),
            ("127.0.0.1", {}, 401),
            ("not-an-address", {}, 401),
        ],
    )
    async def test_trusted_networks_need_no_token(self, client: str, headers: dict[str, str], status: int) -> None:
        access = {"token": TOKEN, "trusted_networks": [ip_network("10.1.0.0/16")]}

        response = await get(access=access, client=(client, 4000), headers=headers)

        assert response.status_code == status

    async def test_returns_403_for_another_machine_whatever_host_it_names(self) -> None:
        response = await get(client=("203.0.113.9", 4000))

        assert (response.status_code, response.json()["code"]) == (403, "foreign_client")

    @pytest.mark.parametrize(
        "header", ["Forwarded", "Via", "X-Real-IP", "X-Forwarded-For", "x-forwarded-host", "X-FORWARDED-PROTO"]
    )
    @pytest.mark.parametrize("value", ["127.0.0.1", "for=8.8.8.8", ""])
    async def test_returns_403_for_a_request_that_a_proxy_passed_on(self, header: str, value: str) -> None:
        response = await get(headers={header: value})

        assert (response.status_code, response.json()["code"]) == (403, "through_proxy")
        assert header.lower() in response.json()["detail"]

    async def test_with_token_a_proxy_may_pass_requests_on(self) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}", "X-Forwarded-For": "203.0.113.9", "Via": "1.1 nginx"}

        assert (await get(access={"token": TOKEN}, headers=headers)).status_code == 200

    @pytest.mark.parametrize(
        ("header", "name"),
        [
            ("a:1", "a"),
            ("[::1]:2", "::1"),
            ("[::1]", "::1"),
            ("a:b", None),
            ("a:1:2", None),
            ("a/b", None),
            ("", None),
        ],
    )
    def test_host_name(self, header: str, name: str | None) -> None:
        assert host_name(header) == name


class TestOrigin:
    @pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "HTTP://127.0.0.1:8000"])
    async def test_own_pages_may_call(self, origin: str) -> None:
        assert (await get(headers={"Origin": origin})).status_code == 200

    @pytest.mark.parametrize(
        "origin",
        ["https://evil.example", "null", "http://127.0.0.1:9000", "http://localhost:8000", "file://", "", "x"],
    )
    async def test_returns_403_for_pages_of_others(self, origin: str) -> None:
        response = await get(headers={"Origin": origin})

        assert (response.status_code, response.json()["code"]) == (403, "foreign_origin")

    async def test_is_refused_before_the_body_is_read(self) -> None:
        async def body() -> AsyncIterator[bytes]:
            raise AssertionError("the body was read")
            yield b""

        response = await send("POST", "/api/v1/things", content=body(), headers={"Origin": "https://evil.example"})

        assert response.status_code == 403

    async def test_token_does_not_make_pages_of_others_welcome(self) -> None:
        response = await get(
            access={"token": TOKEN},
            headers={"Authorization": f"Bearer {TOKEN}", "Origin": "https://evil.example"},
        )

        assert response.json()["code"] == "foreign_origin"

    async def test_allowed_origin_may_call_and_read(self) -> None:
        origin = "https://pages.example.com"

        response = await get(access={"allowed_origins": [origin]}, headers={"Origin": origin})

        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin
        assert "ETag" in response.headers["access-control-expose-headers"]

    async def test_preflight_of_an_allowed_origin_needs_no_token(self) -> None:
        origin = "https://pages.example.com"
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "PUT",
            "Access-Control-Request-Headers": "authorization, if-match",
        }

        async with client_of(make_app(token=TOKEN, allowed_origins=[origin])) as client:
            response = await client.options("/api/v1/things", headers=headers)

        assert response.status_code == 200
        assert "PUT" in response.headers["access-control-allow-methods"]


class TestBodyLimit:
    async def test_returns_413_by_the_announced_length(self) -> None:
        response = await send("POST", "/api/v1/things", json={"name": "x" * LIMIT})

        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")

    async def test_returns_413_by_what_really_comes(self) -> None:
        received = 0

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal received
            while received < LIMIT * 100:
                received += 500
                yield b'"' + b"x" * 499

        response = await send("POST", "/api/v1/things", content=chunks(), headers={"Content-Type": "application/json"})

        assert response.status_code == 413
        assert received < LIMIT + 1000

    async def test_uploads_have_their_own_limit(self) -> None:
        fits = await send("PUT", "/api/v1/files/a.bin", content=b"\xff" * (LIMIT * 2))
        too_large = await send("PUT", "/api/v1/files/a.bin", content=b"\xff" * (UPLOAD_LIMIT + 1))

        assert fits.json() == LIMIT * 2
        assert too_large.status_code == 413

    @pytest.mark.parametrize("path", ["/api/v1/files/a", "/api/v1/streams/a"])
    async def test_streamed_upload_over_the_limit_is_413_in_the_middle(self, path: str) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(11):
                yield b"\xff" * 10_000

        response = await send("PUT", path, content=chunks())

        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")

    async def test_body_of_a_get_is_bounded_too(self) -> None:
        response = await send("GET", "/api/v1/things", content=b"x" * (LIMIT + 1))

        assert response.status_code == 413


class TestContentType:
    @pytest.mark.parametrize("kind", ["application/json", "application/json; charset=UTF-8", "Application/JSON"])
    async def test_json_is_taken(self, kind: str) -> None:
        response = await send("POST", "/api/v1/things", content=b'{"name": "a"}', headers={"Content-Type": kind})

        assert response.status_code == 201

    @pytest.mark.parametrize(
        "kind",
        [
            None,
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data",
            "application/json;charset=gbk",
        ],
    )
    async def test_returns_415_for_anything_else(self, kind: str | None) -> None:
        headers = {} if kind is None else {"Content-Type": kind}

        response = await send("POST", "/api/v1/things", content=b'{"name": "a"}', headers=headers)

        assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
        assert "application/json" in response.json()["detail"]

    async def test_merge_patch_is_for_patch_only(self) -> None:
        headers = {"Content-Type": "application/merge-patch+json", "If-Match": "*"}

        patched = await send("PATCH", "/api/v1/things/a", content=b'{"a": null}', headers=headers)
        put = await send("PUT", "/api/v1/things/a", content=b"{}", headers=headers)

        assert patched.json() == {"a": None}
        assert put.status_code == 415

    async def test_no_body_needs_no_type(self) -> None:
        assert (await send("POST", "/api/v1/things/a/poke")).status_code == 204

    async def test_compressed_body_is_415(self) -> None:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}

        response = await send("POST", "/api/v1/things", content=b"\x1f\x8b", headers=headers)

        assert (response.status_code, response.json()["code"]) == (415, "unsupported_encoding")


class TestJson:
    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            (b'{"name": "a"', 400, "malformed_json"),
            (b"{'name': 'a'}", 400, "malformed_json"),
            (b'{"name": "\xff"}', 400, "json_not_utf8"),
            (b'{"name": "\xed\xa0\x80"}', 400, "json_not_utf8"),
            ('{"name": "a"}'.encode("utf-16"), 400, "json_not_utf8"),
            (b'{"name": "a", "anything": NaN}', 400, "json_bad_number"),
            (b'{"name": "a", "anything": -1e999}', 400, "json_bad_number"),
            (b'{"name": "a", "size": ' + b"9" * 1500 + b"}", 422, "invalid_request"),
            (b'{"name": "a", "anything": ' + b"[" * 70 + b"]" * 70 + b"}", 400, "json_too_deep"),
            (b"[" * 2000, 400, "json_too_deep"),
            (b'{"name": "a", "anything": {"b/c": ["\\u0000"]}}', 422, "json_bad_character"),
            (b'{"name": "\\ud800"}', 422, "json_bad_character"),
            (b'{"name": "\\ud83d\\ude00"}', 201, None),
            (b'{"name": "[[[[\\u0041"}', 201, None),
            (b'\xef\xbb\xbf{"name": "a"}', 201, None),
        ],
    )
    async def test_has_its_own_answer(self, body: bytes, status: int, code: str | None) -> None:
        response = await send("POST", "/api/v1/things", content=body, headers={"Content-Type": "application/json"})

        assert (response.status_code, response.json().get("code")) == (status, code)

    @pytest.mark.parametrize(
        "text",
        ["[" + "1," * 11_000, "[" + "{}," * 6_000, "[" * 11_000, '"",' * 21_000, r'["\"",' + "1," * 11_000],
        ids=["numbers", "objects", "depth", "texts", "escapes"],
    )
    def test_of_too_many_values_is_refused_unparsed(self, text: str) -> None:
        with pytest.raises(JsonTooManyValues):
            parse_json(text.encode())

    @pytest.mark.parametrize(
        "value",
        [[1] * 9_000, "," * 50_000, {'"\\,{': ',\\"' * 9_000}, {f"k{n}": "" for n in range(9_000)}],
        ids=["numbers", "commas", "escapes", "names"],
    )
    def test_signs_inside_of_texts_are_no_values(self, value: object) -> None:
        assert parse_json(json.dumps(value).encode()) == value

    async def test_says_line_and_column(self) -> None:
        body = b'{\n  "name": "a",\n  "size": 3,,\n}'

        response = await send("POST", "/api/v1/things", content=body, headers={"Content-Type": "application/json"})

        assert "line 3, column 13" in response.json()["detail"]

    async def test_says_where_the_character_stands(self) -> None:
        response = await send("POST", "/api/v1/things", json={"name": "a", "anything": {"b/c": ["\0"]}})

        assert response.json()["errors"][0]["pointer"] == "/anything/b~1c/0"
