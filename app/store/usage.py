"""Who uses a resource right now: jobs that have not ended, methods that name it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.demand import COMPARISON_PRIORITY
from app.domain.transitions import UNFINISHED
from app.store.session import EVERYBODYS
from app.store.tables import JobRow, MethodRow, MethodVersionRow


async def unfinished_jobs(
    session: AsyncSession,
    *,
    base_model_id: str | None = None,
    dataset_id: str | None = None,
    model_id: str | None = None,
    environment: str | None = None,
) -> Sequence[str]:
    """Return the ids of the jobs, waiting or running, that use what is given (exactly one), oldest first.

    Comparisons of answers hold nothing: they end by themselves when something of theirs is gone.
    """
    wanted = {
        JobRow.base_model_id: base_model_id,
        JobRow.environment: environment,
    }
    statement = select(JobRow.id).where(col(JobRow.status).in_(UNFINISHED), col(JobRow.priority) != COMPARISON_PRIORITY)
    if dataset_id is not None:
        scored_with = col(JobRow.launch)["validation_dataset"]["id"].as_string()
        statement = statement.where(sa.or_(col(JobRow.dataset_id) == dataset_id, scored_with == dataset_id))
    if model_id is not None:
        judged_by = col(JobRow.launch)["reward_model"]["id"].as_string()
        statement = statement.where(sa.or_(col(JobRow.model_id) == model_id, judged_by == model_id))
    for column, value in wanted.items():
        if value is not None:
            statement = statement.where(col(column) == value)
    statement = statement.order_by(col(JobRow.created_at), col(JobRow.id))
    return (await session.exec(statement.execution_options(**EVERYBODYS))).all()  # of whatever project


async def methods_deploying_to(session: AsyncSession, target: str) -> list[str]:
    """Return the names of the existing methods whose newest version deploys to `target`."""
    return [
        name
        for name, definition in await _definitions(session)
        if (definition.get("deployment") or {}).get("target") == target
    ]


async def methods_running_in(session: AsyncSession, environment: str) -> list[str]:
    """Return the names of the existing methods whose newest version runs a stage in `environment`."""
    return [
        name
        for name, definition in await _definitions(session, EVERYBODYS)
        if any(
            (config or {}).get("conda_env") == environment
            for config in [*(definition.get("stages") or {}).values(), definition.get("deployment")]
        )
    ]


async def _definitions(
    session: AsyncSession, options: Mapping[str, Any] = MappingProxyType({})
) -> Sequence[tuple[str, Mapping[Any, Any]]]:
    statement = (
        select(MethodRow.name, MethodVersionRow.definition)
        .join(
            MethodVersionRow,
            (col(MethodVersionRow.method_id) == MethodRow.id) & (col(MethodVersionRow.number) == MethodRow.version),
        )
        .where(col(MethodRow.deleted_at).is_(None))
        .order_by(col(MethodRow.name_key))
        .execution_options(**options)
    )
    return (await session.exec(statement)).all()
