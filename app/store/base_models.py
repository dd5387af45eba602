"""Base models: folders under `models/` that trainings start from."""

from collections.abc import Sequence

from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import NotFound
from app.store import named
from app.store.tables import BaseModelRow


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
