"""Jobs, nodes and run folders as tests need them: everything defaulted, rows inserted through the store."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.domain.enums import EndReason, JobKind, JobStatus, Platform, VersionSource
from app.domain.kinds import STAGES
from app.domain.names import name_key
from app.executor.runs.job_spec import JobSpec
from app.executor.runs.run_folder import RunFolder
from app.store import claims, job_attempts, jobs, methods, nodes
from app.store.claims import Offer
from app.store.home import Home
from app.store.job_attempts import Claim
from app.store.job_status import End
from app.store.session import Database
from app.store.tables import JobRow, MethodRow

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LEASE = timedelta(seconds=60)
ENVIRONMENT = "trl"
SUCCESS = End(status=JobStatus.SUCCEEDED, reason=EndReason.COMPLETED, params={})
FAILURE = End(
    status=JobStatus.FAILED,
    reason=EndReason.EXIT_CODE,
    params={"exit_code": 3, "detail": "ValueError: no", "log_tail": ["Traceback", "ValueError: no"]},
)


def new_job(**overrides: Any) -> JobRow:
    """Return a queued training that is a chain of its own."""
    job_id = overrides.get("id") or str(uuid4())
    values: dict[str, Any] = {
        "id": job_id,
        "name": "job",
        "kind": JobKind.TRAINING,
        "status": JobStatus.QUEUED,
        "reason_params": {},
        "chain_id": job_id,
        "environment": ENVIRONMENT,
        "parameters": {},
        "launch": JobSpec(effective=overrides.get("parameters", {})).document(),
        "created_at": START,
        "updated_at": START,
    }
    return JobRow(**{**values, **overrides})


def new_chain(*kinds: JobKind, **overrides: Any) -> list[JobRow]:
    """Return jobs that follow one another; a full chain when no kinds are given."""
    rows: list[JobRow] = []
    for position, kind in enumerate(kinds or (JobKind.TRAINING, JobKind.SAVING, JobKind.DEPLOYMENT)):
        blocked_by = rows[-1].id if rows else None
        chain = {"chain_id": rows[0].id} if rows else {}
        rows.append(new_job(kind=kind, position=position, blocked_by=blocked_by, **chain, **overrides))
    return rows


async def insert(database: Database, *rows: JobRow) -> list[str]:
    """Insert the jobs and return their ids."""
    ids = [row.id for row in rows]
    async with database.writing() as session:
        await jobs.insert(session, rows)
    return ids


async def add_job(database: Database, **overrides: Any) -> str:
    """Insert one job and return its id."""
    (job_id,) = await insert(database, new_job(**overrides))
    return job_id


def cards(
    count: int, *, memory_mib: int = 80_000, kind: AcceleratorKind = AcceleratorKind.SIMULATED
) -> list[Accelerator]:
    """Return accelerators as a node has them."""
    return [
        Accelerator(id=f"card-{index}", index=index, kind=kind, name="card", memory_mib=memory_mib)
        for index in range(count)
    ]


async def add_node(
    database: Database,
    name: str = "node-1",
    *,
    environments: Sequence[str] = (ENVIRONMENT,),
    slots: int = 1,
    accelerators: Sequence[Accelerator] = (),
    labels: Mapping[str, str] | None = None,
    heartbeat_at: datetime = START,
) -> str:
    """Register a node and return its id."""
    async with database.writing() as session:
        row = await nodes.register_node(
            session,
            name=name,
            platform=Platform.CPU,
            accelerators=[one.document() for one in accelerators],
            environments=environments,
            slots=slots,
            boot_id="boot",
            now=heartbeat_at,
        )
        row.labels = dict(labels or {})
        session.add(row)
        return row.id


async def add_method(database: Database, name: str = "finance", **definition: Any) -> str:
    """Insert a method of one version, whose files nobody looks at, and return its id."""
    whole = {
        "name": name,
        "training_type": "chat",
        "technique": "sft",
        "lifecycle": ["customized"],
        "stages": {"training": {"file": "train.py", "conda_env": ENVIRONMENT}},
        **definition,
    }
    row = MethodRow(
        id=str(uuid4()),
        name=name,
        name_key=name_key(name),
        training_type=whole["training_type"],
        technique=whole["technique"],
        lifecycle=",".join(whole["lifecycle"]),
        version=1,
        created_at=START,
        updated_at=START,
    )
    version = methods.new_version(
        row,
        number=1,
        definition=whole,
        files={
            stage: {"file": config["file"], "sha256": "0" * 64, "size": 1} for stage, config in whole["stages"].items()
        },
        source=VersionSource.CREATE,
        now=START,
    )
    async with database.writing() as session:
        await methods.insert(session, row, version)
    return row.id


async def claim(
    database: Database,
    node_id: str,
    *,
    kinds: Iterable[JobKind] = STAGES,
    environments: Sequence[str] = (ENVIRONMENT,),
    slots: int = 1000,
    usable: Sequence[str] | None = None,
    now: datetime = START,
) -> Claim | None:
    """Claim the next job for the node; no foreign process uses its accelerators unless `usable` leaves some out."""
    async with database.writing() as session:
        offer = Offer(node_id=node_id, environments=environments, slots=slots, usable=usable)
        return await claims.claim(session, offer, kinds=frozenset(kinds), now=now, lease=LEASE)


@dataclass
class Runner:
    """Plays the part of a node: claims, starts and ends jobs and writes their run folders; nothing runs."""

    database: Database
    home: Home
    node_id: str

    async def start(self, job_id: str) -> Claim:
        """Claim exactly this job and mark it as running."""
        won = await claim(self.database, self.node_id, kinds=frozenset(JobKind), environments=("base", ENVIRONMENT))
        assert won is not None
        assert won.job.id == job_id, "another job is first in the queue"
        async with self.database.writing() as session:
            assert await job_attempts.mark_running(session, won, now=START + timedelta(seconds=1))
        return won

    async def end(self, won: Claim, end: End = SUCCESS) -> None:
        async with self.database.writing() as session:
            assert await job_attempts.finish(session, won, end, now=START + timedelta(seconds=2))

    async def run(self, job_id: str, end: End = SUCCESS) -> None:
        """Start the job and end it."""
        await self.end(await self.start(job_id), end)

    def folder(self, job_id: str, attempt: int = 1) -> RunFolder:
        run = RunFolder(self.home.run_folder(job_id, attempt))
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    def prints(self, job_id: str, text: str | bytes, *, attempt: int = 1) -> None:
        """Append to the job's output."""
        with self.folder(job_id, attempt).output_log.open("ab") as log:
            log.write(text.encode() if isinstance(text, str) else text)

    def reports(self, job_id: str, *events: Mapping[str, Any], attempt: int = 1) -> None:
        """Append to the job's events."""
        with self.folder(job_id, attempt).events.open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)


async def new_runner(database: Database, home: Home) -> Runner:
    """Return a runner on a node of its own."""
    return Runner(database=database, home=home, node_id=await add_node(database))
