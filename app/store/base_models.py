"""Base models: folders under `models/` that trainings start from."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import ModelState
from app.domain.errors import NotFound
from app.store import named
from app.store.tables import BUILDING_BASE_MODEL, BaseModelRow, JobRow, ModelRow


class BaseModelNotFound(NotFound):
    """No base model has this id or name."""

    code = "base_model_not_found"


async def get_base_model(session: AsyncSession, base_model: str) -> BaseModelRow:
    """Return the base model with this id or name or raise `BaseModelNotFound`."""
    row = await named.find(session, BaseModelRow, base_model)
    if row is None:
        raise BaseModelNotFound(base_model=base_model)
    return row


async def registered_paths(session: AsyncSession) -> Sequence[str]:
    """Return the paths of all base models, relative to `DEEPE_HOME`."""
    return (await session.exec(select(BaseModelRow.path))).all()


async def paths_besides(session: AsyncSession, base_model_id: str) -> Sequence[str]:
    """Return the paths of all other base models, relative to `DEEPE_HOME`."""
    return (await session.exec(select(BaseModelRow.path).where(BaseModelRow.id != base_model_id))).all()


async def customized_models(session: AsyncSession, path: str) -> Sequence[str]:
    """Return the names of the existing customized models that need the base model at `path` to answer."""
    statement = select(ModelRow.name).where(
        ModelRow.base_model_path == path,
        ModelRow.state == ModelState.CUSTOMIZED,
        col(ModelRow.deleted_at).is_(None),
    )
    return (await session.exec(statement.order_by(ModelRow.name))).all()


async def lock(session: AsyncSession, base_model_id: str) -> BaseModelRow | None:
    """Return the row as it is now, locked until the transaction ends; None if it was deleted."""
    return await session.get(BaseModelRow, base_model_id, populate_existing=True, with_for_update=True)


async def unfinished_build(session: AsyncSession, base_model_id: str) -> str | None:
    """Return the id of the job that makes the base model now."""
    statement = select(JobRow.id).where(JobRow.base_model_id == base_model_id, sa.text(BUILDING_BASE_MODEL))
    return (await session.exec(statement)).first()


async def record_built(session: AsyncSession, base_model_id: str, *, card: Mapping[str, Any], now: datetime) -> None:
    """Write down that the files are there, and what they say. The row may have been deleted."""
    built = sa.update(BaseModelRow).where(col(BaseModelRow.id) == base_model_id)
    await session.exec(built.values(card=dict(card), built_at=now))
