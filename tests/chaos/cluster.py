"""One installation with everything that may be killed: nodes, API, Redis, Postgres, a submitter, all real processes.

Nodes are folders of one host, each with its own `python -m app.worker` and simulated accelerators. On Postgres every
node reaches the database through a proxy of its own. Whatever is done to an attempt that may spoil its end is written
down first (`hurt`).
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlmodel import col, select

from app.domain.projects import DEFAULT_SCOPE
from app.executor.supervisor import program
from app.executor.supervisor.program import REAPER_KEY
from app.store.home import Home, NodeHome
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import JobEventRow, JobRow, NodeRow
from tests.chaos.evidence import collect
from tests.chaos.postgres import Postgres, own_postgres
from tests.chaos.proxy import Line as Network
from tests.chaos.proxy import Proxy
from tests.chaos.stage import BASE_MODEL, DATASET, JOURNAL, SCRIPT, submission
from tests.chaos.verdict import TERMINAL, Evidence
from tests.executor.attempts import supervises
from tests.fork_server import Fork, ForkServer
from tests.servers import RedisServer, free_port, private_redis
from tests.waiting import until
from tests.worker.harness import alive, make_base

ROOT = Path(__file__).resolve().parents[2]
SLOTS = 2
LOOK_SECONDS = 15.0  # a look at a database that does not answer is given up
PATIENCE_SECONDS = 300.0  # a job that has not ended by then is lost
QUIET = ("--log-level", "warning", "--timeout-graceful-shutdown", "3")


class Child:
    """A process of the service that is killed and started again: `python ARGUMENTS`, forked if there is a fork
    server."""

    def __init__(
        self, arguments: Sequence[str], environment: dict[str, str], log: Path, forks: ForkServer | None = None
    ) -> None:
        self.arguments = arguments
        self.environment = environment
        self.log = log
        self.forks = forks
        self.process: subprocess.Popen[bytes] | Fork | None = None

    def start(self, **variables: str) -> None:
        """Start it unless it runs."""
        if self.is_alive():
            return
        environment = self.environment | variables
        if self.forks is not None:
            with self.log.open("ab") as log:
                self.process = self.forks.start(
                    self.arguments, cwd=self.log.parent, environment=environment, output=log
                )
            return
        command = [sys.executable, *self.arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.log.parent)

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    async def end(self) -> None:
        """End it as a service manager would; it must end by itself."""
        self.send(signal.SIGTERM)
        if self.process is not None:
            await asyncio.to_thread(self.process.wait)


class Node:
    """A worker and its node home."""

    def __init__(self, name: str, home: NodeHome, worker: Child, proxy: Proxy | None) -> None:
        self.name = name
        self.home = home
        self.worker = worker
        self.proxy = proxy

    def folders(self) -> list["Folder"]:
        """Return the attempts that are under way here."""
        return [folder for path in sorted(self.home.attempts.glob("[!.]*")) if (folder := Folder.of(path))]

    def fork_servers(self) -> list[psutil.Process]:
        """Return the worker's fork server and what it forks at this moment."""
        if not self.worker.is_alive() or self.worker.process is None:
            return []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.worker.process.pid).children(recursive=True)
            return [child for child in children if program.FORK_SERVER in child.cmdline()]
        return []


@dataclass(frozen=True)
class Folder:
    """An attempt's control folder, and the processes that its state file names."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> "Folder | None":
        """Read the state; None before there is one and after the end."""
        try:
            state = json.loads((path / "state.json").read_bytes())
        except (OSError, ValueError):
            return None
        return cls(path, state) if "pid" in state and not (path / "exit.json").exists() else None

    @property
    def attempt(self) -> str:
        return self.path.name

    def supervisor_pid(self) -> int | None:
        """Return the living supervisor."""
        pid = self.state["supervisor_pid"]
        with contextlib.suppress(psutil.Error):
            if supervises(psutil.Process(pid), self.path):
                return int(pid)
        return None

    def process(self, identity: dict[str, Any]) -> psutil.Process | None:
        """Return the process of this identity if it lives."""
        with contextlib.suppress(OSError, psutil.Error):
            stat = Path(f"/proc/{identity['pid']}/stat").read_text()
            if stat[stat.rindex(")") + 2 :].split()[19] == identity["start"]:
                return psutil.Process(identity["pid"])
        return None

    @property
    def stage(self) -> psutil.Process | None:
        return self.process(self.state)

    @property
    def reaper(self) -> psutil.Process | None:
        return self.process(self.state[REAPER_KEY])


@dataclass
class Cluster:
    """The installation, and what the harness did to it."""

    root: Path
    database: Database
    nodes: list[Node]
    api: Child
    submitter: Child
    api_port: int
    redis: RedisServer
    postgres: Postgres | None
    hurt: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)

    # ---- setting up -------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Bring the service up and give it a method whose training is the stage of the runs."""
        self.api.start()
        await until(self.api_answers, "the API", self.report)
        async with self.client() as client:
            folder = self.root / "models" / BASE_MODEL
            shutil.copytree(ROOT / "app" / "presets" / "custom01" / "custom01-base", folder)
            tag = (await client.get("/methods/Custom01/files/training")).headers["ETag"]
            answers = [
                await client.post("/base-models", json={"name": BASE_MODEL, "path": BASE_MODEL}),
                await client.put(f"/datasets/{DATASET}/file", content=b'{"question": "q", "answer": "a"}\n' * 4),
                await client.put(
                    "/methods/Custom01/files/training", content=SCRIPT.encode(), headers={"If-Match": tag}
                ),
            ]
        for answer in answers:
            assert answer.is_success, answer.text

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        base = f"http://127.0.0.1:{self.api_port}/api/v1"
        async with httpx.AsyncClient(base_url=base, timeout=None, trust_env=False) as client:
            yield client

    async def api_answers(self) -> bool:
        async with self.client() as client:
            with contextlib.suppress(httpx.HTTPError):
                return (await client.get(f"http://127.0.0.1:{self.api_port}/readyz")).status_code == 200
        return False

    async def submit(self, **parameters: Any) -> str:
        """Submit one job over HTTP and return its id."""
        async with self.client() as client:
            answer = await client.post("/jobs", json=submission(parameters))
        assert answer.status_code == 201, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    # ---- what happened ----------------------------------------------------------------------------------------------

    def acknowledged(self) -> list[str]:
        """Return the jobs that a 201 was seen for."""
        file = self.root / "acknowledged"
        return file.read_text().split() if file.exists() else []

    async def unfinished(self) -> int | None:
        """Return how many jobs have not ended; None while the database does not answer."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LOOK_SECONDS), self.database.reading() as session:
                rows = (await session.exec(select(JobRow.status))).all()
                return sum(status not in TERMINAL for status in rows)
        return None

    async def signs_of_life(self) -> dict[str, Any] | None:
        """Return the last heartbeat of each node and the last event, None while the database does not answer."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LOOK_SECONDS), self.database.reading() as session:
                beats = (await session.exec(select(NodeRow.name, NodeRow.heartbeat_at))).all()
                last = (
                    await session.exec(select(JobEventRow.id).order_by(col(JobEventRow.id).desc()).limit(1))
                ).first()
                return {**dict(beats), "event": last or 0}
        return None

    async def evidence(self) -> Evidence:
        """Return all that the verdict is made of."""
        return await collect(
            self.database,
            journal=self.root / JOURNAL,
            acknowledged=self.acknowledged(),
            slots={node.name: SLOTS for node in self.nodes},
            hurt=frozenset(self.hurt),
            cancelled=frozenset(self.cancelled),
            leftovers=[describe(process) for process in self.stage_processes()],
        )

    def stage_processes(self) -> list[psutil.Process]:
        """Return what lives of attempts: supervisors, reapers, scripts and all they started."""
        own = {child.process.pid for child in self.children() if child.process is not None}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid not in own and belongs_to(process, str(self.root)) and alive(process):
                    found.append(process)
        return found

    # ---- the end ----------------------------------------------------------------------------------------------------

    def children(self) -> list[Child]:
        return [self.api, self.submitter, *(node.worker for node in self.nodes)]

    async def heal(self) -> None:
        """Take every fault back."""
        for node in self.nodes:
            if node.proxy is not None:
                node.proxy.become(Network.GOOD)
        if self.postgres is not None:
            await asyncio.to_thread(self.postgres.start)
        if self.redis.process is None:
            await asyncio.to_thread(self.redis.start)
        for child in self.children():
            child.send(signal.SIGCONT)
            if child is not self.submitter:
                child.start()

    async def settle(self, seconds: float) -> None:
        """Wait until every job has ended and nothing runs; after so long, what is left is for the verdict."""

        async def quiet() -> bool:
            return await self.unfinished() == 0 and not any(
                list(node.home.attempts.glob("[!.]*")) for node in self.nodes
            )

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await until(quiet, "the end of everything", self.report)

    def report(self) -> str:
        """Return the ends of the logs."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.root.glob("*.log")))

    async def close(self) -> None:
        """End all processes."""
        for child in self.children():
            child.kill()
        for process in self.stage_processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for node in self.nodes:
            if node.proxy is not None:
                await node.proxy.close()
        await self.database.close()


@asynccontextmanager
async def cluster(
    root: Path, *, backend: str, nodes: int = 3, jobs: int = 0, ahead: int = 8, forks: ForkServer | None = None
) -> AsyncIterator[Cluster]:
    """Run an installation under `root`. The submitter, once started, submits `jobs` jobs, `ahead` at a time.

    With a fork server, workers and API are forked.
    """
    with contextlib.ExitStack() as servers:
        postgres = servers.enter_context(own_postgres()) if backend == "postgres" else None
        (root / "redis").mkdir(parents=True)
        redis = servers.enter_context(private_redis(root / "redis"))
        base = next(servers.enter_context(contextlib.contextmanager(make_base)(root / "base")) for _ in range(1))
        url = postgres.url if postgres else f"sqlite+aiosqlite:///{root / 'deepe.sqlite'}"
        database = Database(url, scope=DEFAULT_SCOPE)
        await upgrade(database)
        Home(root).create()
        common = _environment(root, url, redis)
        proxies = [Proxy(postgres.port) if postgres else None for _ in range(nodes)]
        made = []
        for number, proxy in enumerate(proxies, 1):
            if proxy is not None:
                await proxy.start()
            environment = _environment(root, url_of(url, postgres, proxy), redis)
            made.append(_node(root, f"node-{number}", base, environment, proxy, forks))
        port = free_port()
        api = Child(
            ["-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port), *QUIET],
            common | {"DEEPE_PORT": str(port)},
            root / "api.log",
            forks,
        )
        arguments = ["-m", "tests.chaos.submitter", str(root), str(port), str(jobs), str(ahead)]
        submitter = Child(arguments, common, root / "submitter.log")
        cluster = Cluster(root, database, made, api, submitter, port, redis, postgres)
        try:
            await cluster.prepare()
            yield cluster
        finally:
            await cluster.close()


def url_of(url: str, postgres: Postgres | None, proxy: Proxy | None) -> str:
    return postgres.url_by(proxy.port) if postgres is not None and proxy is not None else url


def _environment(root: Path, url: str, redis: RedisServer) -> dict[str, str]:
    return {
        "PATH": os.defpath,
        "HOME": str(root),
        # this tree, whatever is installed: mutants are copies of it
        "PYTHONPATH": str(ROOT),
        "DEEPE_HOME": str(root),
        "DEEPE_CONTAINMENT": "off",  # scripts write the journal beside the home's folders
        "DEEPE_DATABASE_URL": url,
        "DEEPE_REDIS_URL": f"redis://127.0.0.1:{redis.port}",
        "DEEPE_POLL_SECONDS": "0.5",
        "DEEPE_STOP_GRACE_SECONDS": "0.5",
        "DEEPE_SLOTS": str(SLOTS),
        "DEEPE_SIMULATED_ACCELERATORS": str(SLOTS),
        "DEEPE_MIN_FREE_BYTES": "0",
        "DEEPE_LOG_FORMAT": "json",
    }


def _node(
    root: Path, name: str, base: Path, environment: dict[str, str], proxy: Proxy | None, forks: ForkServer | None
) -> Node:
    home = NodeHome(root / "nodes" / name)
    home.root.parent.mkdir(exist_ok=True)
    home.create()
    (home.environments / "base").symlink_to(base)
    worker = Child(["-m", "app.worker"], environment | {"DEEPE_NODE_NAME": name}, root / f"{name}.log", forks)
    return Node(name, home, worker, proxy)


def belongs_to(process: psutil.Process, root: str) -> bool:
    """Say whether a process is of an attempt under `root`."""
    if any(f"{root}/nodes/" in word or f"{root}/scripts/" in word for word in process.cmdline()):
        return True
    if supervises(process, Path(root)):
        return True
    return process.environ().get("DEEPE_OUTPUT_DIR", "").startswith(root + "/")


def describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    return str(process.pid)


def supervisors(nodes: Sequence[Node]) -> Iterator[tuple[Node, Folder]]:
    """Return every attempt under way with its node."""
    for node in nodes:
        for folder in node.folders():
            yield node, folder
