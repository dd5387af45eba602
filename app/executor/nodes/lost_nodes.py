"""Nodes that are gone for good: declared dead by a person, or removed.

A node that is silent keeps its jobs: its machine may be up and training, only cut off. That it is gone only a person
can know. What the declaration does is fenced: the attempts end, their tokens with them, so that a node that lives after
all can change nothing any more; it stops what it finds running, proves that nothing is left and lives again
(`app.executor.nodes.agent`). What its attempts held stays quarantined until then.

A node runs jobs of all projects, so what is ended or counted here is of all of them, whoever asks.
"""

import logging

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason, JobStatus
from app.domain.errors import Conflict, Invalid
from app.domain.projects import EVERY_PROJECT
from app.executor.attempts.retrying import decide_on
from app.store import job_attempts, job_status
from app.store.clock import database_now
from app.store.job_attempts import Claim
from app.store.job_status import End
from app.store.nodes import NODE_SILENT_AFTER, NodeStatus, get_node, node_status_of, remove_node
from app.store.session import within
from app.store.tables import NodeRow

logger = logging.getLogger(__name__)


class NodeNotConfirmed(Invalid):
    """Declaring a node dead requires its name, so that it is not another node by mistake."""

    code = "node_not_confirmed"


class NodeIsAlive(Conflict):
    """The node's last heartbeat is fresh: its processes are there."""

    code = "node_is_alive"


class NodeInUse(Conflict):
    """Only an empty node that gets no work can be removed."""

    code = "node_in_use"


async def declare_dead(session: AsyncSession, node: str, *, confirm: str) -> NodeRow:
    """End what the node was running, because a person says that its processes are gone; twice is fine."""
    row = await get_node(session, node, lock=True)
    if confirm != row.name:
        raise NodeNotConfirmed(pointer="/confirm", node=row.name)
    if row.dead_at is not None:
        return row
    now = await database_now(session)
    age = now - row.heartbeat_at
    if age < NODE_SILENT_AFTER:
        raise NodeIsAlive(
            node=row.name, seconds=int(age.total_seconds()), silent_after=int(NODE_SILENT_AFTER.total_seconds())
        )
    row.dead_at = now
    session.add(row)
    async with within(session, EVERY_PROJECT):
        live = await job_attempts.live_attempts(session, row.id)
        for claim in live:
            await _end(session, claim, row)
        await _end_builds(session, row)
    logger.warning("node_declared_dead", extra={"node": row.name, "ended_attempts": len(live)})
    return row


async def remove(session: AsyncSession, node: str) -> None:
    """Take a node out of the installation that is dead, or drained and empty."""
    row = await get_node(session, node, lock=True)
    async with within(session, EVERY_PROJECT):
        live = await job_attempts.live_attempts(session, row.id)
        if live or node_status_of(row) not in (NodeStatus.DEAD, NodeStatus.DRAINING):
            raise NodeInUse(node=row.name, jobs=len(live))
        await _end_builds(session, row)
    await remove_node(session, row, now=await database_now(session))
    logger.warning("node_removed", extra={"node": row.name})


async def _end(session: AsyncSession, claim: Claim, row: NodeRow) -> None:
    """Put the job back into the queue where that is allowed, else end it; the attempt is over in any case."""
    now, params = await database_now(session), {"detail": "", "node": row.name}
    again = decide_on(claim.job, EndReason.NODE_LOST, ran=True)
    if again is not None and await job_attempts.requeue(
        session, claim, reason=EndReason.NODE_LOST, now=now, again=again, params=params
    ):
        return
    cancelled = claim.job.cancel_requested_at is not None
    end = End(status=JobStatus.CANCELLED if cancelled else JobStatus.FAILED, reason=EndReason.NODE_LOST, params=params)
    await job_attempts.finish(session, claim, end, now=now)


async def _end_builds(session: AsyncSession, row: NodeRow) -> None:
    """Building an environment is bound to its node: no other node takes over."""
    end = End(status=JobStatus.FAILED, reason=EndReason.NODE_LOST, params={"detail": "", "node": row.name})
    await job_status.end_queued_builds(session, row.id, end, now=await database_now(session))
