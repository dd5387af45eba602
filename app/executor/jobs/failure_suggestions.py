"""Suggest changes for a failed job from its rows and its script. `app.domain.failure_suggestions` has the rules."""

import asyncio
from collections.abc import Sequence
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason, JobStatus
from app.domain.errors import NotFound
from app.domain.failure_suggestions import FailureSuggestion, TunableParameters, suggestion_for
from app.domain.kinds import KINDS, as_stage
from app.executor.jobs.stage_parameters import StageParameters
from app.executor.runs.job_spec import JobSpec
from app.registry.methods.record import Method, method_of
from app.store import methods
from app.store.tables import DatasetRow, JobRow

REASONS_WITH_SUGGESTIONS = frozenset(
    {
        EndReason.OUT_OF_MEMORY,
        EndReason.CUDA_OUT_OF_MEMORY,
        EndReason.METAL_WATCHDOG,
        EndReason.COLUMN_MISSING,
    }
)


class FailureSuggestions:
    """Finds the change to suggest for a failed job."""

    def __init__(self, parameters: StageParameters) -> None:
        self._parameters = parameters

    async def of(self, job: JobRow, method: Method | None, columns: Sequence[str]) -> FailureSuggestion | None:
        """Return the suggested change. `None` if the job did not fail or no concrete change is known.

        `method` is the version that the job ran, `columns` are those of its data set now.
        """
        if not may_have_suggestion(job) or job.reason is None:
            return None
        tunable = await self.tunable_parameters(job, method)
        return None if tunable is None else suggestion_for(job.reason, job.reason_params, tunable, columns=columns)

    async def tunable_parameters(self, job: JobRow, method: Method | None) -> TunableParameters | None:
        """Return what the job's script declares and was given. `None` if the script is no longer known."""
        if method is None or not KINDS[job.kind].is_stage:
            return None
        script = await asyncio.to_thread(self._parameters.read, method, as_stage(job.kind))
        return TunableParameters(declared=script.by_name(), given=given_to(job))


def may_have_suggestion(job: JobRow) -> bool:
    """Return whether the job failed for a reason that a change of its parameters may help."""
    return job.status is JobStatus.FAILED and job.reason in REASONS_WITH_SUGGESTIONS


def given_to(job: JobRow) -> dict[str, Any]:
    """Return the values that the job's script gets."""
    return dict(JobSpec.of(job).effective)


async def pinned_method(session: AsyncSession, job: JobRow) -> Method | None:
    """Return the version of the method that the job runs."""
    if job.method_id is None or job.method_version is None:
        return None
    try:
        row = await methods.get_even_deleted(session, job.method_id)
        return method_of(row, await methods.get_version(session, row, job.method_version))
    except NotFound:
        return None


async def column_names(session: AsyncSession, job: JobRow) -> Sequence[str]:
    """Return the columns of the job's data set as it is now."""
    data = await session.get(DatasetRow, job.dataset_id) if job.dataset_id is not None else None
    return data.columns if data is not None else ()
