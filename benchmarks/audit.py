"""What the audit trail costs a request that writes, and a claim; how quickly it is verified, and how large it is.

    python -m benchmarks.audit [--runs 200] [--backend sqlite|postgres|both]

The routes are called within the process, one request after the other, in turn with the trail and without it (nobody's
call is running then, so that nothing is recorded). Postgres is a private one on the same machine, its files on disk.
"""

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sqlalchemy as sa

from app.access.audit import verify
from app.domain.projects import DEFAULT_SCOPE
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import AuditRecordRow
from benchmarks.reporting import Samples, ms, print_machine, print_table, ratio
from tests.api.jobs_app import API, SUBMIT, JobsApp, jobs_app
from tests.job_rows import ENVIRONMENT, add_job, claim
from tests.servers import postgres_url, private_postgres

ANY = {"If-Match": "*"}
AT_ONCE = 8
Cost = tuple[float, float]


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--backend", choices=("sqlite", "postgres", "both"), default="both")
    args = parser.parse_args()
    print_machine()
    for name, opened in (("sqlite", sqlite), ("postgres", postgres)):
        if args.backend in (name, "both"):
            with tempfile.TemporaryDirectory(prefix="deepe-benchmark-") as folder:
                async with opened(Path(folder)) as database, jobs_app(database, Path(folder) / "home") as app:
                    await report(name, app, runs=args.runs)


@asynccontextmanager
async def sqlite(folder: Path) -> AsyncIterator[Database]:
    """Yield a migrated SQLite database on disk."""
    async with migrated(f"sqlite+aiosqlite:///{folder / 'deepe.db'}") as database:
        yield database


@asynccontextmanager
async def postgres(_folder: Path) -> AsyncIterator[Database]:
    """Yield a migrated Postgres database."""
    with private_postgres() as server:
        async with migrated(postgres_url(server, "postgres")) as database:
            yield database


@asynccontextmanager
async def migrated(url: str) -> AsyncIterator[Database]:
    """Yield the database at an address with the newest schema."""
    database = Database(url, scope=DEFAULT_SCOPE)
    try:
        await upgrade(database)
        yield database
    finally:
        await database.close()


@contextmanager
def without_trail() -> Iterator[None]:
    """Let nothing be recorded."""

    async def nothing(*_: object, **__: object) -> None:
        return None

    with patch("app.api.guards._action_of", lambda *_: None), patch("app.store.audit_records.record_launches", nothing):
        yield


async def report(name: str, app: JobsApp, *, runs: int) -> None:
    """Measure on one database and print."""
    rows = []
    for label, operation in operations(app).items():
        recorded, bare = await in_turn(operation, runs)
        rows.append([label, *bare.shown(), *recorded.shown(), *recorded.ratios(bare)])
    print_table(
        f"{name}: {runs} requests each, in turn",
        ["", "without: median ms", "processor ms", "with: median ms", "processor ms", "ratio", "of processor time"],
        rows,
    )
    async with app.database.reading() as session:
        size = sa.func.avg(sa.func.length(AuditRecordRow.details) + sa.func.length(AuditRecordRow.things))
        average = (await (await session.connection()).execute(sa.select(size))).scalar_one()
    begun = time.perf_counter()
    found = await verify(app.database)
    assert found.sound, found.problems
    seconds = time.perf_counter() - begun
    speed = found.records / seconds
    print(f"{found.records:,} records, {float(average):.0f} characters each, {speed:,.0f} verified a second")


@dataclass
class Costs:
    """Seconds, and those of them that this process was computing (not the database's)."""

    seconds: Samples = field(default_factory=Samples)
    processor: Samples = field(default_factory=Samples)

    def add(self, cost: Cost) -> None:
        self.seconds.seconds.append(cost[0])
        self.processor.seconds.append(cost[1])

    def shown(self) -> tuple[str, str]:
        return ms(self.seconds.median), ms(self.processor.median)

    def ratios(self, peer: "Costs") -> tuple[str, str]:
        return (
            ratio(self.seconds.median, peer.seconds.median),
            ratio(self.processor.median, peer.processor.median),
        )


async def cost_of(work: Awaitable[object]) -> Cost:
    """Return what something took."""
    begun, computed = time.perf_counter(), time.process_time()
    await work
    return time.perf_counter() - begun, time.process_time() - computed


def operations(app: JobsApp) -> dict[str, Callable[[], Awaitable[Cost]]]:
    """Return what is measured; each returns its seconds."""
    numbers = itertools.count()

    async def request(method: str, path: str, status: int, **options: Any) -> None:
        response = await app.client.request(method, API + path, **options)
        assert response.status_code == status, response.text

    async def set_limit(queue: int) -> None:
        await request("PUT", f"/queues/night-{queue}", 200, json={"max_live": next(numbers)}, headers=ANY)

    async def claimed() -> Cost:
        await add_job(app.database)
        return await cost_of(claim(app.database, app.runner.node_id, slots=10_000, environments=(ENVIRONMENT,)))

    target = {"kind": "ollama", "url": "http://127.0.0.1:11434"}
    body = {**SUBMIT, "through": "customized"}
    return {
        "PUT /queues/{queue}: changes one row": lambda: cost_of(set_limit(0)),
        f"PUT /queues/{{queue}}: {AT_ONCE} at once": lambda: cost_of(asyncio.gather(*map(set_limit, range(AT_ONCE)))),
        "POST /deploy-targets: makes one row": lambda: cost_of(
            request("POST", "/deploy-targets", 201, json={**target, "name": f"target-{next(numbers)}"})
        ),
        "POST /jobs: makes one job": lambda: cost_of(request("POST", "/jobs", 201, json=body)),
        "a claim by a node": claimed,
        "GET /queues: reads": lambda: cost_of(request("GET", "/queues", 200)),
    }


async def in_turn(operation: Callable[[], Awaitable[Cost]], runs: int) -> tuple[Costs, Costs]:
    """Return what it costs with the trail and without it."""
    recorded, bare = Costs(), Costs()
    await operation()  # FastAPI prepares a route with its first request
    for number in range(runs):
        # the second of two is a little quicker, so that each comes first as often
        for with_it in (True, False) if number % 2 else (False, True):
            if with_it:
                recorded.add(await operation())
            else:
                with without_trail():
                    bare.add(await operation())
    return recorded, bare


if __name__ == "__main__":
    asyncio.run(main())
