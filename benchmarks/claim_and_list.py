"""Listing and claiming with few and with many jobs in the table; both should cost the same.

    python -m benchmarks.claim_and_list [--sizes 100,10000,100000] [--runs 50] [--users 1]
        [--backend sqlite|postgres|both]

Every size is a database of its own with that many finished and as many queued jobs. The peer is reading one job by its
primary key; the ratio is to the same figure with the smallest table. Below it stands which indexes the statements use.
The node has a thousand accelerators; jobs of so many users ask for as many different things (`app.domain.demand`).
"""

import argparse
import asyncio
import re
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
from app.domain.kinds import INFERENCE_KINDS, LISTED_KINDS, SlotPool, kinds_of
from app.domain.projects import DEFAULT_SCOPE
from app.executor.jobs.job_views import views_of
from app.store import claims, job_attempts, jobs
from app.store.claims import Offer
from app.store.job_queries import JobFilter, list_jobs
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import AttemptRow, JobRow
from benchmarks.reporting import Samples, ms, print_machine, print_table, ratio
from tests.job_rows import LEASE, START, add_method, add_node, cards, new_job
from tests.servers import postgres_url, private_postgres

PAGE = 50
BATCH = 5000
ELSEWHERE = "not-on-this-node"
METHODS = 20


_INDEX = re.compile(r"(?:USING (?:COVERING )?INDEX |Scan (?:Backward )?using |Index Scan on )(\w+)")
_WHOLE_TABLE = re.compile(r"(?:SCAN|Seq Scan on) (job|attempt|method)\b")


@dataclass(frozen=True)
class Table:
    """A database with so many finished and so many queued jobs."""

    database: Database
    size: int
    node_id: str
    method_id: str
    finished: Sequence[str]


Operation = Callable[[Table], Awaitable[object]]


async def main() -> None:
    """Measure and print."""
    args = _arguments()
    print_machine()
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.backend in {"sqlite", "both"}:
        await _measure("SQLite", _sqlite, sizes, runs=args.runs, users=args.users)
    if args.backend in {"postgres", "both"}:
        await _measure("Postgres", _postgres, sizes, runs=args.runs, users=args.users)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100,10000,100000", help="finished jobs, and as many queued ones")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--users", type=int, default=1, help="different demands in the queue")
    parser.add_argument("--backend", choices=("sqlite", "postgres", "both"), default="both")
    return parser.parse_args()


# ---- what is measured -----------------------------------------------------------------------------------------------


async def read_one(table: Table) -> None:
    """Read one job by its key: the peer."""
    async with table.database.reading() as session:
        await jobs.get(session, table.finished[len(table.finished) // 2])


def page(*, deep: bool = False, of_method: bool = False, sort: str = "created_at", **wanted: Any) -> Operation:
    """Return the operation that lists a page as the API does, the first one or one in the middle of the table."""

    async def operation(table: Table) -> None:
        after = (START + timedelta(seconds=table.size // 2), "") if deep else None
        jobs_wanted = JobFilter(kinds=LISTED_KINDS, method_id=table.method_id if of_method else None, **wanted)
        async with table.database.reading() as session:
            found = await list_jobs(session, jobs_wanted, sort=sort, descending=True, after=after, limit=PAGE)
            await views_of(session, found.rows)

    return operation


def claim(kinds: frozenset[JobKind], environments: Sequence[str]) -> Operation:
    """Return the operation of a worker that asks for a job, its commit included."""

    async def operation(table: Table) -> None:
        async with table.database.writing() as session:
            offer = Offer(node_id=table.node_id, environments=environments, slots=1)
            await claims.claim(session, offer, kinds=kinds, now=START, lease=LEASE)

    return operation


async def look_for_environments(table: Table) -> None:
    """Ask which environments queued jobs wait for, as each round of a worker does."""
    async with table.database.reading() as session:
        await jobs.environments_waited_for(session)


async def look_for_attempts(table: Table) -> None:
    """Read what this node holds, as each round of a worker does."""
    async with table.database.reading() as session:
        await job_attempts.live_attempts(session, table.node_id)


async def renew_leases(table: Table) -> None:
    """Extend what this node holds, as each beat of a worker does."""
    async with table.database.writing() as session:
        await job_attempts.renew_leases(session, table.node_id, now=START, lease=LEASE)


OPERATIONS: dict[str, Operation] = {
    "read one by key (peer)": read_one,
    "list, first page": page(),
    "list, page in the middle": page(deep=True),
    "list, failed ones (1 in 100)": page(statuses=[JobStatus.FAILED]),
    "list, unfinished ones": page(statuses=[JobStatus.LAUNCHING, JobStatus.RUNNING, JobStatus.STOPPING]),
    "list, of one method": page(of_method=True),
    "list, by name": page(sort="name"),
    "list, text in the name": page(text="job 77"),
    "environments waited for": look_for_environments,
    "attempts of this node": look_for_attempts,
    "renew the leases of this node": renew_leases,
    "claim": claim(kinds_of(SlotPool.STAGES), ["trl"]),
    "claim, no such environment here": claim(kinds_of(SlotPool.STAGES), [ELSEWHERE]),
    "claim, no question waits": claim(INFERENCE_KINDS, ["trl"]),
}


async def _measure(name: str, databases: Callable[[int], Any], sizes: Sequence[int], *, runs: int, users: int) -> None:
    found: dict[str, list[Samples]] = {operation: [] for operation in OPERATIONS}
    plans: dict[str, list[str]] = {}
    for size in sizes:
        async with databases(size) as database:
            table = await _fill(database, size, users=users)
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
    print_table(
        f"{name}: how rows are found with {sizes[-1]:,} + {sizes[-1]:,} jobs",
        ["", ""],
        [[title, ", ".join(ways)] for title, ways in plans.items()],
    )


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
    database = Database(url, scope=DEFAULT_SCOPE)
    try:
        await upgrade(database)
        yield database
    finally:
        await database.close()


async def _fill(database: Database, size: int, *, users: int) -> Table:
    node_id = await add_node(database, accelerators=cards(1000))
    methods = [await add_method(database, f"method {number}") for number in range(METHODS)]
    finished = [_finished(number, methods) for number in range(size)]
    queued = [
        _job(size + number, methods, status=JobStatus.QUEUED, submitted_by=f"user {number % users}")
        for number in range(size)
    ]
    attempts = [_attempt(job, node_id) for job in finished]
    for table, rows in ((JobRow, finished), (JobRow, queued), (AttemptRow, attempts)):
        for batch in _batches(rows):
            async with database.writing() as session:
                connection = await session.connection()
                await connection.execute(sa.insert(table), batch)
    if not database.url.startswith("sqlite"):
        # what autovacuum does within a minute
        async with database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            await connection.execute(sa.text("VACUUM ANALYZE"))
    return Table(
        database=database,
        size=size,
        node_id=node_id,
        method_id=methods[3],
        finished=[row["id"] for row in finished],
    )


def _finished(number: int, methods: Sequence[str]) -> dict[str, Any]:
    failed = number % 100 == 0
    return _job(
        number,
        methods,
        status=JobStatus.FAILED if failed else JobStatus.SUCCEEDED,
        reason=EndReason.EXIT_CODE if failed else EndReason.COMPLETED,
        attempts=1,
        finished_at=START + timedelta(seconds=number + 60),
    )


def _job(number: int, methods: Sequence[str], **changes: Any) -> dict[str, Any]:
    moment = START + timedelta(seconds=number)
    method = {"method_id": methods[number % METHODS], "method_name": f"method {number % METHODS}", "method_version": 1}
    row = new_job(id=str(uuid4()), name=f"job {number}", created_at=moment, updated_at=moment, **method, **changes)
    row.demand = jobs.demand_of(row).text
    return {column: getattr(row, column) for column in JobRow.model_fields}


def _attempt(job: dict[str, Any], node_id: str) -> dict[str, Any]:
    row = AttemptRow(
        id=str(uuid4()),
        job_id=job["id"],
        number=1,
        node_id=node_id,
        token=str(uuid4()),
        live=False,
        lease_expires_at=job["created_at"],
        reason=job["reason"],
        created_at=job["created_at"],
        finished_at=job["finished_at"],
    )
    return {column: getattr(row, column) for column in AttemptRow.model_fields}


def _batches(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for begin in range(0, len(rows), BATCH):
        yield rows[begin : begin + BATCH]


# ---- plans ----------------------------------------------------------------------------------------------------------


async def _plans(table: Table, operation: Operation) -> list[str]:
    """Return how the statements of the operation reach their rows: the indexes, and tables that are read whole."""
    with _statements(table.database) as statements:
        await operation(table)
    explain = "EXPLAIN QUERY PLAN " if table.database.url.startswith("sqlite") else "EXPLAIN "
    ways: dict[str, None] = {}
    async with table.database.engine.connect() as connection:
        for statement, parameters in statements:
            for row in (await connection.exec_driver_sql(explain + statement, parameters)).all():
                if found := _INDEX.search(str(row[-1])):
                    ways[found[1]] = None
                elif found := _WHOLE_TABLE.search(str(row[-1])):
                    ways[f"ALL OF {found[1]}"] = None
        await connection.rollback()
    return list(ways)


@contextmanager
def _statements(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """Yield the list that the statements which are executed meanwhile come into."""
    found: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        if statement.startswith(("SELECT", "WITH", "UPDATE attempt")) and not many:
            found.append((statement, parameters))

    engine = database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", note)


if __name__ == "__main__":
    asyncio.run(main())
