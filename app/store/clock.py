"""The database's clock. Leases are compared across nodes, so nodes must not use their own."""

from datetime import UTC, datetime

import sqlalchemy as sa
from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession


async def database_now(session: AsyncSession) -> datetime:
    """Return the present time in UTC. SQLite serves one machine, whose clock is the database's."""
    if session.get_bind().dialect.name == "sqlite":
        return datetime.now(UTC)
    now: datetime = (await session.exec(select(sa.func.clock_timestamp()))).one()
    return now.astimezone(UTC)
