"""Order the building of an environment before a job needs it."""

from collections.abc import Sequence
from datetime import datetime

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import Conflict
from app.executor.presence import build_job
from app.registry.environments import EnvironmentNotFound
from app.registry.readiness import NODE_SILENT_AFTER
from app.store import jobs as store
from app.store import nodes
from app.store.environments import find_environment
from app.store.registry_facts import BASE_ENVIRONMENT
from app.store.tables import JobRow, NodeRow


class NoNode(Conflict):
    """No worker is there that could build."""

    code = "no_node"


class EnvironmentWithoutSpec(Conflict):
    """Nobody knows what belongs into the environment."""

    code = "environment_without_spec"


async def order_build(
    session: AsyncSession, environment: str, *, node: str | None, now: datetime
) -> tuple[JobRow, bool]:
    """Return the job that builds the environment, and whether it is a new one.

    It is built on `node` (id or name), else on the node that was heard last.
    """
    row = await find_environment(session, environment)
    known = await nodes.all_nodes(session)
    if row is None and environment != BASE_ENVIRONMENT:
        if any(environment in other.environments for other in known):
            raise EnvironmentWithoutSpec(environment=environment)
        raise EnvironmentNotFound(environment=environment)
    if row is not None and row.spec is None:
        raise EnvironmentWithoutSpec(environment=environment)
    builder = await _builder(session, known, node, now=now)
    while True:
        made = await build_job(session, environment, row.spec if row else None, node_id=builder.id)
        if made is not None:
            return made, True
        building = await store.unfinished_builds(session, [environment])
        if environment in building:  # else the other one ended between our two looks
            return await store.get(session, building[environment]), False


async def _builder(session: AsyncSession, known: Sequence[NodeRow], node: str | None, *, now: datetime) -> NodeRow:
    if node is not None:
        return await nodes.get_node(session, node)
    alive = [other for other in known if now - other.heartbeat_at < NODE_SILENT_AFTER]
    if not alive:
        raise NoNode()
    return max(alive, key=lambda other: other.heartbeat_at)
