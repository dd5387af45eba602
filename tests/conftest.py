"""Private servers and databases for the tests. Nothing outside the temporary folders is touched.

A Postgres or Redis that cannot be started is a failure, not a skip: what is not tested there is not known to work.
"""

import asyncio
import gc
import shutil
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from uuid import uuid4

import pluggy
import pytest
from hypothesis import HealthCheck, settings

from app.domain.projects import DEFAULT_SCOPE
from app.store.session import Database
from tests import training_environment
from tests.databases import PostgresDatabase, execute, fast_folder, migrate
from tests.fork_server import ForkServer, fork_workers
from tests.servers import RedisServer, postgres_url, private_postgres, private_redis
from tests.waiting import awaited_in_vain

# Property tests do the same on every run and never judge how quick the machine is.
settings.register_profile(
    "tests",
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")

BACKENDS = [
    pytest.param("sqlite", id="sqlite"),
    pytest.param("postgres", id="postgres", marks=[pytest.mark.postgres]),
]


# What takes longest begins first, so that no worker of xdist comes upon it at the end; what trains, which keeps a
# processor busy, takes turns with what waits for processes.
LONGEST = (
    *("presets/test_sd_demo.py", "chaos/test_random.py", "presets/test_training.py", "e2e/test_real_resume.py"),
    *("presets/test_mlx_demo.py", "chaos/test_crash_points.py", "presets/test_vl_demo.py", "e2e/test_survival.py"),
    *("presets/test_dpo_demo.py", "chaos/test_mutants.py", "presets/test_embedding.py", "e2e/test_real_training.py"),
    *("presets/test_reranker_demo.py", "clients/", "presets/test_distributed.py", "ops/", "presets/test_peft_demo.py"),
    *("presets/test_ppo_demo.py", "presets/test_grpo_demo.py", "presets/test_reward_demo.py", "presets/test_memory.py"),
    *("presets/test_step_loss.py", "presets/test_options.py", "presets/test_going_on.py", "presets/test_turn_ends.py"),
    *(
        "presets/test_full_tuning.py",
        "presets/test_preparation.py",
        "presets/test_labels.py",
        "presets/test_trackers.py",
    ),
    *("worker/test_environments.py", "worker/test_launchers.py", "argspec/test_dataclass_parsers.py", "e2e/", "chaos/"),
    *("cli/", "worker/", "executor/"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every later collection of garbage, and of those of forks."""
    gc.collect()
    gc.freeze()


def _rank(item: pytest.Item) -> int:
    path = item.nodeid.removeprefix("tests/")
    return next((rank for rank, prefix in enumerate(LONGEST) if path.startswith(prefix)), len(LONGEST))


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
def _no_real_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test away from the home of the person who runs it; no folder is made for tests that need none."""
    for name in ("DEEPE_API_TOKEN", "DEEPE_DATABASE_URL", "DEEPE_REDIS_URL", "DEEPE_URL"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path_factory.getbasetemp() / f"home-{uuid4().hex}"
    monkeypatch.setenv("DEEPE_HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", f"{home}-config")


@pytest.fixture(scope="session")
def databases_folder() -> Iterator[Path]:
    """Return a folder for SQLite files, in memory if possible."""
    with fast_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def sqlite_template(databases_folder: Path) -> Path:
    """Return a migrated SQLite file that each test copies."""
    path = databases_folder / "template.sqlite"
    migrate(f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Start a private Postgres; return the URL of its database `postgres`. The one named `template` is migrated."""
    with private_postgres() as server:
        settings = [f"ALTER SYSTEM SET {name} = off" for name in ("fsync", "synchronous_commit", "full_page_writes")]
        asyncio.run(execute(server, *settings, "SELECT pg_reload_conf()", 'CREATE DATABASE "template"'))
        migrate(postgres_url(server, "template"))
        yield server


@pytest.fixture(scope="session")
def postgres_database(postgres_server: str) -> PostgresDatabase:
    """Return the database that one test after the other gets."""
    return PostgresDatabase(postgres_server)


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the URL of an empty migrated database, once on SQLite and once on Postgres."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_url")
        return
    database: PostgresDatabase = request.getfixturevalue("postgres_database")
    asyncio.run(database.prepare())
    yield database.url
    asyncio.run(database.empty())


@pytest.fixture
def sqlite_url(sqlite_template: Path, databases_folder: Path) -> Iterator[str]:
    """Return the URL of an empty migrated SQLite database."""
    folder = databases_folder / uuid4().hex
    folder.mkdir()
    shutil.copyfile(sqlite_template, folder / "deepe.sqlite")
    yield f"sqlite+aiosqlite:///{folder / 'deepe.sqlite'}"
    shutil.rmtree(folder)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """Yield a `Database` on a fresh migrated database, once on SQLite and once on Postgres."""
    database = Database(database_url, scope=DEFAULT_SCOPE)
    yield database
    await database.close()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Start a private Redis on a free loopback port."""
    with private_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def worker_forks() -> Iterator[ForkServer]:
    """Start what workers and APIs are forked from: what they import takes one or two seconds of a processor."""
    with fork_workers() as server:
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
