"""The audit trail: who changed what, and which code was started."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import Depends, Path, Query
from fastapi.responses import StreamingResponse
from pydantic import AwareDatetime

from app.access.audit import verify
from app.api.dependencies import ReadSession, ServicesDep
from app.api.errors import problem_responses
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routing import Router
from app.api.schemas.audit import AuditRecordRead, AuditVerification, audit_record_read, audit_verification
from app.domain.access import Permission
from app.domain.audit import AuditKind
from app.store import audit_records
from app.store.audit_records import AuditFilter, AuditRecordNotFound

router = Router(changes=Permission.ADMINISTER, reads=Permission.ADMINISTER, prefix="/api/v1", tags=["audit"])

JSON_LINES: Final = "application/octet-stream"  # as all downloads: what generated clients hand on as bytes
_EXPORT: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "A record on each line, oldest first.",
        "content": {JSON_LINES: {"schema": {"type": "string", "format": "binary"}}},
    }
}
Paging = Annotated[PageParams, Depends(page_params("number", default="-number"))]


async def _wanted(
    caller: Annotated[str | None, Query(description="Name or principal of the caller.", max_length=500)] = None,
    kind: Annotated[AuditKind | None, Query(description="Only records of this kind.")] = None,
    operation: Annotated[str | None, Query(description="Operation id of the route.", max_length=100)] = None,
    thing_kind: Annotated[
        str | None, Query(description="Kind of a thing, such as `method` or `job`.", max_length=50)
    ] = None,
    thing: Annotated[str | None, Query(description="Id or name of a thing.", max_length=300)] = None,
    project: Annotated[str | None, Query(description="Only records of this project.", max_length=40)] = None,
    since: Annotated[AwareDatetime | None, Query(description="From this time on (RFC 3339).")] = None,
    until: Annotated[AwareDatetime | None, Query(description="Before this time.")] = None,
) -> AuditFilter:
    return AuditFilter(
        caller=caller,
        kind=kind,
        operation=operation,
        thing_kind=thing_kind,
        thing=thing,
        project=project,
        since=since,
        until=until,
    )


Wanted = Annotated[AuditFilter, Depends(_wanted)]


@router.get("/audit", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_audit_records(session: ReadSession, paging: Paging, wanted: Wanted) -> Page[AuditRecordRead]:
    """List the records of the audit trail, newest first."""
    found = await audit_records.page(session, wanted, paging)
    return paging.page([audit_record_read(row) for row in found.rows], found.next_position)


@router.get("/audit:export", response_class=StreamingResponse, responses=_EXPORT)
async def export_audit_records(services: ServicesDep, wanted: Wanted) -> StreamingResponse:
    """Read the records as JSON lines, oldest first. `deepe audit verify --file` verifies what was exported whole."""

    async def lines() -> AsyncIterator[str]:
        async for row in services.audit.export(wanted):
            yield audit_record_read(row).model_dump_json() + "\n"

    return StreamingResponse(lines(), media_type=JSON_LINES)


@router.get("/audit:verify")
async def verify_audit_records(
    services: ServicesDep,
    language: RequestLanguage,
    expect: Annotated[
        str | None,
        Query(
            description="Hash of a record that you kept: a trail without it was cut, or written anew.",
            pattern="^[0-9a-f]{64}$",
        ),
    ] = None,
) -> AuditVerification:
    """Compare every record with its hash and with the one before it."""
    return audit_verification(await verify(services.database, expected=expect), language)


@router.get("/audit/{number}", responses=problem_responses(AuditRecordNotFound))
async def get_audit_record(
    number: Annotated[int, Path(ge=1, le=2**63 - 1, description="Number of the record.", examples=[1042])],
    session: ReadSession,
) -> AuditRecordRead:
    """Read one record."""
    return audit_record_read(await audit_records.get(session, number))
