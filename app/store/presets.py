"""Which shipped methods were installed, from which version, and which were deleted on purpose."""

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.store.tables import PresetRow

_INSTALL_LOCK = 0x70726573  # "pres"; any constant that no other user of the database takes


async def lock_installation(session: AsyncSession) -> None:
    """Lock the installation of presets until the transaction ends; on SQLite the transaction itself is the lock."""
    postgres = session.get_bind().dialect.name == "postgresql"
    await (await session.connection()).execute(
        sa.text(f"SELECT pg_advisory_xact_lock({_INSTALL_LOCK})" if postgres else "SELECT 1")
    )


async def all_rows(session: AsyncSession) -> Sequence[PresetRow]:
    """Return what was ever installed."""
    return (await session.exec(select(PresetRow))).all()


async def record(session: AsyncSession, name: str, *, method_id: str, version: int) -> None:
    """Remember that the preset is there, in this version."""
    row = await session.get(PresetRow, name)
    if row is None:
        session.add(PresetRow(name=name, method_id=method_id, version=version, removed_at=None))
    else:
        row.method_id, row.version, row.removed_at = method_id, version, None
    await session.flush()


async def mark_removed(session: AsyncSession, method_id: str, *, now: datetime) -> None:
    """Remember that the preset's method was deleted, so that it stays away."""
    await session.exec(sa.update(PresetRow).where(col(PresetRow.method_id) == method_id).values(removed_at=now))
