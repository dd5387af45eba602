import asyncio
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI

from app.access.guard import LicenceGuard
from app.access.licence import PRIVATE_KEY_FILE, issue, keygen, load_private_key
from app.api.routes import system
from app.api.routes.system import Readiness
from app.main import create_app
from app.settings import load_settings
from app.store.session import Database
from tests.api.foundation import client_of, make_app

NOW = datetime(2026, 6, 1, tzinfo=UTC)


async def answers() -> None: ...


async def refuses() -> None:
    raise ConnectionRefusedError("nobody there")


async def hangs() -> None:
    await asyncio.Event().wait()


def service(readiness: Readiness | None = None, *, licence: str | None = None, folder: Path | None = None) -> FastAPI:
    app = make_app(token="a-token-for-everything-else")
    app.include_router(system.router)
    app.state.readiness = readiness or Readiness(database=answers)
    if folder is not None:
        path = folder / "license.json"
        if licence is not None:
            path.write_text(licence)
        app.state.licence = LicenceGuard(path, PRIVATE_KEY.public_key(), lambda: NOW)
    return app


PRIVATE_KEY = Ed25519PrivateKey.generate()


class TestProbes:
    async def test_healthz_needs_no_token_and_asks_nothing(self) -> None:
        async with client_of(service(Readiness(database=refuses))) as client:
            response = await client.get("/healthz")

        assert (response.status_code, response.json()) == (200, {"status": "ok"})

    async def test_ready_if_everything_answers(self) -> None:
        async with client_of(service(Readiness(answers, {"redis": answers}))) as client:
            response = await client.get("/readyz")

        assert (response.status_code, response.json()) == (200, {"status": "ready", "degraded": []})

    async def test_redis_down_is_degraded_and_no_error(self) -> None:
        async with client_of(service(Readiness(answers, {"redis": refuses}))) as client:
            response = await client.get("/readyz")

        assert (response.status_code, response.json()["degraded"]) == (200, ["redis"])

    async def test_returns_503_if_the_database_is_down(self) -> None:
        async with client_of(service(Readiness(refuses, {"redis": answers}))) as client:
            response = await client.get("/readyz")

        assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")

    async def test_check_that_hangs_counts_as_down(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(system, "CHECK_SECONDS", 0.05)

        async with client_of(service(Readiness(answers, {"redis": hangs}))) as client:
            response = await client.get("/readyz")

        assert response.json()["degraded"] == ["redis"]


class TestLicense:
    async def get(self, app: FastAPI, language: str = "en") -> dict[str, object]:
        headers = {"Authorization": "Bearer a-token-for-everything-else", "Accept-Language": language}
        async with client_of(app) as client:
            response = await client.get("/api/v1/license", headers=headers)
        assert response.status_code == 200
        body: dict[str, object] = response.json()
        return body

    async def test_none_installed(self, tmp_path: Path) -> None:
        body = await self.get(service(folder=tmp_path))

        assert body == {"state": "none", "license": None, "problem": None, "warning": None}

    async def test_valid(self, tmp_path: Path) -> None:
        text = issue(PRIVATE_KEY, licensee="ACME 有限公司", issued_at=NOW, licence_id="L-1")

        body = await self.get(service(licence=text, folder=tmp_path))

        assert body["state"] == "valid"
        assert body["license"] == {
            "id": "L-1",
            "licensee": "ACME 有限公司",
            "issued_at": "2026-06-01T00:00:00Z",
            "expires_at": None,
            "features": ["methods:write"],
            "edition": None,
            "projects": None,
            "ends_at": None,
        }

    async def test_expired_says_why_in_the_callers_language(self, tmp_path: Path) -> None:
        text = issue(PRIVATE_KEY, licensee="ACME", issued_at=NOW - timedelta(days=2), expires_at=NOW, licence_id="L-1")

        body = await self.get(service(licence=text, folder=tmp_path), "zh")

        assert body["state"] == "invalid"
        assert body["problem"] == {
            "pointer": "",
            "code": "license_expired",
            "detail": "许可证 L-1 已于 2026-06-01T00:00:00Z 过期。请向供应商索取新的许可证并安装。",
        }


class TestInstallation:
    async def test_over_http_counts_at_once_and_tells_everybody_of_its_end(
        self, database: Database, tmp_path: Path
    ) -> None:
        _, public_key = keygen(tmp_path / "keys")
        private_key = load_private_key(tmp_path / "keys" / PRIVATE_KEY_FILE)
        now = datetime.now(UTC)
        text = issue(
            private_key,
            licensee="ACME",
            issued_at=now - timedelta(hours=1),
            expires_at=now + timedelta(days=9, hours=1),
            edition="team",
            projects=3,
            grace_days=14,
        )
        settings = load_settings(home=tmp_path / "home", database_url=database.url, license_public_key=public_key)
        application = create_app(settings)
        transport = httpx.ASGITransport(application)
        headers = {"Accept-Language": "de"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            before = (await client.get("/api/v1/me")).json()["notices"]
            forged = await client.put("/api/v1/license", json={**json.loads(text), "signature": "AAAA"})
            broken = await client.put("/api/v1/license", json={"payload": "e30"})
            none_yet = (await client.get("/api/v1/license")).json()["state"]
            installed = await client.put("/api/v1/license", json=json.loads(text))
            (notice,) = (await client.get("/api/v1/me")).json()["notices"]
        await application.state.services.database.close()

        assert (before, none_yet) == ([], "none")
        assert [(answer.status_code, answer.json()["code"]) for answer in (forged, broken)] == [
            (422, "license_forged"),
            (422, "invalid_request"),
        ]
        body = installed.json()
        assert (installed.status_code, body["state"], body["license"]["projects"]) == (200, "valid", 3)
        assert body["warning"] == notice
        assert (notice["code"], "in 9 Tag(en)" in notice["detail"]) == ("license_expires_soon", True)
        assert (tmp_path / "home" / "license.json").stat().st_mode & 0o777 == 0o600


def test_import_of_the_api_leaves_out_what_it_may_not_need() -> None:
    program = (
        "import sys, app.main; from app.domain import texts; print(texts.catalogue.cache_info().currsize, *sys.modules)"
    )

    texts_read, *loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()

    assert texts_read == "0"
    assert {"torch", "redis", "arq", "httpx", "alembic", "rich"}.isdisjoint(loaded)
