"""Order the building of an environment before a job needs it."""

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import Conflict
from app.executor.presence import build_job
from app.registry.environments import EnvironmentNotFound
from app.registry.nodes import living_nodes
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


async def order_build(session: AsyncSession, environment: str, *, node: str | None) -> tuple[JobRow, bool]:
    """Return the job that builds the environment, and whether it is a new one.

    It is built on `node` (id or name), else on the node that was heard last.
    """
    row = await find_environment(session, environment)
    if row is None and environment != BASE_ENVIRONMENT:
        if any(environment in other.environments for other in await nodes.all_nodes(session)):
            raise EnvironmentWithoutSpec(environment=environment)
        raise EnvironmentNotFound(environment=environment)
    if row is not None and row.spec is None:
        raise EnvironmentWithoutSpec(environment=environment)
    builder = await _builder(session, node)
    while True:
        made = await build_job(session, environment, row.spec if row else None, node_id=builder.id)
        if made is not None:
            return made, True
        building = await store.unfinished_builds(session, [environment], node_id=builder.id)
        if environment in building:  # else the other one ended between our two looks
            return await store.get(session, building[environment]), False


async def _builder(session: AsyncSession, node: str | None) -> NodeRow:
    if node is not None:
        return await nodes.get_node(session, node)
    alive = await living_nodes(session)
    if not alive:
        raise NoNode()
    return max(alive, key=lambda other: other.heartbeat_at)
