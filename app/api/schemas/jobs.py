"""Jobs as they are answered, and pieces of their output."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from app.api.errors import ProblemEntry, problem_entries
from app.api.schemas.common import JOB_ID
from app.api.schemas.previews import LengthsRead, lengths_read
from app.domain.demand import (
    Resources,
)
from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.retries import Limits, RetryPolicy
from app.domain.texts import Language, text
from app.domain.values import Value
from app.executor.attempts.comparisons import answer_warnings
from app.executor.jobs.estimates import Estimate
from app.executor.jobs.job_views import JobDetails, JobView
from app.executor.jobs.submission import Plan, Submitted
from app.executor.jobs.waiting import Waiting
from app.executor.runs.evaluations import Evaluation
from app.executor.runs.log_pages import LogPage
from app.executor.runs.memory_forecasts import Basis, MemoryForecast
from app.executor.runs.progress import Progress
from app.store.job_queries import ChainLink
from app.store.jobs import PastAttempt
from app.store.tables import JobRow

_NO_RESOURCES = Resources()
_PARAMETERS = {"learning_rate": 0.0002, "max_steps": 100}


class JobLink(Value):
    """A job of a chain."""

    id: str = Field(examples=[JOB_ID])
    stage: JobKind
    status: JobStatus


class MemoryRead(Value):
    """What a training is expected to need of the memory of the most capable living node."""

    expected_mib: int = Field(description="On one device.", examples=[18_400])
    basis: Basis = Field(
        description="`measured`: an earlier training of this method and base model on the same kind of device, scaled "
        "by the ratio of the estimates; `estimated`: the base model's configuration and the parameters."
    )
    from_job: str | None = Field(description="The training that was measured.", examples=[JOB_ID])
    parts: dict[str, int] | None = Field(
        description="MiB of the estimate by what takes them. Null: the script's use of its parameters is not known.",
        examples=[{"weights": 15_316, "adapter": 160, "activations": 2100, "logits": 256}],
    )
    device: str = Field(description="The kind of device it is about.", examples=["NVIDIA H200"])
    node: str = Field(description="The node that has it.", examples=["gpu-1"])
    available_mib: int | None = Field(description="All memory of the device.", examples=[143_771])


class JobSubmitted(JobLink):
    """The first job of the chain that was made, and the whole chain."""

    chain: list[JobLink]
    memory: MemoryRead | None = Field(description="Null: there is no training, or nothing is known of its memory.")
    warnings: list[ProblemEntry] = Field(description="What is unusual about the parameters; nothing was refused.")


class PlannedStageRead(Value):
    """A job that a submit would make."""

    stage: JobKind
    environment: str = Field(examples=["trl"])
    parameters: dict[str, Any] = Field(description="As the caller gave them.", examples=[_PARAMETERS])


class PlannedRowsRead(Value):
    """What becomes of the rows of the data set."""

    read: int = Field(examples=[450])
    used: int = Field(description="Rows that something is learned from, or that are held out.", examples=[448])
    held_out: int | None = Field(description="For the score, not learned; null: not known.", examples=[45])
    sequences: int = Field(description="Answers, texts or pairs in the used rows.", examples=[448])
    forms: dict[str, int] = Field(description="How rows are written.", examples=[{"instruction-output": 450}])
    features: dict[str, int] = Field(description="Rows with tools, system, reasoning, ...", examples=[{"system": 12}])


class JobPlan(Value):
    """What a submit would do."""

    stages: list[PlannedStageRead]
    rows: PlannedRowsRead | None = Field(description="Null: nothing is known of what the script reads.")
    steps: int | None = Field(description="Steps of one process; null: not known before the script runs.")
    estimated_tokens: int | None = Field(
        description="A rough count without a tokenizer; where `lengths` is not null, made of what was measured.",
        examples=[120000],
    )
    memory: MemoryRead | None = Field(description="Null: there is no training, or nothing is known of its memory.")
    lengths: LengthsRead | None = Field(
        description="Tokens of the rows, if a preview has measured them. Null: `steps` and `estimated_tokens` do not "
        "know which rows are too long."
    )


class JobValidation(Value):
    """Everything that a submit would say."""

    valid: bool
    violation_count: int = Field(description="Of all that is wrong; about a hundred are listed.")
    violations: list[ProblemEntry]
    warnings: list[ProblemEntry] = Field(description="What is unusual; a submit takes it and says the same.")
    plan: JobPlan | None = Field(description="Null if anything is wrong.")


class JobMethod(Value):
    """The method and the version of it that the job runs."""

    id: str = Field(examples=[JOB_ID])
    name: str = Field(description="Its name when the job was submitted.", examples=["SFT-Demo"])
    version: int = Field(examples=[3])


class JobInput(Value):
    """What the job was submitted with; it may be gone or renamed since."""

    id: str = Field(examples=[JOB_ID])
    name: str = Field(examples=["tiny-base"])


class ProgressRead(Value):
    """How far the stage is; null where it cannot be known."""

    percent: float | None = Field(examples=[42.0])
    step: int = Field(examples=[42])
    total: int | None = Field(examples=[100])
    steps_per_second: float | None
    eta_seconds: float | None = Field(examples=[17.5])
    message: str | None
    bytes_done: int | None = Field(default=None, description="Downloaded so far, while an environment is built.")
    bytes_total: int | None = Field(default=None, description="What is to be downloaded in all, if it is known.")


class EvaluationRead(Value):
    """A score on held-out rows, before and after the training."""

    name: str = Field(examples=["exact_match"])
    before: float | None = Field(examples=[0.05])
    after: float | None = Field(examples=[0.98])
    samples: int | None = Field(examples=[40])


class WaitingRead(Value):
    """Why a queued job does not run yet."""

    position: int | None = Field(
        description="Its place among the queued jobs, 1 is the next; null: it is not in the queue yet, or behind the "
        "first thousand.",
        examples=[14],
    )
    estimated_start: datetime | None = Field(
        description="Estimate if no more urgent job arrives and running jobs end as expected. Null: unknown."
    )
    code: str = Field(description="Stable code of the reason.", examples=["waiting_user_limit"])
    detail: str = Field(
        description="The reason in the caller's language.",
        examples=["3 jobs of user ann run in the queue default; the limit is 3."],
    )


class JobSummary(Value):
    """A job in a list."""

    id: str = Field(examples=[JOB_ID])
    name: str = Field(examples=["SFT-Demo"])
    stage: JobKind = Field(
        description="One of the five stages; `environment`: an environment is built; `base-model`: a sample "
        "base model is made."
    )
    status: JobStatus
    reason: EndReason | None = Field(description="Why it ended; null while it has not.")
    reason_detail: str | None = Field(description="The reason in the caller's language, and what to do.")
    method: JobMethod | None = Field(description="Null: an environment is built or a base model is made.")
    environment: str = Field(description="Conda environment it runs in, or that it builds.", examples=["trl"])
    base_model: JobInput | None
    dataset: JobInput | None
    validation_dataset: JobInput | None = Field(
        description="Rows for the score; null: a part of the data set is held out, or the script scores nothing."
    )
    model: str | None = Field(
        description="Id of the model it works on, or that a training goes on from; null: the base model, or not "
        "made yet."
    )
    reward_model: JobInput | None = Field(description="Model that judges the answers of a training; null: none.")
    result_model: str | None = Field(description="Id of the model it made.")
    parameters: dict[str, Any] = Field(description="As the caller gave them.", examples=[_PARAMETERS])
    chain: list[JobLink] = Field(description="All jobs of its chain, itself among them, in order.")
    waiting_for: str | None = Field(
        description="Id of the job that builds the environment, or makes the base model, which this one needs."
    )
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
    external_id: str | None = Field(
        description="Id of the task at DeepExtension's backend whose call made the job; see docs/runner.md."
    )
    retry_of: str | None = Field(description="Id of the job that this one repeats.")
    copied_from: str | None = Field(description="Id of the job that this one is a copy of.")
    attempts: int = Field(description="How often its process was launched.", examples=[1])
    retries: int = Field(description="How many attempts more it took because one failed; charged to `retry`.")
    recoveries: int = Field(description="The same because a node or a process of the service was lost; not charged.")
    not_before: datetime | None = Field(description="A queued job is not started before; null: as soon as possible.")
    cancel_requested: bool = Field(description="A cancel was requested.")
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class ResumedFrom(Value):
    """The checkpoint that an attempt was given."""

    job: str = Field(
        description="The job that wrote the checkpoint: this job, or the one that it repeats.", examples=[JOB_ID]
    )
    attempt: int = Field(examples=[1])
    checkpoint: str = Field(examples=["checkpoint-400"])
    step: int = Field(examples=[400])


class AttemptRead(Value):
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


class FixRead(Value):
    """A change of parameters after which the job may go through."""

    changes: dict[str, Any] = Field(
        description="Parameters to give instead; `:retry` with `fix: true` applies them.",
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
    warnings: list[ProblemEntry] = Field(description="What is unusual about the answer of a model.")


class LogPageRead(Value):
    """A piece of a job's output."""

    text: str = Field(description="The bytes `offset` to `next_offset`; without `raw`, as a terminal would show them.")
    offset: int = Field(examples=[0])
    next_offset: int = Field(description="Give it as `offset` to go on.", examples=[4711])
    size: int = Field(description="Bytes there are so far.", examples=[4711])
    end: bool = Field(description="The job has ended and nothing follows.")
    attempt: int = Field(
        description="The attempt that wrote the output. 0: the job was not launched yet.", examples=[1]
    )


# ---- from values ----------------------------------------------------------------------------------------------------


def job_validation(plan: Plan, language: Language) -> JobValidation:
    """Return what `jobs:validate` answers."""
    found = plan.error.violations() if plan.error is not None else ()
    estimate = plan.estimate()
    return JobValidation(
        valid=plan.error is None,
        violation_count=plan.error.violation_count() if plan.error is not None else 0,
        violations=problem_entries(found, language),
        warnings=problem_entries(plan.warnings, language),
        plan=None if estimate is None else _job_plan(estimate, plan.memory),
    )


def _memory_read(memory: MemoryForecast | None) -> MemoryRead | None:
    if memory is None:
        return None
    return MemoryRead(
        expected_mib=memory.expected_mib,
        basis=memory.basis,
        from_job=memory.from_job,
        parts=None if memory.parts is None else dict(memory.parts),
        device=memory.device.name,
        node=memory.device.node,
        available_mib=memory.device.memory_mib,
    )


def _job_plan(estimate: Estimate, memory: MemoryForecast | None) -> JobPlan:
    rows = estimate.rows
    return JobPlan(
        stages=[
            PlannedStageRead(stage=one.stage, environment=one.environment, parameters=dict(one.parameters))
            for one in estimate.stages
        ],
        rows=None
        if rows is None
        else PlannedRowsRead(
            read=rows.read,
            used=rows.used,
            held_out=rows.held_out,
            sequences=rows.sequences,
            forms=dict(rows.forms),
            features=dict(rows.features),
        ),
        steps=estimate.steps,
        estimated_tokens=estimate.tokens,
        memory=_memory_read(memory),
        lengths=lengths_read(estimate.lengths, estimate.parameters),
    )


def job_submitted(submitted: Submitted, language: Language) -> JobSubmitted:
    """Return what a submit answers."""
    first = submitted.jobs[0]
    return JobSubmitted(
        id=first.id,
        stage=first.kind,
        status=first.status,
        chain=_links(submitted.jobs),
        memory=_memory_read(submitted.memory),
        warnings=problem_entries(submitted.warnings, language),
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
        effective_parameters=view.spec.effective,
        progress=progress_read(digest.progress),
        metrics=digest.latest,
        evaluations=evaluations_read(digest.evaluations),
        notes=list(digest.notes),
        warnings=problem_entries(answer_warnings(view.job.reason_params.get("answers_as_base")), language),
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


def _members(view: JobView, language: Language) -> dict[str, Any]:
    job = view.job
    return {
        "id": job.id,
        "name": job.name,
        "stage": job.kind,
        "status": job.status,
        "reason": job.reason,
        "reason_detail": reason_detail(job, language),
        "method": method_of(job),
        "environment": job.environment,
        "base_model": input_of(job, "base_model"),
        "dataset": input_of(job, "dataset"),
        "validation_dataset": input_of(job, "validation_dataset"),
        "model": job.model_id,
        "reward_model": input_of(job, "reward_model"),
        "result_model": job.result_model_id,
        "parameters": job.parameters,
        "chain": _links(view.chain),
        "waiting_for": view.waiting_for,
        "waiting": _waiting(view.waiting, language),
        "queue": job.queue,
        "priority": job.priority,
        "user": job.submitted_by,
        "resources": Resources.model_validate(job.resources) if job.resources else _NO_RESOURCES,
        "node": view.node,
        "accelerators": list(view.accelerators),
        "external_id": job.external_id,
        "retry_of": job.retry_of,
        "copied_from": job.copied_from,
        "attempts": job.attempts,
        "retries": job.retries,
        "recoveries": job.recoveries,
        "not_before": job.not_before if job.status is JobStatus.QUEUED else None,
        "cancel_requested": job.cancel_requested_at is not None,
        "created_by": job.created_by,
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


def method_of(job: JobRow) -> JobMethod | None:
    """Return the method and the version that the job runs."""
    if job.method_id is None or job.method_version is None:
        return None
    return JobMethod(id=job.method_id, name=job.method_name or "", version=job.method_version)


def input_of(
    job: JobRow, kind: Literal["base_model", "dataset", "validation_dataset", "reward_model"]
) -> JobInput | None:
    """Return what the job was given, by its name of then; its whole specification is not parsed for it."""
    named = job.launch.get(kind)
    return None if named is None else JobInput(id=named["id"], name=named["name"])


def _waiting(waiting: Waiting | None, language: Language) -> WaitingRead | None:
    if waiting is None:
        return None
    return WaitingRead(
        position=waiting.position,
        estimated_start=waiting.estimated_start,
        code=waiting.reason.code,
        detail=text(waiting.reason.code, language, **waiting.reason.params),
    )


def _links(jobs: Sequence[JobRow | ChainLink]) -> list[JobLink]:
    return [JobLink(id=job.id, stage=job.kind, status=job.status) for job in jobs]


def progress_read(progress: Progress | None) -> ProgressRead | None:
    """Return how far a job is."""
    return (
        None if progress is None else ProgressRead(**{key: getattr(progress, key) for key in ProgressRead.model_fields})
    )


def evaluations_read(evaluations: Sequence[Evaluation]) -> list[EvaluationRead]:
    """Return scores on held-out rows."""
    return [EvaluationRead(**vars(evaluation)) for evaluation in evaluations]
