"""Housekeeping: what is old enough to be removed."""

from typing import Annotated

from fastapi import Body
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from app.api.dependencies import ServicesDep
from app.api.errors import problem_responses
from app.api.routing import Router
from app.domain.errors import InvalidRequest
from app.domain.retention import Leftover
from app.executor.maintenance.housekeeping import HousekeepingRunning

router = Router(prefix="/api/v1", tags=["system"])


class HousekeepingRun(BaseModel):
    """Whether to remove, or only to look."""

    model_config = ConfigDict(extra="forbid")

    dry_run: StrictBool = Field(default=False, description="Change nothing, say what would go.", examples=[True])


class LeftoverRead(BaseModel):
    """How much of a kind went, or would go."""

    kind: Leftover
    count: int = Field(description="Run folders, checkpoints, files or rows.", examples=[12])
    size_bytes: int = Field(description="Of files; rows count 0.", examples=[73014444032])


class HousekeepingReport(BaseModel):
    """What went, or would go."""

    dry_run: bool
    items: list[LeftoverRead]
    size_bytes: int = Field(description="Of all.", examples=[73014444032])


@router.post("/housekeeping:run", responses=problem_responses(HousekeepingRunning, InvalidRequest))
async def run_housekeeping(
    services: ServicesDep, wanted: Annotated[HousekeepingRun, Body(default_factory=HousekeepingRun)]
) -> HousekeepingReport:
    """Remove now what the DEEPE_KEEP_... settings no longer keep. It is done every hour by itself.

    Unfinished jobs, living models and links are never touched. The answer comes when it is done.
    """
    found = await (services.housekeeper.preview() if wanted.dry_run else services.housekeeper.run())
    items = [LeftoverRead(kind=entry.leftover, count=entry.count, size_bytes=entry.size_bytes) for entry in found]
    return HousekeepingReport(dry_run=wanted.dry_run, items=items, size_bytes=sum(item.size_bytes for item in items))
