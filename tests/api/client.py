"""A service over ASGI on a fresh database and an empty home, for tests of methods and all that needs them."""

import operator
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI

from app.access.guard import CommercialLicenseRequired, ProjectLimitReached
from app.api.application import HttpOptions, new_application
from app.api.routes import base_models, datasets, methods, presets, scripts
from app.domain.enums import Platform
from app.main import build_services
from app.registry.methods.wiring import MethodServices
from app.registry.nodes.platforms import PlatformChoice
from app.registry.scripts.names import script_path
from app.settings import load_settings
from app.store.home import Home
from app.store.session import Database

BASE_URL = "http://127.0.0.1:8000"
MAX_SCRIPT_BYTES = 100_000
MAX_UPLOAD_BYTES = 200_000
MAX_LINE = 400
SOURCE = b"print('hello')\n"


@dataclass
class SwitchableLicence:
    """A licence gate that a test opens and closes."""

    installed: bool = True

    def require(self) -> None:
        if not self.installed:
            raise CommercialLicenseRequired

    def require_room_for_project(self, present: int) -> None:
        if present and not self.installed:
            raise ProjectLimitReached(limit=1)


@dataclass
class MethodsApp:
    """The service under test and what a test needs to look behind it."""

    client: httpx.AsyncClient
    database: Database
    home: Home
    services: MethodServices
    licence: SwitchableLicence

    def script(self, path: str, content: bytes = SOURCE) -> Path:
        """Put a file into the script root, as a person with an editor does."""
        file = self.home.scripts / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    async def create(self, **overrides: Any) -> dict[str, Any]:
        """Create a method over HTTP; its file is put there if it is missing."""
        wanted = definition(**overrides)
        for stage in wanted["stages"].values():
            path = script_path(stage["file"])
            if not (self.home.scripts / path).exists():
                self.script(path)
        response = await self.client.post("/api/v1/methods", json=wanted)
        assert response.status_code == 201, response.text
        body: dict[str, Any] = response.json()
        return body


def definition(**overrides: Any) -> dict[str, Any]:
    """Return the smallest valid method, changed by `overrides`."""
    return {
        "name": "finance",
        "training_type": "chat",
        "technique": "sft",
        "lifecycle": ["customized"],
        "stages": {"training": {"file": "train.py", "conda_env": "base"}},
        **overrides,
    }


def tag_of(response: httpx.Response) -> dict[str, str]:
    """Return the header that names the version which was read."""
    return {"If-Match": response.headers["etag"]}


def utc_now() -> datetime:
    """Return the present time."""
    return datetime.now(UTC)


@asynccontextmanager
async def methods_app(
    database: Database,
    root: Path,
    *,
    routers: tuple[APIRouter, ...] = (),
    platform: PlatformChoice = "cpu",
    samples: bool = False,
) -> AsyncIterator[MethodsApp]:
    """Run the routes of methods, scripts and presets."""
    settings = load_settings(
        home=root,
        database_url=database.url,
        platform=platform,
        max_script_bytes=MAX_SCRIPT_BYTES,
        dataset_max_line=MAX_LINE,
        samples=samples,
    )
    home = Home(root)
    home.create()
    licence = SwitchableLicence()
    services = build_services(settings, database, licence=licence, clock=utc_now, machine=Platform.CPU)
    app = _application(routers)
    app.state.services = services
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
        yield MethodsApp(client=client, database=database, home=home, services=services.methods, licence=licence)


_applications: list[tuple[tuple[APIRouter, ...], FastAPI]] = []


def _application(routers: tuple[APIRouter, ...]) -> FastAPI:
    """Return the routes, once: FastAPI prepares them at the first request, which takes longer than a test does."""
    for known, app in _applications:
        if len(known) == len(routers) and all(map(operator.is_, known, routers)):
            return app
    uploads = [
        *scripts.script_uploads(MAX_SCRIPT_BYTES),
        *datasets.dataset_uploads(MAX_UPLOAD_BYTES),
        *base_models.base_model_uploads(MAX_UPLOAD_BYTES),
    ]
    app = new_application(HttpOptions(version="test", uploads=uploads))
    for router in (methods.router, scripts.router, presets.router, *routers):
        app.include_router(router)
    _applications.append((routers, app))
    return app
