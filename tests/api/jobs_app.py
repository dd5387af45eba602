"""The whole service over ASGI with Custom01 and its samples, and a runner that plays the node."""

import asyncio
import json
import shutil
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from app.api.application import HttpOptions, new_application
from app.api.dependencies import Services
from app.api.guards import AccessPolicy
from app.api.routes import base_models, datasets, scripts
from app.api.schemas.access import Login
from app.domain.access import Caller
from app.domain.enums import ModelState, TrainingType
from app.main import Licence, build_services, include_routes
from app.presets.catalogue import sample_base_models, sample_datasets
from app.settings import load_settings
from app.store.models import NewModel, create_model
from app.store.session import Database
from tests.job_rows import ENVIRONMENT, FAILURE, Runner, add_node
from tests.waiting import until

MAX_UPLOAD_BYTES = 1_000_000
BASE_URL = "http://127.0.0.1:8000"
API = "/api/v1"
SUBMIT = {"method": "Custom01", "base_model": "custom01-base", "dataset": "custom01", "through": "complete"}


class EverythingLicensed:
    """A licence for all that needs one."""

    def require_room_for_project(self, present: int) -> None:
        return None

    def require(self, feature: str = "") -> None:
        return None


@dataclass
class RecordingNotifier:
    """Records the jobs it notified of."""

    notified: list[str] = field(default_factory=list)

    def notify(self, job_id: str) -> None:
        self.notified.append(job_id)

    async def close(self) -> None:
        return None


@dataclass
class Event:
    """A server-sent event."""

    name: str
    data: Any
    id: str | None


@dataclass
class JobsApp:
    """The service under test and what a test needs to look behind it."""

    application: FastAPI
    client: httpx.AsyncClient
    services: Services
    notifier: RecordingNotifier
    runner: Runner

    @property
    def database(self) -> Database:
        return self.services.database

    async def get(self, path: str, status: int = 200, **options: Any) -> Any:
        response = await self.client.get(API + path, **options)
        assert response.status_code == status, response.text
        return response.json()

    async def post(self, path: str, body: Mapping[str, Any] | None = None, status: int = 200, **options: Any) -> Any:
        response = await self.client.post(API + path, json=body, **options)
        assert response.status_code == status, response.text
        return response.json()

    async def submit(self, **changes: Any) -> dict[str, Any]:
        """Submit a training and a saving of Custom01."""
        body = {key: value for key, value in {**SUBMIT, **changes}.items() if value is not None}
        answer: dict[str, Any] = await self.post("/jobs", body, 201)
        return answer

    async def add_model(
        self, name: str, state: ModelState, *, kind: str, files: Mapping[str, str] | None = None
    ) -> None:
        """Add the model of an earlier training of Custom01; `kind`: what its folder holds, with these files."""
        made = await self.submit(through="customized")
        job = await self.get(f"/jobs/{made['id']}")
        folder = self.services.home.run_folder(made["id"], 1) / "output"
        folder.mkdir(parents=True)
        for file, text in (files or {}).items():
            (folder / file).write_text(text)
        new = NewModel(
            name=name,
            state=state,
            training_type=TrainingType.CHAT,
            path=self.services.home.relative(folder),
            size_bytes=0,
            base_model_id=job["base_model"]["id"],
            base_model_name="custom01-base",
            base_model_path="models/custom01-base",
            job_id=made["id"],
            method_id=job["method"]["id"],
            method_version=1,
            details={"kind": kind},
        )
        async with self.database.writing() as session:
            await create_model(session, new, now=datetime.now(UTC))
        await self.runner.run(made["id"], FAILURE)

    async def register_data(self, name: str, rows: Sequence[Any]) -> dict[str, Any]:
        """Write the rows to a file of the home and register it."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.services.home.datasets / f"{name}.jsonl").write_text(lines, "utf-8")
        made: dict[str, Any] = await self.post("/datasets", {"name": name, "path": f"{name}.jsonl"}, 201)
        return made

    async def events(self, path: str, **options: Any) -> list[Event]:
        response = await self.client.get(API + path, **options)
        assert response.status_code == 200, response.text
        return parse_events(response.text)


def parse_events(text: str) -> list[Event]:
    """Return the events of a stream that was read to its end."""
    events: list[Event] = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            events.append(Event(name=fields["event"], data=json.loads(fields["data"]), id=fields.get("id")))
    return events


def codes(problem: dict[str, Any]) -> list[tuple[str, str]]:
    """Return where and what, for everything that is wrong with a request."""
    return [(entry["pointer"], entry["code"]) for entry in problem["errors"]]


@asynccontextmanager
async def jobs_app(
    database: Database,
    root: Path,
    *,
    samples: bool = False,
    node: str | None = None,
    licence: Licence | None = None,
) -> AsyncIterator[JobsApp]:
    """Run all routes on a home with Custom01, its base model and its data set, or with the samples of all presets.

    `node`: id of a real one; without it, one is added that has all environments and runs nothing.
    """
    settings = load_settings(home=root, database_url=database.url, platform="cpu", samples=samples, min_free_bytes=0)
    notifier = RecordingNotifier()
    services = build_services(
        settings,
        database,
        licence=licence or EverythingLicensed(),
        clock=lambda: datetime.now(UTC),
        notifier=notifier,
    )
    services.home.create()
    if samples:
        async with database.writing() as session:
            await services.methods.presets.install_presets(session)
    else:
        await _register_samples(services)
    app = _application()
    app.state.services = services
    node = node or await add_node(database, environments=("base", ENVIRONMENT))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE_URL) as client:
        yield JobsApp(
            application=app,
            client=client,
            services=services,
            notifier=notifier,
            runner=Runner(database=database, home=services.home, node_id=node),
        )


@cache
def _application() -> FastAPI:
    """Return all routes, once: FastAPI prepares them at the first request, which takes longer than a test does."""
    uploads = [
        *scripts.script_uploads(MAX_UPLOAD_BYTES),
        *datasets.dataset_uploads(MAX_UPLOAD_BYTES),
        *base_models.base_model_uploads(MAX_UPLOAD_BYTES),
    ]

    async def caller(secret: str) -> Caller:
        services: Services = app.state.services
        return await services.access_keys.caller(secret)

    async def enter(caller: Caller, named: str | None) -> Caller:
        services: Services = app.state.services
        return await services.projects.enter(caller, named)

    app = new_application(HttpOptions(version="test", access=AccessPolicy(keys=caller, enter=enter), uploads=uploads))
    include_routes(app)
    app.state.login = Login(oidc=None)
    return app


async def _register_samples(services: Services) -> None:
    base = next(sample for sample in sample_base_models() if sample.name == "custom01-base")
    data = next(sample for sample in sample_datasets() if sample.name == "custom01")
    assert base.folder is not None
    shutil.copytree(base.folder, services.home.models / base.name)
    shutil.copy(data.path, services.home.datasets / "custom01.jsonl")
    prepared = await services.base_models.prepare(name=base.name, path=base.name)
    rows = await services.datasets.prepare(name="custom01", path="custom01.jsonl")
    async with services.database.writing() as session:
        await services.methods.presets.install(session, "Custom01")  # to install all presets is most of a test's time
        await services.base_models.create(session, prepared)
        await services.datasets.create(session, rows)


@asynccontextmanager
async def served(app: JobsApp) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the application on a real socket: only there can a caller hang up."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(app.application, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await until(lambda: server.started, "the server")  # uvicorn has no event for it
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=address, timeout=None) as client:
                yield client
        finally:
            server.should_exit = True
            await serving
