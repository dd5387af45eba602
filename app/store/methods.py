"""Methods and their versions.

A method's row repeats what its newest version says, for filters; `version` guards every change: an edit names the
version it was made from and changes nothing if that is not the newest any more. Rows of deleted methods and their
versions stay, because jobs and models name them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import TrainingType, VersionSource
from app.domain.errors import Conflict, NotFound
from app.domain.names import name_key
from app.store.paging import PageRequest, Slice, page_slice
from app.store.tables import MethodRow, MethodVersionRow

_NAME_INDEX = "uq_method_name_key_live"
_SCRIPTS_LOCK = 0x73637270  # "scrp"; any constant that no other user of the database takes


class MethodNotFound(NotFound):
    """No existing method has this id or name."""

    code = "method_not_found"


class MethodVersionNotFound(NotFound):
    """The method never had this version."""

    code = "method_version_not_found"


class NameTaken(Conflict):
    """A existing method has this name; names differ by more than case and spelling of their characters."""

    code = "name_taken"


@dataclass(frozen=True)
class MethodFilter:
    """Which methods a list shows; `None` matches all. `text` is looked for in name and description."""

    training_type: TrainingType | None = None
    technique: str | None = None
    lifecycle: str | None = None
    text: str | None = None


SORTABLE: Mapping[str, Any] = {
    "name": MethodRow.name_key,
    "created_at": MethodRow.created_at,
    "updated_at": MethodRow.updated_at,
}


# ---- read -----------------------------------------------------------------------------------------------------------


async def find(session: AsyncSession, method: str, *, lock: bool = False) -> MethodRow | None:
    """Return the existing method with this id, else with this name.

    With `lock`, the row is locked until the transaction ends.
    """
    living = select(MethodRow).where(col(MethodRow.deleted_at).is_(None))
    if lock:
        # "for no key update": jobs that merely refer to the row are not held up
        living = living.with_for_update(key_share=True).execution_options(populate_existing=True)
    by_id = (await session.exec(living.where(MethodRow.id == method))).first()
    if by_id is not None:
        return by_id
    return (await session.exec(living.where(MethodRow.name_key == name_key(method)))).first()


async def get(session: AsyncSession, method: str, *, lock: bool = False) -> MethodRow:
    """Return the existing method with this id or name or raise `MethodNotFound`."""
    row = await find(session, method, lock=lock)
    if row is None:
        raise MethodNotFound(method=method)
    return row


async def get_even_deleted(session: AsyncSession, method: str) -> MethodRow:
    """Return the existing method with this id or name, or the deleted one with this id."""
    row = await find(session, method) or await session.get(MethodRow, method)
    if row is None:
        raise MethodNotFound(method=method)
    return row


async def page(session: AsyncSession, wanted: MethodFilter, paging: PageRequest) -> Slice[MethodRow]:
    """Return one page of the existing methods; `paging.sort` is a key of `SORTABLE`."""
    statement = select(MethodRow).where(col(MethodRow.deleted_at).is_(None))
    if wanted.training_type is not None:
        statement = statement.where(MethodRow.training_type == wanted.training_type)
    if wanted.technique is not None:
        statement = statement.where(MethodRow.technique == wanted.technique)
    if wanted.lifecycle is not None:
        statement = statement.where(MethodRow.lifecycle == wanted.lifecycle)
    if wanted.text:
        statement = statement.where(
            sa.or_(
                # the key is folded in every script; the databases' own lower() may know ASCII only
                col(MethodRow.name_key).contains(name_key(wanted.text), autoescape=True),
                col(MethodRow.description).icontains(wanted.text, autoescape=True),
            )
        )
    return await page_slice(session, statement, paging, column=SORTABLE[paging.sort], tie=MethodRow.id)


async def get_version(session: AsyncSession, row: MethodRow, number: int | None = None) -> MethodVersionRow:
    """Return a version of the method, the newest by default."""
    version = await session.get(MethodVersionRow, (row.id, number or row.version))
    if version is None:
        raise MethodVersionNotFound(method=row.name, number=number)
    return version


async def newest_versions(session: AsyncSession, rows: Sequence[MethodRow]) -> dict[str, MethodVersionRow]:
    """Return the newest version of each method, by the method's id."""
    newest = sa.tuple_(col(MethodVersionRow.method_id), col(MethodVersionRow.number)).in_(
        [(row.id, row.version) for row in rows]
    )
    return {
        version.method_id: version for version in (await session.exec(select(MethodVersionRow).where(newest))).all()
    }


async def version_page(session: AsyncSession, method_id: str, wanted: PageRequest) -> Slice[MethodVersionRow]:
    """Return one page of the method's versions, by number."""
    statement = select(MethodVersionRow).where(MethodVersionRow.method_id == method_id)
    return await page_slice(session, statement, wanted, column=MethodVersionRow.number, tie=MethodVersionRow.method_id)


async def files_of_versions(session: AsyncSession, method_id: str) -> Sequence[Mapping[str, Any]]:
    """Return what each version of the method pins."""
    return (await session.exec(select(MethodVersionRow.files).where(MethodVersionRow.method_id == method_id))).all()


async def living_methods(session: AsyncSession) -> Sequence[tuple[MethodRow, MethodVersionRow]]:
    """Return every existing method with its newest version, by name."""
    statement = (
        select(MethodRow, MethodVersionRow)
        .join(
            MethodVersionRow,
            (col(MethodVersionRow.method_id) == MethodRow.id) & (col(MethodVersionRow.number) == MethodRow.version),
        )
        .where(col(MethodRow.deleted_at).is_(None))
        .order_by(MethodRow.name_key)
    )
    return (await session.exec(statement)).all()


async def name_is_taken(session: AsyncSession, name: str, *, by_other_than: str | None = None) -> bool:
    """Return whether a existing method, other than the one with the id `by_other_than`, has this name."""
    statement = select(MethodRow.id).where(
        col(MethodRow.deleted_at).is_(None), MethodRow.name_key == name_key(name), MethodRow.id != (by_other_than or "")
    )
    return (await session.exec(statement)).first() is not None


# ---- write ----------------------------------------------------------------------------------------------------------


async def insert(session: AsyncSession, row: MethodRow, version: MethodVersionRow) -> None:
    """Insert a method with its first version or raise `NameTaken`."""
    session.add(row)
    try:
        await session.flush()
    except sa.exc.IntegrityError as exc:
        _raise_name_taken(exc, row.name)
    session.add(version)
    await session.flush()


async def replace(
    session: AsyncSession, row: MethodRow, version: MethodVersionRow, *, values: Mapping[str, Any], now: datetime
) -> bool:
    """Make `version` the newest of the method if it still follows directly; return `False` if it does not.

    `values` are the columns that repeat it.
    """
    statement = (
        sa.update(MethodRow)
        .where(
            col(MethodRow.id) == row.id,
            col(MethodRow.version) == version.number - 1,
            col(MethodRow.deleted_at).is_(None),
        )
        .values(version=version.number, updated_at=now, **values)
    )
    try:
        changed = _rows(await session.exec(statement)) == 1
    except sa.exc.IntegrityError as exc:
        _raise_name_taken(exc, str(values.get("name")))
    if changed:
        session.add(version)
        await session.flush()
        await session.refresh(row)
    return changed


async def delete(session: AsyncSession, row: MethodRow, *, version: int, now: datetime) -> bool:
    """Delete the method if `version` still is its newest; its history stays."""
    statement = (
        sa.update(MethodRow)
        .where(col(MethodRow.id) == row.id, col(MethodRow.version) == version, col(MethodRow.deleted_at).is_(None))
        .values(deleted_at=now, updated_at=now)
    )
    return _rows(await session.exec(statement)) == 1


async def lock_scripts(session: AsyncSession) -> None:
    """Lock the script root for writing until the transaction ends.

    On SQLite the writing transaction itself is the lock; network disks have none that could be trusted.
    """
    postgres = session.get_bind().dialect.name == "postgresql"
    await (await session.connection()).execute(
        sa.text(f"SELECT pg_advisory_xact_lock({_SCRIPTS_LOCK})" if postgres else "SELECT 1")
    )


def new_version(
    row: MethodRow,
    *,
    number: int,
    definition: Mapping[str, Any],
    files: Mapping[str, Any],
    source: VersionSource,
    now: datetime,
) -> MethodVersionRow:
    """Return the row of a version, not yet inserted."""
    return MethodVersionRow(
        method_id=row.id,
        number=number,
        definition=dict(definition),
        files=dict(files),
        source=source,
        created_at=now,
    )


def _raise_name_taken(exc: sa.exc.IntegrityError, name: str) -> NoReturn:
    # SQLite names the column of a broken index, Postgres the index
    if _NAME_INDEX in str(exc.orig) or "method.name_key" in str(exc.orig):
        raise NameTaken(name=name, pointer="/name") from exc
    raise exc


def _rows(result: Any) -> int:
    assert isinstance(result, CursorResult)
    return result.rowcount


async def modules_by_environment(session: AsyncSession) -> Mapping[str, Sequence[str]]:
    """Return environment → modules of it that stages of the existing methods run."""
    found: dict[str, list[str]] = {}
    for _, version in await living_methods(session):
        configs = {**(version.definition.get("stages") or {}), "deployment": version.definition.get("deployment")}
        for stage, config in configs.items():
            if (
                config
                and config.get("module")
                and stage not in version.files
                and (environment := config.get("conda_env"))
            ):
                found.setdefault(environment, []).append(config["module"])
    return found


async def stages_by_environment(session: AsyncSession) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Return environment → pinned files of the stages that the existing methods run in it, of their newest versions."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for _, version in await living_methods(session):
        configs = {**(version.definition.get("stages") or {}), "deployment": version.definition.get("deployment")}
        for stage, pinned in version.files.items():
            if environment := (configs.get(stage) or {}).get("conda_env"):
                found.setdefault(environment, []).append(pinned)
    return found
