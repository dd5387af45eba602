"""A node's view of its environments, and what it tells the database: heartbeat, environments, wanted builds.

An environment that a queued job needs and this node has not is built by a job of its own, pinned to this node and made
at most once at a time (a partial unique index sees to that). The waiting jobs stay queued and are claimed when it is
ready. When the build fails or is cancelled, the next look fails those that waited for it, unless another living node
has the environment: then they wait for that node, and this one does not try the same specification again.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.accelerators import Accelerator
from app.domain.enums import EndReason, JobKind, JobStatus, Platform
from app.domain.environment_locks import EnvironmentLock
from app.domain.environment_reports import EnvironmentReport, EnvironmentState
from app.domain.labels import automatic_labels
from app.domain.names import BASE_ENVIRONMENT
from app.domain.projects import DEFAULT_PROJECT
from app.executor.environments.activation import interpreter
from app.executor.environments.builders import BuildRules
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environment_cleaning import EnvironmentCleaning
from app.executor.environments.environments import mark_used
from app.executor.environments.local_environments import LocalEnvironments, Look
from app.executor.environments.method_probing import MethodProbing
from app.executor.nodes.disk_guard import DiskGuard
from app.executor.nodes.inventory import Hardware, machine
from app.executor.nodes.joining import require_join_token
from app.executor.runs.job_spec import EnvironmentBuild, JobSpec
from app.registry.nodes.service import living_nodes
from app.store import job_status, nodes, option_classes
from app.store import jobs as store
from app.store.clock import database_now
from app.store.environments import all_environments, builds, spec_hashes
from app.store.home import NodeHome
from app.store.session import Database, scope_of
from app.store.tables import JobRow, NodeRow

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
_LAST_JOBS = 20  # packing an environment is a job like building it
_STANDING = (EnvironmentState.READY, EnvironmentState.STALE)


@dataclass(frozen=True)
class NodeFacts:
    """What does not change while the worker runs."""

    name: str
    platform: Platform
    slots: int
    boot_id: str
    home_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    join_token: str | None = field(default=None, repr=False)


class EnvironmentManager:
    """Finds, reports and orders the environments of one node."""

    def __init__(
        self,
        *,
        database: Database,
        facts: NodeFacts,
        hardware: Hardware,
        node_home: NodeHome,
        search: CondaSearch,
        rules: BuildRules,
        disks: DiskGuard | None = None,
        cleaning: EnvironmentCleaning | None = None,
        probing: MethodProbing | None = None,
    ) -> None:
        self._database = database
        self._cleaning = cleaning
        self._disks = disks
        self._facts = facts
        self._hardware = hardware
        self._home = node_home
        self._rules = rules
        self._probing = probing
        probes = probing.probes if probing is not None else None
        self._local = LocalEnvironments(envs_dir=node_home.environments, search=search, rules=rules, probes=probes)
        self._node_id = ""
        self._seen = Look({}, ())
        self._told: dict[str, Any] = {}
        self._specs: Mapping[str, str | None] = {}
        self._hashes: Mapping[str, str | None] = {}
        self._looked_at = float("-inf")

    async def register(self) -> str:
        """Make this node known and return its id; raise `RegistrationRefused` if it may not be this node."""
        await self._look()
        automatic = automatic_labels(self._facts.name, self._facts.platform, self._hardware.accelerators)
        async with self._database.writing() as session:
            await require_join_token(session, self._facts.join_token)
            row = await nodes.register_node(
                session,
                name=self._facts.name,
                platform=self._facts.platform,
                accelerators=[accelerator.document() for accelerator in self._hardware.accelerators],
                environments=sorted(self._seen.ready),
                slots=self._facts.slots,
                boot_id=self._facts.boot_id,
                home_id=self._facts.home_id,
                hostname=machine().hostname,
                labels={**automatic, **self._facts.labels},
                now=await database_now(session),
            )
        self._node_id, self._told = row.id, {}
        return row.id

    async def beat(self) -> None:
        """Say that the node lives, and what changed on it since it said so last: most beats write a time only."""
        async with self._database.reading() as session:
            specs = await spec_hashes(session)
        environments = sorted(await self.ready_environments(specs))
        inventory = await self._hardware.inventory()
        refusal = None if self._disks is None else await self._disks.refusal()
        report: dict[str, Any] = {
            "environments": environments,
            "environment_states": self._seen.documents(),
            "inventory": inventory.model_dump(mode="json"),
        }
        changed = {column: said for column, said in report.items() if said != self._told.get(column)}
        descriptions = await self._new_descriptions() if "environment_states" in changed else {}
        async with self._database.writing() as session:
            now = await database_now(session)
            await option_classes.keep(session, descriptions, now=now)
            written = await nodes.heartbeat(session, self._node_id, now=now, refusal=refusal, **changed)
        self._told = report if written else {}

    async def _new_descriptions(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the descriptions of configuration classes that the report names and the database may lack."""
        if self._probing is None:
            return {}
        named = {digest for one in self._seen.reports if one.probe for digest in one.probe.options.values()}
        async with self._database.reading() as session:
            unknown = named - (await option_classes.load(session, named)).keys()
        return await asyncio.to_thread(self._probing.probes.descriptions, unknown) if unknown else {}

    async def usable_accelerators(self) -> Sequence[Accelerator]:
        """Return the accelerators that are free or used by jobs of this node."""
        return await self._hardware.usable()

    @property
    def accelerators(self) -> Sequence[Accelerator]:
        """Return all accelerators of the node."""
        return self._hardware.accelerators

    async def accelerator_with_most_memory(self) -> Accelerator | None:
        """Return the usable accelerator with the most memory, which inference jobs share."""
        return max(await self.usable_accelerators(), key=lambda one: one.memory_mib or 0, default=None)

    async def ready_environments(self, specs: Mapping[str, str | None]) -> Collection[str]:
        """Return the names of the environments that stages can run in here, now.

        Looks at the disk every few seconds, and at once when a specification changed: the next job waits for it.
        `specs`: their digests by name.
        """
        if time.monotonic() - self._looked_at > LOOK_SECONDS or specs != self._hashes:
            await self._look()
        return self._seen.ready

    async def prefix(self, name: str) -> Path | None:
        """Return where a stage that was claimed runs, None if the environment is gone; remember that it is used.

        What the claim saw holds while its interpreter is there. A specification may change between claim and launch:
        the stage then runs where it would have a moment ago.
        """
        prefix = self._standing(name)
        if prefix is None or not await asyncio.to_thread(self._use, prefix):
            await self._look()
            prefix = self._standing(name)
            if prefix is not None:
                await asyncio.to_thread(self._use, prefix)
        return prefix

    def _standing(self, name: str) -> Path | None:
        found = self._seen.found.get(name)
        return found.prefix if found is not None and found.state in _STANDING else None

    def _use(self, prefix: Path) -> bool:
        if not interpreter(prefix).exists():
            return False
        with contextlib.suppress(OSError):  # nothing but the clean-up misses it
            mark_used(self._home.environments, prefix)
        return True

    async def request_builds(self) -> None:
        """Order the environments that queued jobs wait for; fail jobs whose environment cannot be built."""
        async with self._database.reading() as session:
            specs, waited_for = await spec_hashes(session), await store.environments_waited_for(session)
        if missing := set(waited_for) - set(await self.ready_environments(specs)):
            async with self._database.reading() as session:
                missing -= await self._being_built(session)
        for name in sorted(missing):
            await self._order(name)
        if self._cleaning is not None:
            await self._cleaning.turn(self._node_id, self._seen)
        if self._probing is not None:
            await self._probing.turn(self._seen)

    async def _being_built(self, session: AsyncSession) -> set[str]:
        """Return what is being built here or on another node that takes jobs; silent nodes do not count."""
        others = {node.id for node in await nodes.working_nodes(session, now=await database_now(session))}
        return {name for name, node_id in await builds(session) if node_id in {*others, self._node_id}}

    async def _order(self, name: str) -> None:
        await self._look()
        if name in self._seen.ready:
            return
        spec = self._specs.get(name)
        if spec is None and name != BASE_ENVIRONMENT:
            await self._give_up(name)
            return
        async with self._database.reading() as session:
            if self._is_for_others(name, await living_nodes(session)):
                return
            failed = await self._failed_here(session, name, spec)
            elsewhere = any(name in node.environments for node in await living_nodes(session))
        if failed is not None and (elsewhere or await self._fail_waiting_for(failed)):
            return
        async with self._database.writing() as session:
            job = await build_job(session, name, spec, node_id=self._node_id)
        if job is not None:
            logger.info("environment_ordered", extra={"environment": name, "job_id": job.id})

    def _is_for_others(self, name: str, living: Sequence[NodeRow]) -> bool:
        """Say whether this node cannot build the environment and another one that lives can, or has it."""
        mine = next((report for report in self._seen.reports if report.name == name), None)
        if mine is None or mine.state is not EnvironmentState.MISSING:
            return False
        reports = (EnvironmentReport.read(node.environment_states or []).get(name) for node in living)
        return any(report is not None and report.state is not EnvironmentState.MISSING for report in reports)

    async def _failed_here(self, session: AsyncSession, name: str, spec: str | None) -> JobRow | None:
        """Return the last build of the environment on this node if it made nothing of this specification."""
        statement = (
            select(JobRow)
            .where(JobRow.kind == JobKind.ENVIRONMENT, JobRow.environment == name, JobRow.node_id == self._node_id)
            .order_by(col(JobRow.created_at).desc())
            .limit(_LAST_JOBS)
        )
        for last in (await session.exec(statement)).all():
            build = JobSpec.of(last).build
            if build is not None and build.action == "build":
                failed = last.status in (JobStatus.FAILED, JobStatus.CANCELLED)
                return last if failed and build.spec == spec and build.lock is None else None
        return None

    async def _fail_waiting_for(self, build: JobRow) -> int:
        """Fail jobs that could have run had the build succeeded; return how many. Later ones get another build."""
        params = {
            "environment": build.environment,
            "build": build.id,
            "detail": build.reason_params.get("detail", ""),
            "log_tail": build.reason_params.get("log_tail", []),
        }
        async with self._database.writing() as session:
            return await job_status.fail_queued(
                session,
                environment=build.environment,
                reason=EndReason.ENV_BUILD_FAILED,
                params=params,
                now=await database_now(session),
                waiting_since=build.finished_at,
            )

    def build_command(
        self, build: EnvironmentBuild, *, archive: Path, spec_file: Path | None, lock_file: Path | None
    ) -> list[str]:
        """Return the program that builds or packs the environment here, with its options."""
        options = ["--name", build.name, "--envs", str(self._home.environments)]
        options += ["--archive", str(archive), "--node", self._facts.name]
        options += [] if spec_file is None else ["--spec", str(spec_file)]
        options += ["--torch-index", self._rules.torch.index] if self._rules.torch.index else []
        options += ["--torch-find-links", self._rules.torch.find_links] if self._rules.torch.find_links else []
        if build.action == "pack":
            return ["app.executor.environments.pack_environment", *options]
        options += ["--builder", self._rules.builder]
        options += [option for channel in self._rules.channels for option in ("--default-channel", channel)]
        options += ["--offline"] if self._rules.offline else []
        options += [option for device in sorted(self._rules.devices) for option in ("--accelerator", device)]
        options += [] if lock_file is None else ["--lock", str(lock_file)]
        return ["app.executor.environments.build_environment", *options]

    async def _give_up(self, name: str) -> None:
        """Nothing here can make it; jobs wait only while another node has it."""
        async with self._database.writing() as session:
            if any(name in node.environments for node in await nodes.all_nodes(session)):
                return
            now = await database_now(session)
            count = await job_status.fail_queued(
                session,
                environment=name,
                reason=EndReason.ENV_MISSING,
                params={"environment": name, "detail": ""},
                now=now,
                spare_patient=True,
            )
        if count:
            logger.warning("environment_missing", extra={"environment": name, "failed_jobs": count})

    async def _look(self) -> None:
        async with self._database.reading() as session:
            rows = await all_environments(session)
        self._specs = {row.name: row.spec for row in rows}
        self._hashes = {row.name: row.spec_hash for row in rows}
        self._seen = await asyncio.to_thread(self._local.look, self._specs)
        self._looked_at = time.monotonic()


async def build_job(
    session: AsyncSession,
    name: str,
    spec: str | None,
    *,
    node_id: str,
    action: Literal["build", "pack"] = "build",
    lock: EnvironmentLock | None = None,
) -> JobRow | None:
    """Insert the job that builds or packs `name` on the node; None when one is at it already."""
    now = await database_now(session)
    job = store.new_job(
        kind=JobKind.ENVIRONMENT,
        name=name,
        environment=name,
        launch=JobSpec(build=EnvironmentBuild(name=name, spec=spec, action=action, lock=lock)).document(),
        now=now,
        node_id=node_id,
        project_id=scope_of(session).project or DEFAULT_PROJECT,  # a node orders it for whoever waits
    )
    try:
        async with session.begin_nested():
            await store.insert(session, [job])
    except IntegrityError:
        return None
    return job
