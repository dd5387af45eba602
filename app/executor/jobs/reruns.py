"""Run a job again: as it was submitted (retry), or as a new submission with changes (copy).

Terminal is terminal, so both make new jobs. A retry repeats what was submitted, to the byte: the same version of the
method, the same pinned scripts, the same parameters; what it worked on must still be there. A copy is a submission
like any other, with the method as it is now, and is checked like one.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from app.domain.demand import Resources
from app.domain.enums import JobKind, JobStatus
from app.domain.errors import Conflict, InvalidRequest, Violation
from app.domain.kinds import KINDS, as_stage
from app.domain.lifecycle import STATE_OF_STAGE
from app.domain.retries import Limits, RetryPolicy
from app.executor.jobs.requests import DeploymentOptions, JobCopy, JobSubmit
from app.executor.runs.job_spec import JobSpec, is_runner_call
from app.store import jobs as store
from app.store.tables import JobRow


class JobNotRetryable(Conflict):
    """Only failed and cancelled jobs can be retried."""

    code = "job_not_retryable"


class PredecessorNotSucceeded(Conflict):
    """The job's predecessor did not make the model that the job needs."""

    code = "predecessor_not_succeeded"


class NoSuggestionKnown(Conflict):
    """No concrete change is known that would help the job."""

    code = "no_fix_known"


class NoCheckpointToResume(Conflict):
    """The job left no checkpoint to resume from."""

    code = "no_checkpoint_to_resume"


class JobIsRunnerCall(Conflict):
    """A call of DeepExtension's backend is repeated there: it waits for what it started itself."""

    code = "job_is_runner_call"


class JobIsInferenceRequest(Conflict):
    """An inference request cannot be retried: send the messages again."""

    code = "job_is_question"


class JobIsBuild(Conflict):
    """An environment build cannot be retried: build the environment by its own route."""

    code = "job_is_build"


class JobIsBaseModelBuild(Conflict):
    """The making of a base model is not retried: a submit or a retry of a training orders it anew."""

    code = "job_is_base_model_build"


class JobIsPreview(Conflict):
    """A preview is not retried: asking again makes a new one."""

    code = "job_is_preview"


def to_retry(job: JobRow, chain: Sequence[JobRow]) -> Sequence[JobRow]:
    """Return the jobs that a retry of `job` repeats: itself and the rest of its chain."""
    _check_is_stage(job)
    if job.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
        raise JobNotRetryable(job=job.id, status=job.status)
    return [other for other in chain if other.position >= job.position]


def resuming(job: JobRow, checkpoint_of: str | None) -> None:
    """Start a job that is not queued yet from the newest checkpoint of another job."""
    job.launch = JobSpec.of(job).model_copy(update={"resume_of": checkpoint_of}).document()


def retried(jobs: Sequence[JobRow], *, model_id: str | None, now: datetime) -> list[JobRow]:
    """Return new queued jobs that repeat `jobs`; the first works on `model_id`."""
    made = [
        store.new_job(
            kind=job.kind,
            name=job.name,
            environment=job.environment,
            launch=job.launch,
            now=now,
            position=job.position,
            retry_of=job.id,
            method_id=job.method_id,
            method_name=job.method_name,
            method_version=job.method_version,
            base_model_id=job.base_model_id,
            dataset_id=job.dataset_id,
            model_id=model_id if job is jobs[0] else None,
            parameters=job.parameters,
            priority=job.priority,
            queue=job.queue,
            submitted_by=job.submitted_by,
            resources=job.resources,
            retry=job.retry,
            limits=job.limits,
        )
        for job in jobs
    ]
    store.link(made)
    return made


def works_on_model(job: JobRow) -> bool:
    """Say whether a model is all that the job works on; a training that goes on from one has its own data as well."""
    return job.model_id is not None and job.kind is not JobKind.TRAINING


def copied(job: JobRow, chain: Sequence[JobRow], changes: JobCopy) -> JobSubmit:
    """Return the submit request that copies `job`.

    A job that works on a model is copied alone, on the same model; any other with its whole chain.
    """
    _check_is_stage(job)
    origin = job if works_on_model(job) else chain[0]
    if works_on_model(origin):
        return _on_model(origin, changes)
    spec = JobSpec.of(origin)
    last = chain[-1]
    whole = len(chain) > 1
    return JobSubmit(
        method=_method(origin),
        base_model=changes.base_model or (spec.base_model.id if spec.base_model else None),
        dataset=changes.dataset or (spec.dataset.id if spec.dataset else None),
        validation_dataset=_validation_dataset(spec, changes),
        adapter_name_or_path=_adapter(origin, changes),
        reward_model=_reward_model(spec, changes),
        parameters=_merged([step.parameters for step in reversed(chain)], changes),
        through=STATE_OF_STAGE[as_stage(last.kind)] if whole else None,
        stage=None if whole else last.kind,
        name=changes.name or origin.name,
        deployment=_deployment_options(last),
        **_conditions(origin, changes),
    )


def _on_model(job: JobRow, changes: JobCopy) -> JobSubmit:
    given = {
        "/base_model": changes.base_model,
        "/dataset": changes.dataset,
        "/validation_dataset": changes.validation_dataset,
        "/adapter_name_or_path": changes.adapter_name_or_path,
        "/reward_model": changes.reward_model,
    }
    if wrong := [Violation(pointer, "model_keeps_inputs", {}) for pointer, value in given.items() if value is not None]:
        raise InvalidRequest(wrong)
    return JobSubmit(
        method=_method(job),
        stage=job.kind,
        model=job.model_id,
        parameters=_merged([job.parameters], changes),
        name=changes.name or job.name,
        deployment=_deployment_options(job),
        **_conditions(job, changes),
    )


def _validation_dataset(spec: JobSpec, changes: JobCopy) -> str | None:
    if "validation_dataset" in changes.model_fields_set:
        return changes.validation_dataset
    return spec.validation_dataset.id if spec.validation_dataset else None


def _adapter(job: JobRow, changes: JobCopy) -> str | None:
    return changes.adapter_name_or_path if "adapter_name_or_path" in changes.model_fields_set else job.model_id


def _reward_model(spec: JobSpec, changes: JobCopy) -> str | None:
    if "reward_model" in changes.model_fields_set:
        return changes.reward_model
    return spec.reward_model.id if spec.reward_model else None


def _merged(parameters: Sequence[Mapping[str, Any]], changes: JobCopy) -> dict[str, Any]:
    merged = {name: value for given in parameters for name, value in given.items()}
    return {name: value for name, value in {**merged, **changes.parameters}.items() if value is not None}


def _conditions(job: JobRow, changes: JobCopy) -> dict[str, Any]:
    return {
        "retry": changes.retry if changes.retry is not None else RetryPolicy.of(job.retry),
        "limits": changes.limits if changes.limits is not None else Limits.of(job.limits),
        "resources": changes.resources if changes.resources is not None else Resources.model_validate(job.resources),
        "priority": changes.priority if changes.priority is not None else job.priority,
        "queue": changes.queue if changes.queue is not None else job.queue,
        "user": changes.user if changes.user is not None else job.submitted_by,
    }


def _deployment_options(job: JobRow) -> DeploymentOptions:
    deployment = JobSpec.of(job).deployment
    if deployment is None:
        return DeploymentOptions()
    return DeploymentOptions(**deployment.model_dump(include=set(DeploymentOptions.model_fields)))


def _method(job: JobRow) -> str:
    assert job.method_id is not None
    return job.method_id


def _check_is_stage(job: JobRow) -> None:
    if is_runner_call(job):
        raise JobIsRunnerCall(job=job.id)
    if KINDS[job.kind].is_inference:
        raise JobIsInferenceRequest(job=job.id, model=job.model_id)
    if job.kind is JobKind.ENVIRONMENT:
        raise JobIsBuild(job=job.id, environment=job.environment)
    if job.kind is JobKind.BASE_MODEL:
        raise JobIsBaseModelBuild(job=job.id, base_model=job.name)
    if job.kind is JobKind.PREVIEW:
        raise JobIsPreview(job=job.id)
