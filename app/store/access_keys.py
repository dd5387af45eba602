"""API keys: found by the digest of what a caller sends, else by id or name; a revoked key keeps its row."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import NotFound
from app.domain.names import name_key
from app.store.methods import NameTaken
from app.store.paging import PageRequest, Slice, page_slice
from app.store.tables import AccessKeyRow


class AccessKeyNotFound(NotFound):
    """No key has this id, and none that is not revoked has this name."""

    code = "access_key_not_found"


async def by_digest(session: AsyncSession, digest: str) -> AccessKeyRow | None:
    """Return the key with this digest of its secret."""
    return (await session.exec(select(AccessKeyRow).where(col(AccessKeyRow.digest) == digest))).first()


async def get(session: AsyncSession, key: str, *, project: str | None, lock: bool = False) -> AccessKeyRow:
    """Return the key with this id, else the one with this name that is not revoked, or raise `AccessKeyNotFound`.

    With a project only if it opens that one. With `lock` as it is now, and others wait until the transaction ends.
    """
    named = select(AccessKeyRow).where(
        col(AccessKeyRow.name_key) == name_key(key), col(AccessKeyRow.revoked_at).is_(None)
    )
    row = await session.get(AccessKeyRow, key) or (await session.exec(named)).first()
    if row is not None and lock:
        row = await session.get(AccessKeyRow, row.id, populate_existing=True, with_for_update=True)
    if row is None or project not in (None, row.project_id):
        raise AccessKeyNotFound(key=key)
    return row


async def save(session: AsyncSession, row: AccessKeyRow, **values: Any) -> AccessKeyRow:
    """Insert the key, or change columns of it; raise `NameTaken` if another that is not revoked has its name."""
    for name, value in values.items():
        setattr(row, name, value)
    session.add(row)
    try:
        await session.flush()
    except sa.exc.IntegrityError as exc:
        if "name_key" in str(exc.orig):
            raise NameTaken(name=row.name, pointer="/name") from exc
        raise
    return row


async def note_use(session: AsyncSession, key_id: str, *, now: datetime) -> None:
    """Remember when the key was used last."""
    await session.exec(sa.update(AccessKeyRow).where(col(AccessKeyRow.id) == key_id).values(last_used_at=now))


async def page(
    session: AsyncSession, wanted: PageRequest, *, project: str | None, revoked: bool
) -> Slice[AccessKeyRow]:
    """Return one page of the keys, or of those that open one project; with `revoked` those as well that are."""
    statement: Any = select(AccessKeyRow)
    if project is not None:
        statement = statement.where(col(AccessKeyRow.project_id) == project)
    if not revoked:
        statement = statement.where(col(AccessKeyRow.revoked_at).is_(None))
    column = AccessKeyRow.name_key if wanted.sort == "name" else getattr(AccessKeyRow, wanted.sort)
    return await page_slice(session, statement, wanted, column=column, tie=AccessKeyRow.id)
