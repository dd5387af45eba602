"""Queries of housekeeping, and which process has the turn."""

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import DeliveryState
from app.domain.retention import EndedRun
from app.domain.transitions import UNFINISHED
from app.store.clock import database_now
from app.store.tables import DeliveryRow, IdempotencyRow, InstallationRow, JobRow, WebhookRow

TURN_KEY: Final = "housekeeping"
REMOVED_AT_ONCE: Final = 1000


# ---- the turn -------------------------------------------------------------------------------------------------------


async def take_turn(session: AsyncSession, holder: str, *, lease: timedelta, unasked: bool) -> bool:
    """Take the turn for a while, by the database's clock; False: another process has it, or (unasked) it is not due."""
    now = await database_now(session)
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    await session.exec(insert(InstallationRow).values(key=TURN_KEY, value={}, updated_at=now).on_conflict_do_nothing())
    statement = select(InstallationRow).where(InstallationRow.key == TURN_KEY).with_for_update()
    turn = (await session.exec(statement.execution_options(populate_existing=True))).one()
    is_held = turn.value.get("holder") is not None and datetime.fromisoformat(turn.value["until"]) > now
    is_early = unasked and "due" in turn.value and datetime.fromisoformat(turn.value["due"]) > now
    if is_held or is_early:
        return False
    await _write(session, turn.value | {"holder": holder, "until": (now + lease).isoformat()}, now=now)
    return True


async def keep_turn(session: AsyncSession, holder: str, *, lease: timedelta) -> bool:
    """Renew the turn. False: it was lost."""
    now = await database_now(session)
    turn = await session.get(InstallationRow, TURN_KEY, populate_existing=True, with_for_update={})
    if turn is None or turn.value.get("holder") != holder:
        return False
    await _write(session, turn.value | {"until": (now + lease).isoformat()}, now=now)
    return True


async def give_turn_back(session: AsyncSession, holder: str, *, next_in: timedelta) -> None:
    """Release the turn; no process takes it before it is due again."""
    now = await database_now(session)
    turn = await session.get(InstallationRow, TURN_KEY, populate_existing=True, with_for_update={})
    if turn is not None and turn.value.get("holder") == holder:
        await _write(session, {"holder": None, "due": (now + next_in).isoformat()}, now=now)


async def _write(session: AsyncSession, value: dict[str, Any], *, now: datetime) -> None:
    await session.exec(
        sa.update(InstallationRow)
        .where(col(InstallationRow.key) == TURN_KEY)
        .values(value=value, updated_at=now)
        .execution_options(synchronize_session=False)
    )


# ---- retention ------------------------------------------------------------------------------------------------------


async def ended_runs(session: AsyncSession, job_ids: Collection[str]) -> Mapping[str, EndedRun]:
    """Return what is known of these jobs; an unknown id is missing."""
    rows = (await session.exec(select(JobRow).where(col(JobRow.id).in_(job_ids)))).all()
    # a retry repeats one job and may go on from the checkpoint of another, which that one went on from
    resume_of = col(JobRow.launch)["resume_of"].as_string()
    repeating = select(col(JobRow.retry_of), resume_of).where(
        col(JobRow.status).in_(UNFINISHED),
        col(JobRow.retry_of).is_not(None),
        sa.or_(col(JobRow.retry_of).in_(job_ids), resume_of.in_(job_ids)),
    )
    needed = {job_id for pair in (await session.exec(repeating)).all() for job_id in pair}
    return {
        row.id: EndedRun(kind=row.kind, status=row.status, finished_at=row.finished_at, needed=row.id in needed)
        for row in rows
    }


async def old_deliveries(session: AsyncSession, before: datetime, *, remove: bool) -> int:
    """Count, or remove up to `REMOVED_AT_ONCE`, messages that are through and older; return how many."""
    found = 0
    for webhook_id in (await session.exec(select(WebhookRow.id))).all():
        old = sa.select(col(DeliveryRow.id)).where(
            col(DeliveryRow.webhook_id) == webhook_id,
            col(DeliveryRow.created_at) < before,
            col(DeliveryRow.state) != DeliveryState.PENDING,
        )
        found += await _through(session, DeliveryRow, col(DeliveryRow.id), old, remove=remove)
    return found


async def old_idempotency_keys(session: AsyncSession, before: datetime, *, remove: bool) -> int:
    """Count, or remove, keys that are older; return how many."""
    if remove:
        result = await session.exec(sa.delete(IdempotencyRow).where(col(IdempotencyRow.created_at) < before))
        assert isinstance(result, CursorResult)
        return result.rowcount
    statement = select(sa.func.count()).select_from(IdempotencyRow).where(col(IdempotencyRow.created_at) < before)
    return (await session.exec(statement)).one()


async def _through(session: AsyncSession, table: Any, key: Any, old: Any, *, remove: bool) -> int:
    if not remove:
        return (await session.exec(select(sa.func.count()).select_from(old.subquery()))).one()
    result = await session.exec(
        sa.delete(table).where(key.in_(old.limit(REMOVED_AT_ONCE))).execution_options(synchronize_session=False)
    )
    assert isinstance(result, CursorResult)
    return result.rowcount
