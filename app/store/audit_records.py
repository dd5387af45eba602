"""Records of the audit trail: listed, read in their order, removed from the oldest on; those of launches."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.audit import Action, AuditKind, AuditRecord, KeptRecord, digest_of
from app.domain.errors import NotFound
from app.store.audit_trail import Entry, append
from app.store.job_attempts import Claim
from app.store.paging import PageRequest, Slice, page_slice
from app.store.tables import AuditRecordRow, MethodVersionRow, NodeRow

AT_ONCE: Final = 500
REMOVED_AT_ONCE: Final = 1000
RETENTION: Final = "retention"


class AuditRecordNotFound(NotFound):
    """No record has this number."""

    code = "audit_record_not_found"


@dataclass(frozen=True)
class AuditFilter:
    """Which records a list shows; `None` matches all. `thing` is an id or a name."""

    caller: str | None = None
    kind: AuditKind | None = None
    operation: str | None = None
    thing_kind: str | None = None
    thing: str | None = None
    project: str | None = None
    since: datetime | None = None
    until: datetime | None = None


# ---- read -----------------------------------------------------------------------------------------------------------


async def get(session: AsyncSession, number: int) -> AuditRecordRow:
    """Return the record with this number or raise `AuditRecordNotFound`."""
    row = await session.get(AuditRecordRow, number)
    if row is None:
        raise AuditRecordNotFound(number=number)
    return row


async def page(session: AsyncSession, wanted: AuditFilter, paging: PageRequest) -> Slice[AuditRecordRow]:
    """Return one page of the records, by number."""
    return await page_slice(session, _matching(wanted), paging, column=AuditRecordRow.number, tie=AuditRecordRow.hash)


async def batch(
    session: AsyncSession, *, after: int, wanted: AuditFilter | None = None, limit: int = AT_ONCE
) -> Sequence[AuditRecordRow]:
    """Return the next records after a number."""
    statement = _matching(wanted or AuditFilter()).where(col(AuditRecordRow.number) > after)
    rows: Sequence[AuditRecordRow] = (
        await session.exec(statement.order_by(col(AuditRecordRow.number)).limit(limit))
    ).all()
    return rows


async def in_order(session: AsyncSession) -> AsyncIterator[Sequence[KeptRecord]]:
    """Yield all records by their numbers, some at a time."""
    after = -(2**63)
    while rows := await batch(session, after=after):
        yield [kept(row) for row in rows]
        after = rows[-1].number
        session.expunge_all()


def kept(row: AuditRecordRow) -> KeptRecord:
    """Return the record of a row."""
    fields = {name: getattr(row, name) for name in AuditRecord.__dataclass_fields__}
    return KeptRecord(AuditRecord(**fields), row.hash, row.things)


def _matching(wanted: AuditFilter) -> Any:
    statement: Any = select(AuditRecordRow)
    for column, value in (
        (AuditRecordRow.kind, wanted.kind),
        (AuditRecordRow.operation, wanted.operation),
        (AuditRecordRow.project_id, wanted.project),
    ):
        if value is not None:
            statement = statement.where(column == value)
    if wanted.caller is not None:
        statement = statement.where(
            sa.or_(col(AuditRecordRow.caller) == wanted.caller, col(AuditRecordRow.principal) == wanted.caller)
        )
    if wanted.since is not None:
        statement = statement.where(col(AuditRecordRow.at) >= wanted.since)
    if wanted.until is not None:
        statement = statement.where(col(AuditRecordRow.at) < wanted.until)
    things = col(AuditRecordRow.things)
    if wanted.thing_kind is not None:
        statement = statement.where(things.contains(f"\n\t{wanted.thing_kind}\t", autoescape=True))
    if wanted.thing is not None:
        statement = statement.where(things.contains(f"\t{wanted.thing}\t", autoescape=True))
    return statement


# ---- write ----------------------------------------------------------------------------------------------------------


async def record_launches(session: AsyncSession, node: NodeRow, won: Sequence[Claim], *, now: datetime) -> None:
    """Record that the node is about to start the code of these jobs; called last in the transaction of the claim.

    No code starts without a record in this way. The head of the trail is locked after everything that the claim locks,
    so two claims never wait for each other.
    """
    versions = sa.tuple_(col(MethodVersionRow.method_id), col(MethodVersionRow.number))
    wanted = {(claim.job.method_id, claim.job.method_version) for claim in won if claim.job.method_id is not None}
    rows = (await session.exec(select(MethodVersionRow).where(versions.in_(wanted)))).all() if wanted else []
    files: Mapping[Any, Any] = {(row.method_id, row.number): row.files for row in rows}
    action = Action("node", node.name, f"node:{node.id}", "launch")
    entries = [_launch(claim, node, files.get((claim.job.method_id, claim.job.method_version), {})) for claim in won]
    await append(session, [Entry(AuditKind.LAUNCH, action, *entry) for entry in entries], now=now)


def _launch(claim: Claim, node: NodeRow, files: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    job, attempt = claim.job, claim.attempt
    things: list[dict[str, Any]] = [
        {"kind": "job", "id": job.id, "name": job.name, "done": "launched"},
        {"kind": "node", "id": node.id, "name": node.name},
    ]
    if job.method_id is not None:
        things.append({"kind": "method", "id": job.method_id, "name": job.method_name})
    launch = {
        "attempt": attempt.number,
        "attempt_id": attempt.id,
        "job_kind": job.kind,
        "user": job.submitted_by,
        "method_version": job.method_version,
        "script": files.get(job.kind),
        "environment": job.environment,
        "base_model": job.base_model_id,
        "dataset": job.dataset_id,
        "model": job.model_id,
        "accelerators": attempt.accelerators,
        # what else the arguments are made of stands in the record of the submit by the same digest
        "launch": digest_of(job.launch),
    }
    return {"things": things, "launch": launch}, getattr(job, "project_id", None)


async def record_setting(session: AsyncSession, name: str, before: str, after: str, *, now: datetime) -> None:
    """Record that the service began with another setting, called last in the transaction that keeps it."""
    thing = {"kind": "setting", "id": name, "name": name, "done": "changed", "fields": {name: [before, after]}}
    action = Action("service", "service", "service", "start")
    await append(session, [Entry(AuditKind.CHANGE, action, {"things": [thing]})], now=now)


async def old_records(session: AsyncSession, before: datetime, *, remove: bool) -> int:
    """Count, or remove the first of, the oldest records without a gap; return how many.

    A removal adds a record that says which ones are gone and which hash the last of them had, so that the rest can
    still be verified.
    """
    too_young = select(sa.func.min(AuditRecordRow.number)).where(col(AuditRecordRow.at) >= before)
    newest = select(sa.func.max(AuditRecordRow.number))
    end = (await session.exec(too_young)).one() or ((await session.exec(newest)).one() or 0)  # the head stays
    first = (await session.exec(select(sa.func.min(AuditRecordRow.number)))).one()
    if first is None or end <= first:
        return 0
    if not remove:
        return int(end - first)
    last = await get(session, min(end, first + REMOVED_AT_ONCE) - 1)
    removed = {"first": first, "last": last.number, "hash": last.hash, "before": before.isoformat()}
    action = Action("service", "service", "service", RETENTION)
    entry = Entry(AuditKind.REMOVAL, action, {"things": [], "removed": removed})
    await append(session, [entry], now=datetime.now(UTC))
    await session.exec(
        sa.delete(AuditRecordRow)
        .where(col(AuditRecordRow.number) <= last.number)
        .execution_options(synchronize_session=False)
    )
    return int(last.number - first + 1)
