"""Models that jobs made: lists, lineage, files, deletion.

Deletion goes in steps that a crash may separate: the tool that serves the model is asked to unload it; the row is
marked as deleted; the folder is removed. What a crash left of the last step is removed at the next start.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.deploy_targets import DeployTargetKind
from app.domain.errors import Conflict
from app.presets.shared.helpers.deepe_addresses import AddressPolicy
from app.registry.models.archive import Archive, archive_of
from app.registry.models.folders import ModelFile, existing_file, existing_folder, list_files, remove_folder
from app.registry.models.serving_tools import unload_from_ollama
from app.store import methods as method_store
from app.store import models as store
from app.store.home import Home
from app.store.models import ModelFilter
from app.store.paging import PageRequest, Slice
from app.store.session import Database
from app.store.tables import JobRow, MethodRow, ModelRow
from app.store.usage import unfinished_jobs

logger = logging.getLogger(__name__)


class ModelInUse(Conflict):
    """Unfinished jobs work on the model."""

    code = "model_in_use"


@dataclass(frozen=True)
class Lineage:
    """A model and what it comes from and became: `parents` up to the base model, nearest first, and `children`."""

    model: ModelRow
    method: MethodRow | None
    job: JobRow | None
    parents: Sequence[ModelRow]
    children: Sequence[ModelRow]


class Models:
    """Reads and deletes models. Deletion runs its own short transactions, with the network between them."""

    def __init__(
        self,
        *,
        database: Database,
        home: Home,
        clock: Callable[[], datetime],
        addresses: AddressPolicy = AddressPolicy.ANY,
    ) -> None:
        self._addresses = addresses
        self._database = database
        self._home = home
        self._clock = clock

    async def get(self, session: AsyncSession, model: str) -> ModelRow:
        """Return the existing model with this id or name."""
        return await store.get_model(session, model)

    async def page(self, session: AsyncSession, wanted: ModelFilter, paging: PageRequest) -> Slice[ModelRow]:
        """Return one page of the existing models."""
        return await store.page(session, wanted, paging)

    async def method_id_of(self, session: AsyncSession, method: str | None) -> str | None:
        """Return the id of the existing method with this id or name; else what was given, the id of a deleted one."""
        if method is None:
            return None
        row = await method_store.find(session, method)
        return row.id if row is not None else method

    async def lineage(self, session: AsyncSession, model: str) -> Lineage:
        """Return the model with everything it comes from and became."""
        row = await store.get_model(session, model)
        return Lineage(
            model=row,
            method=await session.get(MethodRow, row.method_id),
            job=None if row.job_id is None else await session.get(JobRow, row.job_id),
            parents=await store.ancestors(session, row),
            children=await store.children(session, row),
        )

    async def files(self, row: ModelRow) -> list[ModelFile]:
        """Return the files of the model; an online model has none here."""
        folder = self._folder(row)
        return [] if folder is None else await asyncio.to_thread(list_files, folder)

    async def file(self, row: ModelRow, name: str) -> Path:
        """Return the file that the list calls `name`. Raises `ModelFileNotFound`."""
        return await asyncio.to_thread(existing_file, self._folder(row), row.name, name)

    async def archive(self, row: ModelRow) -> Archive:
        """Return the files of the model as a tar. Raises `ModelFileNotFound` for a model without files here."""
        return await asyncio.to_thread(archive_of, existing_folder(self._folder(row), row.name), row.name)

    def _folder(self, row: ModelRow) -> Path | None:
        return None if row.path is None else self._home.absolute(row.path)

    async def delete(self, model: str, *, without_unloading: bool = False) -> None:
        """Delete the model: its folder if a job made it, else what serves it is asked to unload it.

        Models made from it and its lineage stay. Raises `ModelInUse`, and `DeployTargetUnreachable` unless
        `without_unloading`: then the entry goes and the tool is left alone.
        """
        async with self._database.reading() as session:
            row = await self._deletable(session, model)
        served = _served_by_ollama(row)
        if served and not without_unloading:
            await unload_from_ollama(served, row.name, policy=self._addresses)
        async with self._database.writing() as session:
            row = await self._deletable(session, row.id)
            await store.mark_deleted(session, row.id, now=self._clock())
        await self._remove(row)

    async def finish_deletions(self) -> int:
        """Remove folders that a crash left of deleted models; return how many. Called at start."""
        async with self._database.reading() as session:
            rows = await store.deleted_with_folder(session)
        removed = [await self._remove(row) for row in rows]
        return sum(removed)

    async def _deletable(self, session: AsyncSession, model: str) -> ModelRow:
        row = await store.get_model(session, model)
        if jobs := await unfinished_jobs(session, model_id=row.id):
            raise ModelInUse(model=row.name, count=len(jobs), jobs=", ".join(jobs[:5]))
        return row

    async def _remove(self, row: ModelRow) -> bool:
        if row.path is None or row.job_id is None or not self._home.absolute(row.path).is_dir():
            return False  # the files of a model that was made elsewhere are not ours
        async with self._database.reading() as session:
            living = await store.living_paths(session, inside=row.path)
        keep = [self._home.absolute(path) for path in living]
        folder = self._home.absolute(row.path)
        removed = await asyncio.to_thread(remove_folder, folder, root=self._home.runs, keep=keep)
        if not removed:
            logger.warning("model_folder_kept", extra={"model_id": row.id, "path": row.path})
        return removed


def _served_by_ollama(row: ModelRow) -> str | None:
    """Return the address of the Ollama that serves the model; what a user's own script deployed is the user's."""
    deployment = row.details.get("deployment") or {}
    return deployment.get("url") if deployment.get("kind", DeployTargetKind.OLLAMA) == DeployTargetKind.OLLAMA else None
