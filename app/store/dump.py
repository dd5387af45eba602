"""All rows of a database as text, and a database made of them: the part of a backup that is the same on both.

The form is JSON lines: an object names a table and its columns, the arrays after it are rows. Tables are read as they
stand in the database (reflection), not as this version declares them, so that rows of an older schema can be loaded
into that schema and then migrated. Times are ISO 8601 in UTC.
"""

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.projects import EVERY_PROJECT
from app.store.migrate import VERSION_TABLE, for_migrations, migrate_connection
from app.store.session import Database

LEFT_OUT: Final = frozenset({VERSION_TABLE, "idempotency"})  # answers that are kept for a day
_ROWS_AT_ONCE: Final = 500


class DumpDamaged(ValueError):
    """The text is not what `dump` writes, or not all of it; `line` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        self.line = line
        super().__init__(f"line {line}: {reason}")


@asynccontextmanager
async def snapshot(database: Database) -> AsyncIterator[AsyncConnection]:
    """Yield a connection that sees the database as it is now, however long it reads; writers are not held up."""
    # a transaction on SQLite is a snapshot by itself
    options = {} if database.engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
    reader = Database(database.url, pool_size=1, silent_after=None, scope=EVERY_PROJECT)
    try:
        async with reader.engine.connect() as connection:
            await connection.execution_options(**options)
            async with connection.begin():
                yield connection
    finally:
        await reader.close()


async def dump(connection: AsyncConnection) -> AsyncIterator[str]:
    """Yield the lines of all tables, each after those that it refers to."""
    for table in (await connection.run_sync(_tables)).sorted_tables:
        yield _line({"table": table.name, "columns": [column.name for column in table.columns]})
        key = list(table.primary_key.columns)
        statement = sa.select(table).order_by(*key).limit(_ROWS_AT_ONCE)
        rows = (await connection.execute(statement)).all()
        while rows:
            for row in rows:
                yield _line([_plain(value) for value in row])
            last = [rows[-1]._mapping[column] for column in key]
            rows = (await connection.execute(statement.where(sa.tuple_(*key) > sa.tuple_(*last)))).all()


@asynccontextmanager
async def restored(
    database: Database, lines: Iterable[str], *, revision: str
) -> AsyncIterator[tuple[AsyncSession, Mapping[str, int]]]:
    """Make an empty database of the lines of a dump whose schema is `revision`, and migrate it to the newest.

    Yields a session that sees the result, and the rows of each table; all of it commits when the block ends, or
    nothing. Raises `DumpDamaged`.
    """
    async with for_migrations(database) as migrated, migrated.writing() as session:
        connection = await session.connection()
        yield session, await connection.run_sync(_restore, lines, revision)


def _restore(connection: sa.Connection, lines: Iterable[str], revision: str) -> Mapping[str, int]:
    migrate_connection(connection, revision)
    metadata = _tables(connection)
    for table in reversed(metadata.sorted_tables):  # the dump has what the migrations wrote, as it was then
        connection.execute(sa.delete(table))
    counts = _load(connection, metadata, lines)
    migrate_connection(connection, "head")
    return counts


def _load(connection: sa.Connection, metadata: sa.MetaData, lines: Iterable[str]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    links = _Links()
    for table, columns, rows in _tables_of(lines, metadata):
        for some in _batches(rows):
            loaded = [_typed(table, dict(zip(columns, row, strict=True))) for row in some]
            connection.execute(sa.insert(table), [links.without(table, row) for row in loaded])
            counts[table.name] = counts.get(table.name, 0) + len(some)
    links.write(connection)
    if connection.dialect.name == "postgresql":
        _continue_counting(connection, metadata)
    return counts


class _Links:
    """References of rows to rows of the same table, written when all of them are there."""

    def __init__(self) -> None:
        self._kept: list[tuple[sa.Table, dict[str, Any], dict[str, Any]]] = []

    def without(self, table: sa.Table, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row without its references to the same table."""
        own = [column.name for column in table.columns if any(key.column.table is table for key in column.foreign_keys)]
        links = {name: row[name] for name in own if row[name] is not None}
        if links:
            self._kept.append((table, {column.name: row[column.name] for column in table.primary_key}, links))
        return row | dict.fromkeys(own)

    def write(self, connection: sa.Connection) -> None:
        for table, key, links in self._kept:
            this = sa.and_(*(table.c[name] == value for name, value in key.items()))
            connection.execute(sa.update(table).where(this).values(**links))


def _tables_of(
    lines: Iterable[str], metadata: sa.MetaData
) -> Iterator[tuple[sa.Table, list[str], Iterator[tuple[Any, ...]]]]:
    """Yield each table of a dump with its columns and rows; the rows have to be taken before the next table."""
    numbered = enumerate(lines, 1)
    head: tuple[int, Any] | None = next(_parsed(numbered), None)
    while head is not None:
        number, said = head
        table = metadata.tables.get(said.get("table", "")) if isinstance(said, dict) else None
        columns = said.get("columns", []) if table is not None else []
        if table is None or sorted(columns) != sorted(table.columns.keys()):
            raise DumpDamaged(number, "no table of this schema begins here")
        following: list[tuple[int, Any]] = []
        yield table, columns, _rows(numbered, len(columns), following)
        head = following[0] if following else None


def _rows(
    numbered: Iterator[tuple[int, str]], width: int, following: list[tuple[int, Any]]
) -> Iterator[tuple[Any, ...]]:
    for number, row in _parsed(numbered):
        if isinstance(row, dict):
            following.append((number, row))
            return
        if not isinstance(row, list) or len(row) != width:
            raise DumpDamaged(number, f"a row of {width} values was expected")
        yield tuple(row)


def _parsed(numbered: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    for number, text in numbered:
        try:
            yield number, json.loads(text)
        except ValueError as error:
            raise DumpDamaged(number, str(error)) from error


def _batches(rows: Iterator[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    some: list[tuple[Any, ...]] = []
    for row in rows:
        some.append(row)
        if len(some) == _ROWS_AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def _tables(connection: sa.Connection) -> sa.MetaData:
    metadata = sa.MetaData()
    metadata.reflect(connection, only=lambda name, _: name not in LEFT_OUT)
    for table in metadata.tables.values():
        for column in table.columns:
            if isinstance(column.type, sa.JSON):
                column.type = sa.JSON(none_as_null=True)  # a missing document is no document `null`
    return metadata


def _typed(table: sa.Table, row: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(table.c[name].type, value) for name, value in row.items()}


def _value(kind: sa.types.TypeEngine[Any], value: Any) -> Any:
    if isinstance(kind, sa.DateTime) and value is not None:
        time = datetime.fromisoformat(value)
        return time if kind.timezone else time.replace(tzinfo=None)  # SQLite keeps no zone
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    return value


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n"


def _continue_counting(connection: sa.Connection, metadata: sa.MetaData) -> None:
    """Let the numbers that Postgres gives to new rows go on behind the highest."""
    for table in metadata.tables.values():
        column = table.autoincrement_column
        highest = None if column is None else connection.scalar(sa.select(sa.func.max(column)))
        if column is not None and highest is not None:
            sequence = sa.func.pg_get_serial_sequence(table.name, column.name)
            connection.execute(sa.select(sa.func.setval(sequence, highest)))
