"""Fixtures of the end-to-end tests: environments that nodes have, and the three kinds of installations."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from app.cli.private_redis import NO_REDIS, RedisChoice, RedisKind
from tests.databases import execute
from tests.e2e.installation import Installation
from tests.fork_server import ForkServer
from tests.servers import postgres_url, private_redis
from tests.worker.harness import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a venv that nodes have as their environment `base`."""
    yield from make_base(tmp_path_factory.mktemp("envs") / "base")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("sqlite", id="sqlite", marks=pytest.mark.xdist_group("e2e-sqlite")),
        pytest.param(
            "sqlite-redis", id="sqlite-redis", marks=[pytest.mark.redis, pytest.mark.xdist_group("e2e-redis")]
        ),
        pytest.param(
            "postgres-redis",
            id="postgres-redis",
            marks=[pytest.mark.postgres, pytest.mark.redis, pytest.mark.xdist_group("e2e-postgres")],
        ),
    ],
)
def site(
    request: pytest.FixtureRequest, base: Path, worker_forks: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """Run an installation with a licence and samples: SQLite without any Redis, SQLite with, Postgres with."""
    root = tmp_path_factory.mktemp(request.param)
    with _redis(root, wanted="redis" in request.param) as redis:
        server = request.getfixturevalue("postgres_server") if "postgres" in request.param else None
        url = asyncio.run(_new_database(server)) if server else None
        # with a long pause between two looks in the database, only what hints tell happens soon
        pause = "0.1" if redis is NO_REDIS else "10"
        site = Installation(
            root, {"base": base}, forks=worker_forks, redis=redis, database_url=url, DEEPE_POLL_SECONDS=pause
        )
        site.install_licence()
        try:
            site.start()
            site.add_samples()
            yield site
        finally:
            site.close()


@dataclass(frozen=True)
class Trained:
    """An installation in which the demo of SFT-Demo has run undisturbed: its jobs, and how long the chain took."""

    site: Installation
    training: Any
    saving: Any
    deployment: Any
    seconds: float

    def submit_demo(self, method: str, **members: Any) -> Any:
        """Submit a shipped method with what came with it."""
        samples = self.site.get(f"/presets/{method}")["samples"]
        inputs = {name: samples[name] for name in ("base_model", "dataset", "parameters")}
        return self.site.submit(method, **inputs, **members)


@pytest.fixture(scope="session")
def trained(
    base: Path, training_python: Path, worker_forks: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """Train, save and deploy with SFT-Demo as a newcomer does: on an empty home, with what came with the method."""
    environments = {"base": base, "trl": training_python.parents[1]}
    site = Installation(tmp_path_factory.mktemp("training"), environments, forks=worker_forks)
    try:
        site.start()
        unfinished = Trained(site, None, None, None, 0.0)
        begun = time.monotonic()
        chain = unfinished.submit_demo("SFT-Demo", through="online")["chain"]
        training, saving, deployment = (site.succeed(link["id"]) for link in chain)
        yield replace(
            unfinished, training=training, saving=saving, deployment=deployment, seconds=time.monotonic() - begun
        )
    finally:
        site.close()


def _redis(root: Path, *, wanted: bool) -> AbstractContextManager[RedisChoice]:
    return _own_redis(root) if wanted else nullcontext(NO_REDIS)


@contextmanager
def _own_redis(root: Path) -> Iterator[RedisChoice]:
    folder = root / "redis"
    folder.mkdir()
    with private_redis(folder) as server:
        yield RedisChoice(RedisKind.CONFIGURED, url=f"redis://127.0.0.1:{server.port}")


async def _new_database(server: str) -> str:
    """Create an empty database; the service brings the schema itself."""
    name = f"e2e_{uuid4().hex}"
    await execute(server, f'CREATE DATABASE "{name}"')
    return postgres_url(server, name)
