"""Queues over the wire."""

from datetime import datetime

from pydantic import Field

from app.api.schemas.common import RequestBody
from app.domain.values import Value
from app.registry.nodes.queues import QueueView

_MOST = 1_000_000


class QueueLimitsWrite(RequestBody):
    """The limits of a queue; what is left out, or null, has none."""

    max_live: int | None = Field(
        default=None, ge=0, le=_MOST, description="Most jobs of the queue at once; 0 stops it.", examples=[16]
    )
    max_live_per_user: int | None = Field(
        default=None, ge=0, le=_MOST, description="Most jobs of one user in the queue at once.", examples=[3]
    )


class QueueRead(Value):
    """A queue: jobs that share limits. Training, saving and deployment jobs count."""

    name: str = Field(examples=["default"])
    max_live: int | None = Field(description="Most jobs at once; null: no limit.", examples=[16])
    max_live_per_user: int | None = Field(description="The same for each user.", examples=[3])
    running: int = Field(description="Jobs that run now.", examples=[12])
    waiting: int = Field(description="Its jobs among the first ten thousand that wait.", examples=[40])
    updated_at: datetime | None = Field(description="When the limits were set; null: there are none.")


def queue_read(view: QueueView) -> QueueRead:
    """Return the queue as callers see it."""
    row = view.row
    return QueueRead(
        name=view.name,
        max_live=row.max_live if row else None,
        max_live_per_user=row.max_live_per_user if row else None,
        running=view.running,
        waiting=view.waiting,
        updated_at=row.updated_at if row else None,
    )
