"""What to change in a job that failed, from its rows and its script (`app.domain.fixes` has the rules)."""

import asyncio
from collections.abc import Sequence
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.errors import NotFound
from app.domain.fixes import Fix, Knobs, fix_for
from app.executor.jobs.stage_parameters import StageParameters
from app.executor.runs.job_spec import Snapshot
from app.registry.method_record import Method, method_of
from app.store import methods
from app.store.tables import DatasetRow, JobRow

FIXABLE = frozenset(
    {
        EndReason.OUT_OF_MEMORY,
        EndReason.CUDA_OUT_OF_MEMORY,
        EndReason.METAL_WATCHDOG,
        EndReason.COLUMN_MISSING,
    }
)


class Fixes:
    """Finds the change that a failed job is offered."""

    def __init__(self, parameters: StageParameters) -> None:
        self._parameters = parameters

    async def of(self, session: AsyncSession, job: JobRow) -> Fix | None:
        """Return the change, None if the job did not fail or nothing concrete is known."""
        if job.status is not JobStatus.FAILED or job.reason not in FIXABLE:
            return None
        knobs = await self.knobs(session, job)
        if knobs is None:
            return None
        return fix_for(job.reason, job.reason_params, knobs, columns=await columns_of(session, job))

    async def knobs(self, session: AsyncSession, job: JobRow) -> Knobs | None:
        """Return what the job's script declares and was given; None if the script is no longer known."""
        method = await pinned_method(session, job)
        if method is None or job.kind is JobKind.ENVIRONMENT:
            return None
        script = await asyncio.to_thread(self._parameters.read, method, job.kind)
        return Knobs(declared=script.by_name(), given=given_to(job))


def given_to(job: JobRow) -> dict[str, Any]:
    """Return the values that the job's script gets."""
    return {**Snapshot.of(job).effective, **job.parameters}


async def pinned_method(session: AsyncSession, job: JobRow) -> Method | None:
    """Return the version of the method that the job runs."""
    if job.method_id is None or job.method_version is None:
        return None
    try:
        row = await methods.get_even_deleted(session, job.method_id)
        return method_of(row, await methods.get_version(session, row, job.method_version))
    except NotFound:
        return None


async def columns_of(session: AsyncSession, job: JobRow) -> Sequence[str]:
    """Return the columns of the job's data set as it is now."""
    data = await session.get(DatasetRow, job.dataset_id) if job.dataset_id is not None else None
    return data.columns if data is not None else ()
