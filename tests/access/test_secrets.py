"""Secrets at rest: ciphertext in the database, keys that are replaced, rows that were tampered with."""

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from app.access.secrets import (
    SecretKeys,
    Secrets,
    SecretsKeyUnusable,
    SecretUnreadable,
    encrypt_anew,
    secret_values,
    unreadable_secrets,
)
from app.domain.access import LOCAL
from app.store import secrets as store
from app.store.session import Database

VALUE = "correct horse battery"


async def put(database: Database, keys: SecretKeys, **values: str) -> None:
    async with database.writing() as session:
        for name, value in values.items():
            service = Secrets(keys, clock=lambda: datetime.now(UTC))
            await service.put(session, name, value, by=LOCAL, check=lambda _: None)


async def values(database: Database, keys: SecretKeys, *names: str) -> dict[str, str]:
    async with database.reading() as session:
        return dict(await secret_values(session, keys, names))


class TestAtRest:
    async def test_values_come_back_with_the_key_alone(self, database: Database, tmp_path: Path) -> None:
        keys = SecretKeys(tmp_path / "secrets.key")

        await put(database, keys, one=VALUE, two="another " + VALUE)

        async with database.reading() as session:
            stored = [row.value for row in await store.all_secrets(session)]
        assert not any(VALUE in text for text in stored)
        assert stat.S_IMODE(keys.file.stat().st_mode) == 0o600
        assert await values(database, keys, "one", "gone") == {"one": VALUE}
        for other in (SecretKeys(tmp_path / "none"), SecretKeys(tmp_path, given=Fernet.generate_key().decode())):
            with pytest.raises(SecretUnreadable):
                await values(database, other, "one")
            async with database.reading() as session:
                assert await unreadable_secrets(session, other) == ["one", "two"]

    async def test_a_row_does_not_read_another_ones_value(self, database: Database, tmp_path: Path) -> None:
        keys = SecretKeys(tmp_path / "secrets.key")
        await put(database, keys, cheap=VALUE, dear="another " + VALUE)
        async with database.writing() as session:
            cheap, dear = await store.all_secrets(session)
            cheap.value = dear.value
            await store.save(session, cheap)

        with pytest.raises(SecretUnreadable):
            await values(database, keys, "cheap")

    async def test_a_new_key_takes_over_and_the_old_one_can_be_forgotten(
        self, database: Database, tmp_path: Path
    ) -> None:
        keys = SecretKeys(tmp_path / "secrets.key")
        await put(database, keys, one=VALUE)
        (old,) = keys.read()

        keys.add()
        assert await values(database, keys, "one") == {"one": VALUE}
        async with database.writing() as session:
            assert await encrypt_anew(session, keys) == 1

        assert await values(database, SecretKeys(tmp_path, given=keys.read()[0]), "one") == {"one": VALUE}
        assert keys.read()[1:] == (old,)
        keys.keep_first()
        assert old not in keys.read()
        with pytest.raises(SecretUnreadable):
            await values(database, SecretKeys(tmp_path, given=old), "one")

    def test_a_damaged_key_is_told_and_not_shown(self, tmp_path: Path) -> None:
        keys = SecretKeys(tmp_path / "secrets.key")
        keys.file.write_text("half-a-key")

        with pytest.raises(SecretsKeyUnusable) as raised:
            keys.read_or_make()

        assert "half-a-key" not in raised.value.detail()
        assert keys.file.read_text() == "half-a-key"
