"""Processor time and statements of one request, in process: what `benchmarks.http_api` cannot tell on a busy machine.

    python -m benchmarks.http_cpu [--requests 100] [--rounds 5] [--jobs 1000]

Requests go to the application without a server or a client in between; the peer is bare FastAPI that reads one row
through the same `Database`. The least of some rounds counts.
"""

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import event

from app.domain.enums import EndReason, JobStatus
from app.main import create_app
from app.settings import load_settings
from app.store.session import Database
from benchmarks.reporting import ms, print_machine, print_table, ratio
from tests.job_rows import insert, new_job

HOST = ("127.0.0.1", 8000)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1000, help="finished jobs in the table")
    args = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        asyncio.run(measure(Path(name), args))


async def measure(folder: Path, args: argparse.Namespace) -> None:
    """Run both applications and print what a request of each costs."""
    os.environ["BARE_DATABASE"] = f"sqlite+aiosqlite:///{folder / 'bare.db'}"
    from benchmarks import bare

    app = create_app(load_settings(home=folder / "home", log_level="warning"))
    database: Database = app.state.services.database
    async with app.router.lifespan_context(app), bare.app.router.lifespan_context(bare.app):
        done = {"status": JobStatus.SUCCEEDED, "reason": EndReason.COMPLETED}
        (job, *_) = await insert(database, *(new_job(**done) for _ in range(args.jobs)))
        count = Statements(database, bare.database)
        rows: list[list[str]] = []
        peer = 0.0
        for label, target, path in (
            ("bare FastAPI: one row by its key (peer)", bare.app, "/row"),
            ("GET /healthz", app, "/healthz"),
            ("GET /jobs/{job}", app, f"/api/v1/jobs/{job}"),
            ("GET /jobs (50 a page)", app, "/api/v1/jobs"),
            ("GET /methods/Custom01", app, "/api/v1/methods/Custom01"),
        ):
            await get(target, path)
            count.seen = 0
            await get(target, path)
            statements, least = count.seen, float("inf")
            for _ in range(args.rounds):
                begun = time.process_time()
                for _ in range(args.requests):
                    await get(target, path)
                least = min(least, (time.process_time() - begun) / args.requests)
            peer = peer or least
            rows.append([label, ms(least), f"{statements}", ratio(least, peer)])
    print_table(
        f"one request, {args.jobs:,} jobs in a SQLite table", ["", "processor ms", "statements", "of peer"], rows
    )


class Statements:
    """Counts the statements of some databases."""

    def __init__(self, *databases: Database) -> None:
        self.seen = 0
        for database in databases:
            event.listen(database.engine.sync_engine, "before_cursor_execute", self._count)

    def _count(self, *_: Any) -> None:
        self.seen += 1


async def get(app: Any, path: str) -> None:
    """Send one GET request straight to the application."""
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"host", b"127.0.0.1")], "client": HOST, "server": HOST, "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    assert status == 200, (path, status)


if __name__ == "__main__":
    main()
