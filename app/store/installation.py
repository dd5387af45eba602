"""What all processes of an installation agree on, by key."""

import contextlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import IntegrityError
from sqlmodel import col
from sqlmodel.ext.asyncio.session import AsyncSession

from app.store.tables import InstallationRow


async def get(session: AsyncSession, key: str) -> Mapping[str, Any] | None:
    """Return the value, None if there is none."""
    row = await session.get(InstallationRow, key, populate_existing=True)
    return None if row is None else row.value


async def put(session: AsyncSession, key: str, value: Mapping[str, Any] | None, *, now: datetime) -> None:
    """Write the value, or remove it when it is None; of two at once, either may win."""
    this = col(InstallationRow.key) == key
    if value is None:
        await session.exec(sa.delete(InstallationRow).where(this))
        return
    written = await session.exec(sa.update(InstallationRow).where(this).values(value=dict(value), updated_at=now))
    assert isinstance(written, CursorResult)
    if written.rowcount == 0:
        with contextlib.suppress(IntegrityError):
            async with session.begin_nested():
                session.add(InstallationRow(key=key, value=dict(value), updated_at=now))
