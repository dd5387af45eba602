"""Deploy targets over HTTP, on SQLite and on Postgres."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from app.store.session import Database
from tests.api.client import MethodsApp, methods_app
from tests.api.resources import ROUTERS, codes

URL = "/api/v1/deploy-targets"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home", routers=ROUTERS) as running:
        yield running


async def create(
    app: MethodsApp, name: str = "gpu-box", url: str = "http://gpu-box:11434/", kind: str = "ollama"
) -> httpx.Response:
    return await app.client.post(URL, json={"name": name, "kind": kind, "url": url})


class TestCreate:
    async def test_configures_a_target(self, app: MethodsApp) -> None:
        response = await create(app)

        body = response.json()
        assert response.status_code == 201
        assert (body["name"], body["kind"], body["url"]) == ("gpu-box", "ollama", "http://gpu-box:11434")
        assert (await app.client.get(f"{URL}/GPU-Box")).json() == body
        assert (await app.client.get(URL)).json() == {"items": [body], "next_cursor": None}

    @pytest.mark.parametrize(
        ("url", "code"),
        [
            ("", "invalid_url"),
            ("gpu-box:11434", "invalid_url"),
            ("ftp://gpu-box", "invalid_url"),
            ("file:///etc/passwd", "invalid_url"),
            ("http://", "invalid_url"),
            ("http://:80", "invalid_url"),
            ("http://box:99999", "invalid_url"),
            ("http://box:x", "invalid_url"),
            ("http://[::1", "invalid_url"),
            ("http://a b", "invalid_url"),
            ("http://box/?x=1", "invalid_url"),
            ("http://box/#x", "invalid_url"),
            ("http://box\n", None),
            ("http://bo\tx", "invalid_url"),
            ("http://user:secret@box", "url_with_credentials"),
            ("http://user@box", "url_with_credentials"),
            ("http://" + "x" * 3000, "invalid_url"),
            ("https://[::1]:11434/ollama", None),
        ],
    )
    async def test_checks_the_address(self, app: MethodsApp, url: str, code: str | None) -> None:
        response = await create(app, url=url)

        assert codes(response.json()) == ([] if code is None else [("/url", code)])
        assert response.status_code == (201 if code is None else 422)

    async def test_reports_name_and_address_at_once(self, app: MethodsApp) -> None:
        response = await create(app, name="Custom", url="x")

        assert codes(response.json()) == [("/name", "name_reserved"), ("/url", "invalid_url")]

    async def test_refuses_unknown_kinds(self, app: MethodsApp) -> None:
        assert codes((await create(app, kind="vllm")).json()) == [("/kind", "field_choice")]

    async def test_of_two_creates_of_one_name_one_wins(self, app: MethodsApp) -> None:
        responses = await asyncio.gather(*[create(app, name=name) for name in ("box", "Box", "BOX")])

        assert sorted(response.status_code for response in responses) == [201, 409, 409]


class TestDelete:
    async def test_deletes(self, app: MethodsApp) -> None:
        await create(app)

        assert (await app.client.delete(f"{URL}/gpu-box")).status_code == 204
        assert (await app.client.delete(f"{URL}/gpu-box")).json()["code"] == "deploy_target_not_found"

    async def test_refuses_while_a_method_names_it(self, app: MethodsApp) -> None:
        await create(app)
        method = await app.create(
            name="deployer",
            lifecycle=["customized", "online"],
            deployment={"target": "gpu-box"},
        )

        refused = await app.client.delete(f"{URL}/gpu-box")
        gone = await app.client.delete(f"/api/v1/methods/{method['id']}", headers={"If-Match": "*"})
        deleted = await app.client.delete(f"{URL}/gpu-box")

        assert (refused.status_code, refused.json()["code"]) == (409, "deploy_target_in_use")
        assert "deployer" in refused.json()["detail"]
        assert (gone.status_code, deleted.status_code) == (204, 204)
