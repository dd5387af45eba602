"""Listing and claiming with few and with many jobs in the table; both should cost the same.

    python -m benchmarks.claim_and_list [--sizes 100,10000,100000] [--runs 50] [--backend sqlite|postgres|both]

Every size is a database of its own with that many finished and as many queued jobs. The peer is reading one job by its
primary key; the ratio is to the same figure with the smallest table. At the end come the plans of the statements.
"""

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy import event

from app.domain.enums import EndReason, JobKind, JobStatus
from app.executor.job_actions import LISTED
from app.executor.job_views import views_of
from app.store import jobs
from app.store.job_queries import JobFilter, list_jobs
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import JobRow
from app.worker import QUESTIONS, STAGES
from benchmarks.reporting import Samples, ms, print_machine, print_table, ratio
from tests.job_rows import LEASE, START, add_node, new_job
from tests.servers import postgres_url, private_postgres

PAGE = 50
BATCH = 5000
ELSEWHERE = "not-on-this-node"
METHODS = 20


@dataclass(frozen=True)
class Table:
    """A database with so many finished and so many queued jobs."""

    database: Database
    size: int
    node_id: str
    finished: Sequence[str]


Operation = Callable[[Table], Awaitable[object]]


async def main() -> None:
    """Measure and print."""
    args = _arguments()
    print_machine()
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.backend in {"sqlite", "both"}:
        await _measure("SQLite", _sqlite, sizes, runs=args.runs)
    if args.backend in {"postgres", "both"}:
        await _measure("Postgres", _postgres, sizes, runs=args.runs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100,10000,100000", help="finished jobs, and as many queued ones")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--backend", choices=("sqlite", "postgres", "both"), default="both")
    return parser.parse_args()


# ---- what is measured -----------------------------------------------------------------------------------------------


async def read_one(table: Table) -> None:
    """Read one job by its key: the peer."""
    async with table.database.reading() as session:
        await jobs.get(session, table.finished[len(table.finished) // 2])


def page(*, deep: bool = False, sort: str = "created_at", **wanted: Any) -> Operation:
    """Return the operation that lists a page as the API does, the first one or one in the middle of the table."""

    async def operation(table: Table) -> None:
        after = (START + timedelta(seconds=table.size // 2), "") if deep else None
        async with table.database.reading() as session:
            found = await list_jobs(
                session, JobFilter(**{"kinds": LISTED, **wanted}), sort=sort, descending=True, after=after, limit=PAGE
            )
            await views_of(session, found.rows)

    return operation


def claim(kinds: frozenset[JobKind], environments: Sequence[str]) -> Operation:
    """Return the operation of a worker that asks for a job, its commit included."""

    async def operation(table: Table) -> None:
        async with table.database.writing() as session:
            await jobs.claim(
                session, node_id=table.node_id, kinds=kinds, environments=environments, now=START, lease=LEASE
            )

    return operation


async def look_for_environments(table: Table) -> None:
    """Ask which environments queued jobs wait for, as each round of a worker does."""
    async with table.database.reading() as session:
        await jobs.environments_waited_for(session)


OPERATIONS: dict[str, Operation] = {
    "read one by key (peer)": read_one,
    "list, first page": page(),
    "list, page in the middle": page(deep=True),
    "list, failed ones (1 in 100)": page(statuses=[JobStatus.FAILED]),
    "list, of one method": page(method_id="method-3"),
    "list, by name": page(sort="name"),
    "list, text in the name": page(text="job 77"),
    "claim": claim(STAGES, ["trl"]),
    "claim, no such environment here": claim(STAGES, [ELSEWHERE]),
    "claim, no question waits": claim(QUESTIONS, ["trl"]),
    "environments waited for": look_for_environments,
}


async def _measure(name: str, databases: Callable[[int], Any], sizes: Sequence[int], *, runs: int) -> None:
    found: dict[str, list[Samples]] = {operation: [] for operation in OPERATIONS}
    plans: dict[str, list[str]] = {}
    for size in sizes:
        async with databases(size) as database:
            table = await _fill(database, size)
            for title, operation in OPERATIONS.items():
                await operation(table)  # warms up statement caches
                samples = Samples()
                for _ in range(runs):
                    with samples.measure():
                        await operation(table)
                found[title].append(samples)
            if size == sizes[-1]:
                plans = {title: await _plans(table, operation) for title, operation in OPERATIONS.items()}
    _print(name, sizes, found)
    print(f"\n{name}: plans with {sizes[-1]} jobs")
    for title, lines in plans.items():
        print(f"  {title}")
        print("\n".join(f"      {line}" for line in lines))


def _print(name: str, sizes: Sequence[int], found: dict[str, list[Samples]]) -> None:
    header = [f"{name}, ms median (p99)", *(f"{size:,} + {size:,}" for size in sizes), "largest / smallest", "/ peer"]
    peer = found[next(iter(found))][-1].median
    rows = [
        [
            title,
            *(f"{ms(samples.median)} ({ms(samples.p99)})" for samples in columns),
            ratio(columns[-1].median, columns[0].median),
            ratio(columns[-1].median, peer),
        ]
        for title, columns in found.items()
    ]
    print_table(f"{name}: finished + queued jobs in the table", header, rows)


# ---- the tables -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _sqlite(_size: int) -> AsyncIterator[Database]:
    with tempfile.TemporaryDirectory() as folder:
        async with _migrated(f"sqlite+aiosqlite:///{Path(folder) / 'jobs.sqlite'}") as database:
            yield database


@asynccontextmanager
async def _postgres(_size: int) -> AsyncIterator[Database]:
    with private_postgres() as server:
        async with _migrated(postgres_url(server, "postgres")) as database:
            yield database


@asynccontextmanager
async def _migrated(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    try:
        await upgrade(database)
        yield database
    finally:
        await database.close()


async def _fill(database: Database, size: int) -> Table:
    node_id = await add_node(database)
    async with database.writing() as session:
        for number in range(METHODS):
            await session.exec(
                sa.text(  # type: ignore[call-overload]
                    "INSERT INTO method (id, name, name_key, description, training_type, technique, lifecycle, version,"
                    " read_only, created_at, updated_at) VALUES (:id, :id, :id, '', 'chat', 'sft', 'customized', 1,"
                    " :no, :now, :now)"
                ).bindparams(
                    sa.bindparam("now", START, JobRow.__table__.c.created_at.type),  # type: ignore[attr-defined]
                    id=f"method-{number}",
                    no=False,
                )
            )
    finished = [_finished(number) for number in range(size)]
    queued = [_queued(number, size) for number in range(size)]
    for rows in _batches([*finished, *queued]):
        async with database.writing() as session:
            connection = await session.connection()
            await connection.execute(sa.insert(JobRow), rows)
    if not database.url.startswith("sqlite"):
        # what autovacuum does within a minute
        async with database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            await connection.execute(sa.text("VACUUM ANALYZE job"))
    return Table(database=database, size=size, node_id=node_id, finished=[row["id"] for row in finished])


def _finished(number: int) -> dict[str, Any]:
    failed = number % 100 == 0
    return _row(
        number,
        status=JobStatus.FAILED if failed else JobStatus.SUCCEEDED,
        reason=EndReason.EXIT_CODE if failed else EndReason.COMPLETED,
        finished_at=START + timedelta(seconds=number + 60),
    )


def _queued(number: int, size: int) -> dict[str, Any]:
    return _row(size + number, status=JobStatus.QUEUED)


def _row(number: int, **changes: Any) -> dict[str, Any]:
    moment = START + timedelta(seconds=number)
    job = new_job(
        id=str(uuid4()),
        name=f"job {number}",
        method_id=f"method-{number % METHODS}",
        method_name=f"method {number % METHODS}",
        method_version=1,
        created_at=moment,
        updated_at=moment,
        **changes,
    )
    return {column: getattr(job, column) for column in JobRow.model_fields}


def _batches(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for begin in range(0, len(rows), BATCH):
        yield rows[begin : begin + BATCH]


# ---- plans ----------------------------------------------------------------------------------------------------------


async def _plans(table: Table, operation: Operation) -> list[str]:
    """Return the plans of the statements on `job` that the operation runs."""
    with _statements(table.database) as statements:
        await operation(table)
    sqlite = table.database.url.startswith("sqlite")
    explain = "EXPLAIN QUERY PLAN " if sqlite else "EXPLAIN "
    lines: list[str] = []
    async with table.database.engine.connect() as connection:
        for statement, parameters in statements:
            rows = (await connection.exec_driver_sql(explain + statement, parameters)).all()
            lines += [str(row[3] if sqlite else row[0]) for row in rows]
        await connection.rollback()
    return lines


@contextmanager
def _statements(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """Yield the list that the statements on jobs which are executed meanwhile come into."""
    found: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        if statement.startswith("SELECT") and "FROM job" in statement and not many:
            found.append((statement, parameters))

    engine = database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", note)


if __name__ == "__main__":
    asyncio.run(main())
