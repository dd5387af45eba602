"""Engines and sessions. Only the edges open a session, and only they commit.

SQLite: WAL, `synchronous=FULL`, one machine. A writing transaction begins with `BEGIN IMMEDIATE`, because a reader that
turns writer fails at once with "database is locked", whatever the busy timeout says. The writers of one process take
turns.

Every session has a scope (`app.domain.projects.Scope`), and there is no database handle without one: rows that belong
to a project are seen, changed and written by sessions of that project only, whatever a statement says. A statement that
counts what all projects share, such as the place of a job in a queue, asks for it with `EVERYBODYS`.

A statement never fails because of its texts: what a database refuses in them is escaped on the way
(`app.store.types`). Text from a file system or a script is made printable where it is read; this is the last check.
"""

import asyncio
import contextlib
import copy
import functools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import ORMExecuteState, with_loader_criteria
from sqlmodel import Session, SQLModel, col
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.access import caller_name
from app.domain.projects import Scope
from app.store import audit_trail
from app.store.home import keep_sqlite_private
from app.store.sqlite_driver import SqliteConnection
from app.store.tables import OfProject
from app.store.types import dump_json, load_json, storable_parameters

BUSY_TIMEOUT_MS = 10_000
SILENT_AFTER_SECONDS = 30.0  # a Postgres that does not answer (network, failover) is asked anew on another connection
_POSTGRES = {
    "application_name": "deepe",
    "jit": "off",
    # the other side: locks of a machine that died are given back within a minute, not after two hours
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}


EVERYBODYS: Final[Mapping[str, Any]] = {"deepe_every_project": True}
"""Execution options of a statement that reads the rows of all projects; its caller must show none of them."""
_SCOPE: Final = "scope"


class DatabaseUnreachable(ConnectionError):
    """Nothing answers at the database's address, or there is no such address: a port, a host, a socket file."""


class ForeignProject(RuntimeError):
    """A row of one project was about to be written in a session of another, or of none: a fault of the program."""


class Database:
    """Hands out sessions: `reading()` for queries, `writing()` for one transaction that commits at the end.

    `scope`: whose rows its sessions see; `of` returns the same database with another one.
    `silent_after`: seconds after which a statement on Postgres is given up; None waits for ever.
    `foreign_keys`: whether SQLite checks them, which it cannot be told within a transaction.
    """

    def __init__(
        self,
        url: str,
        *,
        scope: Scope,
        pool_size: int = 10,
        silent_after: float | None = SILENT_AFTER_SECONDS,
        foreign_keys: bool = True,
    ) -> None:
        self.url = url
        self.scope = scope
        self.engine = _create_engine(url, pool_size=pool_size, silent_after=silent_after, foreign_keys=foreign_keys)
        self._write_lock = asyncio.Lock()

    def of(self, scope: Scope) -> "Database":
        """Return this database for another scope; both share connections and the writers' turns."""
        if scope == self.scope:
            return self
        other = copy.copy(self)
        other.scope = scope
        return other

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """Yield a session for queries; nothing is committed."""
        async with self._session(self.engine) as session:
            yield session

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """Yield a session whose transaction commits when the block ends and rolls back when it raises."""
        turn = _Turn(self._write_lock)
        trail = audit_trail.trail_of_call()
        engine = self.engine.execution_options(deepe_turn=turn, **audit_trail.options_of(trail))
        try:
            async with self._session(engine) as session, session.begin():
                yield session
                await audit_trail.seal(session, trail)
            audit_trail.committed(trail)
        finally:
            turn.give_back()

    def _session(self, engine: AsyncEngine) -> AsyncSession:
        options: Any = {"sync_session_class": _ScopedSession, "info": {_SCOPE: self.scope}}
        return AsyncSession(engine, expire_on_commit=False, **options)

    async def ping(self) -> None:
        """Raise when the database does not answer."""
        async with self.engine.connect() as connection:
            await connection.execute(sa.text("SELECT 1"))

    async def close(self) -> None:
        """Give all connections back."""
        await self.engine.dispose()


def scope_of(session: AsyncSession) -> Scope:
    """Return whose rows the session sees."""
    scope: Scope = session.info[_SCOPE]
    return scope


@asynccontextmanager
async def within(session: AsyncSession, scope: Scope) -> AsyncIterator[None]:
    """Let the session see and write another scope's rows for a while, in the same transaction."""
    await session.flush()
    before = scope_of(session)
    session.info[_SCOPE] = scope
    try:
        yield
        await session.flush()
    finally:
        session.info[_SCOPE] = before


def own(session: AsyncSession, row: OfProject) -> None:
    """Make a row one of the session's project and of its caller, before the session does when it writes it."""
    _own(session.info[_SCOPE], row)


def _own(scope: Scope, row: OfProject) -> None:
    project = scope.project
    if row.project_id is None:
        row.project_id = project
    if row.project_id is None or project not in (None, row.project_id):
        raise ForeignProject(f"{type(row).__name__} of {row.project_id} in a session of {project}")
    _name_maker(row)


def _name_maker(row: Any) -> None:
    if getattr(row, "created_by", None) == "":
        row.created_by = caller_name()


class _ScopedSession(Session):
    """A session that shows and takes rows of its scope only."""


def _only_of_project(state: ORMExecuteState) -> None:
    scope: Scope = state.session.info[_SCOPE]
    if scope.project is None or state.is_column_load or state.execution_options.get("deepe_every_project"):
        return
    state.statement = state.statement.options(*_criteria(scope.project))


@functools.lru_cache(maxsize=1024)
def _criteria(project: str) -> tuple[Any, ...]:
    tables = [mapper.class_ for mapper in SQLModel._sa_registry.mappers if issubclass(mapper.class_, OfProject)]
    return tuple(
        with_loader_criteria(table, col(table.project_id) == project, include_aliases=True) for table in tables
    )


def _own_what_is_new(session: Any, _context: Any, _instances: Any) -> None:
    scope: Scope = session.info[_SCOPE]
    for row in session.new:
        if isinstance(row, OfProject):
            _own(scope, row)
        else:
            _name_maker(row)
    for row in (*session.dirty, *session.deleted):
        if isinstance(row, OfProject) and scope.project not in (None, row.project_id):
            raise ForeignProject(f"{type(row).__name__} of {row.project_id} in a session of {scope.project}")


event.listen(_ScopedSession, "do_orm_execute", _only_of_project)
event.listen(_ScopedSession, "before_flush", _own_what_is_new)


class _Turn:
    """The right of one transaction to be the process's writer; taken when it begins, given back when it is closed.

    SQLite lets writers wait by sleeping, without any order: with eight of them one in a hundred waited for seconds.
    """

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock = lock
        self._taken = False

    async def take(self) -> None:
        """Wait for the other writers of this process; after the busy timeout let SQLite say that it is locked."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BUSY_TIMEOUT_MS / 1000):
                await self._lock.acquire()
                self._taken = True

    def give_back(self) -> None:
        if self._taken:
            self._lock.release()


def _create_engine(url: str, *, pool_size: int, silent_after: float | None, foreign_keys: bool) -> AsyncEngine:
    json: dict[str, Any] = {"json_serializer": dump_json, "json_deserializer": load_json}
    if make_url(url).get_backend_name() == "sqlite":
        driver: dict[str, Any] = {"timeout": BUSY_TIMEOUT_MS / 1000, "async_creator_fn": SqliteConnection}
        engine = create_async_engine(url, pool_size=pool_size, connect_args=driver, **json)
        event.listen(engine.sync_engine, "do_connect", _keep_private)
        event.listen(engine.sync_engine, "connect", functools.partial(_prepare_sqlite, foreign_keys=foreign_keys))
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
    else:
        driver = {"server_settings": _POSTGRES, "timeout": 10, "command_timeout": silent_after}
        engine = create_async_engine(url, pool_size=pool_size, pool_pre_ping=True, connect_args=driver, **json)
        event.listen(engine.sync_engine, "do_connect", _connect)
    event.listen(engine.sync_engine, "before_cursor_execute", _make_storable, retval=True)
    audit_trail.watch(engine)
    return engine


def _make_storable(
    _connection: sa.Connection, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool
) -> tuple[str, Any]:
    return statement, storable_parameters(parameters)


def _keep_private(_dialect: Any, _record: Any, arguments: list[Any], _parameters: Any) -> None:
    # what is read through a descriptor from before the mode was set stays readable, so it is set first
    if not str(arguments[0]).startswith((":memory:", "file:")):
        keep_sqlite_private(Path(arguments[0]))


def _connect(dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
    """Connect; the driver passes on what the operating system says, such as that a socket file is not there."""
    try:
        return dialect.connect(*arguments, **options)
    except OSError as error:
        raise DatabaseUnreachable(str(error)) from error


def _prepare_sqlite(connection: Any, _record: Any, *, foreign_keys: bool) -> None:
    # the driver must not open transactions on its own: we say which kind (see the module docstring)
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        f"foreign_keys={'ON' if foreign_keys else 'OFF'}",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    turn: _Turn | None = connection.get_execution_options().get("deepe_turn")
    if turn is not None:
        adapted: Any = connection.connection.dbapi_connection
        adapted.run_async(lambda _: turn.take())
    driver: Any = connection.connection.driver_connection
    driver.begin_with_next(write=turn is not None)
