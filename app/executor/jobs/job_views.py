"""Build the view of a job: its row, its specification, its chain and what it waits for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import JobStatus
from app.domain.failure_suggestions import FailureSuggestion
from app.domain.kinds import KINDS
from app.domain.transitions import LIVE
from app.executor.jobs.waiting import Waiting, waiting_of
from app.executor.runs.job_spec import JobSpec
from app.executor.runs.observe import RunDigest
from app.registry.nodes.service import Reason
from app.store import job_queries
from app.store import jobs as store
from app.store.clock import database_now
from app.store.job_queries import ChainLink
from app.store.jobs import PastAttempt
from app.store.nodes import NODE_SILENT_AFTER
from app.store.tables import JobRow, NodeRow


@dataclass(frozen=True)
class JobView:
    """What the database knows. `waiting_for` is the job that builds the environment, or makes the base model, which a
    queued job needs.

    `node` is the name of the node of its newest attempt, `accelerators` what that attempt held or holds.
    """

    job: JobRow
    chain: tuple[ChainLink, ...]
    waiting_for: str | None
    waiting: Waiting | None = None
    node: str | None = None
    accelerators: tuple[str, ...] = ()

    @property
    def spec(self) -> JobSpec:
        """What the job runs."""
        return JobSpec.of(self.job)


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
    fix: FailureSuggestion | None = None


async def views_of(session: AsyncSession, rows: Sequence[JobRow]) -> list[JobView]:
    """Return the views of these jobs, in their order; a handful of queries for all of them."""
    chains = await job_queries.links_of(session, {row.chain_id for row in rows})
    places = await store.places_of(session, [row.id for row in rows if row.attempts])
    return await _views(session, rows, chains, places)


async def view_with_history(session: AsyncSession, job_id: str) -> tuple[JobView, Sequence[PastAttempt]]:
    """Return the view of one job and its attempts, oldest first, or raise `JobNotFound`."""
    chain = await job_queries.chain_around(session, job_id)
    row = next((row for row in chain if row.id == job_id), None)
    if row is None:
        raise store.JobNotFound(job=job_id)
    history = await store.attempts_of(session, job_id) if row.attempts else ()
    links = [ChainLink(id=one.id, kind=one.kind, status=one.status) for one in chain]
    places = {job_id: history[-1]} if history else {}
    (view,) = await _views(session, [row], {row.chain_id: links}, places)
    return view, history


async def _views(
    session: AsyncSession,
    rows: Sequence[JobRow],
    chains: Mapping[str, Sequence[ChainLink]],
    places: Mapping[str, PastAttempt],
) -> list[JobView]:
    wanted = {row.environment for row in rows if _can_wait(row)}
    builds = await store.unfinished_builds(session, wanted) if wanted else {}
    waiting = await waiting_of(session, rows)
    return [
        JobView(
            job=row,
            chain=tuple(chains[row.chain_id]),
            waiting_for=builds.get(row.environment) if _can_wait(row) else _base_model_build(row),
            waiting=waiting.get(row.id),
            node=places[row.id].node if row.id in places else None,
            accelerators=tuple(places[row.id].row.accelerators) if row.id in places else (),
        )
        for row in rows
    ]


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
    return row.status is JobStatus.QUEUED and row.blocked_by is None and KINDS[row.kind].needs_environment


def _base_model_build(row: JobRow) -> str | None:
    """Return what the first job of a chain waits for: only the making of its base model can come before it."""
    return row.blocked_by if row.status is JobStatus.QUEUED and row.chain_id == row.id else None
