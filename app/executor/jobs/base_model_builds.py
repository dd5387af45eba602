"""A sample base model is made by a job, before the first training that starts from it.

The job is a chain of its own: of all who submit with the base model before it is made, the first orders it and the
others wait for the same one. When it fails, those that wait end with its reason; the next submit or retry orders it
anew. Who orders holds a lock on the base model's row, and its end writes that row first: no job is left to wait for
one that has ended.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import JobKind
from app.domain.errors import Violation
from app.domain.transitions import TERMINAL
from app.executor.runs.job_spec import JobSpec, Named
from app.presets.catalogue import SampleBaseModel
from app.registry.samples import sample_that_makes
from app.store import base_models
from app.store import jobs as store
from app.store.home import Home
from app.store.tables import BaseModelRow, JobRow


def must_be_made(row: BaseModelRow | None, path: str, home: Home) -> bool:
    """Say whether what a submission names as the base model's `path` is not there, and a job makes it. Blocks."""
    if row is None or row.path != path or sample_that_makes(row) is None:
        return False
    return row.built_at is None or not home.absolute(path).exists()


async def build_before(session: AsyncSession, jobs: Sequence[JobRow], home: Home, *, now: datetime) -> list[Violation]:
    """Let a chain that is about to be inserted wait until its base model is made; return what to tell the caller."""
    first = jobs[0]
    assert first.base_model_id is not None
    row = await base_models.lock(session, first.base_model_id)
    if row is None or not await asyncio.to_thread(must_be_made, row, row.path, home):  # it was made meanwhile
        return []
    first.blocked_by = await _build(session, row, first, now=now)
    return [Violation("/base_model", "base_model_made_first", {"base_model": row.name, "job": first.blocked_by})]


async def _build(session: AsyncSession, row: BaseModelRow, wanted_by: JobRow, *, now: datetime) -> str:
    """Return the job that makes the base model; a new one unless one is at it. The row is locked."""
    unfinished = await base_models.unfinished_build(session, row.id)
    # locked: it must not fail between this look and the end of the transaction
    if unfinished is not None and (await store.get(session, unfinished, lock=True)).status not in TERMINAL:
        return unfinished
    sample = sample_that_makes(row)
    assert sample is not None
    job = _new_build(row, sample, wanted_by, now=now)
    await store.insert(session, [job])
    return job.id


def _new_build(row: BaseModelRow, sample: SampleBaseModel, wanted_by: JobRow, *, now: datetime) -> JobRow:
    spec = JobSpec(
        base_model=Named(id=row.id, name=row.name, path=row.path),
        sample=sample.name,
        wait=JobSpec.of(wanted_by).wait,
    )
    assert sample.environment is not None
    return store.new_job(
        kind=JobKind.BASE_MODEL,
        name=row.name,
        environment=sample.environment,
        launch=spec.document(),
        now=now,
        base_model_id=row.id,
        priority=wanted_by.priority,
        submitted_by=wanted_by.submitted_by,
    )
