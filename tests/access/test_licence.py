import base64
import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.access.licence import (
    Licence,
    LicenceError,
    LicenceExpired,
    LicenceForged,
    LicenceKeyExists,
    LicenceKeyUnreadable,
    LicenceMalformed,
    LicenceNotYetValid,
    LicenceWrongProduct,
    install,
    issue,
    keygen,
    licence_path,
    load_private_key,
    load_public_key,
    read_file,
    verify,
)

KEY = Ed25519PrivateKey.generate()
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
TEXT = issue(KEY, licensee="ACME 有限公司", issued_at=NOW, expires_at=NOW + timedelta(days=30), licence_id="L-1")


def check(text: str, *, now: datetime = NOW) -> Licence:
    return verify(text, KEY.public_key(), now)


def with_payload(**changes: object) -> str:
    """Return the licence with a changed payload and the old signature."""
    document = json.loads(TEXT)
    payload = json.loads(base64.urlsafe_b64decode(document["payload"] + "==")) | changes
    document["payload"] = base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")
    return json.dumps(document)


class TestVerify:
    def test_returns_what_was_issued(self) -> None:
        assert check(TEXT) == Licence(
            id="L-1",
            licensee="ACME 有限公司",
            issued_at=NOW,
            expires_at=NOW + timedelta(days=30),
            features=("methods:write",),
        )

    def test_licence_without_end_never_expires(self) -> None:
        text = issue(KEY, licensee="ACME", issued_at=NOW)

        assert check(text, now=NOW + timedelta(days=36500)).expires_at is None

    def test_expires_at_its_moment(self) -> None:
        end = NOW + timedelta(days=30)

        check(TEXT, now=end - timedelta(seconds=1))
        with pytest.raises(LicenceExpired, match=r"L-1 expired at 2026-07-01T12:00:00Z"):
            check(TEXT, now=end)

    def test_is_not_valid_before_it_was_issued_but_clocks_may_differ_a_little(self) -> None:
        check(TEXT, now=NOW - timedelta(minutes=4))
        with pytest.raises(LicenceNotYetValid):
            check(TEXT, now=NOW - timedelta(minutes=6))

    def test_signature_of_another_key_is_forged(self) -> None:
        with pytest.raises(LicenceForged):
            verify(TEXT, Ed25519PrivateKey.generate().public_key(), NOW)

    def test_longer_term_with_the_old_signature_is_forged(self) -> None:
        with pytest.raises(LicenceForged):
            check(with_payload(expires_at="2099-01-01T00:00:00Z"))

    def test_every_changed_byte_of_the_signature_is_noticed(self) -> None:
        document = json.loads(TEXT)
        signature = base64.urlsafe_b64decode(document["signature"] + "==")

        for index in range(len(signature)):
            changed = bytes([*signature[:index], signature[index] ^ 1, *signature[index + 1 :]])
            document["signature"] = base64.urlsafe_b64encode(changed).decode()
            with pytest.raises(LicenceForged):
                check(json.dumps(document))

    def test_signature_over_the_bare_payload_is_no_licence(self) -> None:
        payload = base64.urlsafe_b64decode(json.loads(TEXT)["payload"] + "==")
        text = json.dumps(
            {
                name: base64.urlsafe_b64encode(part).decode()
                for name, part in (("payload", payload), ("signature", KEY.sign(payload)))
            }
        )

        with pytest.raises(LicenceForged):
            check(text)

    def test_licence_of_another_product(self) -> None:
        with pytest.raises(LicenceWrongProduct, match="other-product"):
            check(issue(KEY, licensee="ACME", issued_at=NOW, product="other-product"))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "not json",
            "[]",
            "3",
            "null",
            "{}",
            '{"payload": 1, "signature": "x"}',
            '{"payload": "e30"}',
            '{"payload": "*", "signature": "AAAA"}',
            '{"payload": "é", "signature": "AAAA"}',
            "[" * 100_000,
        ],
    )
    def test_what_is_no_licence_file_is_malformed(self, text: str) -> None:
        with pytest.raises(LicenceMalformed):
            check(text)

    @pytest.mark.parametrize("issued_at", ["2026-06-01", "soon"])
    def test_signed_nonsense_is_malformed(self, issued_at: str) -> None:
        payload = json.dumps(
            {"id": "x", "product": "deepextension", "licensee": "a", "issued_at": issued_at, "features": []}
        ).encode()
        signature = KEY.sign(b"deepe-license-1\n" + payload)
        text = json.dumps(
            {"payload": base64.b64encode(payload).decode(), "signature": base64.urlsafe_b64encode(signature).decode()}
        )

        with pytest.raises(LicenceMalformed):
            check(text)


class TestKeys:
    def test_pair_signs_and_verifies(self, tmp_path: Path) -> None:
        private_path, public_path = keygen(tmp_path / "keys")

        text = issue(load_private_key(private_path), licensee="ACME", issued_at=NOW)

        assert verify(text, load_public_key(public_path), NOW).licensee == "ACME"

    def test_private_key_is_for_its_owner_only(self, tmp_path: Path) -> None:
        private_path, _ = keygen(tmp_path)

        assert stat.S_IMODE(private_path.stat().st_mode) == 0o600

    def test_overwrites_nothing(self, tmp_path: Path) -> None:
        private_path, _ = keygen(tmp_path)
        before = private_path.read_bytes()

        with pytest.raises(LicenceKeyExists, match=r"license-private-key\.pem"):
            keygen(tmp_path)

        assert private_path.read_bytes() == before

    def test_other_files_are_no_keys(self, tmp_path: Path) -> None:
        _, public_path = keygen(tmp_path)
        rsa_path = tmp_path / "rsa.pem"
        rsa_path.write_bytes(
            rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )

        for path in (public_path, rsa_path, tmp_path / "missing.pem", tmp_path):
            with pytest.raises(LicenceKeyUnreadable):
                load_private_key(path)
        with pytest.raises(LicenceKeyUnreadable):
            load_public_key(rsa_path)

    def test_built_in_key_is_there_and_verifies_nothing_of_ours(self) -> None:
        with pytest.raises(LicenceForged):
            verify(TEXT, load_public_key(), NOW)

    def test_repository_holds_no_private_key(self) -> None:
        for path in Path(__file__).parents[2].joinpath("app").rglob("*.pem"):
            assert b"PRIVATE" not in path.read_bytes()


class TestInstall:
    def test_puts_the_file_in_the_home_folder(self, tmp_path: Path) -> None:
        path = licence_path(tmp_path / "home")

        licence = install(TEXT, path, public_key=KEY.public_key(), now=NOW)

        assert licence.id == "L-1"
        assert read_file(path) == TEXT
        assert [entry.name for entry in path.parent.iterdir()] == ["license.json"]

    def test_file_is_for_the_owner_of_the_home_alone(self, tmp_path: Path) -> None:
        path = licence_path(tmp_path)
        if os.geteuid() == 0:  # an administrator installs it for a service that runs as another account
            os.chown(tmp_path, 65534, 65534)

        install(TEXT, path, public_key=KEY.public_key(), now=NOW)

        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_uid == tmp_path.stat().st_uid

    @pytest.mark.parametrize("text", ["", with_payload(licensee="me")], ids=["empty", "forged"])
    def test_licence_that_does_not_count_replaces_nothing(self, tmp_path: Path, text: str) -> None:
        path = licence_path(tmp_path)
        install(TEXT, path, public_key=KEY.public_key(), now=NOW)

        with pytest.raises(LicenceError):
            install(text, path, public_key=KEY.public_key(), now=NOW)

        assert read_file(path) == TEXT

    def test_file_that_cannot_be_a_licence_is_malformed(self, tmp_path: Path) -> None:
        large, binary = tmp_path / "large", tmp_path / "binary"
        large.write_bytes(b"x" * 70_000)
        binary.write_bytes(b"\xff\xfe")

        for path in (large, binary, tmp_path, tmp_path / "missing"):
            with pytest.raises(LicenceMalformed):
                read_file(path)
