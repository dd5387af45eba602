"""Licences: a signed file says what a customer bought. Verified offline with the vendor's public key (Ed25519).

The file is JSON with two members, `payload` (base64url of a JSON object) and `signature` (base64url, over a domain
prefix and the payload's bytes as they are, so that no canonical form is needed). It lies at `DEEPE_HOME/license.json`.
What a payload does not say is as it was before there were such terms: no grace, as many projects as one likes.
"""

import base64
import binascii
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from app.domain.errors import Conflict, Invalid, Violation
from app.store.home import is_shared, make_private_folder

PRODUCT: Final = "deepextension"
METHODS_WRITE: Final = "methods:write"
EVERYTHING: Final = "*"
FILE_NAME: Final = "license.json"
PRIVATE_KEY_FILE: Final = "license-private-key.pem"
PUBLIC_KEY_FILE: Final = "license-public-key.pem"
CLOCK_TOLERANCE: Final = timedelta(minutes=5)
WARNED_BEFORE: Final = timedelta(days=30)
MAX_GRACE_DAYS: Final = 366
MAX_PROJECTS: Final = 1_000_000

_SIGNED_PREFIX = b"deepe-license-1\n"  # a signature of this key over anything else is never a licence
_MAX_FILE_BYTES = 64 * 1024

Clock = Callable[[], datetime]


class LicenceError(Invalid):
    """A licence that does not count; the leaf says why."""


class LicenceMalformed(LicenceError):
    """No licence file at all."""

    code = "license_malformed"


class LicenceForged(LicenceError):
    """The signature is not the vendor's."""

    code = "license_forged"


class LicenceExpired(LicenceError):
    """Its time is over."""

    code = "license_expired"


class LicenceNotYetValid(LicenceError):
    """Issued in the future."""

    code = "license_not_yet_valid"


class LicenceClockSetBack(LicenceError):
    """The clock says an earlier time than the installation has seen already."""

    code = "license_clock_set_back"


class LicenceWrongProduct(LicenceError):
    """A licence of another product of the vendor."""

    code = "license_wrong_product"


class LicenceKeyExists(Conflict):
    """`keygen` would overwrite a key."""

    code = "license_key_exists"


class LicenceKeyUnreadable(Invalid):
    """A PEM file is no Ed25519 key."""

    code = "license_key_unreadable"


@dataclass(frozen=True)
class Edition:
    """What a licence of an edition allows unless its issuer says otherwise. Only who issues licences reads it."""

    features: tuple[str, ...]
    projects: int | None
    days: int | None = None
    grace_days: int = 14


EDITIONS: Final[Mapping[str, Edition]] = {
    "trial": Edition((EVERYTHING,), projects=None, days=30, grace_days=0),
    "team": Edition((METHODS_WRITE,), projects=3),
    "enterprise": Edition((EVERYTHING,), projects=None),
}


@dataclass(frozen=True)
class Licence:
    """What a verified licence file says."""

    id: str
    licensee: str
    issued_at: datetime
    expires_at: datetime | None
    features: tuple[str, ...]
    edition: str | None = None
    projects: int | None = None
    """How many the installation may have; None: no limit."""
    grace: timedelta = timedelta(0)
    """How long it goes on after its end, with a warning."""

    @property
    def ends_at(self) -> datetime | None:
        """Return from when on it does not count; None: never."""
        return self.expires_at + self.grace if self.expires_at is not None else None

    def warning(self, now: datetime) -> Violation | None:
        """Return what its holder should know of its end: that it comes soon, or that the grace has begun."""
        if self.expires_at is None or self.ends_at is None or now < self.expires_at - WARNED_BEFORE:
            return None
        params = {"licence": self.id, "expires_at": _text(self.expires_at), "ends_at": _text(self.ends_at)}
        if now >= self.expires_at:
            return Violation("", "license_in_grace", params)
        return Violation("", "license_expires_soon", params | {"days": (self.expires_at - now).days})

    def allows(self, feature: str) -> bool:
        """Say whether `feature` was bought."""
        return feature in self.features or EVERYTHING in self.features

    def check_time(self, now: datetime) -> None:
        """Raise when `now` is outside the licence's time."""
        if now < self.issued_at - CLOCK_TOLERANCE:
            raise LicenceNotYetValid(licence=self.id, issued_at=_text(self.issued_at))
        if self.expires_at is not None and self.ends_at is not None and now >= self.ends_at:
            raise LicenceExpired(licence=self.id, expires_at=_text(self.expires_at))


def issue(
    private_key: Ed25519PrivateKey,
    *,
    licensee: str,
    issued_at: datetime,
    expires_at: datetime | None = None,
    features: Sequence[str] = (METHODS_WRITE,),
    edition: str | None = None,
    projects: int | None = None,
    grace_days: int = 0,
    product: str = PRODUCT,
    licence_id: str | None = None,
) -> str:
    """Return the text of a licence file."""
    terms = {"edition": edition, "projects": projects, "grace_days": grace_days or None}
    payload = {
        "id": licence_id or uuid4().hex,
        "product": product,
        "licensee": licensee,
        "issued_at": _text(issued_at),
        "expires_at": _text(expires_at) if expires_at else None,
        "features": list(features),
        **{name: value for name, value in terms.items() if value is not None},
    }
    encoded = json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()
    signature = private_key.sign(_SIGNED_PREFIX + encoded)
    return json.dumps({"payload": _encode(encoded), "signature": _encode(signature)}, indent=2) + "\n"


def verify(text: str, public_key: Ed25519PublicKey, now: datetime) -> Licence:
    """Return the licence, or raise the `LicenceError` that says why it does not count."""
    licence = read_signed(text, public_key)
    licence.check_time(now)
    return licence


def read_signed(text: str, public_key: Ed25519PublicKey) -> Licence:
    """Return the licence if its signature and product are right, whatever the time is."""
    payload, signature = _split(text)
    try:
        public_key.verify(signature, _SIGNED_PREFIX + payload)
    except InvalidSignature:
        raise LicenceForged from None
    return _parse(payload)


def keygen(folder: Path) -> tuple[Path, Path]:
    """Write a key pair into `folder` and return the paths of the private and the public key; nothing is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    private_key = Ed25519PrivateKey.generate()
    private_path, public_path = folder / PRIVATE_KEY_FILE, folder / PUBLIC_KEY_FILE
    for path in (private_path, public_path):
        if path.exists():
            raise LicenceKeyExists(path=path)
    _write_new(
        private_path,
        private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        mode=0o600,
    )
    _write_new(
        public_path,
        private_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        mode=0o644,
    )
    return private_path, public_path


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a PEM file; anything but an Ed25519 private key is `LicenceKeyUnreadable`."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise LicenceKeyUnreadable(path=path, problem=_reason(error)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise LicenceKeyUnreadable(path=path, problem="another kind of key")
    return key


def load_public_key(path: Path | None = None) -> Ed25519PublicKey:
    """Read a PEM file, or the built-in key of the vendor."""
    try:
        pem = path.read_bytes() if path else resources.files("app.access").joinpath("public_key.pem").read_bytes()
        key = serialization.load_pem_public_key(pem)
    except (OSError, ValueError, TypeError) as error:
        raise LicenceKeyUnreadable(path=path, problem=_reason(error)) from error
    if not isinstance(key, Ed25519PublicKey):
        raise LicenceKeyUnreadable(path=path, problem="another kind of key")
    return key


def licence_path(home: Path) -> Path:
    """Return the path of the installed licence."""
    return home / FILE_NAME


def install(text: str, path: Path, *, public_key: Ed25519PublicKey, now: datetime) -> Licence:
    """Verify `text` and put it at `path` in one step; a licence that does not count replaces nothing."""
    licence = verify(text, public_key, now)
    make_private_folder(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if os.geteuid() == 0:  # the service that is to read it may run as the home's owner
                owner = path.parent.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            if is_shared(path.parent):
                os.fchmod(descriptor, 0o640)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return licence


def read_file(path: Path) -> str:
    """Return the text of a licence file; a file that cannot be one is `LicenceMalformed`."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise LicenceMalformed(problem="the file is too large")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LicenceMalformed(problem=_reason(error)) from error


def _split(text: str) -> tuple[bytes, bytes]:
    try:
        document = json.loads(text)
        return _decode(document["payload"]), _decode(document["signature"])
    except (ValueError, RecursionError):
        raise LicenceMalformed(problem="it is no JSON or not base64") from None
    except (KeyError, TypeError, AttributeError):
        raise LicenceMalformed(problem="payload or signature is missing") from None


def _parse(payload: bytes) -> Licence:
    try:
        document: dict[str, Any] = json.loads(payload)
        licence_id, product = str(document["id"]), str(document["product"])
        expires_at = document.get("expires_at")
        features = tuple(str(feature) for feature in document["features"])
        licence = Licence(
            id=licence_id,
            licensee=str(document["licensee"]),
            issued_at=_time(document["issued_at"]),
            expires_at=_time(expires_at) if expires_at else None,
            features=features,
            edition=str(document["edition"]) if document.get("edition") is not None else None,
            projects=_count(document.get("projects"), MAX_PROJECTS),
            grace=timedelta(days=_count(document.get("grace_days"), MAX_GRACE_DAYS) or 0),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LicenceMalformed(problem="a field is missing or wrong") from None
    if product != PRODUCT:
        raise LicenceWrongProduct(licence=licence_id, product=product)
    return licence


def _write_new(path: Path, content: bytes, *, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise LicenceKeyExists(path=path) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _count(value: Any, most: int) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value <= most):
        raise ValueError("no number of that kind")
    return None if value is None else int(value)


def _time(value: str) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError("a time without zone")
    return moment


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error) or "no PEM"
