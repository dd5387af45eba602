"""Engines and sessions. Only the edges open a session, and only they commit.

SQLite: WAL, `synchronous=FULL`, one machine. A writing transaction begins with `BEGIN IMMEDIATE`, because a reader that
turns writer fails at once with "database is locked", whatever the busy timeout says.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession

BUSY_TIMEOUT_MS = 10_000


class Database:
    """Hands out sessions: `reading()` for queries, `writing()` for one transaction that commits at the end."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        self.url = url
        self.engine = _create_engine(url, pool_size=pool_size)
        self._readers = async_sessionmaker(self.engine, class_=AsyncSession, expire_on_commit=False)
        writing_engine = self.engine.execution_options(deepe_writes=True)
        self._writers = async_sessionmaker(writing_engine, class_=AsyncSession, expire_on_commit=False)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """Yield a session for queries; nothing is committed."""
        async with self._readers() as session:
            yield session

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """Yield a session whose transaction commits when the block ends and rolls back when it raises."""
        async with self._writers() as session, session.begin():
            yield session

    async def ping(self) -> None:
        """Raise when the database does not answer."""
        async with self.engine.connect() as connection:
            await connection.execute(sa.text("SELECT 1"))

    async def close(self) -> None:
        """Give all connections back."""
        await self.engine.dispose()


def _create_engine(url: str, *, pool_size: int) -> AsyncEngine:
    if make_url(url).get_backend_name() != "sqlite":
        return create_async_engine(
            url,
            pool_size=pool_size,
            pool_pre_ping=True,
            connect_args={"server_settings": {"application_name": "deepe", "jit": "off"}, "timeout": 10},
        )
    engine = create_async_engine(url, pool_size=pool_size, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # the driver must not open transactions on its own: we say which kind (see the module docstring)
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("deepe_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
