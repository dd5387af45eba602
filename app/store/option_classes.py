"""Configuration classes of libraries that nodes described, each document once, by its digest."""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.store.tables import OptionClassRow


async def keep(session: AsyncSession, documents: Mapping[str, Mapping[str, Any]], *, now: datetime) -> None:
    """Write the documents that are not there yet; `documents` has them by digest."""
    if not documents:
        return
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    rows = [
        {"digest": digest, "path": document["path"], "document": dict(document), "created_at": now}
        for digest, document in sorted(documents.items())  # one order for all nodes: no deadlock
    ]
    await session.exec(insert(OptionClassRow).values(rows).on_conflict_do_nothing())


async def load(session: AsyncSession, digests: Collection[str]) -> Mapping[str, Mapping[str, Any]]:
    """Return the documents of these digests that are there."""
    statement = select(OptionClassRow).where(col(OptionClassRow.digest).in_(digests))
    return {row.digest: row.document for row in (await session.exec(statement)).all()} if digests else {}
