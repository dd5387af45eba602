"""Models that jobs made or people registered, with their lineage.

Rows of deleted models stay: other models, jobs and people name them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import ModelState, TrainingType
from app.domain.errors import Conflict, NotFound
from app.store.paging import PageRequest, Slice, page_slice
from app.store.tables import ModelRow

SORTABLE: Mapping[str, Any] = {
    "name": ModelRow.name,
    "created_at": ModelRow.created_at,
    "size_bytes": ModelRow.size_bytes,
}


class ModelNotFound(NotFound):
    """No existing model has this id or name."""

    code = "model_not_found"


class ModelNameAmbiguous(Conflict):
    """Several existing models have the name."""

    code = "model_name_ambiguous"


@dataclass(frozen=True)
class NewModel:
    """A model that a job made (`job_id`) or that was made elsewhere; paths are relative to `DEEPE_HOME`."""

    name: str
    state: ModelState
    training_type: TrainingType
    path: str | None
    size_bytes: int
    base_model_id: str
    base_model_name: str
    base_model_path: str
    job_id: str | None
    method_id: str
    method_version: int
    parent_id: str | None = None
    dataset_id: str | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    project_id: str | None = None
    """Of the job that made it; None is the session's."""
    created_by: str = ""


@dataclass(frozen=True)
class ModelFilter:
    """Which models a list shows; `None` matches all. `text` is looked for in the name."""

    state: ModelState | None = None
    training_type: TrainingType | None = None
    base_model: str | None = None
    method_id: str | None = None
    dataset: str | None = None
    text: str | None = None


async def create_model(session: AsyncSession, new: NewModel, *, now: datetime) -> ModelRow:
    """Insert the model of a job; a job that settles twice gets the model it made the first time."""
    if new.job_id is not None:
        existing = (await session.exec(select(ModelRow).where(ModelRow.job_id == new.job_id))).first()
        if existing is not None:
            return existing
    values = {**vars(new), "parameters": dict(new.parameters), "details": dict(new.details)}
    row = ModelRow(id=str(uuid4()), created_at=now, **values)
    session.add(row)
    await session.flush()
    return row


async def find_model(session: AsyncSession, model_id: str, *, lock: bool = False) -> ModelRow | None:
    """Return the model with this id, deleted or not. With `lock`, its row is locked until the transaction ends."""
    for_update: Any = {"key_share": True} if lock else None
    return await session.get(ModelRow, model_id, populate_existing=lock, with_for_update=for_update)


async def name_is_taken(session: AsyncSession, name: str) -> bool:
    """Return whether an existing model has this name."""
    named = select(ModelRow.id).where(ModelRow.name == name, col(ModelRow.deleted_at).is_(None)).limit(1)
    return (await session.exec(named)).first() is not None


async def get_model(session: AsyncSession, model: str) -> ModelRow:
    """Return the existing model with this id or name or raise `ModelNotFound`."""
    row = await session.get(ModelRow, model)
    if row is not None and row.deleted_at is None:
        return row
    named = select(ModelRow).where(ModelRow.name == model, col(ModelRow.deleted_at).is_(None)).limit(2)
    rows = (await session.exec(named)).all()
    if not rows:
        raise ModelNotFound(model=model)
    if len(rows) > 1:
        raise ModelNameAmbiguous(model=model)
    return rows[0]


async def page(session: AsyncSession, wanted: ModelFilter, paging: PageRequest) -> Slice[ModelRow]:
    """Return one page of the existing models; `paging.sort` is a key of `SORTABLE`."""
    statement = select(ModelRow).where(col(ModelRow.deleted_at).is_(None))
    if wanted.state is not None:
        statement = statement.where(ModelRow.state == wanted.state)
    if wanted.training_type is not None:
        statement = statement.where(ModelRow.training_type == wanted.training_type)
    if wanted.method_id is not None:
        statement = statement.where(ModelRow.method_id == wanted.method_id)
    if wanted.base_model is not None:
        statement = statement.where(
            sa.or_(col(ModelRow.base_model_id) == wanted.base_model, col(ModelRow.base_model_name) == wanted.base_model)
        )
    if wanted.dataset is not None:
        statement = statement.where(
            sa.or_(col(ModelRow.dataset_id) == wanted.dataset, col(ModelRow.dataset_name) == wanted.dataset)
        )
    if wanted.text:
        statement = statement.where(col(ModelRow.name).icontains(wanted.text, autoescape=True))
    return await page_slice(session, statement, paging, column=SORTABLE[paging.sort], tie=ModelRow.id)


async def ancestors(session: AsyncSession, row: ModelRow) -> list[ModelRow]:
    """Return the models that `row` was made from, its parent first; deleted ones too."""
    found: list[ModelRow] = []
    parent_id = row.parent_id
    while parent_id is not None and all(parent_id != model.id for model in found):
        parent = await session.get(ModelRow, parent_id)
        if parent is None:
            break
        found.append(parent)
        parent_id = parent.parent_id
    return found


async def children(session: AsyncSession, row: ModelRow) -> Sequence[ModelRow]:
    """Return the models that were made from `row`, oldest first; deleted ones too."""
    statement = select(ModelRow).where(ModelRow.parent_id == row.id)
    return (await session.exec(statement.order_by(col(ModelRow.created_at), col(ModelRow.id)))).all()


async def mark_deleted(session: AsyncSession, model_id: str, *, now: datetime) -> bool:
    """Mark the model as deleted; return `False` if it was already."""
    statement = (
        sa.update(ModelRow)
        .where(col(ModelRow.id) == model_id, col(ModelRow.deleted_at).is_(None))
        .values(deleted_at=now)
    )
    result = await session.exec(statement)
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


async def deleted_with_folder(session: AsyncSession) -> Sequence[ModelRow]:
    """Return the deleted models that had a folder."""
    statement = select(ModelRow).where(col(ModelRow.deleted_at).is_not(None), col(ModelRow.path).is_not(None))
    return (await session.exec(statement)).all()


async def living_paths(session: AsyncSession, *, inside: str) -> Sequence[str]:
    """Return the paths of existing models that are, or are in, the folder `inside` (all relative to `DEEPE_HOME`)."""
    there = sa.or_(col(ModelRow.path) == inside, col(ModelRow.path).startswith(f"{inside}/", autoescape=True))
    statement = select(ModelRow.path).where(col(ModelRow.deleted_at).is_(None), there)
    return [path for path in (await session.exec(statement)).all() if path is not None]
