"""Housekeeping: what is old enough to be removed."""

from typing import Annotated

from fastapi import Body
from pydantic import Field, StrictBool

from app.api.dependencies import ServicesDep
from app.api.errors import problem_responses
from app.api.routing import Router
from app.api.schemas.common import RequestBody
from app.domain.access import Permission
from app.domain.errors import InvalidRequest
from app.domain.retention import RetentionTarget
from app.domain.values import Value
from app.executor.maintenance.housekeeping import HousekeepingRunning

router = Router(changes=Permission.ADMINISTER, reads=Permission.OBSERVE, prefix="/api/v1", tags=["system"])


class HousekeepingRun(RequestBody):
    """Whether to remove, or only to report."""

    dry_run: StrictBool = Field(
        default=False, description="Change nothing, report what would be removed.", examples=[True]
    )


class RetentionTargetRead(Value):
    """How many of a target were or would be removed."""

    kind: RetentionTarget
    count: int = Field(description="Run folders, checkpoints, files or rows.", examples=[12])
    size_bytes: int = Field(description="Of files; rows count 0.", examples=[73014444032])


class HousekeepingReport(Value):
    """What was or would be removed."""

    dry_run: bool
    items: list[RetentionTargetRead]
    size_bytes: int = Field(description="Of all.", examples=[73014444032])


@router.post("/housekeeping:run", responses=problem_responses(HousekeepingRunning, InvalidRequest))
async def run_housekeeping(
    services: ServicesDep, wanted: Annotated[HousekeepingRun, Body(default_factory=HousekeepingRun)]
) -> HousekeepingReport:
    """Remove files and rows that are older than the DEEPE_KEEP_... settings allow. The service does it every hour.

    Unfinished jobs, existing models and links are never touched. The response is sent when the run has ended.
    """
    found = await (services.housekeeper.preview() if wanted.dry_run else services.housekeeper.run())
    items = [RetentionTargetRead(kind=entry.target, count=entry.count, size_bytes=entry.size_bytes) for entry in found]
    return HousekeepingReport(dry_run=wanted.dry_run, items=items, size_bytes=sum(item.size_bytes for item in items))
