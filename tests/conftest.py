"""Private servers and databases for the tests. Nothing outside the temporary folders is touched.

A Postgres or Redis that cannot be started is a failure, not a skip: what is not tested there is not known to work.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from uuid import uuid4

import pluggy
import pytest
import sqlalchemy as sa

from app.store.migrate import upgrade
from app.store.session import Database
from tests import training_environment
from tests.servers import RedisServer, postgres_url, private_postgres, private_redis
from tests.waiting import awaited_in_vain

BACKENDS = [
    pytest.param("sqlite", id="sqlite"),
    pytest.param("postgres", id="postgres", marks=[pytest.mark.postgres]),
]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pluggy.Result[pytest.TestReport], None]:
    """Say what a test waited for in vain; turn a skipped test of Postgres or Redis into a failure.

    What is skipped there is not known to work.
    """
    outcome = yield
    report = outcome.get_result()
    if (awaited := awaited_in_vain()) and report.failed:
        report.sections.append(("waited in vain", awaited))
    if report.skipped and any(item.get_closest_marker(name) for name in ("postgres", "redis")):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but tests of Postgres and Redis have to run: {report.longrepr}"


@pytest.fixture(autouse=True)
def _no_real_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test away from the home of the person who runs it."""
    for name in ("DEEPE_API_TOKEN", "DEEPE_DATABASE_URL", "DEEPE_REDIS_URL", "DEEPE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEEPE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a migrated SQLite file that each test copies."""
    path = tmp_path_factory.mktemp("sqlite") / "template.sqlite"
    asyncio.run(_migrate(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Start a private Postgres; return the URL of its `template` database, which is migrated."""
    with private_postgres() as server:
        asyncio.run(_execute(server, 'CREATE DATABASE "template"'))
        asyncio.run(_migrate(postgres_url(server, "template")))
        yield server


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of a fresh migrated database, once on SQLite and once on Postgres."""
    yield from _fresh_database(request, tmp_path, backend=request.param)


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """Return the URL of a fresh migrated SQLite database."""
    return _copy_sqlite(sqlite_template, tmp_path)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """Yield a `Database` on a fresh migrated database, once on SQLite and once on Postgres."""
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Start a private Redis on a free loopback port."""
    with private_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def training_python() -> Path:
    """Return the interpreter of the `trl` environment (`tests.training_environment`)."""
    return training_environment.ready()


@pytest.fixture(scope="session")
def mlx_python() -> Path:
    """Return the interpreter of the `mlx` environment (`tests.training_environment`)."""
    return training_environment.ready("mlx")


@pytest.fixture(scope="session")
def simpletuner_python() -> Path:
    """Return the interpreter of the `simpletuner` environment, which is too large to be built by a test."""
    if not training_environment.is_built("simpletuner"):
        pytest.skip("SimpleTuner's environment (9 GB) is not built: make simpletuner does it, and trains with it")
    return training_environment.ready("simpletuner")


def _fresh_database(request: pytest.FixtureRequest, tmp_path: Path, *, backend: str) -> Iterator[str]:
    if backend == "sqlite":
        yield _copy_sqlite(request.getfixturevalue("sqlite_template"), tmp_path)
        return
    server: str = request.getfixturevalue("postgres_server")
    name = f"test_{uuid4().hex}"
    asyncio.run(_execute(server, f'CREATE DATABASE "{name}" TEMPLATE "template"'))
    yield postgres_url(server, name)
    asyncio.run(_execute(server, f'DROP DATABASE "{name}" WITH (FORCE)'))


def _copy_sqlite(template: Path, tmp_path: Path) -> str:
    copy = tmp_path / "deepe.sqlite"
    shutil.copyfile(template, copy)
    return f"sqlite+aiosqlite:///{copy}"


async def _migrate(url: str) -> None:
    database = Database(url)
    try:
        await upgrade(database)
        if url.startswith("sqlite"):
            async with database.engine.connect() as connection:
                await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        await database.close()


async def _execute(server: str, statement: str) -> None:
    database = Database(postgres_url(server, "postgres"))
    try:
        async with database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            await connection.execute(sa.text(statement))
    finally:
        await database.close()
