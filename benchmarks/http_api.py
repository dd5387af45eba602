"""Requests a second and latency of the API, beside bare FastAPI routes and servers of others that do the same work.

    python -m benchmarks.http_api [--seconds 4] [--connections 8] [--jobs 1000]

All run as one process each on a loopback port, one after the other, with nothing else of the service. Prefect's and
MLflow's servers are measured where they are installed (`benchmarks.peers`). The load
comes from a client of our own on raw sockets (an HTTP library would be slower than the servers), every connection with
one request at a time; client and server share the machine's cores.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.cli.embedded import is_ready
from app.domain.enums import EndReason, JobStatus
from app.domain.projects import DEFAULT_SCOPE
from app.presets.catalogue import ROOM
from app.settings import database_url
from app.store.session import Database
from benchmarks.peers import PeerMissing, mlflow, prefect
from benchmarks.reporting import Samples, ms, print_machine, print_table, ratio
from tests.job_rows import insert, new_job
from tests.servers import free_port

PATIENCE = 60.0
Request = Callable[[], bytes]


@dataclass(frozen=True)
class Result:
    """What one load gave."""

    samples: Samples
    seconds: float
    bytes_of_answer: int
    refused: int = 0

    @property
    def rate(self) -> float:
        return len(self.samples.seconds) / self.seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1000, help="finished jobs in the table")
    args = parser.parse_args()
    print_machine()

    def load(port: int, request: Request, status: int = 200, *, strict: bool = True) -> Result:
        loading = put_load(port, request, status, seconds=args.seconds, connections=args.connections, strict=strict)
        return asyncio.run(loading)

    body = {"name": "thing", "kind": "ollama", "url": "http://127.0.0.1:11434"}
    with bare_server() as port:
        read = load(port, get("/thing"))
        create = load(port, post("/thing", lambda: body), 201)
        read_row = load(port, get("/row"))
        write_row = load(port, post("/row", lambda: body), 201)
    rows = [
        row("bare FastAPI: GET (peer of reads)", read, read),
        row("bare FastAPI: GET, one row by its key", read_row, read),
        row("bare FastAPI: POST (peer of creates)", create, create),
        row("bare FastAPI: POST, one row written", write_row, create),
    ]
    ours: dict[str, Result] = {}
    with api_server(args.jobs) as (port, job):
        numbers = itertools.count()
        for name, path in (
            ("GET /healthz", "/healthz"),
            ("GET /jobs/{job}", f"/api/v1/jobs/{job}"),
            ("GET /jobs?limit=20", "/api/v1/jobs?limit=20"),
            ("GET /jobs (50 a page)", "/api/v1/jobs"),
            ("GET /methods/Custom01", "/api/v1/methods/Custom01"),
            ("GET /methods", "/api/v1/methods"),
        ):
            ours[name] = load(port, get(path))
            rows.append(row(name, ours[name], read))
        target = post("/api/v1/deploy-targets", lambda: {**body, "name": f"target {next(numbers)}"})
        rows.append(row("POST /deploy-targets", load(port, target, 201), create))
        body = {"method": "Custom01", "base_model": "bike-base", "dataset": "bike-hire", "through": "customized"}
        ours["POST /jobs"] = load(port, post("/api/v1/jobs", lambda: body), 201, strict=False)
        rows.append(row("POST /jobs", ours["POST /jobs"], create))
    best = dict.fromkeys(("read", "list", "create"), 0.0)
    for start_peer in (prefect, mlflow):
        try:
            with start_peer(child, args.jobs) as peer:
                loads = {
                    "read": load(peer.port, get(peer.read), strict=False),
                    "list": load(peer.port, post(*peer.list), strict=False),
                    "create": load(peer.port, post(*peer.create), peer.created, strict=False),
                }
                label = f"{peer.name} {peer.version}"
        except PeerMissing as missing:
            print(f"{start_peer.__name__} is not measured: {missing}")
            continue
        for kind, result in loads.items():
            rows.append(row(f"{label}: {kind}", result, create if kind == "create" else read))
            best[kind] = max(best[kind], result.rate)
    print_table(
        f"{args.connections} connections, {args.seconds:g} s each, {args.jobs:,} jobs in a SQLite table, one process",
        ["", "requests/s", "median ms", "p99 ms", "bytes", "rate / bare", "refused"],
        rows,
    )
    print(f"reading a job: {ours['GET /jobs/{job}'].rate / read_row.rate:.2f} of the bare route that reads one row")
    for kind, name in (("read", "GET /jobs/{job}"), ("list", "GET /jobs (50 a page)"), ("create", "POST /jobs")):
        if best[kind]:
            print(f"{name}: {ours[name].rate / best[kind]:.2f} times the better peer")


def row(name: str, result: Result, peer: Result) -> list[str]:
    samples = result.samples
    rate = ratio(result.rate, peer.rate)
    figures = [f"{result.rate:.0f}", ms(samples.median), ms(samples.p99), f"{result.bytes_of_answer}"]
    return [name, *figures, rate, f"{result.refused or ''}"]


# ---- the load -------------------------------------------------------------------------------------------------------


def get(path: str) -> Request:
    """Return what makes a GET request."""
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    return lambda: request


def post(path: str, body: Callable[[], Any]) -> Request:
    """Return what makes a POST request with a new body each time."""

    def make() -> bytes:
        content = json.dumps(body()).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    return make


async def put_load(
    port: int, request: Request, status: int, *, seconds: float, connections: int, strict: bool
) -> Result:
    """Send requests over some connections, each waiting for its answer.

    `strict`: every answer must have the status; otherwise those that have not are counted apart.
    """
    warm = Load(port, request, status, seconds=0.5, strict=strict)
    await asyncio.gather(*(warm.talk() for _ in range(connections)))
    load = Load(port, request, status, seconds=seconds, strict=strict)
    begun = time.perf_counter()
    await asyncio.gather(*(load.talk() for _ in range(connections)))
    return Result(load.samples, time.perf_counter() - begun, load.size, load.refused)


class Load:
    """One kind of request for a while, and what came back."""

    def __init__(self, port: int, request: Request, status: int, *, seconds: float, strict: bool) -> None:
        self._port = port
        self._request = request
        self._expected = f"HTTP/1.1 {status} ".encode()
        self._seconds = seconds
        self._strict = strict
        self.samples = Samples()
        self.size = 0
        self.refused = 0

    async def talk(self) -> None:
        """Use one connection for a while; a server that closes it has refused the request."""
        until = time.perf_counter() + self._seconds
        while time.perf_counter() < until:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                while time.perf_counter() < until:
                    await self._ask(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                if self._strict:
                    raise
                self.refused += 1
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        message = self._request()
        begun = time.perf_counter()
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        if head.startswith(self._expected):
            self.samples.seconds.append(time.perf_counter() - begun)
            self.size = length
        elif self._strict:
            raise AssertionError(f"{message.decode()}\n{head.decode()}\n{body.decode()}")
        else:
            self.refused += 1


# ---- the servers ----------------------------------------------------------------------------------------------------


@contextmanager
def bare_server() -> Iterator[int]:
    """Run the bare application; yield its port."""
    port = free_port()
    options = ["--port", str(port), "--no-access-log", "--log-level", "warning"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        variables = {"BARE_DATABASE": f"sqlite+aiosqlite:///{Path(name) / 'bare.db'}"}
        with child([sys.executable, "-m", "uvicorn", "benchmarks.bare:app", *options], variables):
            wait_until_listening(port)
            yield port


@contextmanager
def api_server(jobs: int) -> Iterator[tuple[int, str]]:
    """Run the API alone on a home with the samples of Custom01; yield its port and the id of a job."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        home, port = Path(name) / "home", free_port()
        variables = {"DEEPE_HOME": str(home), "DEEPE_MIN_FREE_BYTES": "0", "DEEPE_LOG_LEVEL": "warning"}
        with child([sys.executable, "-m", "app.cli", "serve", "--port", str(port)], variables):
            wait_until_listening(port)
            deadline = time.monotonic() + PATIENCE
            while not is_ready(f"http://127.0.0.1:{port}"):
                if time.monotonic() > deadline:
                    raise TimeoutError("the API is not ready")
                time.sleep(0.05)
            yield port, asyncio.run(fill(home, port, jobs))


async def fill(home: Path, port: int, jobs: int) -> str:
    """Register the samples and insert finished jobs; return the id of one."""
    shutil.copytree(ROOM / "custom01" / "custom01-base", home / "models" / "bike-base")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1", trust_env=False) as client:
        base = await client.post("/base-models", json={"name": "bike-base", "path": "bike-base"})
        rows = await client.put("/datasets/bike-hire/file", content=(ROOM / "custom01" / "custom01.jsonl").read_bytes())
    assert (base.status_code, rows.status_code) == (201, 201), (base.text, rows.text)
    database = Database(database_url(f"sqlite:///{home / 'deepe.db'}"), scope=DEFAULT_SCOPE)
    done = {"status": JobStatus.SUCCEEDED, "reason": EndReason.COMPLETED}
    ids = await insert(database, *(new_job(**done) for _ in range(jobs)))
    await database.close()
    return ids[0]


@contextmanager
def child(command: list[str], variables: dict[str, str]) -> Iterator[None]:
    """Run a server as a child process without the settings of the person who measures."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DEEPE_")}
    with subprocess.Popen(command, env={**environment, **variables}, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def wait_until_listening(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


if __name__ == "__main__":
    main()
