"""The one place that writes the audit trail: it watches the statements of a transaction and adds one record to it.

`watch` listens to an engine. In a transaction that runs for somebody's call (`app.domain.audit.current_action`) each
INSERT, UPDATE and DELETE of an audited table is looked at before it runs, whether the ORM makes it or not: the rows
that it will meet are read and kept. Right before the commit the rows are read again, and what differs becomes one
record. So there is no change without its record, and no record without its change. Statements written as text are not
seen: the product has none that change rows, which a test keeps true.

Records are numbered under a lock on the head (one row), which lasts from here to the end of the commit. Transactions of
several processes form one chain in this way. Of those of nodes, only claims record something (`app.store.claims`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlmodel import SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.audit import (
    HIDDEN,
    MAX_DETAILED,
    MAX_THINGS,
    Action,
    AuditKind,
    AuditRecord,
    Head,
    canonical,
    current_action,
    digest_of,
    index_of,
    recordable,
)
from app.domain.plain_text import storable
from app.store.tables import AuditRecordRow, InstallationRow

HEAD_KEY: Final = "audit-head"
_TRAIL: Final = "deepe_audit"
_RECORD: Final[sa.Table] = AuditRecordRow.__table__  # type: ignore[attr-defined]
_INSTALLATION: Final[sa.Table] = InstallationRow.__table__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Audited:
    """How changes of a table are recorded: every column, but for those named here."""

    kind: str
    name: str | None = "name"
    hidden: frozenset[str] = frozenset()
    """Secrets: a record says that one was changed, and nothing of it."""
    left_out: frozenset[str] = frozenset()
    """What follows from another column or says only when something was done."""
    digests: frozenset[str] = frozenset()
    """Long documents, and what people wrote: a record holds digest and size."""


@dataclass(frozen=True)
class Unaudited:
    """Why changes of a table are not recorded."""

    reason: str


def _columns(*names: str) -> frozenset[str]:
    return frozenset(names)


_TIMES: Final = _columns("created_at", "updated_at", "changed_at")
_KEY: Final = _columns("name_key")

# The first that a transaction changed comes first in its record.
TABLES: Final[Mapping[str, Audited | Unaudited]] = {
    "project": Audited("project", name="id", left_out=_TIMES | _KEY),
    "project_member": Audited("member", left_out=_TIMES),
    "code_review": Audited("code-review", name="method_name", digests=_columns("code"), left_out=_TIMES),
    "access_key": Audited("key", hidden=_columns("digest"), left_out=_TIMES | _KEY | {"last_used_at"}),
    "method": Audited("method", left_out=_TIMES | _KEY),
    "method_version": Audited("method-version", name=None, left_out=_TIMES),
    "job": Audited(
        "job",
        digests=_columns("launch", "reason_params", "memory"),
        left_out=_TIMES | {"demand", "token", "attempts", "retries", "recoveries"},
    ),
    "model": Audited("model", digests=_columns("details"), left_out=_TIMES),
    "base_model": Audited("base-model", digests=_columns("card"), left_out=_TIMES | _KEY),
    "dataset": Audited("dataset", digests=_columns("report"), left_out=_TIMES | _KEY),
    "environment": Audited("environment", digests=_columns("spec"), left_out=_TIMES | _KEY),
    "environment_rule": Audited("environment-allow-list", name="environment", left_out=_TIMES | {"changed_by"}),
    "deploy_target": Audited("deploy-target", left_out=_TIMES | _KEY),
    "node": Audited(
        "node",
        left_out=_TIMES
        | {"accelerators", "inventory", "worker_labels", "environments", "environment_states", "boot_id"}
        | {"heartbeat_at", "home_id", "labels"},
    ),
    "lease": Audited("lease", name="accelerator", left_out=_TIMES),
    "job_queue": Audited("queue", left_out=_TIMES),
    "secret": Audited("secret", hidden=_columns("value"), left_out=_TIMES),
    # the path of such an address is often the secret that opens it
    "webhook": Audited("webhook", name=None, hidden=_columns("secret", "url"), left_out=_TIMES),
    "code_decision": Unaudited("a history of its own; the review that was decided is recorded"),
    "code_change": Unaudited("a history of its own; the change itself is recorded"),
    "preset": Unaudited("which presets were installed; the methods themselves are recorded"),
    "sample": Unaudited("which samples were registered; data sets and base models themselves are recorded"),
    "option_class": Unaudited("what libraries offer; never changed"),
    "attempt": Unaudited("written by nodes; each claim has a record of its own"),
    "installation": Unaudited("what processes agree on; the head of the trail among it"),
    "delivery": Unaudited("messages that follow from recorded changes"),
    "job_event": Unaudited("a history of its own"),
    "idempotency": Unaudited("answers that are kept for a day"),
    "audit_record": Unaudited("the trail itself"),
}
_RANK: Final = {name: rank for rank, name in enumerate(TABLES)}

Key = tuple[Any, ...]
Row = Mapping[str, Any]


@dataclass
class Trail:
    """What one transaction changed: table → key → the row before; None: it was not there."""

    action: Action
    touched: dict[str, dict[Key, Row | None]] = field(default_factory=dict)
    files: int = 0
    """So many files of the action stand in the record of this transaction."""
    sealed: bool = False

    def touch(self, table: sa.Table, key: Key, before: Row | None) -> None:
        """Keep the row as it was when the transaction met it first."""
        self.touched.setdefault(table.name, {}).setdefault(key, before)


def trail_of_call() -> Trail | None:
    """Return the trail of a transaction that begins now; None where nobody's call runs."""
    action = current_action.get()
    return Trail(action) if action is not None else None


def options_of(trail: Trail | None) -> dict[str, Any]:
    """Return the execution options by which the statements of a transaction are watched."""
    return {_TRAIL: trail}


def watch(engine: AsyncEngine) -> None:
    """Look at the statements of every transaction that has a trail."""
    event.listen(engine.sync_engine, "before_execute", _look)


async def seal(session: AsyncSession, trail: Trail | None) -> None:
    """Add the record of what the transaction changed; called last, right before its commit."""
    if trail is None:
        return
    await session.flush()
    if trail.touched or trail.action.files:
        await (await session.connection()).run_sync(_seal, trail)


def committed(trail: Trail | None) -> None:
    """Note that the record of the transaction is there to stay."""
    if trail is not None and trail.sealed:
        trail.action.recorded = True
        del trail.action.files[: trail.files]


async def append(session: AsyncSession, entries: Sequence["Entry"], *, now: datetime) -> None:
    """Add records at the end of the chain, in the transaction of the session."""
    if entries:
        await (await session.connection()).run_sync(_append, entries, now)


async def head_of(session: AsyncSession) -> Head | None:
    """Return number and hash of the newest record as the installation keeps them; None: there never was one."""
    return _head(await (await session.connection()).scalar(_head_statement()))


@dataclass(frozen=True)
class Entry:
    """What a record is made of; its number and its hashes follow from its place in the chain."""

    kind: AuditKind
    action: Action
    details: Mapping[str, Any]
    project_id: str | None = None


# ---- before a statement ---------------------------------------------------------------------------------------------


def _look(connection: sa.Connection, statement: Any, many: Any, one: Any, _options: Any) -> None:
    trail: Trail | None = connection.get_execution_options().get(_TRAIL)
    if trail is None or not isinstance(statement, sa.Insert | sa.Update | sa.Delete):
        return
    table: Any = statement.table
    # tables as a dump has them are another schema's
    if not isinstance(TABLES.get(table.name), Audited) or table.metadata is not SQLModel.metadata:
        return
    table = SQLModel.metadata.tables[table.name]
    given: Sequence[Mapping[str, Any]] = many or [one]
    if isinstance(statement, sa.Insert):
        for values in _inserted(statement, given):
            if not all(column.name in values for column in table.primary_key):
                raise NotImplementedError(f"rows of {table.name} whose keys are not known before are not recorded")
            trail.touch(table, _key(table, values), None)
        return
    if not statement._where_criteria:
        raise NotImplementedError(f"a change of the whole table {table.name} is not recorded")
    rows = sa.select(*table.columns).where(*statement._where_criteria)
    locked = rows.with_for_update(key_share=isinstance(statement, sa.Update))
    for values in given:
        for row in connection.execute(locked, dict(values)).mappings():
            trail.touch(table, _key(table, row), dict(row))


def _inserted(statement: sa.Insert, given: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    if statement._multi_values:
        return [_named(row) for rows in statement._multi_values for row in rows if isinstance(row, Mapping)]
    own = _named(statement._values or {})
    return [own | dict(values) for values in given]


def _named(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {getattr(column, "name", column): getattr(value, "value", value) for column, value in values.items()}


def _key(table: sa.Table, row: Any) -> Key:
    return tuple(row[column.name] for column in table.primary_key)


# ---- before the commit ----------------------------------------------------------------------------------------------


def _seal(connection: sa.Connection, trail: Trail) -> None:
    things: list[Row] = []
    unlisted, project = 0, None
    for name in sorted(trail.touched, key=_RANK.__getitem__):
        rule, table = TABLES[name], SQLModel.metadata.tables[name]
        assert isinstance(rule, Audited)
        after = _rows(connection, table, list(trail.touched[name]))
        for key, before in trail.touched[name].items():
            fields = _fields(table, rule, before or {}, after.get(key, {}))
            if not fields:
                continue
            project = project or (after.get(key) or before or {}).get("project_id")
            if len(things) < MAX_THINGS:
                told = fields if len(things) < MAX_DETAILED else None
                things.append(_thing(rule, _id_of(table, key), before, after.get(key), told))
            else:
                unlisted += 1
    if not things and not trail.action.files:
        return
    trail.sealed, trail.files = True, len(trail.action.files)
    details = trail.action.details(things)
    if unlisted:
        details["unlisted"] = unlisted
    about = project if things else trail.action.project
    _append(connection, [Entry(AuditKind.CHANGE, trail.action, details, about)], datetime.now(UTC))


def _id_of(table: sa.Table, key: Key) -> str:
    """Return how a thing is called within its project."""
    parts = zip(table.primary_key, key, strict=True)
    return "/".join(str(part) for column, part in parts if column.name != "project_id")


def _rows(connection: sa.Connection, table: sa.Table, keys: Sequence[Key]) -> Mapping[Key, Row]:
    columns = list(table.primary_key)
    found: dict[Key, Row] = {}
    for at in range(0, len(keys), 500):
        some = keys[at : at + 500]
        this = columns[0].in_([key[0] for key in some]) if len(columns) == 1 else sa.tuple_(*columns).in_(some)
        found |= {_key(table, row): dict(row) for row in connection.execute(sa.select(table).where(this)).mappings()}
    return found


def _thing(
    rule: Audited, thing_id: str, before: Row | None, after: Row | None, fields: Mapping[str, Any] | None
) -> Row:
    row = before or after or {}  # by the name that it had: what is removed may get another
    name = row.get(rule.name) if rule.name is not None else None
    done = "created" if before is None else "deleted" if after is None else "changed"
    thing = {
        "kind": rule.kind,
        "id": thing_id,
        "name": None if name is None else storable(str(name)),
        "done": done,
    }
    # the columns of a row that is gone or new say themselves what they were: null on the other side
    return thing if fields is None else {**thing, "fields": fields}


def _fields(table: sa.Table, rule: Audited, before: Row, after: Row) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for column in table.columns:
        old, new = before.get(column.name), after.get(column.name)
        if column.name in rule.left_out or old == new:
            continue
        if column.name in rule.hidden:
            changed[column.name] = HIDDEN
        else:
            told = digest_of if column.name in rule.digests else recordable
            changed[column.name] = [None if value is None else told(value) for value in (old, new)]
    return changed


def _append(connection: sa.Connection, entries: Sequence[Entry], now: datetime) -> None:
    head = _locked_head(connection, now)
    rows = []
    for entry in entries:
        record = _record(entry, head, now)
        head = Head(record.number, record.hash())
        rows.append(_row(record, head, entry))
    connection.execute(sa.insert(_RECORD), rows)
    connection.execute(
        sa.update(_INSTALLATION)
        .where(_INSTALLATION.c.key == HEAD_KEY)
        .values(value={"number": head.number, "hash": head.hash}, updated_at=now)
    )


def _locked_head(connection: sa.Connection, now: datetime) -> Head:
    statement = _head_statement().with_for_update()
    found = _head(connection.scalar(statement))
    if found is None:
        insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        first = {"key": HEAD_KEY, "value": {"number": 0, "hash": Head().hash}, "updated_at": now}
        connection.execute(insert(_INSTALLATION).values(**first).on_conflict_do_nothing())
        found = _head(connection.scalar(statement))
        assert found is not None
    return found


def _head_statement() -> sa.Select[Any]:
    return sa.select(_INSTALLATION.c.value).where(_INSTALLATION.c.key == HEAD_KEY)


def _head(value: Mapping[str, Any] | None) -> Head | None:
    return None if value is None else Head(value["number"], value["hash"])


def _record(entry: Entry, head: Head, now: datetime) -> AuditRecord:
    action = entry.action
    return AuditRecord(
        number=head.number + 1,
        at=now,
        kind=entry.kind,
        caller_kind=action.caller_kind,
        caller=storable(action.caller)[:200],
        principal=storable(action.principal)[:500],
        address=None if action.address is None else storable(action.address)[:100],
        request_id=None if action.request_id is None else storable(action.request_id)[:200],
        operation=action.operation[:100],
        project_id=entry.project_id,
        details=canonical(entry.details),
        previous=head.hash,
    )


def _row(record: AuditRecord, head: Head, entry: Entry) -> dict[str, Any]:
    fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return {**fields, "things": index_of(entry.details), "hash": head.hash}
