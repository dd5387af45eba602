"""A sample base model is made by a job, before the first training that starts from it; one of a hub is downloaded so.

The job is a chain of its own: of all who submit with the base model before it is made, the first orders it and the
others wait for the same one. When it fails, those that wait end with its reason; the next submit or retry orders it
anew. Who orders holds a lock on the base model's row, and its end writes that row first: no job is left to wait for
one that has ended. A download is ordered at once, by the request that registers it.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import JobKind
from app.domain.errors import Conflict, Violation
from app.domain.names import BASE_ENVIRONMENT
from app.domain.transitions import TERMINAL
from app.executor.runs.job_spec import HubModel, JobSpec, Named
from app.registry.base_models.service import BaseModels, hub_recipe
from app.registry.methods.samples import UNMADE, sample_that_makes
from app.store import base_models
from app.store import jobs as store
from app.store.home import Home
from app.store.tables import BaseModelRow, JobRow


class BaseModelThere(Conflict):
    """The model was downloaded already."""

    code = "base_model_there"


@dataclass(frozen=True)
class _Wanted:
    """How a job that makes a base model is queued."""

    priority: int = 0
    submitted_by: str = ""
    wait: bool = False


class BaseModelDownloads:
    """Registers models of a hub and orders the jobs that download them."""

    def __init__(self, *, base_models: BaseModels, home: Home, clock: Callable[[], datetime]) -> None:
        self._base_models = base_models
        self._home = home
        self._clock = clock

    async def order(
        self, session: AsyncSession, *, name: str, repository: str, revision: str, description: str = ""
    ) -> tuple[JobRow, bool]:
        """Return the job that downloads the model, and whether it is a new one.

        The same model under the same name may be ordered again after a download that failed. Raises `BaseModelThere`.
        """
        row = await self._base_models.register_of_hub(
            session, name=name, recipe=hub_recipe(repository, revision), card=UNMADE, description=description
        )
        locked = await base_models.lock(session, row.id)
        assert locked is not None
        if not await asyncio.to_thread(must_be_made, locked, locked.path, self._home):
            raise BaseModelThere(base_model=row.name)
        job_id, is_new = await _build(session, locked, _Wanted(), now=self._clock())
        return await store.get(session, job_id), is_new


def must_be_made(row: BaseModelRow | None, path: str, home: Home) -> bool:
    """Say whether what a submission names as the base model's `path` is not there, and a job makes it. Blocks."""
    if row is None or row.path != path or (_hub_model(row) is None and sample_that_makes(row) is None):
        return False
    return row.built_at is None or not home.absolute(path).exists()


async def build_before(session: AsyncSession, jobs: Sequence[JobRow], home: Home, *, now: datetime) -> list[Violation]:
    """Let a chain that is about to be inserted wait until its base model is made; return what to tell the caller."""
    first = jobs[0]
    assert first.base_model_id is not None
    row = await base_models.lock(session, first.base_model_id)
    if row is None or not await asyncio.to_thread(must_be_made, row, row.path, home):  # it was made meanwhile
        return []
    wanted = _Wanted(first.priority, first.submitted_by, JobSpec.of(first).wait)
    first.blocked_by, _ = await _build(session, row, wanted, now=now)
    return [Violation("/base_model", "base_model_made_first", {"base_model": row.name, "job": first.blocked_by})]


async def _build(session: AsyncSession, row: BaseModelRow, wanted: _Wanted, *, now: datetime) -> tuple[str, bool]:
    """Return the job that makes the base model, and whether it is a new one. The row is locked."""
    unfinished = await base_models.unfinished_build(session, row.id)
    # locked: it must not fail between this look and the end of the transaction
    if unfinished is not None and (await store.get(session, unfinished, lock=True)).status not in TERMINAL:
        return unfinished, False
    job = _new_build(row, wanted, now=now)
    await store.insert(session, [job])
    return job.id, True


def _new_build(row: BaseModelRow, wanted: _Wanted, *, now: datetime) -> JobRow:
    hub, sample = _hub_model(row), sample_that_makes(row)
    environment = BASE_ENVIRONMENT if sample is None else sample.environment
    assert environment is not None
    spec = JobSpec(
        base_model=Named(id=row.id, name=row.name, path=row.path),
        hub=hub,
        sample=sample.name if sample is not None else None,
        wait=wanted.wait,
    )
    return store.new_job(
        kind=JobKind.BASE_MODEL,
        name=row.name,
        environment=environment,
        launch=spec.document(),
        now=now,
        base_model_id=row.id,
        priority=wanted.priority,
        submitted_by=wanted.submitted_by,
    )


def _hub_model(row: BaseModelRow) -> HubModel | None:
    recipe = row.recipe or {}
    return HubModel.model_validate(recipe) if "repository" in recipe else None
