import importlib
import json
import logging
import pkgutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import HTTPConnection

import app as package
from app.access.licence import LicenceKeyExists
from app.api.errors import (
    STATUS_BY_FAMILY,
    DatabaseUnavailable,
    describe_problems,
    problem_of,
    problem_response,
    problem_responses,
    status_of,
    translate,
)
from app.domain.errors import AppError, Conflict, InvalidRequest, NotFound, Violation
from app.domain.projects import DEFAULT_SCOPE
from app.domain.texts import Language, catalogue
from app.store.session import Database, DatabaseUnreachable
from tests.api.foundation import client_of, make_app


async def call(method: str, path: str, **options: Any) -> httpx.Response:
    async with client_of(make_app()) as client:
        return await client.request(method, path, **options)


def leaves() -> list[type[AppError]]:
    for module in pkgutil.walk_packages(package.__path__, "app."):
        if not module.name.startswith(("app.main", "app.worker", "app.cli")):
            importlib.import_module(module.name)
    found, waiting = set(), [AppError]
    while waiting:
        error = waiting.pop()
        waiting += error.__subclasses__()
        if error.__module__.startswith("app.") and error.code:
            found.add(error)
    return sorted(found, key=lambda error: error.__qualname__)


class TestEveryError:
    def test_has_a_status(self) -> None:
        assert {error: status_of(error) for error in leaves()}

    def test_has_a_text_in_every_language(self) -> None:
        lacking = [
            (error.code, language)
            for error in leaves()
            for language in Language
            if not catalogue().get(error.code, {}).get(language)
        ]

        assert lacking == []

    def test_status_has_a_title_in_every_language(self) -> None:
        for status in STATUS_BY_FAMILY.values():
            assert set(catalogue()[f"problem_title_{status}"]) == set(Language)

    def test_class_without_family_is_refused(self) -> None:
        class Stray(AppError):
            code = "bad_request"

        with pytest.raises(LookupError, match="Stray"):
            status_of(Stray)


class TestProblemDocument:
    async def test_has_all_members(self) -> None:
        response = await call("GET", "/api/v1/things/x", headers={"X-Request-Id": "abc"})

        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json() == {
            "type": "urn:deepe:problem:route_not_found",
            "title": "Not found",
            "status": 404,
            "detail": "Nothing is served at this address. The addresses are listed in /docs.",
            "instance": "/api/v1/things/x",
            "code": "route_not_found",
            "request_id": "abc",
            "errors": [],
            "error_count": 0,
        }

    async def test_speaks_the_callers_language(self) -> None:
        response = await call("GET", "/nothing", headers={"Accept-Language": "fr, de;q=0.5, zh-CN;q=0.9"})

        assert response.json()["title"] == "未找到"
        assert response.headers["content-language"] == "zh"
        assert "Accept-Language" in response.headers["vary"]

    async def test_instance_is_ascii_for_a_unicode_path(self) -> None:
        response = await call("GET", "/api/v1/模型")

        assert response.json()["instance"] == "/api/v1/%E6%A8%A1%E5%9E%8B"

    def test_lists_every_violation_with_pointer_code_and_detail(self) -> None:
        error = InvalidRequest([Violation("/a", "field_required"), Violation("/b", "field_too_long", {"limit": 3})])

        problem = problem_of(error, language=Language.DE)

        assert [entry.model_dump() for entry in problem.errors] == [
            {"pointer": "/a", "code": "field_required", "detail": "Dieses Feld ist erforderlich."},
            {"pointer": "/b", "code": "field_too_long", "detail": "Der Wert ist zu lang; höchstens 3."},
        ]

    async def test_lists_a_hundred_violations_and_counts_the_others(self) -> None:
        body = {"name": "a", **{f"k{n}": 1 for n in range(150)}}

        problem = (await call("POST", "/api/v1/things", json=body)).json()

        assert (len(problem["errors"]), problem["error_count"]) == (100, 150)
        assert "50 more" in problem["detail"]

    def test_file_name_that_is_no_unicode_does_not_crash(self) -> None:
        connection = HTTPConnection({"type": "http", "path": "/x", "headers": [], "query_string": b""})

        response = problem_response(connection, LicenceKeyExists(path="/keys/\udcff"))

        assert "/keys/?" in json.loads(bytes(response.body))["detail"]


class TestUnexpected:
    async def test_answers_500_with_the_request_id_only(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.ERROR):
            response = await call("GET", "/api/v1/fails/bug")

        assert response.status_code == 500
        assert "secret" not in response.text
        assert response.json()["request_id"] == response.headers["x-request-id"]
        assert response.json()["request_id"] in response.json()["detail"]
        assert "KeyError" in caplog.text

    async def test_wrong_sql_is_our_fault(self) -> None:
        assert (await call("GET", "/api/v1/fails/wrong-sql")).status_code == 500

    async def test_an_answer_begun_is_broken_off(self) -> None:
        with pytest.raises(OSError, match="in the middle"):
            await call("GET", "/api/v1/broken-stream")


class TestDatabaseTrouble:
    @pytest.mark.parametrize(
        ("how", "status", "code"),
        [
            ("locked", 503, "database_busy"),
            ("deadlock", 503, "database_busy"),
            ("no-connection-left", 503, "database_busy"),
            ("unreadable", 503, "database_unavailable"),
            ("refused", 503, "database_unavailable"),
            ("full-database", 507, "storage_full"),
            ("full-disk", 507, "storage_full"),
        ],
    )
    async def test_has_its_own_answer(self, how: str, status: int, code: str) -> None:
        response = await call("GET", f"/api/v1/fails/{how}")

        assert (response.status_code, response.json()["code"]) == (status, code)
        assert ("retry-after" in response.headers) == (status == 503)

    async def test_socket_file_that_is_not_there_is_a_database_that_is_down(self, tmp_path: Path) -> None:
        database = Database(f"postgresql+asyncpg:///d?host={tmp_path}", scope=DEFAULT_SCOPE)

        with pytest.raises(DatabaseUnreachable) as raised:
            await database.ping()

        assert isinstance(translate(raised.value), DatabaseUnavailable)
        await database.close()

    async def test_failing_commit_is_no_success(self) -> None:
        response = await call("POST", "/api/v1/commits")

        assert (response.status_code, response.json()["code"]) == (503, "database_busy")


class TestRouting:
    async def test_unknown_route_is_404(self) -> None:
        response = await call("GET", "/api/v1/nothing")

        assert (response.status_code, response.json()["code"]) == (404, "route_not_found")

    async def test_wrong_method_is_405_with_all_that_are_possible(self) -> None:
        response = await call("DELETE", "/api/v1/things/x")

        assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
        assert response.headers["allow"] == "GET, HEAD, PUT, PATCH"
        assert response.json()["detail"] == "DELETE is not possible here. Possible: GET, HEAD, PUT, PATCH."

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("POST", "/api/v1/files/a", "PUT"),
            ("GET", "/api/v1/things/a:poke", "POST"),
            ("PUT", "/api/v1/things/a:poke", "POST"),
            ("HEAD", "/api/v1/things/a:poke", "POST"),
        ],
    )
    async def test_wrong_method_is_405_whatever_is_sent(self, method: str, path: str, allowed: str) -> None:
        response = await call(method, path, content=b"{", headers={"Content-Type": "text/plain"})

        assert (response.status_code, response.headers["allow"]) == (405, allowed)

    async def test_unknown_action_is_404(self) -> None:
        assert (await call("GET", "/api/v1/things/a:fly")).json()["code"] == "route_not_found"

    async def test_path_that_is_no_utf8_is_400(self) -> None:
        response = await call("PUT", "/api/v1/files/%ff", content=b"x")

        assert (response.status_code, response.json()["code"]) == (400, "path_not_utf8")


class TestHead:
    @pytest.mark.parametrize(
        ("path", "status"),
        [("/api/v1/things", 200), ("/api/v1/things/x", 404), ("/api/v1/pieces", 200), ("/docs/static/start.js", 200)],
    )
    async def test_answers_as_get_does_without_the_body(self, path: str, status: int) -> None:
        got, head = await call("GET", path), await call("HEAD", path)

        assert (head.status_code, got.status_code, head.content) == (status, status, b"")
        assert {**head.headers, "x-request-id": ""} == {**got.headers, "x-request-id": ""}

    async def test_is_not_documented_once_more(self) -> None:
        assert all("head" not in operations for operations in make_app().openapi()["paths"].values())


class TestFields:
    async def test_every_problem_at_once_with_pointers(self) -> None:
        body = {
            "name": "x" * 11,
            "size": 10,
            "kind": "poem",
            "parts": {"a/b": {}, "c": {"file": 3, "extra": 1}},
            "stray": 1,
        }

        response = await call("POST", "/api/v1/things", json=body)

        assert response.status_code == 422
        assert response.json()["code"] == "invalid_request"
        assert {(entry["pointer"], entry["code"]) for entry in response.json()["errors"]} == {
            ("/name", "field_too_long"),
            ("/size", "field_too_large"),
            ("/kind", "field_choice"),
            ("/parts/a~1b/file", "field_required"),
            ("/parts/c/file", "field_type"),
            ("/parts/c/extra", "field_unknown"),
            ("/stray", "field_unknown"),
        }

    async def test_details_say_what_to_do_in_the_callers_language(self) -> None:
        response = await call(
            "POST", "/api/v1/things", json={"name": "!", "size": -1, "kind": ""}, headers={"Accept-Language": "zh"}
        )

        details = {entry["pointer"]: entry["detail"] for entry in response.json()["errors"]}
        assert details["/size"] == "值必须 ≥ 0。"
        assert "：chat, " in details["/kind"]
        assert details["/name"] == "值的格式不符合要求（^[^!]+$）。"

    async def test_member_of_a_union_is_named_once_and_without_pydantics_steps(self) -> None:
        response = await call("POST", "/api/v1/things", json={"name": "a", "tags": [1, None]})

        assert [entry["pointer"] for entry in response.json()["errors"]] == ["/tags/1"]

    async def test_missing_body_points_at_the_whole(self) -> None:
        response = await call("POST", "/api/v1/things")

        assert response.json()["errors"] == [
            {"pointer": "", "code": "field_required", "detail": "This field is required."}
        ]

    async def test_body_of_the_wrong_json_type(self) -> None:
        response = await call("POST", "/api/v1/things", json=[1])

        assert response.json()["errors"][0]["detail"] == "The value must be of the type object."

    @pytest.mark.parametrize(
        ("path", "pointer"),
        [("/api/v1/things?limit=0", "?limit"), ("/api/v1/numbers/three", "{number}")],
    )
    async def test_parameters_have_their_own_pointers(self, path: str, pointer: str) -> None:
        response = await call("GET", path)

        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == pointer


class TestProblemResponses:
    def test_groups_errors_by_status_with_an_example_each(self) -> None:
        class Taken(Conflict):
            code = "license_key_exists"

        class Unknown(NotFound):
            code = "route_not_found"

        responses = {str(status): response for status, response in problem_responses(Taken, Unknown).items()}
        describe_problems(responses)

        assert set(responses) == {"404", "409"}
        content = responses["409"]["content"]["application/problem+json"]
        assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
        assert content["examples"]["license_key_exists"]["value"]["status"] == 409
