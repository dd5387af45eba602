"""Servers of others that keep runs as we keep jobs: Prefect's and MLflow's, each in an environment of its own.

They are optional. An environment is made once, its interpreter is named by a variable:

    python -m venv .cache/bench/prefect && .cache/bench/prefect/bin/pip install prefect
    python -m venv .cache/bench/mlflow && .cache/bench/mlflow/bin/pip install mlflow
    export BENCH_PREFECT_PYTHON=.cache/bench/prefect/bin/python BENCH_MLFLOW_PYTHON=.cache/bench/mlflow/bin/python

Both run as one process on a SQLite file in a temporary folder, with nothing but the API.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.servers import free_port

PATIENCE = 180.0


@dataclass(frozen=True)
class Peer:
    """A server that answers: how a run is read, how fifty are listed, how one is created."""

    name: str
    version: str
    port: int
    read: str
    list: tuple[str, Callable[[], Any]]
    create: tuple[str, Callable[[], Any]]
    created: int


class PeerMissing(Exception):
    """Why a peer is not measured."""


Start = Callable[[list[str], dict[str, str]], Any]


@contextmanager
def prefect(start: Start, runs: int) -> Iterator[Peer]:
    """Run Prefect's server with `runs` flow runs that are completed."""
    python = _interpreter("BENCH_PREFECT_PYTHON")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        port = free_port()
        variables = {
            "PREFECT_HOME": home,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
            "DO_NOT_TRACK": "1",
        }
        factory = ["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command = [python, *factory, "--port", str(port), "--no-access-log", "--log-level", "error"]
        with start(command, variables), httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=60) as client:
            _wait(client, "/health")
            version = client.get("/admin/version").json()
            flow = client.post("/flows/", json={"name": "measured"}).json()["id"]
            state = {"type": "COMPLETED", "name": "Completed"}
            names = itertools.count()

            def body() -> dict[str, Any]:
                return {"flow_id": flow, "name": f"run {next(names)}", "state": state}

            made = _fill(runs, lambda: _created(lambda: client.post("/flow_runs/", json=body()))["id"])
            yield Peer(
                name="Prefect",
                version=version,
                port=port,
                read=f"/api/flow_runs/{made}",
                list=("/api/flow_runs/filter", lambda: {"limit": 50, "sort": "START_TIME_DESC"}),
                create=("/api/flow_runs/", body),
                created=201,
            )


@contextmanager
def mlflow(start: Start, runs: int) -> Iterator[Peer]:
    """Run MLflow's server with `runs` runs of one experiment."""
    python = _interpreter("BENCH_MLFLOW_PYTHON")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        port = free_port()
        store = ["--backend-store-uri", f"sqlite:///{Path(home) / 'mlflow.db'}", "--artifacts-destination", home]
        command = [python, "-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"]
        # without the consumers of its own jobs, which outlive the server
        variables = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with start(command, variables), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _wait(client, "/health")
            version = client.get("/version").text

            def body() -> dict[str, Any]:
                return {"experiment_id": "0", "start_time": int(time.time() * 1000), "run_name": "measured"}

            def create() -> str:
                answer = _created(lambda: client.post("/api/2.0/mlflow/runs/create", json=body()))
                return str(answer["run"]["info"]["run_id"])

            made = _fill(runs, create)
            yield Peer(
                name="MLflow",
                version=version,
                port=port,
                read=f"/api/2.0/mlflow/runs/get?run_id={made}",
                list=("/api/2.0/mlflow/runs/search", lambda: {"experiment_ids": ["0"], "max_results": 50}),
                create=("/api/2.0/mlflow/runs/create", body),
                created=200,
            )


def _interpreter(variable: str) -> str:
    python = os.environ.get(variable)
    if not python:
        raise PeerMissing(f"{variable} is not set (see benchmarks/peers.py)")
    if not Path(python).exists():
        raise PeerMissing(f"{variable}: {python} is not there")
    return str(Path(python).absolute())


def _wait(client: httpx.Client, path: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if client.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise PeerMissing(f"it was not ready within {PATIENCE:g} s")
        time.sleep(0.2)


def _created(post: Callable[[], httpx.Response]) -> Any:
    """Return what was created; with several writers a peer on SQLite refuses some, or closes the connection."""
    while True:
        try:
            answer = post()
        except httpx.RemoteProtocolError:
            continue
        if answer.is_success:
            return answer.json()
        time.sleep(0.1)


def _fill(runs: int, create: Callable[[], str]) -> str:
    """Create the runs through the server's own API, four at a time; return the id of one."""
    with ThreadPoolExecutor(4) as pool:
        first, *_ = pool.map(lambda _: create(), range(runs))
        return first
