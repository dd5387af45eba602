"""Metrics for Prometheus."""

from typing import Annotated, Final

from fastapi import Depends, Request, Response

from app.api.errors import problem_responses
from app.api.guards import TokenMissing, TokenWrong
from app.api.prometheus import CONTENT_TYPE, Metrics
from app.api.routing import Router
from app.domain.access import Permission

router = Router(changes=Permission.ADMINISTER, reads=Permission.OBSERVE, tags=["system"])

_EXAMPLE: Final = """# HELP deepe_jobs_queued Jobs that wait for nothing but a node.
# TYPE deepe_jobs_queued gauge
deepe_jobs_queued{kind="training",queue="default"} 3.0
"""


async def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "The text format of Prometheus.",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": _EXAMPLE}},
        },
        **problem_responses(TokenMissing, TokenWrong),
    },
)
async def get_metrics(metrics: Annotated[Metrics, Depends(_metrics)]) -> Response:
    """Export metrics; with the API's token, or with DEEPE_METRICS_TOKEN, which opens nothing else."""
    return Response(await metrics.text(), headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})
