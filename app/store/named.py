"""What rows with a unique name have in common: found by id or name, inserted once, listed by name or age."""

from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.names import name_key
from app.store.methods import NameTaken
from app.store.paging import PageRequest, Slice, page_slice
from app.store.tables import BaseModelRow, DatasetRow, DeployTargetRow, EnvironmentRow

RowT = TypeVar("RowT", BaseModelRow, DatasetRow, DeployTargetRow, EnvironmentRow)


async def find(session: AsyncSession, table: type[RowT], given: str) -> RowT | None:
    """Return the row with this id, else with this name."""
    row = await session.get(table, given)
    if row is not None:
        return row
    statement: Any = select(table).where(table.name_key == name_key(given))
    found: RowT | None = (await session.exec(statement)).first()
    return found


async def name_is_taken(session: AsyncSession, table: type[RowT], name: str) -> bool:
    """Return whether a row has this name."""
    statement: Any = select(table.id).where(table.name_key == name_key(name))
    return (await session.exec(statement)).first() is not None


async def insert(session: AsyncSession, row: RowT) -> None:
    """Insert the row or raise `NameTaken`; of two at the same instant the second waits for the first."""
    session.add(row)
    try:
        await session.flush()
    except sa.exc.IntegrityError as exc:
        # SQLite names the column of a broken index, Postgres the index
        if "name_key" in str(exc.orig):
            raise NameTaken(name=row.name, pointer="/name") from exc
        raise


async def update(session: AsyncSession, row: RowT, **values: Any) -> None:
    """Change columns of the row."""
    for name, value in values.items():
        setattr(row, name, value)
    session.add(row)
    await session.flush()


async def delete(session: AsyncSession, row: RowT) -> bool:
    """Delete the row; return `False` if it was already deleted."""
    result = await session.exec(sa.delete(type(row)).where(sa.column("id") == row.id))
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


async def page(session: AsyncSession, table: type[RowT], wanted: PageRequest, *, text: str | None) -> Slice[RowT]:
    """Return one page of the rows whose name contains `text`, sorted by a column or by `name`."""
    statement: Any = select(table)
    if text:
        # the key is folded in every script; the databases' own lower() may know ASCII only
        statement = statement.where(col(table.name_key).contains(name_key(text), autoescape=True))
    column = table.name_key if wanted.sort == "name" else getattr(table, wanted.sort)
    return await page_slice(session, statement, wanted, column=column, tie=table.id)
