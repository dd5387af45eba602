"""Report whether the service is alive and ready, and what its licence allows."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Final, Literal

from fastapi import Depends, Request
from pydantic import Field

from app.access.guard import LicenceGuard, LicenceRecord, LicenceStatus, LicenseState
from app.access.licence import (
    LicenceExpired,
    LicenceForged,
    LicenceMalformed,
    LicenceNotYetValid,
    LicenceWrongProduct,
)
from app.api.errors import DatabaseUnavailable, ProblemEntry, problem_entries, problem_responses
from app.api.language import RequestLanguage
from app.api.routing import Router, needs
from app.api.schemas.common import RequestBody
from app.domain.access import Permission
from app.domain.texts import Language
from app.domain.values import Value

logger = logging.getLogger(__name__)

CHECK_SECONDS: Final = 3.0

Check = Callable[[], Awaitable[object]]
"""Raises when what it asks does not answer."""


@dataclass(frozen=True)
class Readiness:
    """What the service cannot work without (`database`), and what it only works worse without, by name."""

    database: Check
    optional: Mapping[str, Check] = field(default_factory=dict)


class Health(Value):
    """The process answers."""

    status: Literal["ok"]


class Ready(Value):
    """The service can work."""

    status: Literal["ready"]
    degraded: list[str] = Field(description="What does not answer, though the service works without.", examples=[[]])


class LicenseDetails(Value):
    """What the installed licence says."""

    id: str
    licensee: str
    issued_at: datetime
    expires_at: datetime | None
    features: list[str] = Field(examples=[["methods:write"]])
    edition: str | None = Field(examples=["team"])
    projects: int | None = Field(description="How many the installation may have; null: no limit.")
    ends_at: datetime | None = Field(
        description="From when on it does not count: the end of the grace after `expires_at`."
    )


class LicenseFile(RequestBody):
    """A licence file as it was sent by the vendor."""

    payload: str = Field(description="What it says, in base64url.", max_length=48 * 1024, examples=["eyJpZCI6IkwtMSJ9"])
    signature: str = Field(
        description="The vendor's signature, in base64url.", max_length=256, examples=["c2lnbmF0dXJl"]
    )


class LicenseRead(Value):
    """The status of the licence."""

    state: LicenseState
    license: LicenseDetails | None = Field(description="Null when none is installed or it cannot be read.")
    problem: ProblemEntry | None = Field(description="Why an installed licence does not count.")
    warning: ProblemEntry | None = Field(description="It counts, but expires soon or has only its grace left.")


router = Router(changes=Permission.ADMINISTER)


async def _readiness(request: Request) -> Readiness:
    readiness: Readiness = request.app.state.readiness
    return readiness


async def _licence(request: Request) -> LicenceGuard:
    guard: LicenceGuard = request.app.state.licence
    return guard


async def _record(request: Request) -> LicenceRecord:
    record: LicenceRecord = request.app.state.licence_record
    return record


@router.get("/healthz", tags=["system"])
@needs(None)
async def get_health() -> Health:
    """Say that the process answers; looks at nothing else."""
    return Health(status="ok")


@router.get("/readyz", tags=["system"], responses=problem_responses(DatabaseUnavailable))
@needs(None)
async def get_readiness(readiness: Annotated[Readiness, Depends(_readiness)]) -> Ready:
    """Say whether requests can be served: 503 without the database; what else is missing stands in `degraded`."""
    names = list(readiness.optional)
    database, *others = await asyncio.gather(
        _answers("database", readiness.database),
        *(_answers(name, check) for name, check in readiness.optional.items()),
    )
    if not database:
        raise DatabaseUnavailable
    return Ready(status="ready", degraded=[name for name, answers in zip(names, others, strict=True) if not answers])


@router.get("/api/v1/license", tags=["license"])
async def get_license(guard: Annotated[LicenceGuard, Depends(_licence)], language: RequestLanguage) -> LicenseRead:
    """Show the installed licence and whether it counts at this moment."""
    return _license_read(guard.status(), language)


@router.put(
    "/api/v1/license",
    tags=["license"],
    responses=problem_responses(
        *(LicenceMalformed, LicenceForged, LicenceExpired, LicenceNotYetValid, LicenceWrongProduct)
    ),
)
async def install_license(
    file: LicenseFile,
    guard: Annotated[LicenceGuard, Depends(_licence)],
    record: Annotated[LicenceRecord, Depends(_record)],
    language: RequestLanguage,
) -> LicenseRead:
    """Install a licence in the place of the present one. One that does not count replaces nothing."""
    await record.install(json.dumps(file.model_dump(), indent=2) + "\n")
    return _license_read(guard.status(), language)


def _license_read(status: LicenceStatus, language: Language) -> LicenseRead:
    licence, error = status.licence, status.error
    details = licence and LicenseDetails(
        id=licence.id,
        licensee=licence.licensee,
        issued_at=licence.issued_at,
        expires_at=licence.expires_at,
        features=list(licence.features),
        edition=licence.edition,
        projects=licence.projects,
        ends_at=licence.ends_at,
    )
    problem = error and ProblemEntry(pointer="", code=error.code, detail=error.detail(language))
    warnings = problem_entries([status.warning] if status.warning else [], language)
    return LicenseRead(state=status.state, license=details, problem=problem, warning=warnings[0] if warnings else None)


async def _answers(name: str, check: Check) -> bool:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await check()
    except Exception as exc:
        logger.warning("readiness_check_failed", extra={"check": name, "error": f"{type(exc).__name__}: {exc}"})
        return False
    return True
