"""Submit: plan the chain of jobs, check everything that can be checked now, then insert it in one short transaction.

A job that cannot work is refused by its plan, with every reason at once, and not minutes later by its script. What
passes is written with everything that its arguments are made of (`app.executor.runs.job_spec`), so that it runs as
submitted.

A plan reads rows, then files and scripts, with no transaction open. What it rests on is looked at again when it is
written: if the method, the base model or the data set changed meanwhile, it is made anew.
"""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.demand import Resources, resource_violations
from app.domain.enums import JobKind, ModelState
from app.domain.errors import AppError, InvalidRequest, Unavailable, Violation
from app.domain.kinds import STAGES, Stage, as_stage
from app.domain.lifecycle import source_state
from app.domain.names import BASE_ENVIRONMENT
from app.domain.projects import NO_LIMITS
from app.domain.retries import policy_violations
from app.domain.secret_references import SCHEME
from app.executor.jobs.base_model_builds import build_before
from app.executor.jobs.code_approval import JobCodeApproval
from app.executor.jobs.data_check import Data
from app.executor.jobs.deployment_plan import deploy_target, planned_deployment, untaken_options, untaken_settings
from app.executor.jobs.estimates import Estimate, estimate
from app.executor.jobs.job_chain import (
    accelerator_violations,
    allowed_violations,
    environments_of,
    job_chain,
    named_files,
    secret_violations,
    server,
    server_violations,
    strategy,
    strategy_violations,
    wanted_stages,
    within_limits,
)
from app.executor.jobs.requests import JobSubmit
from app.executor.jobs.runnability import judge_runnability
from app.executor.jobs.stage_parameters import CheckedParameters, StageParameters
from app.executor.jobs.submission_inputs import InputCheck, Inputs, Known
from app.executor.jobs.token_lengths import TokenLengths, length_warnings, lengths_key
from app.executor.runs.job_spec import JobSpec
from app.executor.runs.memory_forecasts import MemoryForecast, device_for, forecast_memory
from app.presets.shared.helpers.deepe_rows.lengths import Lengths
from app.registry.base_models.card import BaseModelCard
from app.registry.base_models.service import BaseModels
from app.registry.datasets.files import Inspection
from app.registry.datasets.mixes import DatasetMixes, Mix
from app.registry.datasets.service import Datasets
from app.registry.environments.described_options import OptionClasses
from app.registry.environments.on_nodes import AS_REPORTED, environment_states
from app.registry.methods.readiness_matrix import matrix_of
from app.registry.methods.record import Method, method_of
from app.registry.methods.runs import MethodRuns
from app.store import allow_lists, models, named, submissions
from app.store import jobs as store
from app.store.home import Home
from app.store.job_queries import measured_trainings
from app.store.models import ModelNameAmbiguous, ModelNotFound
from app.store.nodes import all_nodes
from app.store.projects import require_room
from app.store.secrets import all_names
from app.store.session import Database
from app.store.tables import DatasetRow, JobRow, ModelRow

_MEASURED = 20  # trainings that are looked at: one of them ran on the same kind of device


class InsufficientDiskSpace(Unavailable):
    """The disk of the outputs is nearly full."""

    code = "insufficient_disk_space"


@dataclass(frozen=True)
class Submitted:
    """The jobs that were made, in their order, and what is unusual about the request."""

    jobs: Sequence[JobRow]
    warnings: Sequence[Violation]
    memory: MemoryForecast | None = None


@dataclass(frozen=True)
class Plan:
    """What a submission will write, or the error that refuses it.

    The error is kept because a repeated Idempotency-Key returns the first response.
    """

    request: JobSubmit
    copied_from: str | None = None
    error: AppError | None = None
    known: Known | None = None
    method: Method | None = None
    jobs: Sequence[JobRow] = ()
    warnings: Sequence[Violation] = ()
    inspections: Sequence[tuple[str, Inspection]] = ()
    """What data sets are now that were edited since they were last read, by their ids."""
    base_unmade: bool = False
    card: BaseModelCard | None = None
    checked: CheckedParameters | None = None
    lengths: Lengths | None = None
    """Of the rows, if a preview has measured them."""
    memory: MemoryForecast | None = None
    """Of the training."""

    def estimate(self) -> Estimate | None:
        """Return what the submission would do; None if it is refused."""
        if self.error is not None or self.checked is None:
            return None
        return estimate(self.jobs, self.checked, self.lengths)


class _RunsNowhereAsReported(Exception):
    """No node says that it can run a stage; a build or a specification that it has not seen may change that."""


class Submissions:
    """Turns requests into queued jobs."""

    def __init__(
        self,
        *,
        database: Database,
        home: Home,
        runs: MethodRuns,
        datasets: Datasets,
        mixes: DatasetMixes,
        base_models: BaseModels,
        parameters: StageParameters,
        lengths: TokenLengths,
        options: OptionClasses,
        approval: JobCodeApproval,
        min_free_bytes: int,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._home = home
        self._runs = runs
        self._datasets = datasets
        self._mixes = mixes
        self._base_models = base_models
        self._inputs = InputCheck(home=home, datasets=datasets, base_models=base_models)
        self._parameters = parameters
        self._lengths = lengths
        self._options = options
        self.approval = approval
        self._min_free_bytes = min_free_bytes
        self._clock = clock

    @contextlib.asynccontextmanager
    async def planned(self, request: JobSubmit, *, submits: bool = True) -> AsyncIterator[Plan]:
        """Yield the plan of a request that may name several data sets; a mix of them that is not written is gone.

        `submits`: code that is not approved waits for a review from now on.
        """
        if request.datasets is None or request.model is not None:
            yield await self.plan(request, submits=submits)
        elif request.dataset is not None:
            both = InvalidRequest([Violation("/datasets", "dataset_or_datasets", {})])
            yield await self.plan(request, mix=Mix(error=both), submits=submits)
        else:
            async with self._mixes.found_or_mixed(request.datasets, "/datasets") as mix:
                yield await self.plan(request, mix=mix, submits=submits)

    async def plan(
        self, request: JobSubmit, *, copied_from: str | None = None, mix: Mix | None = None, submits: bool = True
    ) -> Plan:
        """Check the request and return what it will write; what is wrong is kept in the plan, not raised."""
        try:
            if mix is not None and mix.error is not None and not isinstance(mix.error, InvalidRequest):
                raise mix.error
            async with self._database.reading() as session:
                known = await self._load(session, request, mix)
            try:
                plan = await asyncio.to_thread(self._judge, request, known)
            except _RunsNowhereAsReported:
                async with self._database.reading() as session:
                    known = await _with_builds(session, known)
                plan = await asyncio.to_thread(self._judge, request, known)
            await self._require_approval(plan, submits=submits)
            if known.limits != NO_LIMITS:
                async with self._database.reading() as session:
                    await require_room(session, jobs=len(plan.jobs))
            return replace(plan, copied_from=copied_from)
        except AppError as error:
            return Plan(request=request, copied_from=copied_from, error=error)

    async def write(self, session: AsyncSession, plan: Plan) -> Submitted:
        """Queue the jobs of the plan. Raise the error of a refused plan, `InvalidRequest` with all violations."""
        if plan.error is not None:
            raise plan.error
        if not await self._still_holds(session, plan):
            assert plan.known is not None
            mix = plan.known.mix
            if mix is not None and (row := await self._mixes.made_meanwhile(session, mix)):
                mix = replace(mix, row=row, new=None)
            known = await _with_builds(session, await self._load(session, plan.request, mix))
            judged = await asyncio.to_thread(self._judge, plan.request, known)
            plan = replace(judged, copied_from=plan.copied_from)
        assert plan.known is not None
        assert plan.method is not None
        if plan.known.mix is not None and plan.known.mix.new is not None:
            await self._mixes.place(session, plan.known.mix)
        for dataset_id, inspection in plan.inspections:
            row = await named.find(session, DatasetRow, dataset_id)
            assert row is not None
            await self._datasets.record(session, row, inspection)
        base = plan.known.base_model
        if base is not None and plan.card is not None and base.card != plan.card.model_dump(mode="json"):
            await self._base_models.record(session, base.id, plan.card)
        method = await self._runs.record(session, plan.known.method, plan.method)
        await self.approval.require_still(session, plan.jobs, method, at="/method")
        for job in plan.jobs:
            job.method_version = method.version
        if plan.jobs and plan.copied_from is not None:
            plan.jobs[0].copied_from = plan.copied_from
        told = await build_before(session, plan.jobs, self._home, now=self._clock()) if plan.base_unmade else []
        if plan.known.limits != NO_LIMITS:
            await require_room(session, jobs=len(plan.jobs))
        await store.insert(session, plan.jobs)
        return Submitted(jobs=plan.jobs, warnings=[*plan.warnings, *told], memory=plan.memory)

    def data_of(self, row: DatasetRow) -> Data:
        """Return the file of a data set and its columns."""
        return self._inputs.data_of(row)

    async def checked_again(
        self,
        jobs: Sequence[JobRow],
        method: Method,
        parameters: Mapping[str, Any],
        data: Data | None,
        validation: DatasetRow | None,
        start: ModelRow | None,
    ) -> Sequence[Violation]:
        """Change the parameters of jobs that are not queued yet, checked against the version that they run.

        A value that is None leaves the parameter out. Returns what is unusual, raises `InvalidRequest` for the wrong.
        """
        given = {name: value for job in reversed(jobs) for name, value in job.parameters.items()}
        values = {name: value for name, value in {**given, **parameters}.items() if value is not None}
        stages = [as_stage(job.kind) for job in jobs]
        scored = None if validation is None else self._inputs.validation_of(validation, None)
        async with self._database.reading() as session:
            described = await self._options.of(session, environments_of(method, stages))
        own = self._inputs.model_arguments(start, JobSpec.of(jobs[0]).reward_model)
        checked = await asyncio.to_thread(self._parameters.check, method, stages, values, data, scored, described, own)
        if checked.violations:
            raise InvalidRequest(list(checked.violations))
        for job in jobs:
            stage = as_stage(job.kind)
            job.parameters = checked.given(stage)
            resources = Resources.model_validate(job.resources or {})
            files = await asyncio.to_thread(self._runs.pin_named, checked.effective(stage))
            changed = {
                "effective": checked.effective(stage),
                "files": named_files(files),
                "named_paths": checked.named_paths.get(stage, ()),
                "strategy": strategy(method, stage, checked, resources),
                "server": server(stage, checked),
                **checked.needed_of_node(stage),
            }
            job.launch = JobSpec.of(job).model_copy(update=changed).document()
        if found := strategy_violations(jobs):
            raise InvalidRequest(found)
        return checked.warnings

    # ---- rows -------------------------------------------------------------------------------------------------------

    async def _load(self, session: AsyncSession, request: JobSubmit, mix: Mix | None) -> Known:
        """Read every row that the request names, and of the nodes what may be in the way."""
        base_model, dataset, model = request.base_model, request.dataset, None
        if mix is not None:
            dataset = mix.row.id if mix.row is not None and mix.new is None else None
        if request.stage is not None and request.model is not None:
            base_model = dataset = None
            with contextlib.suppress(ModelNotFound, ModelNameAmbiguous):
                model = await models.get_model(session, request.model)
                base_model = model.base_model_id
        start = None
        if request.adapter_name_or_path is not None:
            with contextlib.suppress(ModelNotFound, ModelNameAmbiguous):
                start = await models.get_model(session, request.adapter_name_or_path)
        judge = None
        if request.reward_model is not None:
            with contextlib.suppress(ModelNotFound, ModelNameAmbiguous):
                judge = await models.get_model(session, request.reward_model)
        found = await submissions.find_named(session, method=request.method, base_model=base_model, dataset=dataset)
        if found is None:
            raise InvalidRequest([Violation("/method", "unknown_method", {"method": request.method})])
        method = method_of(found.method, found.version)
        stages, violations = wanted_stages(method, request)
        rows = await all_nodes(session) if found.has_nodes else ()
        described = await self._options.of(session, environments_of(method, stages), rows)
        scored = request.validation_dataset
        measured: Sequence[JobRow] = ()
        if rows and found.base_model is not None and JobKind.TRAINING in stages:
            measured = await measured_trainings(
                session, method_id=found.method.id, base_model_id=found.base_model.id, limit=_MEASURED
            )
        target = await deploy_target(session, method, stages)
        refers = SCHEME in f"{request!r}{method!r}{target!r}"  # few jobs need a look for secrets
        return Known(
            method=method,
            base_model=found.base_model,
            dataset=found.dataset if mix is None or mix.new is None else mix.row,
            model=model,
            start=start,
            judge=judge,
            stages=stages,
            violations=violations,
            target=target,
            environments=found.environments.union([BASE_ENVIRONMENT], *(row.environments for row in rows)),
            validation=None if scored is None else await named.find(session, DatasetRow, scored),
            mix=mix,
            nodes=matrix_of(rows, AS_REPORTED, now=self._clock()),
            described=described,
            secrets=await all_names(session) if refers else frozenset(),
            rules=await allow_lists.of_environments(session),
            limits=found.limits,
            measured=measured,
        )

    async def _still_holds(self, session: AsyncSession, plan: Plan) -> bool:
        """Say whether what the plan rests on is there and unchanged; the method stays so until the transaction ends."""
        known = plan.known
        assert known is not None
        dataset = known.dataset if known.mix is None or known.mix.new is None else None
        if known.mix is not None and await self._mixes.made_meanwhile(session, known.mix) is not None:
            return False
        worked_on = known.model or known.start
        now = await submissions.look_again(
            session,
            method_id=known.method.id,
            base_model_id=known.base_model.id if known.base_model is not None else None,
            dataset_id=dataset.id if dataset is not None else None,
            model_id=worked_on.id if worked_on is not None else None,
        )
        if now is None or now.version != known.method.version:
            return False
        if known.validation is not None:
            row = await session.get(DatasetRow, known.validation.id, populate_existing=True)
            if row is None or row.digest != known.validation.digest:
                return False
        if known.judge is not None:
            judge = await session.get(ModelRow, known.judge.id, populate_existing=True)
            if judge is None or judge.deleted_at is not None:
                return False
        if known.model is not None:
            return now.model is not None  # a model outlives the entry of what it was made from
        if known.start is not None and now.model is None:
            return False
        base_stands = known.base_model is None or now.base_model is not None
        return base_stands and (dataset is None or now.dataset_digest == dataset.digest)

    async def _require_approval(self, plan: Plan, *, submits: bool) -> None:
        known, method = plan.known, plan.method
        assert known is not None
        assert method is not None

        async def record(session: AsyncSession) -> Method:
            return await self._runs.record(session, known.method, method)

        await self.approval.require(plan.jobs, method, at="/method", record=record if submits else None)

    # ---- judging: files and scripts, no statement is run ------------------------------------------------------------

    def _judge(self, request: JobSubmit, known: Known) -> Plan:
        """Return what to write; raises `InvalidRequest` with everything that is wrong. Blocks: call it in a thread."""
        self._check_disk()
        method, stages = self._runs.as_edited(known.method), known.stages
        inputs = self._inputs.check(request, replace(known, method=method), _needed_state(method, request))
        found = [*known.violations, *inputs.violations]
        found += resource_violations(request.resources)
        request, wrong = within_limits(request, known.limits)
        found += wrong
        found += policy_violations(request.retry)
        found += _unknown_environments(method, stages, known.environments)
        deployment, wrong = planned_deployment(method, request, stages, known.target)
        found += wrong
        checked = self._parameters.check(
            method, stages, request.parameters, inputs.data, inputs.validation, known.described, inputs.model_arguments
        )
        found += checked.violations
        found += server_violations(stages, checked, known.environments)
        if deployment is not None:
            found += untaken_options(method, request, checked)
        if found:
            raise InvalidRequest(found)
        files = {stage: self._runs.pin_named(checked.effective(stage)) for stage in stages}
        jobs = job_chain(method, request, stages, inputs, checked, deployment, files=files, now=self._clock())
        for job in jobs:
            job.project_id = self._database.scope.project or job.project_id
        refused = allowed_violations(jobs, known.rules, [row for _, row in known.nodes.nodes], at="/method")
        if found := [
            *strategy_violations(jobs),
            *secret_violations(jobs, known.secrets),
            *refused,
            *accelerator_violations(jobs, known.limits),
        ]:
            raise InvalidRequest(found)
        needs = {stage: checked.needs(stage) for stage in stages}
        nowhere, unknown = judge_runnability(known.nodes, method, jobs, self._runs.modules, needs)
        if nowhere and not request.wait:
            raise _RunsNowhereAsReported if known.nodes.known is AS_REPORTED else InvalidRequest(nowhere)
        lengths = self._measured(method, stages, inputs, checked)
        notes = untaken_settings(method, deployment, checked) if deployment is not None else []
        notes += [] if lengths is None else [*length_warnings(lengths, checked.values(stages[0]))]
        memory = self._memory(request, known, method, inputs, checked, lengths)
        if memory is not None:
            notes += memory.warnings()
        return Plan(
            request=request,
            known=known,
            method=method,
            jobs=jobs,
            warnings=[*inputs.warnings, *checked.warnings, *unknown, *notes],
            inspections=inputs.inspections,
            base_unmade=inputs.base_unmade,
            card=inputs.card,
            checked=checked,
            lengths=lengths,
            memory=memory,
        )

    def _memory(
        self,
        request: JobSubmit,
        known: Known,
        method: Method,
        inputs: Inputs,
        checked: CheckedParameters,
        lengths: Lengths | None,
    ) -> MemoryForecast | None:
        """Return what the training is expected to need on the most capable living node."""
        if JobKind.TRAINING not in known.stages:
            return None
        living = [row for facts, row in known.nodes.nodes if facts.absent is None]
        device = device_for(living, request.resources.labels)
        if device is None:
            return None
        base = inputs.base_model
        folder = None if base is None or inputs.base_unmade else self._home.absolute(base.path)
        values = checked.values(JobKind.TRAINING)
        return forecast_memory(
            method.preset,
            folder,
            values,
            device,
            lengths=lengths,
            measured=known.measured,
            processes=request.resources.accelerators or 1,
        )

    def _measured(
        self, method: Method, stages: Sequence[Stage], inputs: Inputs, checked: CheckedParameters
    ) -> Lengths | None:
        """Return the lengths of the rows, if a preview has measured them."""
        base, data = inputs.base_model, inputs.data
        if checked.survey is None or base is None or data is None or inputs.base_unmade:
            return None
        folder = self._home.absolute(base.path)
        return self._lengths.find(lengths_key(method, stages[0], folder, data.digest, checked.values(stages[0])))

    def _check_disk(self) -> None:
        free = shutil.disk_usage(self._home.runs).free
        if free < self._min_free_bytes:
            raise InsufficientDiskSpace(free_mib=free // 2**20, needed_mib=self._min_free_bytes // 2**20)


async def _with_builds(session: AsyncSession, known: Known) -> Known:
    """Add what the database knows of environments beyond what nodes say; it matters only where a node lacks one."""
    return replace(known, nodes=replace(known.nodes, known=await environment_states(session)))


def _needed_state(method: Method, request: JobSubmit) -> ModelState | None:
    """Return the state of the model that a single stage works on."""
    stage = next((stage for stage in STAGES if stage == request.stage), None)
    return None if stage is None else source_state(method.definition.lifecycle or (), stage)


def _unknown_environments(method: Method, stages: Sequence[Stage], known: frozenset[str]) -> list[Violation]:
    wanted = {stage: method.environment(stage) or BASE_ENVIRONMENT for stage in stages}
    return [
        Violation("/method", "environment_not_known", {"environment": name, "stage": stage})
        for stage, name in wanted.items()
        if name not in known
    ]
