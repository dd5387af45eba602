"""Real workers on real jobs: a home, tiny user scripts, `python -m app.worker` as a child process.

A `Site` is one installation. Jobs are inserted as the API inserts them (scripts pinned by digest); what happens is read
from the database, the run folders and the process table, never from the worker itself.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlmodel import col, select

from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.projects import DEFAULT_SCOPE
from app.domain.transitions import TERMINAL
from app.executor.runs.job_spec import Deployment, InferenceRequest, JobSpec, Named, PinnedScript
from app.executor.runs.run_folder import RunFolder
from app.registry.methods.files import MethodFiles
from app.registry.scripts.root import ScriptRoot
from app.registry.scripts.versions import VersionStore
from app.store import job_status
from app.store import jobs as store
from app.store.home import Home, NodeHome
from app.store.session import Database
from app.store.tables import AttemptRow, JobEventRow, JobRow, ModelRow
from tests import job_rows
from tests.executor.attempts import supervises
from tests.fork_server import Fork, ForkServer
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
CONTAINMENT = os.environ.get("DEEPE_TEST_CONTAINMENT", "off")
"""What workers are told. `make test-contained` runs all of these tests with stages that are contained."""
WORKER = (sys.executable, "-m", "app.worker")
ASKING = {JobKind.INFERENCE_CUSTOMIZED, JobKind.INFERENCE_COMPLETE}

# What the scripts of the tests import: a module of the script root.
PLAY = '''
import json, os, struct, sys, time
from pathlib import Path

HERE = Path.cwd().parent
NOTES = HERE / "journal"
OUT = Path(os.environ.get("DEEPE_OUTPUT_DIR", "."))

def journal(word):
    """Append a line in one write."""
    with open(NOTES / os.environ["DEEPE_JOB_ID"], "ab", buffering=0) as file:
        file.write(f"{word} {os.getpid()} {time.time():.6f}\\n".encode())

def wait_for(gate, tick=0.02):
    while not (HERE / "gates" / gate).exists():
        time.sleep(tick)

def weights(path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.0))

def adapter():
    (OUT / "adapter_config.json").write_text("{}")
    weights(OUT / "adapter_model.safetensors")

def complete():
    (OUT / "config.json").write_text("{}")
    weights(OUT / "model.safetensors")
'''

TRAIN = "import play\nplay.journal('run')\nprint('hello', flush=True)\nplay.adapter()\n"
SAVE = "import play\nplay.journal('run')\nplay.complete()\nprint('{\"status\": \"success\"}')\n"
DEPLOY = "import play\nplay.journal('run')\nprint('{\"status\": \"success\"}')\n"


class Worker:
    """A worker process and what it logged."""

    def __init__(self, process: "subprocess.Popen[bytes] | Fork", log: Path) -> None:
        self.process = process
        self.log_file = log

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log records of this name."""
        records = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [record for record in records if record.get("event") == name]

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it as a service manager would."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


class Site:
    """One installation: a home, a database, perhaps a Redis, and its workers, forked if there is a fork server."""

    def __init__(
        self,
        root: Path,
        database_url: str,
        base: Path,
        *,
        redis_url: str | None = None,
        forks: ForkServer | None = None,
    ) -> None:
        self.root = root
        self.home = Home(root)
        self.home.create()
        self.database = Database(database_url, scope=DEFAULT_SCOPE)
        self.database_url = database_url
        self.redis_url = redis_url
        self.workers: list[Worker] = []
        self._base = base
        self._forks = forks
        self._method = ""
        for name in ("journal", "gates"):
            (root / name).mkdir()
        (self.home.scripts / "play.py").write_text(PLAY)
        (self.home.models / "base").mkdir()
        (self.home.datasets / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')

    # ---- workers ----------------------------------------------------------------------------------------------------

    def node_home(self, node: str = "one") -> NodeHome:
        return NodeHome(self.root / "nodes" / node)

    def start_worker(self, node: str = "one", *, command: Sequence[str] = (), **variables: str) -> Worker:
        """Start a worker on a node that has the environment `base`."""
        self.place_base(node)
        return self.start_bare_worker(node, command=command, **variables)

    def place_base(self, node: str = "one") -> None:
        """Give the node the environment `base`, as an operator would place it."""
        home = self.node_home(node)
        home.root.parent.mkdir(exist_ok=True)
        home.create()
        if not (home.environments / "base").exists():
            (home.environments / "base").symlink_to(self._base)

    def start_bare_worker(self, node: str = "one", *, command: Sequence[str] = (), **variables: str) -> Worker:
        """Start `python -m app.worker`, or another command, with an environment of its own."""
        environment = {
            "PATH": os.defpath,
            "PYTHONPATH": str(ROOT),  # this tree, whatever is installed: mutants are copies of it
            "HOME": str(self.root),
            "DEEPE_HOME": str(self.root),
            "DEEPE_DATABASE_URL": self.database_url,
            "DEEPE_NODE_NAME": node,
            "DEEPE_POLL_SECONDS": "0.1",
            "DEEPE_STOP_GRACE_SECONDS": "1",
            "DEEPE_LOG_FORMAT": "json",
            "DEEPE_CONTAINMENT": CONTAINMENT,
            "DEEPE_STAGE_READABLE": "gates",
            "DEEPE_STAGE_WRITABLE": "journal",
            **({"DEEPE_REDIS_URL": self.redis_url} if self.redis_url else {}),
            **variables,
        }
        log = self.root / f"worker-{len(self.workers)}.log"
        process: subprocess.Popen[bytes] | Fork
        with log.open("wb") as stream:
            if self._forks is not None and not command:
                process = self._forks.start(WORKER[1:], cwd=self.root, environment=environment, output=stream)
            else:
                process = subprocess.Popen(
                    command or WORKER, env=environment, stdout=stream, stderr=stream, cwd=self.root
                )
        worker = Worker(process, log)
        self.workers.append(worker)
        return worker

    async def close(self) -> None:
        """End everything that was started here."""
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        await self.database.close()

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def script(self, text: str, name: str) -> PinnedScript:
        """Write a script into the script root and return its pin."""
        path = self.home.scripts / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return PinnedScript(**asdict(self.files.keep_on_disk(name)))

    @property
    def files(self) -> MethodFiles:
        """The script root with the version store."""
        return MethodFiles(ScriptRoot(self.home.scripts), VersionStore(self.home.versions, beside=self.home.base))

    def spec(self, script: PinnedScript, kind: JobKind, /, **changes: Any) -> JobSpec:
        """Return what a submit would write down."""
        values: dict[str, Any] = {
            "technique": "sft",
            "script": script,
            "base_model": Named(id="base-id", name="base", path="models/base"),
            "dataset": Named(id="rows-id", name="rows", path="datasets/rows.jsonl", digest="0" * 64),
            "deployment": Deployment(target="custom") if kind is JobKind.DEPLOYMENT else None,
            "question": InferenceRequest(prompt="hi", history=(), session_id="s") if kind in ASKING else None,
        }
        return JobSpec(**{**values, **changes})

    async def job(
        self, text: str = TRAIN, kind: JobKind = JobKind.TRAINING, *, file: str = "", spec: Any = None, **row: Any
    ) -> JobRow:
        """Return a job that runs the script `text`, not inserted yet."""
        if not self._method:
            self._method = await job_rows.add_method(self.database)
        job = job_rows.new_job(kind=kind, **{"environment": "base", "method_id": self._method, **row})
        script = self.script(text, file or f"{kind}-{job.id[:8]}.py")
        job.launch = self.spec(script, kind, **{"effective": job.parameters, **(spec or {})}).document()
        job.method_name, job.method_version = "finance", 1
        job.created_at = job.updated_at = datetime.now(UTC)
        return job

    async def insert(self, *jobs: JobRow) -> list[str]:
        """Insert the jobs as a submit does."""
        return await job_rows.insert(self.database, *jobs)

    async def submit(self, text: str = TRAIN, kind: JobKind = JobKind.TRAINING, **options: Any) -> str:
        """Insert one job and return its id."""
        (job_id,) = await self.insert(await self.job(text, kind, **options))
        return job_id

    async def submit_chain(self, *scripts: tuple[JobKind, str], **options: Any) -> list[str]:
        """Insert jobs that follow one another and return their ids."""
        rows: list[JobRow] = []
        for position, (kind, text) in enumerate(scripts):
            row = await self.job(text, kind, position=position, **options)
            if rows:
                row.chain_id, row.blocked_by = rows[0].id, rows[-1].id
            rows.append(row)
        return await self.insert(*rows)

    async def cancel(self, job_id: str) -> None:
        """Wish the end of a job as the API does."""
        async with self.database.writing() as session:
            await job_status.request_cancel(session, job_id, now=datetime.now(UTC))

    # ---- what happened ----------------------------------------------------------------------------------------------

    async def row(self, job_id: str) -> JobRow:
        async with self.database.reading() as session:
            return await store.get(session, job_id)

    async def attempts(self, job_id: str) -> Sequence[AttemptRow]:
        async with self.database.reading() as session:
            found = await session.exec(select(AttemptRow).where(AttemptRow.job_id == job_id))
            return found.all()

    async def models(self) -> Mapping[str, ModelRow]:
        """Return the models by the id of the job that made them."""
        async with self.database.reading() as session:
            rows = (await session.exec(select(ModelRow))).all()
            return {row.job_id: row for row in rows if row.job_id is not None}

    async def events(self, *job_ids: str) -> list[tuple[str, str]]:
        """Return (job, status) of every transition of these jobs, in order."""
        async with self.database.reading() as session:
            statement = select(JobEventRow).where(col(JobEventRow.job_id).in_(job_ids)).order_by(col(JobEventRow.id))
            return [(event.job_id, event.status.value) for event in (await session.exec(statement)).all()]

    async def statuses(self, job_id: str) -> list[str]:
        return [status for _, status in await self.events(job_id)]

    async def wait(self, job_id: str, *statuses: JobStatus) -> JobRow:
        """Wait until the job has one of these statuses; without any, until it has ended."""
        wanted: Collection[JobStatus] = statuses or TERMINAL

        async def look() -> JobRow | None:
            row = await self.row(job_id)
            assert row.status in wanted or row.status not in TERMINAL, self.story(row)
            return row if row.status in wanted else None

        return await until(look, f"{job_id} {'/'.join(statuses)}", self.report)

    async def wait_for_end(self, *job_ids: str) -> list[JobRow]:
        return [await self.wait(job_id) for job_id in job_ids]

    def run_folder(self, job_id: str, attempt: int = 1) -> RunFolder:
        return RunFolder(self.home.run_folder(job_id, attempt))

    def output(self, job_id: str, attempt: int = 1) -> str:
        file = self.run_folder(job_id, attempt).output_log
        return file.read_text(errors="replace") if file.exists() else ""

    def journal(self, job_id: str) -> list[str]:
        """Return the first words of the lines that the job's script wrote."""
        file = self.root / "journal" / job_id
        return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []

    async def wait_for_journal(self, job_id: str, word: str = "run", *, count: int = 1) -> None:
        async def look() -> bool:
            return self.journal(job_id).count(word) >= count

        await until(look, f"{word} in the journal of {job_id}", self.report)

    def open(self, gate: str) -> None:
        """Let the scripts pass that wait for this gate."""
        (self.root / "gates" / gate).touch()

    def control_folders(self, node: str = "one") -> list[str]:
        return sorted(path.name for path in self.node_home(node).attempts.iterdir())

    def supervisor_pids(self) -> list[int]:
        """Return the supervisors themselves, from what they wrote down."""
        found = []
        for state in self.root.glob("nodes/*/attempts/*/state.json"):
            with contextlib.suppress(FileNotFoundError):  # the attempt has ended since
                found.append(json.loads(state.read_text())["supervisor_pid"])
        return found

    def processes(self) -> list[psutil.Process]:
        """Return what lives of this site's attempts: supervisors, reapers, scripts and all they started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                ours = environment.get("DEEPE_OUTPUT_DIR", "").startswith(str(self.root))
                named = str(self.root) in " ".join(process.cmdline())
                if (ours or named or supervises(process, self.root)) and alive(process):
                    found.append(process)
        return [process for process in found if process.pid not in {worker.process.pid for worker in self.workers}]

    def story(self, row: JobRow) -> str:
        """Return what is known of a job that did not go as expected."""
        return f"{row.kind} {row.status} {row.reason} {row.reason_params}\n{self.output(row.id)}\n{self.report()}"

    def report(self) -> str:
        """Return the end of the workers' logs."""
        return "\n".join(f"--- {worker.log_file.name}\n{worker.log[-4000:]}" for worker in self.workers)


def alive(process: psutil.Process) -> bool:
    """Say whether a process exists and is more than a zombie."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def pids_alive(pids: Sequence[int]) -> list[int]:
    if CONTAINMENT != "off":
        pytest.skip("what a contained script calls its pid is none of the machine's")
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            if alive(psutil.Process(pid)):
                found.append(pid)
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def make_base(folder: Path) -> Iterator[Path]:
    """Yield a venv that stands for the environment `base` (the body of a fixture)."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    yield folder


ENDED_WELL = (JobStatus.SUCCEEDED, EndReason.COMPLETED)
