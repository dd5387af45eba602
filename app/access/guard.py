"""Check the installed licence at every request that needs one.

The file is read again when it changed on disk: `deepe license install` works while the service runs. The time is
looked at on every call: a licence expires under a running service.
"""

import os
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from app.access.licence import METHODS_WRITE, Clock, Licence, LicenceError, read_file, read_signed
from app.domain.errors import NotAllowed, Violation
from app.domain.texts import DEFAULT_LANGUAGE, Language


class CommercialLicenseRequired(NotAllowed):
    """No licence that counts is installed; if one is there, `errors` says what is wrong with it."""

    code = "commercial_license_required"

    def __init__(self, cause: Violation | None = None, **params: Any) -> None:
        self._cause = cause
        super().__init__(**params)

    def detail(self, language: Language = DEFAULT_LANGUAGE) -> str:
        sentence = super().detail(language)
        if self._cause is None:
            return sentence
        separator = "" if language is Language.ZH else " "
        return f"{sentence}{separator}{self._cause.detail(language)}"

    def violations(self) -> tuple[Violation, ...]:
        return (self._cause,) if self._cause else ()


class LicenseState(StrEnum):
    """State of the licence."""

    NONE = "none"
    VALID = "valid"
    INVALID = "invalid"


@dataclass(frozen=True)
class LicenceStatus:
    """What is installed, and what is wrong with it."""

    state: LicenseState
    licence: Licence | None
    error: LicenceError | None


@dataclass
class LicenceGuard:
    """Answers for the licence file at `path`. One per process; safe to call from any thread."""

    path: Path
    public_key: Ed25519PublicKey
    clock: Clock
    _seen: tuple[str, Licence] | None = field(default=None, repr=False)

    def require(self, feature: str = METHODS_WRITE) -> None:
        """Raise `CommercialLicenseRequired` unless an installed, valid licence includes `feature`."""
        status = self.status()
        if status.error is not None:
            raise CommercialLicenseRequired(Violation("", status.error.code, status.error.params))
        if status.licence is None:
            raise CommercialLicenseRequired
        if not status.licence.allows(feature):
            params = {"licence": status.licence.id, "feature": feature}
            raise CommercialLicenseRequired(Violation("", "license_lacks_feature", params))

    def allows(self, feature: str = METHODS_WRITE) -> bool:
        """Say whether `require` would pass."""
        try:
            self.require(feature)
        except CommercialLicenseRequired:
            return False
        return True

    def status(self) -> LicenceStatus:
        """Return the installed licence and its state now."""
        found = self._read()
        if found is None:
            return LicenceStatus(LicenseState.NONE, None, None)
        if isinstance(found, LicenceError):
            return LicenceStatus(LicenseState.INVALID, None, found)
        error = _time_error(found, self.clock())
        return LicenceStatus(LicenseState.INVALID if error else LicenseState.VALID, found, error)

    def _read(self) -> Licence | LicenceError | None:
        """Return what the file says now. It is small, and nothing but its bytes says whether it is still the same."""
        if not os.path.lexists(self.path):
            return None
        try:
            text = read_file(self.path)
            if self._seen is None or self._seen[0] != text:
                self._seen = (text, read_signed(text, self.public_key))
        except LicenceError as error:
            return error
        return self._seen[1]


def _time_error(licence: Licence, now: datetime) -> LicenceError | None:
    try:
        licence.check_time(now)
    except LicenceError as error:
        return error
    return None
