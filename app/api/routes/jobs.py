"""Jobs: submit, list, look at, follow, cancel, retry, copy, compare."""

from collections.abc import Mapping
from typing import Annotated, Any, Final

from fastapi import Body, Depends, Path, Query, Request, Response

from app.api.dependencies import CallerDep, ReadSession, ServicesDep, WriteSession, notify_after_commit
from app.api.errors import problem_responses
from app.api.headers import LastEventId
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.job_events import job_events
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, TextInName, page_params
from app.api.routing import Router, needs
from app.api.schemas.job_curves import JobComparison, JobMetrics, job_comparison, job_metrics
from app.api.schemas.jobs import (
    JobRead,
    JobSubmitted,
    JobSummary,
    JobValidation,
    LogPageRead,
    job_read,
    job_submitted,
    job_summary,
    job_validation,
    log_page_read,
)
from app.api.sse import event_stream
from app.domain.access import CallerKind, Permission
from app.domain.enums import JobKind, JobStatus
from app.domain.errors import Invalid, InvalidRequest
from app.executor.jobs.job_actions import JobBeingRetried, JobDatasetChanged, JobInputsGone, JobMethodDeleted, JobQuery
from app.executor.jobs.requests import JobCopy, JobRetry, JobSubmit
from app.executor.jobs.reruns import (
    JobIsBaseModelBuild,
    JobIsBuild,
    JobIsInferenceRequest,
    JobIsPreview,
    JobIsRunnerCall,
    JobNotRetryable,
    NoCheckpointToResume,
    NoSuggestionKnown,
    PredecessorNotSucceeded,
)
from app.executor.jobs.submission import InsufficientDiskSpace
from app.executor.runs.log_file import CHUNK_BYTES
from app.executor.runs.log_pages import MAX_PAGE_BYTES, LogRange
from app.executor.runs.stream import InvalidEventId, StreamPosition
from app.registry.datasets.files import DatasetChanging, DatasetFileExists
from app.registry.datasets.process import DatasetUnprocessed
from app.registry.datasets.service import DatasetMissing, InvalidDataset
from app.store import jobs
from app.store.job_status import JobAlreadyFinished
from app.store.jobs import JobNotFound
from app.store.methods import NameTaken

router = Router(changes=Permission.RUN, prefix="/api/v1", tags=["jobs"])

Paging = Annotated[PageParams, Depends(page_params("created_at", "name", "updated_at", default="-created_at"))]
JobId = Annotated[str, Path(description="Id of the job.", examples=["0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c"])]
"""`{job}` in the addresses."""

# of data sets that are read again or mixed
_DATA_ERRORS: Final = (
    DatasetMissing,
    InvalidDataset,
    DatasetChanging,
    DatasetUnprocessed,
    DatasetFileExists,
    NameTaken,
)
_SUBMITTED: Final = (InvalidRequest, InsufficientDiskSpace, IdempotencyKeyReused, *_DATA_ERRORS)
_EVENTS: Final = """retry: 2000

id: 12-0-0-0.0.0
event: state
data: {"job":"0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c","attempt":1,"status":"running","reason":null,"reason_detail":null}

id: 12-1-18-0.0.0
event: log
data: {"attempt":1,"text":"loading the model\\n","offset":0,"next_offset":18}

id: 14-1-18-96.0.3
event: end
data: {"status":"succeeded"}

"""


@router.post("/jobs", status_code=201, response_model=JobSubmitted, responses=problem_responses(*_SUBMITTED))
async def submit_job(
    job: JobSubmit,
    session: WriteSession,
    services: ServicesDep,
    language: RequestLanguage,
    caller: CallerDep,
    creation: CreationDep,
) -> Response:
    """Start the stages of a method: a chain of jobs through a state, or a single stage.

    Everything that is wrong comes at once, before anything is queued.
    """
    if caller.kind in (CallerKind.KEY, CallerKind.PERSON) and "user" not in job.model_fields_set:
        job = job.model_copy(update={"user": caller.name})
    async with services.submissions.planned(job) as plan:

        async def create() -> JobSubmitted:
            submitted = await services.submissions.write(session, plan)
            notify_after_commit(session, services.notifier, submitted.jobs[0].id)
            return job_submitted(submitted, language)

        return await creation.answer(create, headers=_location)


@router.post("/jobs:validate", responses=problem_responses(InsufficientDiskSpace, *_DATA_ERRORS))
@needs(Permission.READ)
async def validate_job(job: JobSubmit, services: ServicesDep, language: RequestLanguage) -> JobValidation:
    """Say everything that a submit would say, and what it would do; nothing is changed.

    `plan` tells the stages, the rows in and out, and estimates of steps and tokens. It is null if anything is refused.
    """
    async with services.submissions.planned(job, submits=False) as plan:
        if plan.error is not None and not isinstance(plan.error, Invalid):
            raise plan.error
        return job_validation(plan, language)


@router.get("/jobs", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_jobs(
    session: ReadSession,
    services: ServicesDep,
    language: RequestLanguage,
    paging: Paging,
    status: Annotated[
        list[JobStatus] | None, Query(max_length=len(JobStatus), description="Only jobs in one of these states.")
    ] = None,
    stage: Annotated[
        list[JobKind] | None,
        Query(
            max_length=len(JobKind),
            description="Only jobs of these stages. Inference requests are listed only if their stage is named here.",
        ),
    ] = None,
    method: Annotated[str | None, Query(description="Only jobs of this method; id or name.")] = None,
    chain: Annotated[str | None, Query(description="Only jobs of this chain: the id of its first job.")] = None,
    external_id: Annotated[
        str | None, Query(description="Only jobs of this task of DeepExtension's backend.", max_length=200)
    ] = None,
    q: TextInName = None,
) -> Page[JobSummary]:
    """List the jobs."""
    query = JobQuery(
        statuses=status or (), kinds=stage or (), method=method, chain=chain, external_id=external_id, text=q
    )
    views, following = await services.job_actions.page(
        session, query, sort=paging.sort, descending=paging.descending, after=paging.after, limit=paging.limit
    )
    return paging.page([job_summary(view, language) for view in views], following)


@router.get("/jobs:compare", responses=problem_responses(JobNotFound, InvalidRequest))
async def compare_jobs(
    session: ReadSession,
    services: ServicesDep,
    ids: Annotated[list[str], Query(description="2 to 10 ids; repeated, or separated by commas.", max_length=100)],
    points: Annotated[int, Query(ge=2, le=2000, description="Most points of each curve.")] = 200,
) -> JobComparison:
    """Compare jobs: the parameters that differ, how they ended, their scores and curves."""
    wanted = [part.strip() for given in ids for part in given.split(",") if part.strip()]
    return job_comparison(await services.job_actions.compare(session, wanted, points=points))


@router.get("/jobs/{job}", responses=problem_responses(JobNotFound))
async def get_job(job: JobId, session: ReadSession, services: ServicesDep, language: RequestLanguage) -> JobRead:
    """Read a job and how far it is."""
    return job_read(await services.job_actions.get(session, job), language)


@router.get("/jobs/{job}/logs", responses=problem_responses(JobNotFound))
async def get_job_logs(
    job: JobId,
    session: ReadSession,
    services: ServicesDep,
    offset: Annotated[int, Query(ge=0, le=2**62, description="First byte to read.")] = 0,
    limit: Annotated[int, Query(ge=4, le=MAX_PAGE_BYTES, description="Most bytes to read.")] = CHUNK_BYTES,
    tail: Annotated[
        int | None, Query(ge=1, le=100_000, description="Begin where the last lines begin, instead of at `offset`.")
    ] = None,
    raw: Annotated[bool, Query(description="Keep carriage returns and terminal codes.")] = False,
    attempt: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="Default: the newest attempt.")] = None,
) -> LogPageRead:
    """Read a part of the output. The cost depends on the part, not on the length of the output.

    Lines that were rewritten with a carriage return (progress bars) show their last state. If the text begins with a
    carriage return, it replaces the open line that was read before.
    """
    wanted = LogRange(offset=offset, limit=limit, tail=tail, raw=raw, attempt=attempt)
    return log_page_read(await services.job_actions.logs(session, job, wanted))


@router.get("/jobs/{job}/metrics", responses=problem_responses(JobNotFound))
async def get_job_metrics(
    job: JobId,
    session: ReadSession,
    services: ServicesDep,
    points: Annotated[int, Query(ge=2, le=10_000, description="Most points of each curve.")] = 500,
    names: Annotated[list[str] | None, Query(description="Only these curves.", max_length=100)] = None,
) -> JobMetrics:
    """Read the curves, reduced to points that look the same in a chart of that width, and the scores."""
    return job_metrics(await services.job_actions.curves(session, job, names=names or (), points=points))


@router.get(
    "/jobs/{job}/events",
    response_class=Response,
    responses={
        200: {
            "description": "Server-sent events: `state`, `log`, `metrics`, `progress`, `evaluation`, `note`; at last "
            "`end`. An error on the way is an event `problem`, after which one may resume.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EVENTS}},
        },
        **problem_responses(JobNotFound, InvalidEventId),
    },
)
async def stream_job_events(
    job: JobId,
    request: Request,
    session: ReadSession,
    services: ServicesDep,
    language: RequestLanguage,
    last_event_id: LastEventId = None,
    resume_after: Annotated[
        str | None,
        Query(alias="last_event_id", max_length=200, description="The same for tools that cannot send the header."),
    ] = None,
) -> Response:
    """Follow a job to its end. Comes back with the id of the last event, nothing is lost and no output comes twice."""
    await jobs.get(session, job)
    # the header first: a browser that reconnects sends the newest id there, its address stays the old one
    position = StreamPosition.parse(last_event_id or resume_after)
    return event_stream(request, job_events(services, job, position, language))


@router.post("/jobs/{job}:cancel", responses=problem_responses(JobNotFound, JobAlreadyFinished))
async def cancel_job(job: JobId, session: WriteSession, services: ServicesDep, language: RequestLanguage) -> JobRead:
    """Stop a job and everything that it started. One that waits ends at once; a second request changes nothing.

    The jobs of the chain that wait for it are cancelled when it ends.
    """
    details = await services.job_actions.cancel(session, job)
    notify_after_commit(session, services.notifier, details.view.job.id)
    return job_read(details, language)


@router.post(
    "/jobs/{job}:retry",
    status_code=201,
    response_model=JobSubmitted,
    responses=problem_responses(
        JobNotFound,
        JobNotRetryable,
        JobBeingRetried,
        PredecessorNotSucceeded,
        JobIsInferenceRequest,
        JobIsBuild,
        JobIsBaseModelBuild,
        JobIsPreview,
        JobIsRunnerCall,
        JobInputsGone,
        JobDatasetChanged,
        JobMethodDeleted,
        NoSuggestionKnown,
        NoCheckpointToResume,
        InvalidRequest,
        IdempotencyKeyReused,
    ),
)
async def retry_job(
    job: JobId,
    session: WriteSession,
    services: ServicesDep,
    language: RequestLanguage,
    creation: CreationDep,
    retry: Annotated[JobRetry, Body(default_factory=JobRetry)],
) -> Response:
    """Run a failed or cancelled job again, and the rest of its chain, as submitted or with changed parameters.

    An end is final, so these are new jobs. They run the same version of the method, to the byte; copy the job to run
    the method as it is now. A training goes on from the newest checkpoint unless the changes make it another training.
    """
    plan = await services.job_actions.plan_retry(job, retry)

    async def create() -> JobSubmitted:
        submitted = await services.job_actions.retry(session, plan)
        notify_after_commit(session, services.notifier, submitted.jobs[0].id)
        return job_submitted(submitted, language)

    return await creation.answer(create, headers=_location)


@router.post(
    "/jobs/{job}:copy",
    status_code=201,
    response_model=JobSubmitted,
    responses=problem_responses(
        JobNotFound, JobIsInferenceRequest, JobIsBuild, JobIsBaseModelBuild, JobIsPreview, JobIsRunnerCall, *_SUBMITTED
    ),
)
async def copy_job(
    job: JobId,
    session: WriteSession,
    services: ServicesDep,
    language: RequestLanguage,
    creation: CreationDep,
    copy: Annotated[JobCopy, Body(default_factory=JobCopy)],
) -> Response:
    """Submit a job like this one, with changes, and with the method as it is now.

    A job that works on a model is copied alone, on the same model; any other with its whole chain.
    """
    plan = await services.job_actions.plan_copy(job, copy)

    async def create() -> JobSubmitted:
        submitted = await services.submissions.write(session, plan)
        notify_after_commit(session, services.notifier, submitted.jobs[0].id)
        return job_submitted(submitted, language)

    return await creation.answer(create, headers=_location)


def _location(body: Mapping[str, Any]) -> Mapping[str, str]:
    return {"Location": f"/api/v1/jobs/{body['id']}"}
