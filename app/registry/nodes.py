"""Nodes as people see them: what they have, and whether they were heard of lately."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from sqlmodel.ext.asyncio.session import AsyncSession

from app.registry.node_environments import NodeEnvironment, Standings, standings
from app.store import leases
from app.store.clock import database_now
from app.store.nodes import NODE_SILENT_AFTER, all_nodes, get_node
from app.store.tables import NodeRow


class NodeState(StrEnum):
    """Whether a node says that it is alive."""

    READY = "ready"
    SILENT = "silent"


@dataclass(frozen=True)
class NodeView:
    """A node and the age of its last heartbeat, by the database's clock."""

    row: NodeRow
    heartbeat_age: timedelta
    state: NodeState
    environments: Sequence[NodeEnvironment] = ()


class Nodes:
    """What can be asked about nodes; they register themselves."""

    async def views(self, session: AsyncSession) -> Sequence[NodeView]:
        """Return all nodes by name."""
        now, known = await database_now(session), await standings(session)
        return [_view(row, known, age=now - row.heartbeat_at) for row in await all_nodes(session)]

    async def get(self, session: AsyncSession, node: str) -> NodeView:
        """Return the node with this id or name."""
        row = await get_node(session, node)
        return _view(row, await standings(session), age=await database_now(session) - row.heartbeat_at)

    async def release(self, session: AsyncSession, node: str, accelerator: str) -> NodeView:
        """Put a quarantined accelerator back to use; `AcceleratorInUse` while an attempt holds it."""
        now = await database_now(session)
        row = await leases.release(session, node, accelerator, now=now)
        return _view(row, await standings(session), age=now - row.heartbeat_at)


async def living_nodes(session: AsyncSession) -> Sequence[NodeRow]:
    """Return the nodes that were heard of lately and that nobody declared dead."""
    now = await database_now(session)
    return [
        node
        for node in await all_nodes(session)
        if node.dead_at is None and now - node.heartbeat_at < NODE_SILENT_AFTER
    ]


def _view(row: NodeRow, known: Standings, *, age: timedelta) -> NodeView:
    state = NodeState.SILENT if age >= NODE_SILENT_AFTER else NodeState.READY
    return NodeView(row=row, heartbeat_age=max(age, timedelta()), state=state, environments=known.on(row))
