"""What people do with jobs: list, look at, cancel, retry, copy, compare; and order the building of an environment."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import JobKind, JobStatus
from app.domain.errors import AppError, Conflict, InvalidRequest, Violation
from app.domain.failure_suggestions import FailureSuggestion
from app.domain.kinds import LISTED_KINDS
from app.domain.resuming import resumable
from app.domain.transitions import TERMINAL
from app.executor.attempts.checkpoints import newest_checkpoint
from app.executor.jobs.base_model_builds import BaseModelDownloads, build_before, must_be_made
from app.executor.jobs.comparison import Comparison, by_metric, differences, parameters_of
from app.executor.jobs.environment_builds import BuildRequest, EnvironmentOrders
from app.executor.jobs.failure_suggestions import (
    FailureSuggestions,
    column_names,
    given_to,
    may_have_suggestion,
    pinned_method,
)
from app.executor.jobs.job_views import JobDetails, JobView, silence_of, view_with_history, views_of
from app.executor.jobs.requests import JobCopy, JobRetry
from app.executor.jobs.reruns import (
    NoCheckpointToResume,
    NoSuggestionKnown,
    PredecessorNotSucceeded,
    copied,
    resuming,
    retried,
    to_retry,
    works_on_model,
)
from app.executor.jobs.submission import Plan, Submissions, Submitted
from app.executor.runs.evaluations import Evaluation, Sample
from app.executor.runs.job_spec import JobSpec
from app.executor.runs.log_pages import LogPage, LogRange, read_page
from app.executor.runs.memory_forecasts import EXPECTED_MIB
from app.executor.runs.metrics import Point
from app.executor.runs.observe import NOTHING_SAID, RunDigest, RunObserver
from app.executor.runs.progress import Progress
from app.executor.runs.run_folder import RunFolder
from app.registry.methods.record import Method
from app.store import job_queries, job_status, models
from app.store import jobs as store
from app.store import methods as method_store
from app.store.home import Home
from app.store.job_queries import JobFilter
from app.store.projects import require_room
from app.store.session import Database
from app.store.tables import BaseModelRow, DatasetRow, JobRow, MethodRow, ModelRow, NodeRow

MIN_COMPARED, MAX_COMPARED = 2, 10


class JobInputsGone(Conflict):
    """What the job worked on is not there any more."""

    code = "job_inputs_gone"


class JobDatasetChanged(Conflict):
    """The data set holds other rows than when the job was submitted."""

    code = "job_dataset_changed"


class JobBeingRetried(Conflict):
    """Another retry of the job has not ended."""

    code = "job_being_retried"


class JobMethodDeleted(Conflict):
    """The job's method was deleted."""

    code = "job_method_deleted"


@dataclass(frozen=True)
class JobQuery:
    """Which jobs a list shows; `method` is an id or a name.

    Inference requests are shown only if `kinds` or `external_id` names them.
    """

    statuses: Collection[JobStatus] = ()
    kinds: Collection[JobKind] = ()
    method: str | None = None
    chain: str | None = None
    external_id: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class RetryPlan:
    """The jobs of a retry, or the error that refuses it; kept like that of a `Plan`."""

    job: JobRow | None = None
    made: Sequence[JobRow] = ()
    warnings: Sequence[Violation] = ()
    base_unmade: bool = False
    error: AppError | None = None


@dataclass(frozen=True)
class Curves:
    """What the run measured."""

    series: Mapping[str, Sequence[Point]]
    evaluations: Sequence[Evaluation]
    samples: Sequence[Sample]
    progress: Progress | None


class JobActions:
    """The service behind the routes of jobs."""

    def __init__(
        self,
        *,
        database: Database,
        home: Home,
        submissions: Submissions,
        failure_suggestions: FailureSuggestions,
        observer: RunObserver,
        downloads: BaseModelDownloads,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._failure_suggestions = failure_suggestions
        self.environments = EnvironmentOrders(home.environments)
        self._downloads = downloads
        self._home = home
        self._submissions = submissions
        self._observer = observer
        self._clock = clock

    # ---- look -------------------------------------------------------------------------------------------------------

    async def page(
        self,
        session: AsyncSession,
        query: JobQuery,
        *,
        sort: str,
        descending: bool,
        after: tuple[Any, Any] | None,
        limit: int,
    ) -> tuple[list[JobView], tuple[Any, Any] | None]:
        """Return one page of jobs and the position of the next one."""
        wanted = JobFilter(
            statuses=query.statuses,
            kinds=query.kinds or (LISTED_KINDS if query.external_id is None else ()),
            method_id=await _method_id(session, query.method) if query.method is not None else None,
            chain_id=query.chain,
            external_id=query.external_id,
            text=query.text,
        )
        found = await job_queries.list_jobs(session, wanted, sort=sort, descending=descending, after=after, limit=limit)
        return await views_of(session, found.rows), found.next_position

    async def get(self, session: AsyncSession, job_id: str) -> JobDetails:
        """Return the job and what its run says."""
        view, history = await view_with_history(session, job_id)
        return JobDetails(
            view=view,
            digest=await self._digest(view.job),
            history=tuple(history),
            silence=await silence_of(session, view.job),
            fix=await self._suggestion_of(session, view.job),
        )

    async def logs(self, session: AsyncSession, job_id: str, wanted: LogRange) -> LogPage:
        """Return a page of the job's output, of its newest attempt unless another is named."""
        job = await store.get(session, job_id)
        attempt = min(wanted.attempt or job.attempts, job.attempts)
        ended = job.status in TERMINAL or attempt < job.attempts
        path = RunFolder(self._home.run_folder(job.id, attempt)).output_log
        return await asyncio.to_thread(read_page, path, wanted, attempt=attempt, ended=ended)

    async def curves(self, session: AsyncSession, job_id: str, *, names: Sequence[str], points: int) -> Curves:
        """Return the job's curves, each reduced to at most `points` points."""
        job = await store.get(session, job_id)
        digest = await self._digest(job)
        series = await asyncio.to_thread(self._observer.curves, job.id, job.attempts, names=names, points=points)
        return Curves(series=series, evaluations=digest.evaluations, samples=digest.samples, progress=digest.progress)

    async def compare(self, session: AsyncSession, job_ids: Sequence[str], *, points: int) -> Comparison:
        """Return the jobs side by side."""
        if not MIN_COMPARED <= len(set(job_ids)) == len(job_ids) <= MAX_COMPARED:
            params = {"least": MIN_COMPARED, "most": MAX_COMPARED}
            raise InvalidRequest([Violation("?ids", "compare_needs_ids", params)])
        jobs = [await store.get(session, job_id) for job_id in job_ids]
        details = [await self._details(view) for view in await views_of(session, jobs)]
        curves = {
            job.id: await asyncio.to_thread(self._observer.curves, job.id, job.attempts, names=(), points=points)
            for job in jobs
        }
        return Comparison(
            jobs=tuple(details),
            differences=differences([parameters_of(compared) for compared in details]),
            curves=by_metric(curves),
        )

    # ---- act --------------------------------------------------------------------------------------------------------

    async def cancel(self, session: AsyncSession, job_id: str) -> JobDetails:
        """Cancel a queued job, or request its node to stop it. Raise `JobAlreadyFinished` after its end."""
        await job_status.request_cancel(session, job_id, now=self._clock())
        return await self.get(session, job_id)

    async def plan_retry(self, job_id: str, wanted: JobRetry) -> RetryPlan:
        """Plan to repeat a failed or cancelled job and the rest of its chain as submitted, save for what is wanted."""
        try:
            return await self._plan_retry(job_id, wanted)
        except AppError as error:
            return RetryPlan(error=error)

    async def retry(self, session: AsyncSession, plan: RetryPlan) -> Submitted:
        """Queue the jobs of the plan. Raise the error of a refused plan."""
        if plan.error is not None:
            raise plan.error
        assert plan.job is not None
        # locked: of several who ask at once the first makes the retry, and the others see it
        await store.get(session, plan.job.id, lock=True)
        if (retry := await job_queries.unfinished_retry_of(session, plan.job.id)) is not None:
            raise JobBeingRetried(job=plan.job.id, retry=retry)
        if plan.job.method_id is not None and await method_store.find(session, plan.job.method_id, lock=True) is None:
            raise JobMethodDeleted(job=plan.job.id, method=plan.job.method_name)
        told = await build_before(session, plan.made, self._home, now=self._clock()) if plan.base_unmade else []
        await require_room(session, jobs=len(plan.made))
        await store.insert(session, plan.made)
        return Submitted(jobs=plan.made, warnings=[*plan.warnings, *told])

    async def plan_copy(self, job_id: str, changes: JobCopy) -> Plan:
        """Plan a job like this one, with the method as it is now; `Submissions.write` queues it."""
        async with self._database.reading() as session:
            job = await store.get(session, job_id)
            chain = await store.chain_of(session, [job.chain_id])
        return await self._submissions.plan(copied(job, chain, changes), copied_from=job.id)

    async def build_environment(
        self, session: AsyncSession, environment: str, request: BuildRequest
    ) -> tuple[JobDetails, bool]:
        """Return the job that builds the environment, and whether it is a new one."""
        job, is_new = await self.environments.build(session, environment, request)
        return await self.get(session, job.id), is_new

    async def pack_environment(
        self, session: AsyncSession, environment: str, *, node: str | None
    ) -> tuple[JobDetails, bool]:
        """Return the job that packs the environment, and whether it is a new one."""
        job, is_new = await self.environments.pack(session, environment, node=node)
        return await self.get(session, job.id), is_new

    async def download_base_model(
        self, session: AsyncSession, *, name: str, repository: str, revision: str, description: str
    ) -> tuple[JobDetails, bool]:
        """Return the job that downloads the base model, and whether it is a new one."""
        job, is_new = await self._downloads.order(
            session, name=name, repository=repository, revision=revision, description=description
        )
        return await self.get(session, job.id), is_new

    # ---- inside -----------------------------------------------------------------------------------------------------

    async def _details(self, view: JobView) -> JobDetails:
        return JobDetails(view=view, digest=await self._digest(view.job))

    async def _digest(self, job: JobRow) -> RunDigest:
        if not job.attempts:
            return NOTHING_SAID
        return await asyncio.to_thread(self._observer.digest, job.id, job.attempts)

    async def _suggestion_of(self, session: AsyncSession, job: JobRow) -> FailureSuggestion | None:
        if not may_have_suggestion(job):
            return None
        digest = await self._digest(job)
        return await self._failure_suggestions.of(
            job,
            await pinned_method(session, job),
            await column_names(session, job),
            node=await session.get(NodeRow, job.node_id) if job.node_id is not None else None,
            reported_mib=digest.latest.get(EXPECTED_MIB),
        )

    async def _plan_retry(self, job_id: str, wanted: JobRetry) -> RetryPlan:
        async with self._database.reading() as session:
            job = await store.get(session, job_id)
            jobs = to_retry(job, await store.chain_of(session, [job.chain_id]))
            model_id = await _model_to_work_on(session, job)
            named_model = await models.find_model(session, model_id) if model_id is not None else None
            data = await session.get(DatasetRow, job.dataset_id) if job.dataset_id is not None else None
            scored = JobSpec.of(job).validation_dataset
            validation = await session.get(DatasetRow, scored.id) if scored is not None else None
            base = await session.get(BaseModelRow, job.base_model_id) if job.base_model_id is not None else None
            method = await pinned_method(session, job)
            node = await session.get(NodeRow, job.node_id) if job.node_id is not None else None
        # a training goes on from a model and has its own data; other stages work on nothing but their model
        start, model = (named_model, None) if job.kind is JobKind.TRAINING else (None, named_model)
        unmade = model is None and await asyncio.to_thread(self._base_unmade, job, base)
        await self._require_inputs(job, model, start, [data, validation], base_unmade=unmade)
        made = retried(jobs, model_id=model_id, now=self._clock())
        changes = dict(wanted.parameters)
        if wanted.fix:
            columns = () if data is None else data.columns
            reported = (await self._digest(job)).latest.get(EXPECTED_MIB)
            fix = await self._failure_suggestions.of(job, method, columns, node=node, reported_mib=reported)
            if fix is None:
                raise NoSuggestionKnown(job=job.id)
            changes = {**fix.changes, **changes}
        warnings: Sequence[Violation] = ()
        if changes:
            assert method is not None
            asked = self._submissions.data_of(data) if data and not works_on_model(job) else None
            warnings = await self._submissions.checked_again(made, method, changes, asked, validation, start)
        found = None if wanted.resume is False else await self._checkpoint_of(job)
        if wanted.resume is True and found is None:
            raise NoCheckpointToResume(job=job.id)
        fits = wanted.resume or (wanted.resume is None and await self._resumable(job, made[0], method))
        resuming(made[0], found if fits else None)

        async def record(_session: AsyncSession) -> Method | None:
            return method

        await self._submissions.approval.require(made, method, at="", record=record)
        return RetryPlan(job=job, made=made, warnings=warnings, base_unmade=unmade)

    async def _checkpoint_of(self, job: JobRow) -> str | None:
        """Return the job whose newest checkpoint a retry could go on from: this one, or the one that it resumed."""
        origin = JobSpec.of(job).resume_of
        for candidate in (job.id, *([origin] if origin is not None else [])):
            if await asyncio.to_thread(newest_checkpoint, self._home, candidate) is not None:
                return candidate
        return None

    async def _resumable(self, old: JobRow, new: JobRow, method: Method | None) -> bool:
        tunable = await self._failure_suggestions.tunable_parameters(old, method)
        defaults = {name: one.default for name, one in tunable.declared.items()} if tunable is not None else {}
        return resumable({**defaults, **given_to(old)}, {**defaults, **given_to(new)})

    def _base_unmade(self, job: JobRow, base: BaseModelRow | None) -> bool:
        named_base = JobSpec.of(job).base_model
        return named_base is not None and must_be_made(base, named_base.path, self._home)

    async def _require_inputs(
        self,
        job: JobRow,
        model: ModelRow | None,
        start: ModelRow | None,
        data: Sequence[DatasetRow | None],
        *,
        base_unmade: bool,
    ) -> None:
        """Check that everything the job was submitted with still exists, save for a base model that is made first."""
        spec = JobSpec.of(job)
        # what works on a model needs its rows no more
        named_data = [] if model is not None else [one for one in (spec.dataset, spec.validation_dataset) if one]
        named_base = None if base_unmade else spec.base_model
        judge = spec.reward_model if model is None else None
        named_paths = [given.path for given in (named_base, judge, *named_data) if given is not None]
        named_models = [one for one in (model, start) if one is not None]
        paths = [*named_paths, *(one.path for one in named_models if one.path)]
        gone = [path for path in paths if not await asyncio.to_thread(self._home.absolute(path).exists)]
        deleted = [one.name for one in named_models if one.deleted_at is not None]
        if gone or deleted:
            raise JobInputsGone(job=job.id, paths=", ".join(gone or deleted))
        now = {row.id: row for row in data if row is not None}
        for one in named_data:
            if one.id in now and one.digest not in (None, now[one.id].digest):
                raise JobDatasetChanged(job=job.id, dataset=now[one.id].name)


async def _method_id(session: AsyncSession, method: str) -> str:
    """Return the id of the method with this id or name, of a deleted one too if it is an id."""
    row = await method_store.find(session, method) or await session.get(MethodRow, method)
    return row.id if row is not None else method


async def _model_to_work_on(session: AsyncSession, job: JobRow) -> str | None:
    """Return the model that the job got, or would get now from the job before it."""
    if job.blocked_by is None:
        return job.model_id
    predecessor = await store.get(session, job.blocked_by)
    if predecessor.kind is JobKind.BASE_MODEL:
        return job.model_id
    if predecessor.status is not JobStatus.SUCCEEDED:
        raise PredecessorNotSucceeded(job=job.id, predecessor=predecessor.id, status=predecessor.status)
    return predecessor.result_model_id
