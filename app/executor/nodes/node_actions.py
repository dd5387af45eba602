"""What people do with nodes: look, drain, label, declare dead, remove."""

from collections.abc import Callable

from sqlmodel.ext.asyncio.session import AsyncSession

from app.executor.nodes import lost_nodes
from app.registry.nodes.service import Nodes, NodeView


class NodeActions(Nodes):
    """The service behind the routes of nodes."""

    async def declare_dead(self, session: AsyncSession, node: str, *, confirm: str) -> NodeView:
        """End what the node was running, because a person says that its processes are gone."""
        row = await lost_nodes.declare_dead(session, node, confirm=confirm)
        return await self.get(session, row.id)

    async def remove(self, session: AsyncSession, node: str, *, check: Callable[[str], None]) -> None:
        """Take out a node that is dead, or drained and empty."""
        check((await self.get(session, node)).version)
        await lost_nodes.remove(session, node)
