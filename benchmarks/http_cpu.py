"""Processor time and statements of one request, in process: what `benchmarks.http_api` cannot tell on a busy machine.

    python -m benchmarks.http_cpu [--requests 100] [--rounds 5] [--jobs 1000]

Requests go to the application without a server or a client in between; the peers are bare FastAPI routes that read or
write one row through the same `Database`. The least of some rounds counts.
"""

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import event

from app.domain.enums import EndReason, JobStatus, Platform
from app.domain.environment_reports import EnvironmentReport, EnvironmentState, Probe
from app.main import create_app
from app.presets.catalogue import ROOM
from app.settings import load_settings
from app.store.nodes import heartbeat, register_node
from app.store.session import Database
from benchmarks.reporting import ms, print_machine, print_table, ratio
from tests.job_rows import insert, new_job

HOST = ("127.0.0.1", 8000)
SUBMIT = {"method": "Custom01", "base_model": "bike-base", "dataset": "bike-hire", "through": "customized"}
ROW = {"name": "thing", "kind": "ollama", "url": "http://127.0.0.1:11434"}


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
        reads = (
            ("bare FastAPI: one row read by its key (peer)", bare.app, Call("/row")),
            ("GET /healthz", app, Call("/healthz")),
            ("GET /jobs/{job}", app, Call(f"/api/v1/jobs/{job}")),
            ("GET /jobs (50 a page)", app, Call("/api/v1/jobs")),
            ("GET /methods/Custom01", app, Call("/api/v1/methods/Custom01")),
        )
        rows = await costs(count, args, reads)
        await register_samples(app, folder / "home")
        submit = Call("/api/v1/jobs", json.dumps(SUBMIT).encode())
        creates = (
            ("bare FastAPI: one row written (peer)", bare.app, Call("/row", json.dumps(ROW).encode())),
            ("POST /jobs", app, submit),
        )
        rows += await costs(count, args, creates)
        await add_node(database)
        rows += (await costs(count, args, (creates[0], ("POST /jobs, a node that reports", app, submit))))[1:]
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


@dataclass(frozen=True)
class Call:
    """A GET request, or a POST of JSON if it has a body."""

    path: str
    body: bytes = b""
    method: str = ""
    content_type: bytes = b"application/json"


async def costs(count: Statements, args: argparse.Namespace, calls: Sequence[tuple[str, Any, Call]]) -> list[list[str]]:
    """Return what each of the requests costs; the first is the peer of the others."""
    rows: list[list[str]] = []
    peer = 0.0
    for label, target, call in calls:
        await ask(target, call)
        count.seen = 0
        await ask(target, call)
        statements, least = count.seen, float("inf")
        for _ in range(args.rounds):
            begun = time.process_time()
            for _ in range(args.requests):
                await ask(target, call)
            least = min(least, (time.process_time() - begun) / args.requests)
        peer = peer or least
        rows.append([label, ms(least), f"{statements}", ratio(least, peer)])
    return rows


async def register_samples(app: Any, home: Path) -> None:
    """Register the base model and the data set that `SUBMIT` names."""
    shutil.copytree(ROOM / "custom01" / "custom01-base", home / "models" / "bike-base")
    await ask(app, Call("/api/v1/base-models", json.dumps({"name": "bike-base", "path": "bike-base"}).encode()))
    data = (ROOM / "custom01" / "custom01.jsonl").read_bytes()
    await ask(app, Call("/api/v1/datasets/bike-hire/file", data, "PUT", b"application/jsonl"))


async def add_node(database: Database) -> None:
    """Add a node that reports its environments, as the worker of `deepe dev` does."""
    now = datetime.now(UTC)
    reports = [
        EnvironmentReport(
            name=name, state=EnvironmentState.READY, probe=Probe(key="1", modules=("torch", "transformers"))
        ).document()
        for name in ("base", *(f"environment-{number}" for number in range(10)))
    ]
    async with database.writing() as session:
        node = await register_node(
            session,
            name="node-1",
            platform=Platform.CPU,
            accelerators=[],
            environments=["base"],
            slots=1,
            boot_id="1",
            now=now,
        )
        await heartbeat(session, node.id, now=now, environment_states=reports)


async def ask(app: Any, call: Call) -> None:
    """Send one request straight to the application."""
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": call.body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    method = call.method or ("POST" if call.body else "GET")
    headers = [(b"host", b"127.0.0.1")]
    if call.body:
        headers += [(b"content-type", call.content_type), (b"content-length", str(len(call.body)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": call.path, "raw_path": call.path.encode(), "query_string": b"", "root_path": "",
        "headers": headers, "client": HOST, "server": HOST, "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    assert status in (200, 201), (call.path, status)


if __name__ == "__main__":
    main()
