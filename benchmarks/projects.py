"""What it costs that sessions see one project only: the same statements with that and without, in turn in one run.

    python -m benchmarks.projects --jobs 20000 --rounds 200

One row by its id, a page of fifty jobs, and the statement that a submit rests on; two projects have as many jobs.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.projects import DEFAULT_SCOPE, EVERY_PROJECT, Scope
from app.store import job_queries, jobs
from app.store.migrate import upgrade
from app.store.session import Database
from tests.job_rows import insert, new_job

PROJECTS: Final = (DEFAULT_SCOPE, Scope("bikes"))
Act = Callable[[AsyncSession], Awaitable[object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    asyncio.run(_measure(options.jobs, options.rounds))


async def _measure(count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite+aiosqlite:///{Path(folder) / 'deepe.db'}", scope=DEFAULT_SCOPE)
        await upgrade(database)
        ids = [await insert(database.of(scope), *(new_job() for _ in range(count // 2))) for scope in PROJECTS]
        acts: dict[str, Act] = {
            "one job": lambda session: jobs.get(session, ids[0][-1]),
            "a page of 50": lambda session: job_queries.list_jobs(
                session, job_queries.JobFilter(), sort="created_at", descending=True, after=None, limit=50
            ),
        }
        print(f"{'':16} {'all ms':>8} {'one project ms':>15} {'ratio':>6}")
        for name, act in acts.items():
            times: dict[Scope, list[float]] = {EVERY_PROJECT: [], DEFAULT_SCOPE: []}
            for turn in range(rounds + 20):
                for scope, taken in times.items():
                    began = time.process_time()
                    async with database.of(scope).reading() as session:
                        await act(session)
                    if turn >= 20:  # the first ones fill caches
                        taken.append((time.process_time() - began) * 1000)
            everybody, one = (statistics.median(taken) for taken in times.values())
            print(f"{name:16} {everybody:>8.2f} {one:>15.2f} {one / everybody:>6.2f}")
        await database.close()


if __name__ == "__main__":
    main()
