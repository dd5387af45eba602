"""aiosqlite with one trip to its thread for each statement.

aiosqlite hands every call to the thread of its connection and waits for the answer. SQLAlchemy makes four calls for a
query (cursor, execute, fetchall, close) and one more for `BEGIN`, and each wakes the thread and the event loop: that
was most of what reading a row cost. Here a statement is executed and its rows are fetched in one call, together with
the `BEGIN` of its transaction. There are no server-side cursors: rows are fetched whole.
"""

import asyncio
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Self

import aiosqlite


class SqliteConnection(aiosqlite.Connection):
    """A connection for SQLAlchemy's dialect `sqlite+aiosqlite`."""

    def __init__(self, database: str, **options: Any) -> None:
        super().__init__(lambda: sqlite3.connect(database, **options), iter_chunk_size=64)
        self._thread.daemon = True
        self._beginning: str | None = None
        self._reads = False
        self._used = False
        self._stopped = False

    def stop(self) -> asyncio.Future[Any] | None:
        """End the thread; only the first call has an effect.

        aiosqlite would hand a second stop to a thread that has ended and wait for it for ever: a task that is cancelled
        while it closes the connection, as at the end of the event loop, then kept its process from ending.
        """
        if self._stopped:
            return None
        self._stopped = True
        return super().stop()

    def begin_with_next(self, *, write: bool) -> None:
        """Begin a transaction right before the next statement: one that writes, or one that only reads."""
        self._beginning, self._reads = "BEGIN IMMEDIATE" if write else "BEGIN", not write

    def cursor(self) -> "_Cursor":  # type: ignore[override]
        return _Cursor(self)

    async def commit(self) -> None:
        if self._is_open():
            await super().commit()
            self._used = False

    async def rollback(self) -> None:
        if not self._is_open():
            return
        if self._reads:
            # nothing depends on its end: the thread comes to it before the next statement, nothing waits
            self._tx.put_nowait((None, self._conn.rollback))
        else:
            await super().rollback()
        self._used = False

    def _is_open(self) -> bool:
        """Whether a transaction may be open; statements of a cancelled task may be on their way to the thread."""
        self._beginning = None
        return self._used

    async def run(self, cursor: "_Cursor", method: str, sql: str, parameters: Iterable[Any]) -> None:
        """Execute in the thread; leave the outcome in `cursor`."""
        beginning, self._beginning, self._used = self._beginning, None, True
        await self._execute(self._run, cursor, method, sql, parameters, beginning)  # type: ignore[no-untyped-call]

    def _run(self, cursor: "_Cursor", method: str, sql: str, parameters: Iterable[Any], beginning: str | None) -> None:
        if beginning is not None:
            self._conn.execute(beginning)
        real = self._conn.cursor()
        try:
            getattr(real, method)(sql, parameters)
            cursor.description = real.description
            cursor.rows = real.fetchall() if real.description else []
            cursor.rowcount, cursor.lastrowid = real.rowcount, real.lastrowid
        finally:
            real.close()


class _Cursor:
    """What SQLAlchemy asks of a cursor."""

    def __init__(self, connection: SqliteConnection) -> None:
        self._connection = connection
        self.arraysize = 1
        self.description: Any = None
        self.rowcount = -1
        self.lastrowid: int | None = None
        self.rows: list[Any] = []

    async def __aenter__(self) -> Self:
        return self

    async def execute(self, sql: str, parameters: Iterable[Any] = ()) -> Self:
        await self._connection.run(self, "execute", sql, parameters)
        return self

    async def executemany(self, sql: str, parameters: Iterable[Iterable[Any]]) -> Self:
        await self._connection.run(self, "executemany", sql, parameters)
        return self

    async def fetchall(self) -> Sequence[Any]:
        return self.rows

    async def close(self) -> None:
        self.rows = []
