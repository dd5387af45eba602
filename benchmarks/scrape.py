"""What a scrape of `/metrics` costs with long queues and long histories: `python -m benchmarks.scrape [SQLITE FILE]`.

Fills a database with 100,000 finished and 100,000 queued jobs, then looks as Prometheus does.
"""

import asyncio
import statistics as numbers
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa

from app.domain.enums import EndReason, JobKind, JobStatus, Platform
from app.domain.projects import DEFAULT_SCOPE
from app.store import nodes, statistics
from app.store.jobs import demand_of
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import AttemptRow, JobEventRow, JobRow

COUNT = 100_000
BATCH = 2_000
LONG_AGO = datetime.now(UTC) - timedelta(hours=1)


async def main(url: str) -> None:
    database = Database(url, scope=DEFAULT_SCOPE)
    await upgrade(database)
    async with database.writing() as session:
        node = await nodes.register_node(
            session, name="n", platform=Platform.CPU, accelerators=(), environments=(), slots=1, boot_id="b",
            now=datetime.now(UTC),
        )  # fmt: skip
        node_id = node.id
    for status in (JobStatus.SUCCEEDED, JobStatus.QUEUED):
        for _ in range(COUNT // BATCH):
            await fill(database, node_id, status)
    began, rounds = time.perf_counter(), 0
    more = True
    while more:
        async with database.writing() as session:
            more = await statistics.fold(session)
        rounds += 1
    print(f"first fold of {3 * COUNT} transitions: {time.perf_counter() - began:.2f} s in {rounds} rounds")
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        async with database.writing() as session:
            await statistics.fold(session)
        async with database.reading() as session:
            found = await statistics.figures(session)
        seconds.append(time.perf_counter() - began)
    print(f"scrape: median {numbers.median(seconds) * 1000:.1f} ms, worst {max(seconds) * 1000:.1f} ms")
    print(f"queued {sum(entry.count for entry in found.waiting)}, ended {sum(found.totals.ended.values())}")
    await database.close()


async def fill(database: Database, node_id: str, status: JobStatus) -> None:
    ended = status is JobStatus.SUCCEEDED
    jobs, attempts, events = [], [], []
    for _ in range(BATCH):
        job_id = str(uuid4())
        job = JobRow(
            id=job_id, name="job", kind=JobKind.TRAINING, status=status, reason_params={}, chain_id=job_id,
            environment="trl", parameters={}, launch={}, created_at=LONG_AGO, updated_at=LONG_AGO,
            reason=EndReason.COMPLETED if ended else None, attempts=int(ended),
        )  # fmt: skip
        jobs.append(job.model_dump() | {"demand": demand_of(job).text})
        seen = [JobStatus.QUEUED, *([JobStatus.LAUNCHING, status] if ended else [])]
        for number, of in enumerate(seen):
            reason = EndReason.COMPLETED if of is JobStatus.SUCCEEDED else None
            events.append(
                {"job_id": job_id, "attempt": int(number > 0), "status": of, "reason": reason, "created_at": LONG_AGO}
            )
        if ended:
            attempt = AttemptRow(
                id=str(uuid4()), job_id=job_id, number=1, node_id=node_id, token="t", live=False,
                lease_expires_at=LONG_AGO, reason=EndReason.COMPLETED, created_at=LONG_AGO, finished_at=LONG_AGO,
            )  # fmt: skip
            attempts.append(attempt.model_dump())
    async with database.writing() as session:
        await session.exec(sa.insert(JobRow), params=jobs)
        await session.exec(sa.insert(JobEventRow), params=events)
        if attempts:
            await session.exec(sa.insert(AttemptRow), params=attempts)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        given = sys.argv[1] if len(sys.argv) > 1 else str(Path(folder) / "bench.sqlite")
        asyncio.run(main(f"sqlite+aiosqlite:///{given}"))
