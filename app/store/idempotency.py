"""Keys of creates that may be sent again; written in the transaction that creates."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import CursorResult
from sqlmodel import col
from sqlmodel.ext.asyncio.session import AsyncSession

from app.store.tables import IdempotencyRow

_UNANSWERED = 0


async def reserve(
    session: AsyncSession, *, scope: str, key: str, fingerprint: str, now: datetime
) -> IdempotencyRow | None:
    """Reserve the key in this transaction, or return the answer of the request that had it first.

    Waits while another transaction holds the key: Postgres at the unique index, SQLite at its one writer.
    """
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    statement = insert(IdempotencyRow).values(
        scope=scope, key=key, fingerprint=fingerprint, status_code=_UNANSWERED, body={}, created_at=now
    )
    result = await session.exec(statement.on_conflict_do_nothing())
    assert isinstance(result, CursorResult)
    if result.rowcount == 1:
        return None
    return await session.get_one(IdempotencyRow, (scope, key), populate_existing=True)


async def keep(session: AsyncSession, *, scope: str, key: str, status_code: int, body: Mapping[str, Any]) -> None:
    """Write the answer beside the reserved key."""
    await session.exec(
        sa.update(IdempotencyRow)
        .where(col(IdempotencyRow.scope) == scope, col(IdempotencyRow.key) == key)
        .values(status_code=status_code, body=dict(body))
    )
