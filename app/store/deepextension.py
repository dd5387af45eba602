"""The database of a DeepExtension installation, read only.

Its backend is closed, but the migrations that make its tables are public. All releases edited the same migration, so
that a database has the columns of the day on which it was installed: columns are looked at, no version is trusted.
"""

import json
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.projects import EVERY_PROJECT
from app.store.session import Database, DatabaseUnreachable

MAX_TABLE_ROWS: Final = 50_000
MAX_FILES: Final = 1000
"""Rows of a table that holds scripts."""
MAX_FILE_BYTES: Final = 1024 * 1024
STATEMENT_SECONDS: Final = 60
_LOCK_SECONDS: Final = 5
_BATCH: Final = 1000
_DOCUMENTS: Final = ("json", "jsonb")


Row = Mapping[str, Any]
"""A row by the importer's names of its columns."""


@dataclass(frozen=True)
class SourceTable:
    """A table as the importer knows it: its name there, and for each column that is read the names that it had."""

    name: str
    columns: Mapping[str, Sequence[str]]
    needed: Sequence[str] = ()
    binary: Sequence[str] = ()


def _same(*names: str, **others: Sequence[str]) -> dict[str, Sequence[str]]:
    return {**{name: (name,) for name in names}, **others}


_TENANT: Final = ("co_id", "co_code")
TABLES: Final[Mapping[str, SourceTable]] = {
    "methods": SourceTable(
        "table1",
        _same(
            "id", "is_system", "train_env", "train_file", "created_at",
            uuid=("template_uuid",), name=("template_name",), tenant=_TENANT,
        ),
        needed=("uuid", "name"),
        binary=("train_file",),
    ),
    "method_settings": SourceTable(
        "train_method_info",
        _same(
            "id", "training_type", "life_cycle", "deployment_tools", "trained_inference_support",
            "saved_inference_support", "python_file_config", "conda_env",
            method=("template_uuid",), tenant=_TENANT,
        ),
        needed=("method", "life_cycle", "training_type"),
    ),
    "shared_methods": SourceTable("table7", _same("id", method=("template_uuid",), tenant=("shared_to",))),
    "trainings": SourceTable(
        "table3",
        _same(
            "id", "job_name", "job_parameters", "task_parameters", job=("job_id",), method=("job_template_uuid",)
        ),
        needed=("job",),
    ),
    "training_tasks": SourceTable(
        "table4", _same("id", job=("job_id",), task=("task_uuid",)), needed=("job", "task")
    ),
    "profiles": SourceTable(
        "sys_plan_profile", _same("id", "name", uuid=("profile_uuid",), tenant=_TENANT), needed=("name", "uuid")
    ),
    "profile_entries": SourceTable(
        "sys_params",
        _same(
            "id", profile=("profile_uuid",), name=("field_name",), type=("field_type",), value=("field_value",),
            tenant=_TENANT,
        ),
        needed=("profile", "name", "value"),
    ),
    "environments": SourceTable("python_env_info", _same("id", name=("env_name",), tenant=_TENANT), needed=("name",)),
    "deploy_targets": SourceTable(
        "sys_deploy_env", _same("id", name=("deploy_factory",), url=("env_url",), tenant=_TENANT),
        needed=("name", "url"),
    ),
    "deploy_tools": SourceTable("llm_factories", _same("id", "factory", "is_deploy")),
    "base_models": SourceTable(
        "base_model",
        _same(
            "id", "path", "template", "deploy_config", name=("technic_name",), title=("model_name",),
            inference=("inference_python_file", "inference_file"), tenant=_TENANT,
        ),
        needed=("name", "path"),
    ),
    "models": SourceTable(
        "model",
        _same(
            "id", "created_at", "base_path", "base_model", "is_deleted", name=("model_name",), task=("task_uuid",),
            type=("model_type",), path=("actual_path",), tenant=_TENANT,
        ),
        needed=("name", "task"),
    ),
    "savings": SourceTable(
        "save_models_tasks",
        _same(
            "id", "save_path", "base_model_path", "lora_adapter_path", task=("task_uuid",),
            training=("train_id",), method=("template_uuid",), tenant=_TENANT,
        ),
        needed=("task",),
    ),
    "deployments": SourceTable(
        "deploy_models_tasks",
        _same(
            "id", "save_model_path", "server_url", "quantize", "base_model_id", task=("task_uuid",),
            saving=("save_task_uuid",), method=("train_template_uuid",), tenant=_TENANT,
        ),
        needed=("task",),
    ),
    "datasets": SourceTable(
        "dataset_base_info",
        _same("id", name=("dataset_name",), description=("dataset_desc",), uuid=("dataset_uuid",), tenant=_TENANT),
        needed=("name", "uuid"),
    ),
    "files": SourceTable(
        "file_upload_info",
        _same("id", path=("file_path",), name=("file_name",), uuid=("file_uuid",), belongs_to=("file_relate",)),
    ),
}  # fmt: skip
ROWS: Final = SourceTable("dataset_detail_info", _same("id", file=("file_uuid",), row=("dataset_detail",)))
CORE: Final = ("methods", "base_models", "models")
"""Tables that every release had: without any of them it is another database."""


class SourceUnreadable(Exception):
    """The database cannot be read; the text says why, without its password."""


class SourceUnknown(Exception):
    """The database is none of DeepExtension's, or its tables are called otherwise."""


@dataclass(frozen=True)
class Found:
    """What was read: the rows of each table by the importer's names; None: there is no such table."""

    release: str
    rows: Mapping[str, Sequence[Mapping[str, Any]] | None]
    missing_columns: Mapping[str, Sequence[str]]

    def of(self, table: str) -> Sequence[Mapping[str, Any]]:
        """Return the rows of a table, none if there is no such table."""
        return self.rows.get(table) or ()


@dataclass(frozen=True)
class Naming:
    """How tables and columns are called where that differs from the public migrations."""

    schema: str = "public"
    tables: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def table(self, key: str, table: SourceTable) -> str:
        """Return what a table is called."""
        return self.tables.get(key, table.name)

    def column(self, key: str, table: SourceTable, column: str, there: Collection[str]) -> str | None:
        """Return what a column is called; None if it is not there."""
        given = self.columns.get(key, {}).get(column)
        names = table.columns[column] if given is None else (given,)
        return next((name for name in names if name in there), None)


class SourceDatabase:
    """Reads in one read-only transaction: a moment of the database, whatever goes on there."""

    def __init__(self, url: str, naming: Naming) -> None:
        self._database = Database(url, scope=EVERY_PROJECT, pool_size=1, silent_after=STATEMENT_SECONDS + 5)
        self._naming = naming

    async def read(self) -> Found:
        """Return the rows of all tables that are known. Raises `SourceUnreadable` and `SourceUnknown`."""
        async with self._reading() as connection:
            columns = await self._columns(connection)
            self._require_known(columns)
            rows: dict[str, list[dict[str, Any]] | None] = {}
            missing: dict[str, list[str]] = {}
            for key, table in TABLES.items():
                there = columns.get(self._naming.table(key, table))
                rows[key] = None if there is None else await self._rows(connection, key, table, there)
                if there is not None:
                    absent = [name for name in table.columns if self._naming.column(key, table, name, there) is None]
                    missing[key] = absent
            return Found(_release(rows, missing), rows, {key: names for key, names in missing.items() if names})

    async def rows_of(self, files: Sequence[str]) -> AsyncIterator[Any]:
        """Yield the rows of a data set that are kept in the database, in their order."""
        naming = self._naming
        async with self._reading() as connection:
            there = (await self._columns(connection)).get(naming.table("rows", ROWS), {})
            names = {name: naming.column("rows", ROWS, name, there) or "" for name in ROWS.columns}
            if "" in names.values():
                return
            source = self._table(naming.table("rows", ROWS), *names.values())
            of_files = sa.cast(source.c[names["file"]], sa.Text).in_(list(files))
            statement = (
                sa.select(_readable(source.c[names["row"]], there[names["row"]]))
                .where(of_files)
                .order_by(source.c[names["id"]])
            )
            stream = await connection.stream(statement, execution_options={"yield_per": _BATCH})
            async for row in stream.scalars():
                yield _plain(row, there[names["row"]])

    async def close(self) -> None:
        """Give the connection back."""
        await self._database.close()

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        engine = self._database.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        try:
            async with engine.connect() as connection:
                await connection.execute(sa.text(f"SET LOCAL statement_timeout = '{STATEMENT_SECONDS}s'"))
                await connection.execute(sa.text(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'"))
                yield connection
                await connection.rollback()
        except (DBAPIError, DatabaseUnreachable, OSError, TimeoutError) as error:
            raise SourceUnreadable(_why(error)) from error

    async def _columns(self, connection: AsyncConnection) -> dict[str, dict[str, str]]:
        """Return the columns of each table with their types."""
        statement = (
            "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = :name"
        )
        found: dict[str, dict[str, str]] = {}
        for table, column, kind in await connection.execute(sa.text(statement), {"name": self._naming.schema}):
            found.setdefault(table, {})[column] = kind
        return found

    def _require_known(self, columns: Mapping[str, Mapping[str, str]]) -> None:
        wanted = {key: self._naming.table(key, TABLES[key]) for key in CORE}
        if absent := [name for name in wanted.values() if name not in columns]:
            raise SourceUnknown(f"the schema {self._naming.schema} has no table {', '.join(absent)}")
        for key, table in TABLES.items():
            name = self._naming.table(key, table)
            if name not in columns:
                if key in self._naming.tables:
                    raise SourceUnknown(f"the schema {self._naming.schema} has no table {name}")
                continue
            for column in table.needed:
                if self._naming.column(key, table, column, columns[name]) is None:
                    tried = self._naming.columns.get(key, {}).get(column) or " or ".join(table.columns[column])
                    raise SourceUnknown(f"the table {name} has no column {tried} (columns.{key}.{column})")

    async def _rows(
        self, connection: AsyncConnection, key: str, table: SourceTable, there: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        names = {column: self._naming.column(key, table, column, there) for column in table.columns}
        present = {column: name for column, name in names.items() if name is not None}
        source = self._table(self._naming.table(key, table), *present.values())
        chosen = [
            _readable(source.c[name], there[name], bounded=column in table.binary).label(column)
            for column, name in present.items()
        ]
        most = MAX_FILES if table.binary else MAX_TABLE_ROWS
        statement = sa.select(*chosen).limit(most + 1)
        if "id" in present:
            statement = statement.order_by(source.c[present["id"]])
        found = [dict(row) for row in (await connection.execute(statement)).mappings()]
        if len(found) > most:
            raise SourceUnreadable(f"the table {source.name} has more than {most} rows")
        kinds = {column: there[name] for column, name in present.items()}
        return [{column: _plain(row.get(column), kinds.get(column, "")) for column in table.columns} for row in found]

    def _table(self, name: str, *columns: str) -> "sa.TableClause":
        return sa.table(name, *(sa.column(column) for column in columns), schema=self._naming.schema)


def _readable(column: "sa.ColumnElement[Any]", kind: str, *, bounded: bool = False) -> "sa.ColumnElement[Any]":
    """Return a column as it is read: documents as text, files only as far as a script may go and a byte more."""
    if kind in _DOCUMENTS:
        return sa.cast(column, sa.Text)
    return sa.func.substring(column, 1, MAX_FILE_BYTES + 1) if bounded else column


def _plain(value: Any, kind: str) -> Any:
    """Return a value as JSON has it."""
    if value is not None and kind in _DOCUMENTS:
        return json.loads(value)
    return value if isinstance(value, None | bool | int | float | str | bytes | list) else str(value)


def _release(rows: Mapping[str, Any], missing: Mapping[str, Sequence[str]]) -> str:
    """Return the release whose tables these are, for people: nothing is decided by it."""
    if rows["method_settings"] is not None:
        return "v2509"
    if rows["profiles"] is not None or "train_env" not in missing["methods"]:
        return "v2507"
    return "v2505"


def _why(error: BaseException) -> str:
    """Return what the server or the network says; the driver's words hold no password, its arguments may."""
    cause = getattr(error, "orig", None) or error
    cause = getattr(cause, "__cause__", None) or cause
    return " ".join(str(cause).split()) or type(cause).__name__
