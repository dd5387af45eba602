"""Keyset pages: rows after a position in a stable order, so that page 1,000 costs what page 1 costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import SelectOfScalar

RowT = TypeVar("RowT")
Position = tuple[Any, Any]
"""Sort value and tie value of a row."""


@dataclass(frozen=True)
class PageRequest:
    """The page asked for and its order; `after` is the position before its first row."""

    limit: int
    sort: str
    descending: bool
    after: Position | None


@dataclass(frozen=True)
class Order:
    """Sort column, the unique column that breaks ties, and the direction of both (all SQLModel attributes)."""

    column: Any
    tie: Any
    descending: bool = False


@dataclass(frozen=True)
class Slice(Generic[RowT]):
    """Rows of one page, and the position after which the next page begins."""

    rows: Sequence[RowT]
    next_position: Position | None


async def page_slice(
    session: AsyncSession, statement: SelectOfScalar[RowT], wanted: PageRequest, *, column: Any, tie: Any
) -> Slice[RowT]:
    """Return the page of `statement` that is wanted; `column` is what `wanted.sort` means here."""
    order = Order(column, tie, descending=wanted.descending)
    return await keyset_slice(session, statement, order, after=wanted.after, limit=wanted.limit)


async def keyset_slice(
    session: AsyncSession,
    statement: SelectOfScalar[RowT],
    order: Order,
    *,
    after: Position | None,
    limit: int,
) -> Slice[RowT]:
    """Return up to `limit` rows of `statement` (a select of one table class) after the position `after`."""
    if after is not None:
        # The first condition is the range that the index is entered at. Neither database finds it by itself in
        # `a < x OR (a = x AND b < y)`, and SQLite takes only the first column of `(a, b) < (x, y)`.
        value, tie = after
        reached = order.column <= value if order.descending else order.column >= value
        beyond = order.column < value if order.descending else order.column > value
        tied = order.tie < tie if order.descending else order.tie > tie
        statement = statement.where(reached, sa.or_(beyond, tied))
    direction = sa.desc if order.descending else sa.asc
    statement = statement.order_by(direction(order.column), direction(order.tie)).limit(limit + 1)
    rows = (await session.exec(statement)).all()
    if len(rows) <= limit:
        return Slice(rows=rows, next_position=None)
    last = rows[limit - 1]
    return Slice(rows=rows[:limit], next_position=(getattr(last, order.column.key), getattr(last, order.tie.key)))
