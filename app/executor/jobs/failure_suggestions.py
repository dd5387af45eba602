"""Suggest changes for a failed job from its rows and its script. `app.domain.failure_suggestions` has the rules."""

import asyncio
from collections.abc import Sequence
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.errors import NotFound
from app.domain.failure_suggestions import (
    OUT_OF_MEMORY,
    ExpectedMemory,
    FailureSuggestion,
    TunableParameters,
    suggestion_for,
)
from app.domain.kinds import KINDS, as_stage
from app.executor.jobs.stage_parameters import StageParameters
from app.executor.runs.job_spec import JobSpec, is_runner_call
from app.executor.runs.memory_forecasts import Device, expected_again
from app.registry.methods.record import Method, method_of
from app.store import methods
from app.store.home import Home
from app.store.tables import DatasetRow, JobRow, NodeRow

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

    def __init__(self, parameters: StageParameters, home: Home) -> None:
        self._parameters = parameters
        self._home = home

    async def of(
        self,
        job: JobRow,
        method: Method | None,
        columns: Sequence[str],
        *,
        node: NodeRow | None = None,
        reported_mib: float | None = None,
    ) -> FailureSuggestion | None:
        """Return the suggested change. `None` if the job did not fail or no concrete change is known.

        `method` is the version that the job ran, `columns` are those of its data set now, `node` is where it ran and
        `reported_mib` the memory that its script expected to need.
        """
        if not may_have_suggestion(job) or job.reason is None:
            return None
        tunable = await self.tunable_parameters(job, method)
        if tunable is None:
            return None
        memory = None
        if job.reason in OUT_OF_MEMORY and job.kind is JobKind.TRAINING and method is not None and node is not None:
            memory = await asyncio.to_thread(self._memory, job, method, tunable, Device.of(node), reported_mib)
        return suggestion_for(job.reason, job.reason_params, tunable, columns=columns, memory=memory)

    def _memory(
        self, job: JobRow, method: Method, tunable: TunableParameters, device: Device, reported_mib: float | None
    ) -> ExpectedMemory | None:
        """Return what the job is expected to have needed, and what would fit. `None`: that is not known."""
        base = JobSpec.of(job).base_model
        if base is None or device.memory_mib is None:
            return None
        values = {name: one.default for name, one in tunable.declared.items()} | dict(tunable.given)
        folder = self._home.absolute(base.path)
        found = expected_again(method.preset, folder, values, device, reported_mib=reported_mib)
        if found is None:
            return None
        return ExpectedMemory(found.expected_mib, device.memory_mib, device.name, found.changes or {})

    async def tunable_parameters(self, job: JobRow, method: Method | None) -> TunableParameters | None:
        """Return what the job's script declares and was given. `None` if the script is no longer known."""
        if method is None or not KINDS[job.kind].is_stage:
            return None
        script = await asyncio.to_thread(self._parameters.read, method, as_stage(job.kind))
        return TunableParameters(declared=script.by_name(), given=given_to(job))


def may_have_suggestion(job: JobRow) -> bool:
    """Return whether the job failed for a reason that a change of its parameters may help."""
    return job.status is JobStatus.FAILED and job.reason in REASONS_WITH_SUGGESTIONS and not is_runner_call(job)


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
