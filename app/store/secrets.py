"""Secrets: found by their names. Their values are ciphertext here (`app.access.secrets`)."""

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.store.methods import NameTaken
from app.store.paging import PageRequest, Slice, page_slice
from app.store.tables import SecretRow


async def find(session: AsyncSession, name: str, *, lock: bool = False) -> SecretRow | None:
    """Return the secret of this name; with `lock` as it is now, and others wait until the transaction ends."""
    statement = select(SecretRow).where(col(SecretRow.name) == name).execution_options(populate_existing=lock)
    return (await session.exec(statement.with_for_update() if lock else statement)).first()


async def named(session: AsyncSession, names: Collection[str]) -> Sequence[SecretRow]:
    """Return the secrets of these names that exist."""
    return (await session.exec(select(SecretRow).where(col(SecretRow.name).in_(names)))).all() if names else []


async def all_names(session: AsyncSession) -> frozenset[str]:
    """Return the names of all secrets."""
    return frozenset((await session.exec(select(SecretRow.name))).all())


async def all_secrets(session: AsyncSession, *, lock: bool = False) -> Sequence[SecretRow]:
    """Return all secrets by name; with `lock` others wait until the transaction ends."""
    statement = select(SecretRow).order_by(col(SecretRow.name))
    return (await session.exec(statement.with_for_update() if lock else statement)).all()


async def save(session: AsyncSession, row: SecretRow) -> None:
    """Insert the secret or write its columns; raise `NameTaken` if another request made it a moment ago."""
    session.add(row)
    try:
        await session.flush()
    except sa.exc.IntegrityError as exc:
        raise NameTaken(name=row.name, pointer="") from exc


async def delete(session: AsyncSession, row: SecretRow) -> bool:
    """Delete the secret; return `False` if it was already deleted."""
    result = await session.exec(sa.delete(SecretRow).where(col(SecretRow.id) == row.id))
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


async def page(session: AsyncSession, wanted: PageRequest) -> Slice[SecretRow]:
    """Return one page of the secrets."""
    statement: Any = select(SecretRow)
    return await page_slice(session, statement, wanted, column=getattr(SecretRow, wanted.sort), tie=SecretRow.id)
