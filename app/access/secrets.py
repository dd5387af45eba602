"""Secrets: set by developers, referred to by name (`secret://NAME`), and read by the processes of stages alone.

Values are encrypted with keys of Fernet (AES-128-CBC with HMAC-SHA256). They stand in `DEEPE_SECRETS_KEY`, else in a
file of the home that the first secret makes. The first key encrypts, all of them decrypt, so that a key can be replaced
while the service runs, and a backup of before can still be read. A value is encrypted together with its name: whoever
can write rows cannot give one name the value of another.
"""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final
from uuid import uuid4

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.access import Caller
from app.domain.errors import InvalidRequest, NotFound, Unavailable, Violation
from app.domain.projects import DEFAULT_PROJECT
from app.domain.secret_references import is_secret_name, parse_keys
from app.store import secrets as store
from app.store.paging import PageRequest, Slice
from app.store.session import own
from app.store.tables import SecretRow

SHORTEST: Final = 8
LONGEST: Final = 32 * 1024
_PRIVATE: Final = 0o600


class SecretNotFound(NotFound):
    """No secret has this name."""

    code = "secret_not_found"


class SecretsKeyUnusable(Unavailable):
    """The key that encrypts secrets cannot be read or made."""

    code = "secrets_key_unusable"


class SecretUnreadable(Exception):
    """None of the keys decrypts a secret: it was encrypted with another one."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"The secret {name!r} was encrypted with a key that is not here.")


class SecretKeys:
    """The keys of an installation: those that the settings give, else those in a file, read at each use."""

    def __init__(self, file: Path, given: str | None = None) -> None:
        self.file = file
        self._given = given

    @property
    def are_given(self) -> bool:
        """Whether the settings hold the keys; the service then writes none."""
        return self._given is not None

    def read(self) -> tuple[str, ...]:
        """Return the keys, the one that encrypts first; none if none was made yet. Blocks."""
        try:
            return parse_keys(self._given if self._given is not None else self.file.read_text("ascii"))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            raise SecretsKeyUnusable(file=str(self.file), detail=str(error)) from error

    def read_or_make(self) -> tuple[str, ...]:
        """Return the keys; the first call makes one. Of two at the same instant one makes it. Blocks."""
        while not (keys := self.read()):
            with contextlib.suppress(FileExistsError):
                self._write([_new_key()], replace=False)
        return keys

    def add(self) -> None:
        """Make a new key that encrypts from now on; the others stay for what they encrypted. Blocks."""
        self._write([_new_key(), *self.read()], replace=True)

    def keep_first(self) -> None:
        """Remove all keys but the one that encrypts. Blocks."""
        self._write(self.read()[:1], replace=True)

    def _write(self, keys: Sequence[str], *, replace: bool) -> None:
        draft = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        try:
            with open(draft, "w", encoding="ascii", opener=_private) as file:
                file.write("".join(f"{key}\n" for key in keys))
                file.flush()
                os.fsync(file.fileno())
            if replace:
                draft.replace(self.file)
            else:
                self.file.hardlink_to(draft)
        except FileExistsError:
            raise
        except OSError as error:
            raise SecretsKeyUnusable(file=str(self.file), detail=str(error)) from error
        finally:
            draft.unlink(missing_ok=True)


class Secrets:
    """What can be done with secrets."""

    def __init__(self, keys: SecretKeys, *, clock: Callable[[], datetime]) -> None:
        self._keys = keys
        self._clock = clock

    async def page(self, session: AsyncSession, wanted: PageRequest) -> Slice[SecretRow]:
        """Return one page of the secrets."""
        return await store.page(session, wanted)

    async def get(self, session: AsyncSession, name: str) -> SecretRow:
        """Return the secret, or raise `SecretNotFound`."""
        row = await store.find(session, name)
        if row is None:
            raise SecretNotFound(name=name)
        return row

    async def put(
        self, session: AsyncSession, name: str, value: str, *, by: Caller, check: Callable[[str], None]
    ) -> SecretRow:
        """Make the secret, or give it another value. `check` gets the version that is replaced and may refuse."""
        found = [] if is_secret_name(name) else [Violation("", "secret_name_invalid", {})]
        if found := found + _value_violations(value):
            raise InvalidRequest(found)
        row = await store.find(session, name, lock=True)
        check(version_of(row))
        now = self._clock()
        if row is None:
            row = SecretRow(id=str(uuid4()), name=name, created_by=by.name, created_at=now)
            own(session, row)
        row.value = await asyncio.to_thread(_encrypt, self._keys.read_or_make, _label(row), value)
        row.changed_by, row.changed_at = by.name, now
        await store.save(session, row)
        return row

    async def delete(self, session: AsyncSession, name: str, *, check: Callable[[str], None]) -> None:
        """Delete the secret. Jobs that refer to it and have not started end with `secret_missing`."""
        row = await store.find(session, name, lock=True)
        if row is None:
            raise SecretNotFound(name=name)
        check(version_of(row))
        await store.delete(session, row)


async def secret_values(session: AsyncSession, keys: SecretKeys, names: Collection[str]) -> Mapping[str, str]:
    """Return the values of the secrets that exist, by name; raise `SecretUnreadable`, `SecretsKeyUnusable`."""
    rows = await store.named(session, names)
    values = await asyncio.to_thread(_decrypted, keys, rows) if rows else []
    return {row.name: value for row, value in zip(rows, values, strict=True)}


async def unreadable_secrets(session: AsyncSession, keys: SecretKeys) -> Sequence[str]:
    """Return the names of the secrets that none of the keys decrypts."""
    return await asyncio.to_thread(_unreadable, keys, await store.all_secrets(session))


async def encrypt_anew(session: AsyncSession, keys: SecretKeys) -> int:
    """Encrypt all secrets with the first key; return how many. Raises `SecretUnreadable` before it changes any."""
    rows = await store.all_secrets(session, lock=True)
    values = await asyncio.to_thread(_decrypted, keys, rows)
    for row, value in zip(rows, values, strict=True):
        row.value = await asyncio.to_thread(_encrypt, keys.read, _label(row), value)
        await store.save(session, row)
    return len(rows)


def version_of(row: SecretRow | None) -> str:
    """Return what changes with every change of the secret."""
    return "none" if row is None else str(int(row.changed_at.timestamp() * 1e6))


def _value_violations(value: str) -> list[Violation]:
    """Return why a value cannot be a secret: it could not be handed over, or not be taken out of the output again."""
    if len(value) < SHORTEST or len(value.encode()) > LONGEST:
        return [Violation("/value", "secret_length", {"least": SHORTEST, "most": LONGEST})]
    if re.fullmatch(r"[0-9.,:+-]*", value):  # numbers of a curve would be taken for it
        return [Violation("/value", "secret_is_number", {})]
    return []


def _label(row: SecretRow) -> str:
    """Return what a value is encrypted with: the name, and the project where it is not the first."""
    return row.name if row.project_id == DEFAULT_PROJECT else f"{row.project_id}/{row.name}"


def _encrypt(keys: Callable[[], Sequence[str]], label: str, value: str) -> str:
    from cryptography.fernet import Fernet

    return Fernet(keys()[0]).encrypt(json.dumps([label, value]).encode()).decode()


def _decrypted(keys: SecretKeys, rows: Sequence[SecretRow]) -> list[str]:
    from cryptography.fernet import Fernet, InvalidToken, MultiFernet

    found = [Fernet(key) for key in keys.read()]
    values = []
    for row in rows:
        try:
            if not found:
                raise InvalidToken
            label, value = json.loads(MultiFernet(found).decrypt(row.value))
        except InvalidToken as error:
            raise SecretUnreadable(row.name) from error
        if label != _label(row):
            raise SecretUnreadable(row.name)
        values.append(value)
    return values


def _unreadable(keys: SecretKeys, rows: Sequence[SecretRow]) -> list[str]:
    names = []
    for row in rows:
        try:
            _decrypted(keys, [row])
        except SecretUnreadable:
            names.append(row.name)
    return names


def _new_key() -> str:
    from cryptography.fernet import Fernet

    return Fernet.generate_key().decode()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, _PRIVATE)
