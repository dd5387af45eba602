"""Check the installed licence at every request that needs one.

The file is read again when it changed on disk: `deepe license install` works while the service runs. The time is
looked at on every call: a licence expires under a running service.
"""

import asyncio
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from app.access.licence import (
    METHODS_WRITE,
    Clock,
    Licence,
    LicenceClockSetBack,
    LicenceError,
    install,
    read_file,
    read_signed,
)
from app.domain.audit import note_file
from app.domain.errors import NotAllowed, Violation
from app.domain.texts import DEFAULT_LANGUAGE, Language
from app.store import installation
from app.store.session import Database

logger = logging.getLogger(__name__)

UNLICENSED_PROJECTS: Final = 1
SET_BACK_TOLERANCE: Final = timedelta(days=1)  # a clock that took local time for UTC is no fraud


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


class ProjectLimitReached(NotAllowed):
    """The installation has as many projects as its licence allows."""

    code = "license_project_limit"


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
    warning: Violation | None = None
    """It counts, and its holder should know something of its end."""

    def counting(self) -> Licence | None:
        """Return the licence if it counts."""
        return self.licence if self.state is LicenseState.VALID else None


@dataclass
class LicenceGuard:
    """Answers for the licence file at `path`. One per process; safe to call from any thread."""

    path: Path
    public_key: Ed25519PublicKey
    clock: Clock
    latest_seen: datetime | None = None
    """The latest time that the installation knows of (`LicenceRecord`)."""
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

    def require_room_for_project(self, present: int) -> None:
        """Raise `ProjectLimitReached` when the installation may not have more than the `present` projects."""
        licence = self.status().counting()
        limit = UNLICENSED_PROJECTS if licence is None else licence.projects
        if limit is not None and present >= limit:
            raise ProjectLimitReached(limit=limit)

    def notices(self) -> Sequence[Violation]:
        """Return what people should know of the licence: why it does not count, or that its end is near."""
        status = self.status()
        if status.error is not None:
            return [Violation("", status.error.code, status.error.params)]
        return [] if status.warning is None else [status.warning]

    def status(self) -> LicenceStatus:
        """Return the installed licence and its state now."""
        found = self._read()
        if found is None:
            return LicenceStatus(LicenseState.NONE, None, None)
        if isinstance(found, LicenceError):
            return LicenceStatus(LicenseState.INVALID, None, found)
        now = self.clock()
        error = _time_error(found, now, self.latest_seen)
        if error is not None:
            return LicenceStatus(LicenseState.INVALID, found, error)
        return LicenceStatus(LicenseState.VALID, found, None, found.warning(now))

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


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


class LicenceRecord:
    """Keeps in the database the latest time that the installation has seen, and which licences were installed.

    A clock that was set back gives no licence more time. One that was wrong in the future must not end every licence
    for ever: a licence that was never here before begins the record anew.
    """

    KEY: Final = "licence"
    LOOKS_EVERY_SECONDS: Final = 60.0
    WRITTEN_EVERY: Final = timedelta(hours=1)
    MAX_LICENCES: Final = 100

    def __init__(self, database: Database, guard: LicenceGuard) -> None:
        self._database = database
        self._guard = guard
        self._written: tuple[datetime, str | None] | None = None

    async def install(self, text: str) -> None:
        """Put a licence in the place of the present one; raise `LicenceError` for one that does not count."""
        guard = self._guard
        before = await asyncio.to_thread(_sha256, guard.path)
        await asyncio.to_thread(install, text, guard.path, public_key=guard.public_key, now=guard.clock())
        note_file(guard.path.name, before=before, after=await asyncio.to_thread(_sha256, guard.path))
        await self.look()

    async def look(self) -> None:
        """Compare the clock with the record. Write it once an hour, and when another licence was installed."""
        now = self._guard.clock()
        licence = (await asyncio.to_thread(self._guard.status)).licence
        mark = licence.id if licence is not None else None
        if self._written is not None and self._written[1] == mark and now - self._written[0] < self.WRITTEN_EVERY:
            return
        async with self._database.writing() as session:
            kept = await installation.get(session, self.KEY) or {}
            latest, licences = _recorded(kept.get("latest")), list(kept.get("licences", ()))
            if mark is not None and mark not in licences:
                latest, licences = now, [*licences, mark][-self.MAX_LICENCES :]
            latest = max(latest, now) if latest is not None else now
            value = {"latest": latest.isoformat(), "licences": licences}
            if value != kept:
                await installation.put(session, self.KEY, value, now=now)
        self._guard.latest_seen, self._written = latest, (now, mark)
        for notice in self._guard.notices():
            logger.warning(notice.code, extra=notice.params)


def _recorded(value: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo is not None else None


def _time_error(licence: Licence, now: datetime, latest_seen: datetime | None) -> LicenceError | None:
    if licence.expires_at is not None and latest_seen is not None and now < latest_seen - SET_BACK_TOLERANCE:
        return LicenceClockSetBack(
            licence=licence.id, now=now.isoformat(timespec="minutes"), seen=latest_seen.isoformat(timespec="minutes")
        )
    try:
        licence.check_time(now)
    except LicenceError as error:
        return error
    return None
