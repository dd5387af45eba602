"""API keys: made, changed and revoked by administrators, and recognized at every request.

A key is 256 random bits behind `deepe_`. The database keeps its SHA-256 only: what is that random needs no slow hash,
and nobody who reads the database can call the service. Every request looks into the database, so that a revoked key
ends with the next request at every process of the API.
"""

import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4

from sqlalchemy.exc import SQLAlchemyError
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.access import Caller, CallerKind, Role
from app.domain.errors import InvalidRequest, Unauthenticated, Violation
from app.domain.names import name_key, name_violations, normal_name
from app.store import access_keys
from app.store.paging import PageRequest, Slice
from app.store.session import Database
from app.store.tables import AccessKeyRow

logger = logging.getLogger(__name__)

PREFIX: Final = "deepe_"
_SECRET_BYTES: Final = 32
_SHOWN_CHARACTERS: Final = len(PREFIX) + 6
_USE_IS_NOTED_EVERY: Final = timedelta(minutes=1)
RESERVED_NAMES: Final = tuple(kind.value for kind in CallerKind)


class KeyUnknown(Unauthenticated):
    """No key has this secret."""

    code = "key_unknown"


class KeyExpired(Unauthenticated):
    """The key was valid until a time that has passed."""

    code = "key_expired"


class KeyRevoked(Unauthenticated):
    """The key was revoked."""

    code = "key_revoked"


@dataclass(frozen=True)
class NewKey:
    """What a caller says of a key."""

    name: str
    role: Role
    expires_at: datetime | None = None


class AccessKeys:
    """What can be done with API keys."""

    def __init__(self, *, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock
        self._noted: dict[str, datetime] = {}
        """When this process noted a use of each key last, or tried to."""

    async def caller(self, secret: str) -> Caller:
        """Return whose secret it is, or raise `KeyUnknown`, `KeyExpired` or `KeyRevoked`."""
        now = self._clock()
        async with self._database.reading() as session:
            row = await access_keys.by_digest(session, _digest(secret))
        if row is None:
            raise KeyUnknown
        if row.revoked_at is not None:
            raise KeyRevoked(name=row.name)
        if row.expires_at is not None and row.expires_at <= now:
            raise KeyExpired(name=row.name, at=row.expires_at.isoformat())
        await self._note_use(row, now)
        of_project = row.project_id is not None
        return Caller(
            CallerKind.KEY,
            None if of_project else row.role,
            row.name,
            key_id=row.id,
            expires_at=row.expires_at,
            only_project=row.project_id,
            role_in_project=row.role if of_project else None,
        )

    async def _note_use(self, row: AccessKeyRow, now: datetime) -> None:
        """Write when the key was used, once a minute. A database that cannot be written to keeps nobody out."""
        noted = [at for at in (row.last_used_at, self._noted.get(row.id)) if at is not None]
        if noted and now - max(noted) < _USE_IS_NOTED_EVERY:
            return
        self._noted[row.id] = now
        try:
            async with self._database.writing() as session:
                await access_keys.note_use(session, row.id, now=now)
        except SQLAlchemyError as error:
            logger.warning("key_use_not_noted", extra={"key": row.name, "error": type(error).__name__})

    async def page(
        self, session: AsyncSession, wanted: PageRequest, *, caller: Caller, revoked: bool
    ) -> Slice[AccessKeyRow]:
        """Return one page of the keys: those of the project that the caller is in, else all."""
        return await access_keys.page(session, wanted, project=caller.project, revoked=revoked)

    async def get(self, session: AsyncSession, key: str, *, caller: Caller) -> AccessKeyRow:
        """Return the key with this id or name."""
        return await access_keys.get(session, key, project=caller.project)

    async def create(self, session: AsyncSession, new: NewKey, *, by: Caller) -> tuple[AccessKeyRow, str]:
        """Make a key; return it and its secret, which nobody can read again.

        It opens the project that `by` is in and no other; outside of projects it has its role in the installation.
        """
        now = self._clock()
        self._check(new, now)
        secret = _new_secret()
        row = AccessKeyRow(
            id=str(uuid4()),
            name=normal_name(new.name),
            name_key=name_key(new.name),
            role=new.role,
            project_id=by.project,
            prefix=_shown(secret),
            digest=_digest(secret),
            created_by=by.name,
            created_at=now,
            changed_at=now,
            expires_at=new.expires_at,
        )
        return await access_keys.save(session, row), secret

    async def change(
        self,
        session: AsyncSession,
        key: str,
        changes: Mapping[str, Any],
        *,
        caller: Caller,
        check: Callable[[str], None],
    ) -> AccessKeyRow:
        """Change name, role or expiry of a key that is not revoked; its secret stays."""
        row = await self._live(session, key, caller, check)
        now = self._clock()
        new = NewKey(**{"name": row.name, "role": row.role, "expires_at": row.expires_at, **changes})
        self._check(new, now)
        return await access_keys.save(
            session,
            row,
            name=normal_name(new.name),
            name_key=name_key(new.name),
            role=new.role,
            expires_at=new.expires_at,
            changed_at=now,
        )

    async def rotate(self, session: AsyncSession, key: str, *, caller: Caller) -> tuple[AccessKeyRow, str]:
        """Give the key a new secret; the old one ends at once."""
        row = await self._live(session, key, caller)
        secret = _new_secret()
        return await access_keys.save(
            session, row, prefix=_shown(secret), digest=_digest(secret), changed_at=self._clock()
        ), secret

    async def revoke(self, session: AsyncSession, key: str, *, caller: Caller, check: Callable[[str], None]) -> None:
        """End the key for good. It stays in the list of revoked keys, and its name may be used again."""
        row = await self._live(session, key, caller, check)
        now = self._clock()
        await access_keys.save(session, row, revoked_at=now, changed_at=now)

    async def _live(
        self, session: AsyncSession, key: str, caller: Caller, check: Callable[[str], None] = lambda _: None
    ) -> AccessKeyRow:
        row = await access_keys.get(session, key, project=caller.project, lock=True)
        if row.revoked_at is not None:
            raise access_keys.AccessKeyNotFound(key=key)
        check(version_of(row))
        return row

    def _check(self, new: NewKey, now: datetime) -> None:
        found = name_violations(new.name, reserved=RESERVED_NAMES)
        if new.expires_at is not None and new.expires_at <= now:
            found.append(Violation("/expires_at", "expiry_in_the_past", {"at": new.expires_at.isoformat()}))
        if found:
            raise InvalidRequest(found)


def version_of(row: AccessKeyRow) -> str:
    """Return what changes with every change of the key; its uses are none."""
    return str(int(row.changed_at.timestamp() * 1e6))


def _new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def _shown(secret: str) -> str:
    return secret[:_SHOWN_CHARACTERS]


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
