"""Fixtures of the worker's tests; the helpers stand in `tests.worker.harness`."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fork_server import ForkServer
from tests.servers import RedisServer, private_redis
from tests.worker.harness import Site, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a venv that the nodes have as their environment `base`."""
    yield from make_base(tmp_path_factory.mktemp("envs") / "base")


@pytest.fixture
async def site(tmp_path: Path, sqlite_url: str, base: Path, worker_forks: ForkServer) -> AsyncIterator[Site]:
    """Yield an installation on SQLite without Redis."""
    site = Site(tmp_path / "home", sqlite_url, base, forks=worker_forks)
    yield site
    await site.close()


@pytest.fixture
async def any_site(tmp_path: Path, database_url: str, base: Path, worker_forks: ForkServer) -> AsyncIterator[Site]:
    """Yield an installation without Redis, once on SQLite and once on Postgres."""
    site = Site(tmp_path / "home", database_url, base, forks=worker_forks)
    yield site
    await site.close()


@pytest.fixture
async def redis_site(
    tmp_path: Path, sqlite_url: str, base: Path, worker_forks: ForkServer, own_redis: RedisServer
) -> AsyncIterator[Site]:
    """Yield an installation on SQLite with a Redis of its own."""
    site = Site(tmp_path / "home", sqlite_url, base, redis_url=own_redis.url(1), forks=worker_forks)
    yield site
    await site.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Start a Redis for this test only, which may stop and flush it."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with private_redis(folder) as server:
        yield server
