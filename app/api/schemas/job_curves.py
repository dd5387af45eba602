"""What jobs measured: curves and scores of one, and several side by side."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import Field

from app.api.schemas.common import JOB_ID
from app.api.schemas.jobs import (
    EvaluationRead,
    JobInput,
    JobMethod,
    ProgressRead,
    evaluations_read,
    input_of,
    method_of,
    progress_read,
)
from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.values import Value
from app.executor.jobs.comparison import Comparison
from app.executor.jobs.job_actions import Curves
from app.executor.jobs.job_views import JobDetails
from app.executor.runs.metrics import Point


class SeriesRead(Value):
    """A curve: points by step."""

    name: str = Field(examples=["loss"])
    points: list[tuple[int, float | None]] = Field(
        description="Step and value; a value that was no number is null.", examples=[[[1, 2.31], [2, 1.97]]]
    )


class SampleRead(Value):
    """What a held-out prompt is answered with, before and after the training."""

    prompt: str = Field(description="The last turn of it.", examples=["Which is larger, 3 or 8?"])
    wanted: str = Field(examples=["8"])
    before: str | None = Field(examples=["11"])
    after: str | None = Field(examples=["8"])


class JobMetrics(Value):
    """What a job measured."""

    series: list[SeriesRead]
    evaluations: list[EvaluationRead]
    samples: list[SampleRead]
    progress: ProgressRead | None


class ComparedJob(Value):
    """One of the jobs that are compared."""

    id: str = Field(examples=[JOB_ID])
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


class DifferenceRead(Value):
    """A parameter in which the jobs differ."""

    name: str = Field(examples=["learning_rate"])
    values: list[Any] = Field(description="In the order of `jobs`; null: it has none.", examples=[[0.0002, 0.0001]])


class ComparedSeries(Value):
    """The curve of one job."""

    job: str = Field(examples=[JOB_ID])
    points: list[tuple[int, float | None]] = Field(examples=[[[1, 2.31], [2, 1.97]]])


class ComparedCurve(Value):
    """One metric in all jobs that have it."""

    name: str = Field(examples=["loss"])
    series: list[ComparedSeries]


class JobComparison(Value):
    """Jobs side by side."""

    jobs: list[ComparedJob]
    differences: list[DifferenceRead] = Field(description="The parameters that are not the same in all jobs.")
    curves: list[ComparedCurve]


def job_metrics(curves: Curves) -> JobMetrics:
    """Return the curves of a job."""
    return JobMetrics(
        series=[SeriesRead(name=name, points=_points(points)) for name, points in curves.series.items()],
        evaluations=evaluations_read(curves.evaluations),
        samples=[SampleRead(**vars(sample)) for sample in curves.samples],
        progress=progress_read(curves.progress),
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


def _compared(details: JobDetails) -> ComparedJob:
    job = details.view.job
    lasted = job.finished_at - job.started_at if job.finished_at and job.started_at else None
    return ComparedJob(
        id=job.id,
        name=job.name,
        stage=job.kind,
        status=job.status,
        reason=job.reason,
        method=method_of(job),
        base_model=input_of(job, "base_model"),
        dataset=input_of(job, "dataset"),
        result_model=job.result_model_id,
        seconds=None if lasted is None else lasted.total_seconds(),
        metrics=details.digest.latest,
        evaluations=evaluations_read(details.digest.evaluations),
        created_at=job.created_at,
    )


def _points(points: Sequence[Point]) -> list[tuple[int, float | None]]:
    return [(point.step, point.value) for point in points]
