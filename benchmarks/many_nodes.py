"""A long queue on many nodes with simulated accelerators, beside raw arq with jobs that do nothing.

    python -m benchmarks.many_nodes [--jobs 10000] [--seconds 30] [--real 64] [--backend sqlite|postgres|both]

Three figures from the same machine in the same run. *Claim and end*: each of 8 nodes with 8 accelerators (a process
each; on SQLite all in one, where its writers take turns) claims real jobs with their leases and ends them; nothing
runs. *Real* (Postgres): 8 worker processes, a supervisor and a script that does nothing for each job, from the submit
to the last end. *arq*: 8 workers of 8 jobs at once and the same number of jobs whose function returns at once; it
keeps nothing durable, and what it loses is not looked for.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from arq import Worker
from arq.connections import RedisSettings, create_pool
from arq.worker import func
from sqlmodel import select

from app.domain.enums import JobKind
from app.domain.projects import DEFAULT_SCOPE
from app.domain.transitions import TERMINAL
from app.store import claims, job_attempts
from app.store.claims import Offer
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import JobRow, LeaseRow
from benchmarks.reporting import print_machine, print_table
from tests.job_rows import SUCCESS, add_method, add_node, cards, insert, new_job
from tests.servers import postgres_url, private_postgres, private_redis
from tests.waiting import until
from tests.worker.harness import Site, make_base

NODES, CARDS = 8, 8
BATCH = 1000
KINDS = [JobKind.TRAINING, JobKind.SAVING, JobKind.DEPLOYMENT]
SCRIPT = "import play\nplay.adapter()\n"
LONG = timedelta(hours=1)


def main() -> None:
    """Measure and print."""
    args = _arguments()
    print_machine()
    rows = []
    for backend in ("sqlite", "postgres"):
        if args.backend in (backend, "both"):
            rows += asyncio.run(_measure(backend, args))
    rows.append(_arq(args.jobs))
    peer = rows[-1][2]
    print_table(
        f"{args.jobs:,} queued jobs, {NODES} nodes with {CARDS} simulated accelerators each",
        ["", "jobs", "jobs/s", "/ arq", "memory of a worker"],
        [[name, f"{done:,}", f"{rate:.1f}", f"{rate / peer:.2f} x", memory] for name, done, rate, memory in rows],
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000, help="how long the queue is")
    parser.add_argument("--seconds", type=float, default=30.0, help="for how long jobs are claimed and ended")
    parser.add_argument("--real", type=int, default=64, help="jobs that really run; 0: none")
    parser.add_argument("--backend", choices=("sqlite", "postgres", "both"), default="both")
    return parser.parse_args()


Row = tuple[str, int, float, str]


async def _measure(backend: str, args: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        async with _database(backend, Path(folder)) as database:
            nodes = [await add_node(database, f"node-{number}", accelerators=cards(CARDS)) for number in range(NODES)]
            for begin in range(0, args.jobs, BATCH):
                await insert(database, *(new_job() for _ in range(min(BATCH, args.jobs - begin))))
            if backend == "sqlite":
                done, seconds = await _side_by_side(database.url, nodes, args.seconds)
            else:
                done, seconds = await asyncio.to_thread(_claim_and_end, database.url, nodes, args.seconds)
            await _check(database)
            rows: list[Row] = [(f"{backend}: claim and end", done, done / seconds, "")]
            if args.real and backend != "sqlite":
                await _cancel_the_rest(database)
                rows.append(await _real(backend, database, Path(folder), args.real))
            return rows


# ---- claims and ends ------------------------------------------------------------------------------------------------


def _claim_and_end(url: str, nodes: Sequence[str], seconds: float) -> tuple[int, float]:
    """Let a process for each node work for so long; return how many jobs ended, and how long it took."""
    context = multiprocessing.get_context("spawn")
    barrier, counts = context.Barrier(len(nodes) + 1), context.Queue()
    processes = [context.Process(target=_node, args=(url, node, seconds, barrier, counts)) for node in nodes]
    for process in processes:
        process.start()
    barrier.wait()
    begun = time.perf_counter()
    done = sum(counts.get() for _ in processes)
    lasted = time.perf_counter() - begun
    for process in processes:
        process.join()
    return done, lasted


async def _side_by_side(url: str, nodes: Sequence[str], seconds: float) -> tuple[int, float]:
    """Let all nodes work in one process, where SQLite's writers take turns."""
    database = Database(url, scope=DEFAULT_SCOPE)
    begun = time.perf_counter()
    done = sum(await asyncio.gather(*(_work(database, node, seconds) for node in nodes)))
    lasted = time.perf_counter() - begun
    await database.close()
    return done, lasted


def _node(url: str, node: str, seconds: float, barrier: Any, counts: Any) -> None:
    async def work() -> int:
        database = Database(url, scope=DEFAULT_SCOPE)
        barrier.wait()
        done = await _work(database, node, seconds)
        await database.close()
        return done

    counts.put(asyncio.run(work()))


async def _work(database: Database, node: str, seconds: float) -> int:
    """Claim until every accelerator is held, end all, and so on until the time is over or the queue empty."""
    offer, done = Offer(node_id=node, environments=["trl"], slots=1), 0
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        async with database.writing() as session:
            held = await claims.claim_several(
                session, offer, kinds=KINDS, now=datetime.now(UTC), lease=LONG, most=CARDS
            )
        for won in held:
            async with database.writing() as session:
                assert await job_attempts.finish(session, won, SUCCESS, now=datetime.now(UTC))
        done += len(held)
        if not held:
            break
    return done


async def _check(database: Database) -> None:
    """Nothing may be held any more."""
    async with database.reading() as session:
        left = (await session.exec(select(sa.func.count()).select_from(LeaseRow).where(sa.text("live")))).one()
    assert left == 0, f"{left} accelerators are still held"


async def _cancel_the_rest(database: Database) -> None:
    async with database.writing() as session:
        await session.exec(sa.update(JobRow).where(sa.text("status = 'queued'")).values(status="cancelled"))


# ---- real workers ---------------------------------------------------------------------------------------------------


async def _real(backend: str, database: Database, root: Path, count: int) -> Row:
    """Run jobs by real workers, supervisors and scripts."""
    bases = make_base(root / "envs" / "base")
    site = Site(root / "home", database.url, next(bases))
    site._method = await add_method(database, "no-op")
    try:
        for number in range(NODES):
            site.start_worker(f"real-{number}", DEEPE_SIMULATED_ACCELERATORS=str(CARDS))
        await until(lambda: _started(site), "the workers", site.report)
        rows = [await site.job(SCRIPT, file="no-op.py") for _ in range(count)]
        begun = time.perf_counter()
        ids = await site.insert(*rows)
        memory = 0
        while await _unfinished(database, ids):
            memory = max([memory, *(psutil.Process(worker.process.pid).memory_info().rss for worker in site.workers)])
            await asyncio.sleep(0.2)
        lasted = time.perf_counter() - begun
    finally:
        await site.close()
        bases.close()  # type: ignore[attr-defined]
    return f"{backend}: real workers and supervisors", count, count / lasted, f"{memory / 2**20:.0f} MiB"


async def _started(site: Site) -> bool:
    return all(worker.events("worker_started") for worker in site.workers)


async def _unfinished(database: Database, ids: Sequence[str]) -> int:
    async with database.reading() as session:
        statement = select(sa.func.count()).select_from(JobRow)
        return (
            await session.exec(statement.where(JobRow.id.in_(ids), JobRow.status.not_in(TERMINAL)))  # type: ignore[attr-defined]
        ).one()


# ---- the peer -------------------------------------------------------------------------------------------------------


def _arq(count: int) -> Row:
    """Let 8 arq workers run jobs that do nothing."""
    with tempfile.TemporaryDirectory() as folder, private_redis(Path(folder)) as server:
        url = server.url(1)
        asyncio.run(_enqueue(url, count))
        context = multiprocessing.get_context("spawn")
        barrier, counts = context.Barrier(NODES + 1), context.Queue()
        processes = [context.Process(target=_arq_worker, args=(url, barrier, counts)) for _ in range(NODES)]
        for process in processes:
            process.start()
        barrier.wait()
        begun = time.perf_counter()
        found = [counts.get() for _ in processes]
        lasted = time.perf_counter() - begun
        for process in processes:
            process.join()
    done, memory = sum(done for done, _ in found), max(memory for _, memory in found)
    return "arq, jobs that do nothing", done, done / lasted, f"{memory / 2**20:.0f} MiB"


async def _enqueue(url: str, count: int) -> None:
    pool = await create_pool(RedisSettings.from_dsn(url))
    for number in range(count):
        await pool.enqueue_job("nothing", _job_id=f"job:{number}")
    await pool.aclose()


async def nothing(ctx: dict[Any, Any], *args: Any, **kwargs: Any) -> None:
    """Return at once."""


def _arq_worker(url: str, barrier: Any, counts: Any) -> None:
    async def work() -> int:
        worker = Worker(
            functions=[func(nothing, keep_result=0)],
            redis_settings=RedisSettings.from_dsn(url),
            burst=True,
            max_jobs=CARDS,
            poll_delay=0.01,
            handle_signals=False,
        )
        barrier.wait()
        with contextlib.suppress(asyncio.CancelledError):
            await worker.async_run()
        await worker.close()
        return worker.jobs_complete

    done = asyncio.run(work())
    counts.put((done, psutil.Process(os.getpid()).memory_info().rss))


# ---- databases ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _database(backend: str, folder: Path) -> AsyncIterator[Database]:
    with contextlib.ExitStack() as servers:
        if backend == "sqlite":
            url = f"sqlite+aiosqlite:///{folder / 'queue.sqlite'}"
        else:
            url = postgres_url(servers.enter_context(private_postgres()), "postgres")
        database = Database(url, scope=DEFAULT_SCOPE)
        try:
            await upgrade(database)
            yield database
        finally:
            await database.close()


if __name__ == "__main__":
    main()
