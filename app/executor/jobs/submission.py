"""Submit: check everything that can be checked now, then write the chain of jobs down.

A job that cannot work is refused here, with every reason at once, and not minutes later by its script. What passes is
written with everything that its arguments are made of (`app.executor.runs.job_spec`), so that it runs as submitted.
"""

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.definition import CUSTOM_TARGET
from app.domain.demand import DEFAULT_QUEUE, Resources, resource_violations
from app.domain.enums import JobKind, JobStatus, ModelState, TrainingType
from app.domain.errors import AppError, InvalidRequest, NotFound, Unavailable, Violation
from app.domain.kinds import KINDS, STAGES, Stage, as_stage
from app.domain.lifecycle import chain, runnable_stages, source_state, trains
from app.domain.names import BASE_ENVIRONMENT
from app.domain.plain_text import shown
from app.domain.retries import Limits, RetryPolicy, policy_violations
from app.executor.jobs.fixing import columns_of, pinned_method
from app.executor.jobs.runnability import unrunnable
from app.executor.jobs.stage_parameters import CheckedParameters, StageParameters
from app.executor.runs.job_spec import Deployment, Named, PinnedScript, Snapshot
from app.presets.catalogue import OLLAMA_SCRIPT, script_path
from app.registry.dataset_files import locate
from app.registry.datasets import Datasets
from app.registry.method_record import Method
from app.registry.method_runs import MethodRuns
from app.registry.scripts import digest_of
from app.store import jobs as store
from app.store import models, named, registry_facts
from app.store.home import Home
from app.store.session import Database
from app.store.tables import BaseModelRow, DatasetRow, DeployTargetRow, JobRow, ModelRow

MAX_NAME = 100


class InsufficientDiskSpace(Unavailable):
    """The volume of the outputs is nearly full."""

    code = "insufficient_disk_space"


@dataclass(frozen=True)
class Submission:
    """What a caller asks for: `through` a state of the path, or one `stage` on a `model` that is there."""

    method: str
    base_model: str | None = None
    dataset: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    through: str | None = None
    stage: str | None = None
    model: str | None = None
    name: str | None = None
    quantize: str | None = None
    template: str = ""
    system: str = ""
    deployment_parameters: Mapping[str, Any] = field(default_factory=dict)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    limits: Limits = field(default_factory=Limits)
    resources: Resources = field(default_factory=Resources)
    priority: int = 0
    queue: str = DEFAULT_QUEUE
    user: str = ""
    wait: bool = False  # although no node can run it as things are
    retry_of: str | None = None
    copied_from: str | None = None


@dataclass(frozen=True)
class Submitted:
    """The jobs that were made, in their order, and what is unusual about the request."""

    jobs: Sequence[JobRow]
    warnings: Sequence[Violation]


@dataclass(frozen=True)
class _Inputs:
    """What the names of a submission mean."""

    base_model: Named | None
    dataset: Named | None
    model: ModelRow | None
    columns: Sequence[str] | None
    violations: Sequence[Violation]


class Submissions:
    """Turns submissions into queued jobs."""

    def __init__(
        self,
        *,
        database: Database,
        home: Home,
        runs: MethodRuns,
        datasets: Datasets,
        parameters: StageParameters,
        min_free_bytes: int,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._home = home
        self._runs = runs
        self._datasets = datasets
        self._parameters = parameters
        self._min_free_bytes = min_free_bytes
        self._clock = clock

    async def prepare(self, dataset: str | None) -> None:
        """Check the data set again if its file changed on disk, and record what it is now.

        Call it before the transaction of a submit: large files take long, and a writer that waits there for another
        one would wait for itself. `submit` would do the same, in its own transaction.
        """
        if dataset is None:
            return
        async with self._database.reading() as session:
            row = await named.find(session, DatasetRow, dataset)
        if row is None or not await self._exists(row.path):
            return  # the submit says so, with all else that is wrong
        inspection = await self._datasets.current(row)
        if inspection is None:
            return
        async with self._database.writing() as session:
            row = await named.find(session, DatasetRow, row.id)
            if row is not None:
                await self._datasets.record(session, row, inspection)

    async def submit(self, session: AsyncSession, submission: Submission) -> Submitted:
        """Check and queue; raises `InvalidRequest` with everything that is wrong."""
        await self._check_disk()
        method = await self._method(session, submission)
        stages, found = _wanted_stages(method, submission)
        inputs = await self._inputs(session, submission, _needed_state(method, submission))
        found += inputs.violations
        found += resource_violations(submission.resources)
        found += policy_violations(submission.retry)
        found += await _unknown_environments(session, method, stages)
        deployment, wrong = await _deployment(session, method, submission, stages)
        found += wrong
        checked = await self._parameters.check(method, stages, submission.parameters, inputs.columns)
        found += checked.violations
        if found:
            raise InvalidRequest(found)
        jobs = self._jobs(method, submission, stages, inputs, checked, deployment)
        if not submission.wait:
            found = await unrunnable(session, method, jobs, self._runs.modules, now=self._clock())
            if found:
                raise InvalidRequest(found)
        await store.insert(session, jobs)
        return Submitted(jobs=jobs, warnings=checked.warnings)

    async def change(
        self, session: AsyncSession, jobs: Sequence[JobRow], parameters: Mapping[str, Any]
    ) -> Sequence[Violation]:
        """Change the parameters of jobs that are not queued yet, checked against the version that they run.

        A value that is None leaves the parameter out. Returns what is unusual, raises `InvalidRequest` for the wrong.
        """
        method = await pinned_method(session, jobs[0])
        assert method is not None
        given = {name: value for job in reversed(jobs) for name, value in job.parameters.items()}
        values = {name: value for name, value in {**given, **parameters}.items() if value is not None}
        columns = await columns_of(session, jobs[0]) if jobs[0].model_id is None else None
        checked = await self._parameters.check(method, [as_stage(job.kind) for job in jobs], values, columns)
        if checked.violations:
            raise InvalidRequest(list(checked.violations))
        for job in jobs:
            stage = as_stage(job.kind)
            job.parameters = checked.given(stage)
            effective = {"effective": checked.effective(stage)}
            job.launch = Snapshot.of(job).model_copy(update=effective).document()
        return checked.warnings

    # ---- checks -----------------------------------------------------------------------------------------------------

    async def _check_disk(self) -> None:
        free = (await asyncio.to_thread(shutil.disk_usage, self._home.runs)).free
        if free < self._min_free_bytes:
            raise InsufficientDiskSpace(free_mib=free // 2**20, needed_mib=self._min_free_bytes // 2**20)

    async def _method(self, session: AsyncSession, submission: Submission) -> Method:
        try:
            return await self._runs.pin_for_run(session, submission.method)
        except NotFound as error:
            raise InvalidRequest([Violation("/method", "unknown_method", {"method": submission.method})]) from error

    async def _inputs(self, session: AsyncSession, submission: Submission, needed: ModelState | None) -> _Inputs:
        if submission.stage is not None and submission.model is not None:
            return await self._inputs_of_model(session, submission, needed)
        found: list[Violation] = []
        base = data = None
        if submission.base_model is None:
            found.append(Violation("/base_model", "base_model_needed", {}))
        elif (base := await named.find(session, BaseModelRow, submission.base_model)) is None:
            found.append(Violation("/base_model", "unknown_base_model", {"base_model": submission.base_model}))
        if submission.dataset is None:
            found.append(Violation("/dataset", "dataset_needed", {}))
        elif (data := await named.find(session, DatasetRow, submission.dataset)) is None:
            found.append(Violation("/dataset", "unknown_dataset", {"dataset": submission.dataset}))
        for pointer, row in (("/base_model", base), ("/dataset", data)):
            if row is not None and not await self._exists(row.path):
                found.append(Violation(pointer, "files_missing", {"name": row.name, "path": row.path}))
                data = None if row is data else data
        if data is not None:
            await self._datasets.refresh(session, data)
        return _Inputs(
            base_model=Named(id=base.id, name=base.name, path=base.path, dtype=base.card.get("dtype"))
            if base
            else None,
            dataset=await asyncio.to_thread(self._named_data, data) if data else None,
            model=None,
            columns=data.columns if data else None,
            violations=found,
        )

    async def _exists(self, path: str) -> bool:
        return await asyncio.to_thread(self._home.absolute(path).exists)

    async def _inputs_of_model(
        self, session: AsyncSession, submission: Submission, needed: ModelState | None
    ) -> _Inputs:
        """A single stage works on a model; base model and data set are those it was made from."""
        try:
            model = await models.get_model(session, submission.model or "")
        except AppError:
            unknown = Violation("/model", "unknown_model", {"model": submission.model})
            return _Inputs(base_model=None, dataset=None, model=None, columns=None, violations=[unknown])
        wrong: list[Violation] = []
        if model.path is None:
            wrong.append(Violation("/model", "model_is_online", {"name": model.name}))
        elif not await self._exists(model.path):
            wrong.append(Violation("/model", "files_missing", {"name": model.name, "path": model.path}))
        elif needed is not None and model.state is not needed:
            params = {"model": model.name, "state": model.state, "needed": needed}
            wrong.append(Violation("/model", "model_in_other_state", params))
        base = await named.find(session, BaseModelRow, model.base_model_id)
        data = Named(
            id=model.dataset_id, name=model.dataset_name or "", path="datasets", digest=model.dataset_digest
        ) if model.dataset_id else None  # fmt: skip
        return _Inputs(
            base_model=Named(
                id=model.base_model_id,
                name=model.base_model_name,
                path=model.base_model_path,
                dtype=base.card.get("dtype") if base else None,
            ),
            dataset=data,
            model=model,
            columns=None,
            violations=wrong,
        )

    def _named_data(self, row: DatasetRow) -> Named:
        """Scripts get the JSONL file; what stands beside it (images) they reach from there."""
        located = locate(self._home.absolute(row.path))
        return Named(id=row.id, name=row.name, path=self._home.relative(located.jsonl), digest=row.digest)

    # ---- the chain --------------------------------------------------------------------------------------------------

    def _jobs(
        self,
        method: Method,
        submission: Submission,
        stages: Sequence[Stage],
        inputs: _Inputs,
        checked: CheckedParameters,
        deployment: Deployment | None,
    ) -> list[JobRow]:
        now = self._clock()
        chain_id = str(uuid4())
        jobs: list[JobRow] = []
        for position, stage in enumerate(stages):
            launcher = method.definition.launcher(stage)
            snapshot = Snapshot(
                training_type=TrainingType(method.definition.training_type or ""),
                technique=method.definition.technique,
                script=_pinned(method, stage),
                launcher=launcher,
                declared=checked.declared(stage),
                declared_only=method.definition.arguments.declared_only,
                false_as=method.definition.arguments.false_as,
                forms=checked.forms(stage),
                base_model=inputs.base_model,
                dataset=inputs.dataset,
                effective=checked.effective(stage),
                deployment=deployment if stage is JobKind.DEPLOYMENT else None,
                wait=submission.wait,
            )
            jobs.append(
                JobRow(
                    id=chain_id if position == 0 else str(uuid4()),
                    name=submission.name or method.name,
                    kind=stage,
                    status=JobStatus.QUEUED,
                    reason_params={},
                    chain_id=chain_id,
                    position=position,
                    blocked_by=jobs[-1].id if jobs else None,
                    retry_of=submission.retry_of if position == 0 else None,
                    copied_from=submission.copied_from if position == 0 else None,
                    method_id=method.id,
                    method_name=method.name,
                    method_version=method.version,
                    environment=method.environment(stage) or BASE_ENVIRONMENT,
                    base_model_id=inputs.base_model.id if inputs.base_model else None,
                    dataset_id=inputs.dataset.id if inputs.dataset else None,
                    model_id=inputs.model.id if inputs.model else None,
                    parameters=checked.given(stage),
                    launch=snapshot.document(),
                    priority=submission.priority,
                    queue=submission.queue,
                    submitted_by=submission.user,
                    resources=stage_resources(submission, method, stage).document(),
                    retry=submission.retry.document(),
                    limits=submission.limits.document(),
                    created_at=now,
                    updated_at=now,
                )
            )
        return jobs


def stage_resources(submission: Submission, method: Method, stage: Stage) -> Resources:
    """Return what one stage of the submission asks for.

    Number and memory of accelerators are for the stages that produce: training, and saving on a path without
    `customized`. The others of a chain get the labels; a single stage gets everything.
    """
    lifecycle = method.definition.lifecycle or ()
    if trains(lifecycle, stage) or submission.stage is not None:
        return submission.resources
    return Resources(labels=submission.resources.labels)


def _wanted_stages(method: Method, submission: Submission) -> tuple[Sequence[Stage], list[Violation]]:
    """Return the stages to run, in order."""
    definition = method.definition
    assert definition.lifecycle is not None
    if (submission.through is None) == (submission.stage is None):
        return (), [Violation("/through", "through_or_stage", {})]
    if submission.through is not None:
        if submission.model is not None:
            return (), [Violation("/model", "model_without_stage", {})]
        with_training = definition.stage_config(JobKind.TRAINING) is not None
        try:
            return chain(definition.lifecycle, submission.through, with_training=with_training), []
        except AppError as error:
            return (), list(error.violations())
    stages = [stage for stage in runnable_stages(definition) if KINDS[stage].submitted_alone]
    stage = next((stage for stage in stages if stage == submission.stage), None)
    if stage is None:
        params = {"stage": shown(submission.stage or ""), "stages": ", ".join(stages)}
        return (), [Violation("/stage", "stage_not_runnable", params)]
    source = source_state(definition.lifecycle, stage)
    if source is not None and submission.model is None:
        return (), [Violation("/model", "model_needed", {"stage": stage, "state": source})]
    if source is None and submission.model is not None:
        return (), [Violation("/model", "model_not_taken", {"stage": stage})]
    return (stage,), []


def _needed_state(method: Method, submission: Submission) -> ModelState | None:
    """Return the state of the model that a single stage works on."""
    stage = next((stage for stage in STAGES if stage == submission.stage), None)
    return None if stage is None else source_state(method.definition.lifecycle or (), stage)


def _pinned(method: Method, stage: Stage) -> PinnedScript:
    pinned = method.files.get(stage)
    if pinned is not None:
        return PinnedScript(**asdict(pinned))
    # deployment to a configured target is done by a script of ours
    digest = digest_of(script_path(OLLAMA_SCRIPT).read_bytes())
    return PinnedScript(file=OLLAMA_SCRIPT, sha256=digest.sha256, size=digest.size, shipped=True)


async def _unknown_environments(session: AsyncSession, method: Method, stages: Sequence[Stage]) -> list[Violation]:
    known = (await registry_facts.load(session)).environments
    wanted = {stage: method.environment(stage) or BASE_ENVIRONMENT for stage in stages}
    return [
        Violation("/method", "environment_not_known", {"environment": name, "stage": stage})
        for stage, name in wanted.items()
        if name not in known
    ]


async def _deployment(
    session: AsyncSession, method: Method, submission: Submission, stages: Sequence[Stage]
) -> tuple[Deployment | None, list[Violation]]:
    config = method.definition.deployment
    if JobKind.DEPLOYMENT not in stages or config is None:
        return None, []
    options = {
        "quantize": submission.quantize,
        "template": submission.template,
        "system": submission.system,
        "parameters": dict(submission.deployment_parameters),
    }
    if method.definition.deploys_itself:
        return Deployment(target=CUSTOM_TARGET, **options), []
    row = await named.find(session, DeployTargetRow, config.target or "")
    if row is None:
        return None, [Violation("/method", "deploy_target_gone", {"target": config.target})]
    return Deployment(target=row.name, url=row.url, **options), []
