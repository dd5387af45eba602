"""Reviews of code, decisions on them, and who changed which code.

A launch reads a review with a shared lock, and a decision changes it under an exclusive one: a launch that read
"approved" has its attempt in the database, so that whoever withdraws the approval sees it; any later one reads
"withdrawn". On SQLite one writer at a time gives the same.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.access import Caller, current_caller
from app.domain.code_review import CodeApproval, ReviewState
from app.domain.errors import NotFound
from app.domain.transitions import LIVE
from app.store import installation
from app.store.clock import database_now
from app.store.paging import PageRequest, Slice, page_slice
from app.store.tables import CodeChangeRow, CodeDecisionRow, CodeReviewRow, JobRow, MethodVersionRow

_POLICY: Final = "code_approval"
_AT_ONCE: Final = 1000
_VERSIONS_LOOKED_AT: Final = 200


class CodeReviewNotFound(NotFound):
    """No review has this digest."""

    code = "code_review_not_found"


# ---- whether approval is required -----------------------------------------------------------------------------------


async def set_policy(session: AsyncSession, policy: CodeApproval, *, now: datetime) -> bool:
    """Tell all processes whether code needs an approval; return whether that is new."""
    if (await policy_of(session)) is policy:
        return False
    await installation.put(session, _POLICY, {"policy": policy.value}, now=now)
    return True


async def policy_of(session: AsyncSession) -> CodeApproval:
    """Return whether code needs an approval; the API that started last says so."""
    found = await installation.get(session, _POLICY)
    return CodeApproval.OFF if found is None else CodeApproval(found["policy"])


# ---- reviews --------------------------------------------------------------------------------------------------------


async def get(session: AsyncSession, digest: str, *, lock: bool = False) -> CodeReviewRow:
    """Return the review of this code or raise `CodeReviewNotFound`; with `lock` others wait for this transaction."""
    row = await _find(session, digest, lock=lock)
    if row is None:
        raise CodeReviewNotFound(digest=digest)
    return row


async def _find(session: AsyncSession, digest: str, *, lock: bool = False) -> CodeReviewRow | None:
    statement = select(CodeReviewRow).where(col(CodeReviewRow.digest) == digest)
    statement = statement.execution_options(populate_existing=lock)
    return (await session.exec(statement.with_for_update() if lock else statement)).first()


async def states(session: AsyncSession, digests: Collection[str], *, lock: bool = False) -> Mapping[str, ReviewState]:
    """Return the states of the reviews that there are; with `lock` none of them changes until the transaction ends."""
    found: dict[str, ReviewState] = {}
    for some in _parts(digests):
        statement = select(CodeReviewRow.digest, CodeReviewRow.state).where(col(CodeReviewRow.digest).in_(some))
        for digest, state in (await session.exec(statement.with_for_update(read=True) if lock else statement)).all():
            found[digest] = ReviewState(state)
    return found


async def add(session: AsyncSession, rows: Iterable[CodeReviewRow]) -> None:
    """Add reviews of code that nobody asked about yet; one that is there stays as it is."""
    for row in rows:
        if await _find(session, row.digest) is None:
            try:
                async with session.begin_nested():
                    session.add(row)
            except sa.exc.IntegrityError:
                continue  # another request was quicker


async def decide(session: AsyncSession, row: CodeReviewRow, state: ReviewState, *, by: Caller, note: str) -> None:
    """Give a locked review a state, and remember who did."""
    now = await database_now(session)
    row.state, row.decided_by, row.decided_name, row.decided_at, row.note = state, by.principal, by.name, now, note
    session.add(row)
    session.add(
        CodeDecisionRow(digest=row.digest, state=state, principal=by.principal, name=by.name, note=note, created_at=now)
    )
    await session.flush()


async def page(session: AsyncSession, wanted: PageRequest, *, state: ReviewState | None) -> Slice[CodeReviewRow]:
    """Return one page of the reviews, by when they began."""
    statement: Any = select(CodeReviewRow)
    if state is not None:
        statement = statement.where(col(CodeReviewRow.state) == state)
    return await page_slice(session, statement, wanted, column=CodeReviewRow.created_at, tie=CodeReviewRow.digest)


async def decisions(session: AsyncSession, digest: str) -> Sequence[CodeDecisionRow]:
    """Return the decisions on this code, the oldest first."""
    statement = select(CodeDecisionRow).where(col(CodeDecisionRow.digest) == digest).order_by(col(CodeDecisionRow.id))
    return (await session.exec(statement)).all()


# ---- who changed what -----------------------------------------------------------------------------------------------


def place_of_file(path: str) -> str:
    """Return what names a file of the script root in the log of changes."""
    return hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()


def place_of_stage(method_id: str, stage: str) -> str:
    """Return what names a stage of a method in the log of changes."""
    return hashlib.sha256(f"\0{method_id}\0{stage}".encode()).hexdigest()


async def changed(session: AsyncSession, place: str, digest: str) -> None:
    """Note that the caller whose request runs changed what is at `place`; empty digest: removed it."""
    caller = current_caller.get()
    if caller is None:
        return
    now = await database_now(session)
    session.add(CodeChangeRow(place=place, digest=digest, principal=caller.principal, name=caller.name, created_at=now))
    await session.flush()


async def changes(
    session: AsyncSession, *, digests: Collection[str], places: Collection[str], since: datetime | None
) -> Sequence[CodeChangeRow]:
    """Return who ever brought one of these digests, and who changed something at these places after `since`."""
    found: dict[int | None, CodeChangeRow] = {}
    for some in _parts(digests):
        statement = select(CodeChangeRow).where(col(CodeChangeRow.digest).in_(some))
        found |= {row.id: row for row in (await session.exec(statement)).all()}
    for some in _parts(places):
        statement = select(CodeChangeRow).where(col(CodeChangeRow.place).in_(some))
        if since is not None:
            statement = statement.where(col(CodeChangeRow.created_at) > since)
        found |= {row.id: row for row in (await session.exec(statement)).all()}
    return list(found.values())


async def newest_versions(session: AsyncSession, method_id: str) -> Sequence[MethodVersionRow]:
    """Return the newest versions of a method, the newest first; very old ones are left out."""
    statement = (
        select(MethodVersionRow)
        .where(col(MethodVersionRow.method_id) == method_id)
        .order_by(col(MethodVersionRow.number).desc())
        .limit(_VERSIONS_LOOKED_AT)
    )
    return (await session.exec(statement)).all()


async def started_jobs(session: AsyncSession) -> Sequence[JobRow]:
    """Return the jobs that a node has taken and that have not ended."""
    return (await session.exec(select(JobRow).where(col(JobRow.status).in_(LIVE)))).all()


def _parts(values: Collection[str]) -> Iterable[Sequence[str]]:
    ordered = sorted(values)
    return (ordered[start : start + _AT_ONCE] for start in range(0, len(ordered), _AT_ONCE))
