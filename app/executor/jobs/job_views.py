"""A job as people see it: its row, what it was submitted with, its chain, and what it waits for."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import JobStatus
from app.domain.fixes import Fix
from app.domain.kinds import KINDS
from app.domain.transitions import LIVE
from app.executor.jobs.waiting import Waiting, waiting_of
from app.executor.runs.job_spec import Snapshot
from app.executor.runs.observe import RunDigest
from app.registry.nodes import Reason
from app.store import jobs as store
from app.store.clock import database_now
from app.store.jobs import PastAttempt
from app.store.nodes import NODE_SILENT_AFTER
from app.store.tables import JobRow, NodeRow


@dataclass(frozen=True)
class JobView:
    """What the database knows. `waiting_for` is the job that builds the environment which a queued job needs.

    `node` is the name of the node of its newest attempt, `accelerators` what that attempt held or holds.
    """

    job: JobRow
    snapshot: Snapshot
    chain: tuple[JobRow, ...]
    waiting_for: str | None
    waiting: Waiting | None = None
    node: str | None = None
    accelerators: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobDetails:
    """A job with what its run folders say, and what became of its attempts, oldest first (when it was asked for).

    `silence`: what it means for the job that its node is silent, None while it is not. `fix`: what may help one that
    failed.
    """

    view: JobView
    digest: RunDigest
    history: tuple[PastAttempt, ...] = ()
    silence: Reason | None = None
    fix: Fix | None = None


async def views_of(session: AsyncSession, rows: Sequence[JobRow]) -> list[JobView]:
    """Return the views of these jobs, in their order; a handful of queries for all of them."""
    chains: dict[str, list[JobRow]] = defaultdict(list)
    for row in await store.chain_of(session, {row.chain_id for row in rows}):
        chains[row.chain_id].append(row)
    wanted = {row.environment for row in rows if _can_wait(row)}
    builds = await store.unfinished_builds(session, wanted) if wanted else {}
    waiting = await waiting_of(session, rows)
    places = await store.places_of(session, [row.id for row in rows if row.attempts])
    return [
        JobView(
            job=row,
            snapshot=Snapshot.of(row),
            chain=tuple(chains[row.chain_id]),
            waiting_for=builds.get(row.environment) if _can_wait(row) else None,
            waiting=waiting.get(row.id),
            node=places[row.id].node if row.id in places else None,
            accelerators=tuple(places[row.id].row.accelerators) if row.id in places else (),
        )
        for row in rows
    ]


async def view_of(session: AsyncSession, job_id: str) -> JobView:
    """Return the view of one job or raise `JobNotFound`."""
    (view,) = await views_of(session, [await store.get(session, job_id)])
    return view


async def silence_of(session: AsyncSession, job: JobRow) -> Reason | None:
    """Return what to know and to do when the node of a live job is silent: the job stays with it."""
    if job.status not in LIVE or job.node_id is None:
        return None
    node = await session.get_one(NodeRow, job.node_id)
    age = await database_now(session) - node.heartbeat_at
    if age < NODE_SILENT_AFTER:
        return None
    code = "job_node_silent" if job.cancel_requested_at is None else "job_cancel_waits_for_node"
    return Reason(code, {"node": node.name, "minutes": int(age.total_seconds() // 60)})


def _can_wait(row: JobRow) -> bool:
    return row.status is JobStatus.QUEUED and row.blocked_by is None and KINDS[row.kind].is_stage
