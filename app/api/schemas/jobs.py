"""Jobs over the wire: submitting, reading, their output, curves and comparison."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.api.errors import ProblemEntry
from app.api.schemas.methods import entries
from app.domain.demand import (
    DEFAULT_QUEUE,
    LEAST_PRIORITY,
    MOST_PRIORITY,
    QueueName,
    Resources,
    UserName,
)
from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.retries import Limits, RetryPolicy
from app.domain.texts import Language, text
from app.executor.jobs.comparison import Comparison
from app.executor.jobs.job_actions import Curves
from app.executor.jobs.job_views import JobDetails, JobView
from app.executor.jobs.repetition import Changes, Retry
from app.executor.jobs.snapshot import Named
from app.executor.jobs.submission import MAX_NAME, Submission, Submitted
from app.executor.jobs.waiting import Waiting
from app.executor.output.evaluations import Evaluation
from app.executor.output.log_pages import LogPage
from app.executor.output.metrics import Point
from app.executor.output.progress import Progress
from app.store.jobs import PastAttempt
from app.store.tables import JobRow

_ID = "0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c"
_PARAMETERS = {"learning_rate": 0.0002, "max_steps": 100}
_MAX_TEXT = 100_000

JobName = Field(
    default=None, min_length=1, max_length=MAX_NAME, description="Default: the method's name.", examples=["faq, rank 8"]
)


Priority = Field(
    default=0, ge=LEAST_PRIORITY, le=MOST_PRIORITY, description="Smaller starts first; then the older one."
)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


# ---- submit ---------------------------------------------------------------------------------------------------------


class DeploymentOptions(_Body):
    """How an online model is served; for Ollama."""

    quantize: str | None = Field(default=None, max_length=50, examples=["q4_K_M"])
    template: str = Field(default="", max_length=_MAX_TEXT, description="Prompt template.")
    system: str = Field(default="", max_length=_MAX_TEXT, description="System prompt.")
    parameters: dict[str, Any] = Field(default_factory=dict, examples=[{"temperature": 0.2}])


class JobSubmit(_Body):
    """A chain of jobs (`base_model`, `dataset`, `through`), or one stage (`stage`, and the `model` it works on)."""

    method: str = Field(description="Id or name.", examples=["SFT-Demo"])
    base_model: str | None = Field(default=None, description="Id or name.", examples=["tiny-base"])
    dataset: str | None = Field(default=None, description="Id or name.", examples=["sft-demo"])
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="What the training script takes; see `GET /api/v1/methods/{method}/parameters`.",
        examples=[_PARAMETERS],
    )
    through: str | None = Field(
        default=None,
        description="How far the model shall go: `customized`, `complete` or `online`.",
        examples=["complete"],
    )
    stage: str | None = Field(default=None, description="Run this stage only.", examples=["saving"])
    model: str | None = Field(default=None, description="Id or name of the model that `stage` works on.")
    name: str | None = JobName
    deployment: DeploymentOptions = Field(default_factory=DeploymentOptions)
    retry: RetryPolicy = Field(
        default_factory=RetryPolicy, description="When each job of the chain is run again by itself."
    )
    limits: Limits = Field(default_factory=Limits, description="When an attempt of each job of the chain is stopped.")
    resources: Resources = Field(
        default_factory=Resources,
        description="What a node must have. Accelerators and their memory are for the stage that produces the model, "
        "the labels for every stage of the chain.",
    )
    priority: int = Priority
    queue: QueueName = Field(
        default=DEFAULT_QUEUE, description="Whose limits it counts against; see `GET /api/v1/queues`."
    )
    user: UserName = Field(
        default="", description="For whom it runs: limits per user go by this name.", examples=["ann@example.com"]
    )
    wait: bool = Field(
        default=False,
        description="Accept the jobs although no registered node can run them as things are; they wait for one.",
    )

    def submission(self) -> Submission:
        """Return what the executor takes."""
        return Submission(
            method=self.method,
            base_model=self.base_model,
            dataset=self.dataset,
            parameters=self.parameters,
            through=self.through,
            stage=self.stage,
            model=self.model,
            name=self.name,
            quantize=self.deployment.quantize,
            template=self.deployment.template,
            system=self.deployment.system,
            deployment_parameters=self.deployment.parameters,
            retry=self.retry,
            limits=self.limits,
            resources=self.resources,
            priority=self.priority,
            queue=self.queue,
            user=self.user,
            wait=self.wait,
        )


class JobCopy(_Body):
    """In what the copy differs."""

    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Put over the parameters of the original; null leaves one out.",
        examples=[{"learning_rate": 0.0001}],
    )
    name: str | None = Field(
        default=None, min_length=1, max_length=MAX_NAME, description="Default: the original's name."
    )
    base_model: str | None = Field(default=None, description="Another base model; id or name.")
    dataset: str | None = Field(default=None, description="Another data set; id or name.")
    retry: RetryPolicy | None = Field(default=None, description="Default: the original's.")
    limits: Limits | None = Field(default=None, description="Default: the original's.")
    resources: Resources | None = Field(default=None, description="Default: the original's.")
    priority: int | None = Field(
        default=None, ge=LEAST_PRIORITY, le=MOST_PRIORITY, description="Default: the original's."
    )
    queue: QueueName | None = Field(default=None, description="Default: the original's.")
    user: UserName | None = Field(default=None, description="Default: the original's.")

    def changes(self) -> Changes:
        """Return what the executor takes."""
        return Changes(
            parameters=self.parameters,
            name=self.name,
            base_model=self.base_model,
            dataset=self.dataset,
            retry=self.retry,
            limits=self.limits,
            resources=self.resources,
            priority=self.priority,
            queue=self.queue,
            user=self.user,
        )


class JobRetry(_Body):
    """How the retry differs from the job; an empty body repeats it."""

    resume: bool | None = Field(
        default=None,
        description="Go on from the newest checkpoint of the job. Default: when it left a whole one and no parameter "
        "that matters to it was changed. True demands one, also for changed parameters (such as more steps); false "
        "begins at the beginning.",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Put over the parameters of the job; null leaves one out.",
        examples=[{"batch_size": 4, "grad_accum_steps": 2}],
    )
    fix: bool = Field(default=False, description="Make the changes that the job offers in `fix`.")

    def wanted(self) -> Retry:
        """Return what the executor takes."""
        return Retry(resume=self.resume, parameters=self.parameters, fix=self.fix)


class JobLink(BaseModel):
    """A job of a chain."""

    id: str = Field(examples=[_ID])
    stage: JobKind
    status: JobStatus


class JobSubmitted(JobLink):
    """The first job of the chain that was made, and the whole chain."""

    chain: list[JobLink]
    warnings: list[ProblemEntry] = Field(description="What is unusual about the parameters; nothing was refused.")


# ---- read -----------------------------------------------------------------------------------------------------------


class JobMethod(BaseModel):
    """The method and the version of it that the job runs."""

    id: str = Field(examples=[_ID])
    name: str = Field(description="Its name when the job was submitted.", examples=["SFT-Demo"])
    version: int = Field(examples=[3])


class JobInput(BaseModel):
    """What the job was submitted with; it may be gone or renamed since."""

    id: str = Field(examples=[_ID])
    name: str = Field(examples=["tiny-base"])


class ProgressRead(BaseModel):
    """How far the stage is; null where it cannot be known."""

    percent: float | None = Field(examples=[42.0])
    step: int = Field(examples=[42])
    total: int | None = Field(examples=[100])
    steps_per_second: float | None
    eta_seconds: float | None = Field(examples=[17.5])
    message: str | None


class EvaluationRead(BaseModel):
    """A score on held-out rows, before and after the training."""

    name: str = Field(examples=["exact_match"])
    before: float | None = Field(examples=[0.05])
    after: float | None = Field(examples=[0.98])
    samples: int | None = Field(examples=[40])


class WaitingRead(BaseModel):
    """Why a queued job does not run yet."""

    position: int | None = Field(
        description="Its place among the queued jobs, 1 is the next; null: it is not in the queue yet, or behind the "
        "first thousand.",
        examples=[14],
    )
    estimated_start: datetime | None = Field(
        description="If nothing more urgent comes and running jobs end as expected; null where nobody can know."
    )
    code: str = Field(description="Stable code of the reason.", examples=["waiting_user_limit"])
    detail: str = Field(
        description="The reason in the caller's language.",
        examples=["3 jobs of user ann run in the queue default; the limit is 3."],
    )


class JobSummary(BaseModel):
    """A job in a list."""

    id: str = Field(examples=[_ID])
    name: str = Field(examples=["SFT-Demo"])
    stage: JobKind = Field(description="One of the five stages, or `environment`: an environment is built.")
    status: JobStatus
    reason: EndReason | None = Field(description="Why it ended; null while it has not.")
    reason_detail: str | None = Field(description="The reason in the caller's language, and what to do.")
    method: JobMethod | None = Field(description="Null: an environment is built.")
    environment: str = Field(description="Conda environment it runs in, or that it builds.", examples=["trl"])
    base_model: JobInput | None
    dataset: JobInput | None
    model: str | None = Field(description="Id of the model it works on; null: the base model, or not made yet.")
    result_model: str | None = Field(description="Id of the model it made.")
    parameters: dict[str, Any] = Field(description="As the caller gave them.", examples=[_PARAMETERS])
    chain: list[JobLink] = Field(description="All jobs of its chain, itself among them, in order.")
    waiting_for: str | None = Field(description="Id of the job that builds the environment which this one needs.")
    waiting: WaitingRead | None = Field(description="Why it does not run yet; null unless it is queued.")
    queue: str = Field(examples=["default"])
    priority: int = Field(description="Smaller starts first.", examples=[0])
    user: str = Field(description="For whom it runs; empty: not said.", examples=["ann@example.com"])
    resources: Resources = Field(description="What it asks of a node.")
    node: str | None = Field(description="Name of the node of its newest attempt.", examples=["gpu-1"])
    accelerators: list[str] = Field(
        description="Ids of the accelerators that its newest attempt holds or held.",
        examples=[["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"]],
    )
    retry_of: str | None = Field(description="Id of the job that this one repeats.")
    copied_from: str | None = Field(description="Id of the job that this one is a copy of.")
    attempts: int = Field(description="How often its process was launched.", examples=[1])
    retries: int = Field(description="How many attempts more it took because one failed; charged to `retry`.")
    recoveries: int = Field(description="The same because a node or a process of the service was lost; not charged.")
    not_before: datetime | None = Field(description="A queued job is not started before; null: as soon as possible.")
    cancel_requested: bool = Field(description="Somebody wants it to stop.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class ResumedFrom(BaseModel):
    """The checkpoint that an attempt was given."""

    job: str = Field(description="Whose checkpoint it is: this job's, or that of the job it repeats.", examples=[_ID])
    attempt: int = Field(examples=[1])
    checkpoint: str = Field(examples=["checkpoint-400"])
    step: int = Field(examples=[400])


class AttemptRead(BaseModel):
    """One launch of the job's process."""

    number: int = Field(examples=[1])
    node: str = Field(description="Name of the node that it was launched on.", examples=["gpu-1"])
    live: bool = Field(description="It has not ended.")
    reason: EndReason | None = Field(description="Why it ended; null while it has not.")
    reason_detail: str | None = Field(description="The reason in the caller's language.")
    resumed_from: ResumedFrom | None = Field(description="Null: it began at the beginning.")
    created_at: datetime
    started_at: datetime | None = Field(description="Null: its script never ran.")
    finished_at: datetime | None


class FixRead(BaseModel):
    """A change of parameters after which the job may go through."""

    changes: dict[str, Any] = Field(
        description="Parameters to give instead; `:retry` makes them when it is told to.",
        examples=[{"batch_size": 4, "grad_accum_steps": 2}],
    )
    detail: str = Field(description="What changes and what that costs, in the caller's language.")


class JobRead(JobSummary):
    """A job, and what its run says."""

    retry: RetryPolicy = Field(description="When it is run again by itself.")
    limits: Limits = Field(description="When an attempt of it is stopped.")
    history: list[AttemptRead] = Field(description="Its attempts, oldest first.")
    node_silent: str | None = Field(
        description="What it means that the job's node is silent, in the caller's language; null while it is not. "
        "A cancel waits for the node."
    )
    fix: FixRead | None = Field(description="Null: it did not fail, or no concrete change is known.")
    log_tail: list[str] = Field(description="The last lines of its output, once it has ended.")
    effective_parameters: dict[str, Any] = Field(
        description="What the script is given: the caller's parameters and the platform's own values.",
        examples=[_PARAMETERS],
    )
    progress: ProgressRead | None
    metrics: dict[str, float] = Field(description="The latest value of each curve.", examples=[{"loss": 0.31}])
    evaluations: list[EvaluationRead]
    notes: list[str] = Field(description="Sentences of the script for the person who watches.")


class LogPageRead(BaseModel):
    """A piece of a job's output."""

    text: str = Field(description="The bytes `offset` to `next_offset`; without `raw`, as a terminal would show them.")
    offset: int = Field(examples=[0])
    next_offset: int = Field(description="Give it as `offset` to go on.", examples=[4711])
    size: int = Field(description="Bytes there are so far.", examples=[4711])
    end: bool = Field(description="The job has ended and nothing follows.")
    attempt: int = Field(description="Whose output it is; 0: the job was not launched yet.", examples=[1])


class SeriesRead(BaseModel):
    """A curve: points by step."""

    name: str = Field(examples=["loss"])
    points: list[tuple[int, float | None]] = Field(
        description="Step and value; a value that was no number is null.", examples=[[[1, 2.31], [2, 1.97]]]
    )


class JobMetrics(BaseModel):
    """What a job measured."""

    series: list[SeriesRead]
    evaluations: list[EvaluationRead]
    progress: ProgressRead | None


class ComparedJob(BaseModel):
    """One of the jobs that are compared."""

    id: str = Field(examples=[_ID])
    name: str
    stage: JobKind
    status: JobStatus
    reason: EndReason | None
    method: JobMethod | None
    base_model: JobInput | None
    dataset: JobInput | None
    result_model: str | None
    seconds: float | None = Field(description="From its start to its end.", examples=[61.5])
    metrics: dict[str, float] = Field(description="The last value of each curve.", examples=[{"loss": 0.31}])
    evaluations: list[EvaluationRead]
    created_at: datetime


class DifferenceRead(BaseModel):
    """A parameter in which the jobs differ."""

    name: str = Field(examples=["learning_rate"])
    values: list[Any] = Field(description="In the order of `jobs`; null: it has none.", examples=[[0.0002, 0.0001]])


class ComparedSeries(BaseModel):
    """The curve of one job."""

    job: str = Field(examples=[_ID])
    points: list[tuple[int, float | None]] = Field(examples=[[[1, 2.31], [2, 1.97]]])


class ComparedCurve(BaseModel):
    """One metric in all jobs that have it."""

    name: str = Field(examples=["loss"])
    series: list[ComparedSeries]


class JobComparison(BaseModel):
    """Jobs side by side."""

    jobs: list[ComparedJob]
    differences: list[DifferenceRead] = Field(description="The parameters that are not the same in all jobs.")
    curves: list[ComparedCurve]


# ---- from values ----------------------------------------------------------------------------------------------------


def job_submitted(submitted: Submitted, language: Language) -> JobSubmitted:
    """Return what a submit answers."""
    first = submitted.jobs[0]
    return JobSubmitted(
        id=first.id,
        stage=first.kind,
        status=first.status,
        chain=_links(submitted.jobs),
        warnings=entries(submitted.warnings, language),
    )


def job_summary(view: JobView, language: Language) -> JobSummary:
    """Return the job as a list shows it."""
    return JobSummary(**_members(view, language))


def job_read(details: JobDetails, language: Language) -> JobRead:
    """Return the job in the caller's language."""
    view, digest = details.view, details.digest
    return JobRead(
        **_members(view, language),
        retry=RetryPolicy.of(view.job.retry),
        limits=Limits.of(view.job.limits),
        history=[_attempt(attempt, language) for attempt in details.history],
        node_silent=details.silence.detail(language) if details.silence else None,
        fix=FixRead(changes=dict(details.fix.changes), detail=details.fix.detail(language)) if details.fix else None,
        log_tail=view.job.reason_params.get("log_tail", []),
        effective_parameters={**view.snapshot.effective, **view.job.parameters},
        progress=_progress(digest.progress),
        metrics=digest.latest,
        evaluations=_evaluations(digest.evaluations),
        notes=list(digest.notes),
    )


def reason_detail(job: JobRow, language: Language) -> str | None:
    """Return why the job ended, as a sentence."""
    return None if job.reason is None else text(f"reason_{job.reason}", language, **job.reason_params)


def attempt_detail(attempt: PastAttempt, language: Language) -> str | None:
    """Return why an attempt ended, as a sentence."""
    row = attempt.row
    return None if row.reason is None else text(f"reason_{row.reason}", language, **row.reason_params)


def log_page_read(page: LogPage) -> LogPageRead:
    """Return a piece of output."""
    return LogPageRead(**vars(page))


def job_metrics(curves: Curves) -> JobMetrics:
    """Return the curves of a job."""
    return JobMetrics(
        series=[SeriesRead(name=name, points=_points(points)) for name, points in curves.series.items()],
        evaluations=_evaluations(curves.evaluations),
        progress=_progress(curves.progress),
    )


def job_comparison(comparison: Comparison) -> JobComparison:
    """Return jobs side by side."""
    return JobComparison(
        jobs=[_compared(details) for details in comparison.jobs],
        differences=[DifferenceRead(name=row.name, values=list(row.values)) for row in comparison.differences],
        curves=[
            ComparedCurve(
                name=name,
                series=[ComparedSeries(job=job, points=_points(points)) for job, points in jobs.items()],
            )
            for name, jobs in comparison.curves.items()
        ],
    )


def _members(view: JobView, language: Language) -> dict[str, Any]:
    job, snapshot = view.job, view.snapshot
    return {
        "id": job.id,
        "name": job.name,
        "stage": job.kind,
        "status": job.status,
        "reason": job.reason,
        "reason_detail": reason_detail(job, language),
        "method": _method(job),
        "environment": job.environment,
        "base_model": _input(snapshot.base_model),
        "dataset": _input(snapshot.dataset),
        "model": job.model_id,
        "result_model": job.result_model_id,
        "parameters": job.parameters,
        "chain": _links(view.chain),
        "waiting_for": view.waiting_for,
        "waiting": _waiting(view.waiting, language),
        "queue": job.queue,
        "priority": job.priority,
        "user": job.submitted_by,
        "resources": Resources.model_validate(job.resources),
        "node": view.node,
        "accelerators": list(view.accelerators),
        "retry_of": job.retry_of,
        "copied_from": job.copied_from,
        "attempts": job.attempts,
        "retries": job.retries,
        "recoveries": job.recoveries,
        "not_before": job.not_before if job.status is JobStatus.QUEUED else None,
        "cancel_requested": job.cancel_requested_at is not None,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def _attempt(attempt: PastAttempt, language: Language) -> AttemptRead:
    row = attempt.row
    return AttemptRead(
        number=row.number,
        node=attempt.node,
        live=row.live,
        reason=row.reason,
        reason_detail=attempt_detail(attempt, language),
        resumed_from=None if row.resumed_from is None else ResumedFrom(**row.resumed_from),
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def _compared(details: JobDetails) -> ComparedJob:
    job, snapshot = details.view.job, details.view.snapshot
    lasted = job.finished_at - job.started_at if job.finished_at and job.started_at else None
    return ComparedJob(
        id=job.id,
        name=job.name,
        stage=job.kind,
        status=job.status,
        reason=job.reason,
        method=_method(job),
        base_model=_input(snapshot.base_model),
        dataset=_input(snapshot.dataset),
        result_model=job.result_model_id,
        seconds=None if lasted is None else lasted.total_seconds(),
        metrics=details.digest.latest,
        evaluations=_evaluations(details.digest.evaluations),
        created_at=job.created_at,
    )


def _method(job: JobRow) -> JobMethod | None:
    if job.method_id is None or job.method_version is None:
        return None
    return JobMethod(id=job.method_id, name=job.method_name or "", version=job.method_version)


def _input(named: Named | None) -> JobInput | None:
    return None if named is None else JobInput(id=named.id, name=named.name)


def _waiting(waiting: Waiting | None, language: Language) -> WaitingRead | None:
    if waiting is None:
        return None
    return WaitingRead(
        position=waiting.position,
        estimated_start=waiting.estimated_start,
        code=waiting.reason.code,
        detail=text(waiting.reason.code, language, **waiting.reason.params),
    )


def _links(jobs: Sequence[JobRow]) -> list[JobLink]:
    return [JobLink(id=job.id, stage=job.kind, status=job.status) for job in jobs]


def _progress(progress: Progress | None) -> ProgressRead | None:
    return (
        None if progress is None else ProgressRead(**{key: getattr(progress, key) for key in ProgressRead.model_fields})
    )


def _evaluations(evaluations: Sequence[Evaluation]) -> list[EvaluationRead]:
    return [EvaluationRead(**vars(evaluation)) for evaluation in evaluations]


def _points(points: Sequence[Point]) -> list[tuple[int, float | None]]:
    return [(point.step, point.value) for point in points]
