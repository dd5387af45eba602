"""Order work on an environment before a job needs it: build it, build what another node has, pack it."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.environment_locks import EnvironmentLock
from app.domain.errors import Conflict, NotFound
from app.domain.names import BASE_ENVIRONMENT
from app.executor.environments.environment_archive import EnvironmentArchive
from app.executor.nodes.reporter import build_job
from app.registry.environments.service import EnvironmentNotFound
from app.registry.environments.specs import BASE_SPEC, parse_spec
from app.registry.nodes.service import living_nodes
from app.store import jobs as store
from app.store import nodes
from app.store.clock import database_now
from app.store.environments import find_environment
from app.store.tables import JobRow, NodeRow


class NoNode(Conflict):
    """No worker is there that could build."""

    code = "no_node"


class EnvironmentWithoutSpec(Conflict):
    """The environment has no specification."""

    code = "environment_without_spec"


class EnvironmentOnNoNode(Conflict):
    """There is nothing to pack."""

    code = "environment_ready_nowhere"


class EnvironmentLockMissing(Conflict):
    """No node has reported what it installed for the present specification."""

    code = "environment_lock_missing"


class EnvironmentLockNotFound(NotFound):
    """No node has reported what it installed for the present specification."""

    code = "environment_lock_not_found"


@dataclass(frozen=True)
class BuildRequest:
    """How to build: on `node` (id or name), exactly what another node has if `locked`, that of `lock_of` if given."""

    node: str | None = None
    locked: bool = False
    lock_of: str | None = None


class EnvironmentOrders:
    """Turns build requests into jobs; `archive` is the folder of locks and packs."""

    def __init__(self, archive: Path) -> None:
        self._archive = archive

    async def build(self, session: AsyncSession, environment: str, request: BuildRequest) -> tuple[JobRow, bool]:
        """Return the job that builds the environment, and whether it is a new one.

        Without a node in the request, it is built on the node with the latest heartbeat.
        """
        spec = await self._spec(session, environment)
        node = await _builder(session, request.node)
        lock = None
        if request.locked or request.lock_of is not None:
            of = (await nodes.get_node(session, request.lock_of)).name if request.lock_of is not None else None
            lock = await self._lock(environment, spec, of=of, but=node.name)
            if lock is None:
                raise EnvironmentLockMissing(environment=environment, node=request.lock_of or "–")
        return await _job(session, environment, spec, node=node, lock=lock)

    async def pack(self, session: AsyncSession, environment: str, *, node: str | None) -> tuple[JobRow, bool]:
        """Return the job that packs the environment on a node that has it, and whether it is a new one."""
        spec = await self._spec(session, environment)
        candidates = await living_nodes(session) if node is None else [await nodes.get_node(session, node)]
        having = [other for other in candidates if environment in other.environments]
        if not having:
            raise EnvironmentOnNoNode(environment=environment)
        return await _job(session, environment, spec, node=having[0], action="pack")

    async def lock(self, session: AsyncSession, environment: str, *, node: str | None) -> EnvironmentLock:
        """Return what is installed on the node, by default on the one that built it last."""
        spec = await self._spec(session, environment)
        name = (await nodes.get_node(session, node)).name if node is not None else None
        lock = await self._lock(environment, spec, of=name)
        if lock is None:
            raise EnvironmentLockNotFound(environment=environment)
        return lock

    async def _spec(self, session: AsyncSession, environment: str) -> str | None:
        row = await find_environment(session, environment)
        if row is None and environment != BASE_ENVIRONMENT:
            if any(environment in other.environments for other in await nodes.all_nodes(session)):
                raise EnvironmentWithoutSpec(environment=environment)
            raise EnvironmentNotFound(environment=environment)
        if row is not None and row.spec is None:
            raise EnvironmentWithoutSpec(environment=environment)
        return row.spec if row else None

    async def _lock(
        self, environment: str, spec: str | None, *, of: str | None, but: str | None = None
    ) -> EnvironmentLock | None:
        """Return the lock of the node `of`, else the newest; that of the node `but` only if there is no other."""
        wanted = await asyncio.to_thread(parse_spec, spec or BASE_SPEC)
        archive = EnvironmentArchive(self._archive, environment, wanted)
        if of is not None:
            return await asyncio.to_thread(archive.lock, of)
        found = await asyncio.to_thread(archive.locks)
        return next((lock for lock in found if lock.node != but), found[0] if found else None)


async def _job(
    session: AsyncSession,
    environment: str,
    spec: str | None,
    *,
    node: NodeRow,
    action: Literal["build", "pack"] = "build",
    lock: EnvironmentLock | None = None,
) -> tuple[JobRow, bool]:
    while True:
        made = await build_job(session, environment, spec, node_id=node.id, action=action, lock=lock)
        if made is not None:
            return made, True
        at_it = await store.unfinished_builds(session, [environment], node_id=node.id)
        if environment in at_it:  # else the other one ended between our two looks
            return await store.get(session, at_it[environment]), False


async def _builder(session: AsyncSession, node: str | None) -> NodeRow:
    if node is not None:
        return await nodes.get_node(session, node)
    working = await nodes.working_nodes(session, now=await database_now(session))
    if not working:
        raise NoNode()
    return max(working, key=lambda other: other.heartbeat_at)
