"""Environments: conda environments that stages can name.

Known are those that are registered here, those that a node found or built, and `base`, which every node has.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import Conflict, NotFound, Violation, together_with
from app.domain.names import BASE_ENVIRONMENT, environment_name_violations
from app.registry.environments.on_nodes import EnvironmentStates, NodeEnvironment, environment_states
from app.registry.environments.specs import parse_spec, spec_hash
from app.store import environments as store
from app.store import named
from app.store.nodes import all_nodes
from app.store.tables import EnvironmentRow, NodeRow
from app.store.usage import methods_running_in, unfinished_jobs


class EnvironmentNotFound(NotFound):
    """No environment has this name, here or on a node."""

    code = "environment_not_found"


class EnvironmentInUse(Conflict):
    """Methods or unfinished jobs run in the environment."""

    code = "environment_in_use"


class EnvironmentShipped(Conflict):
    """The environment is part of the product."""

    code = "environment_shipped"


class EnvironmentNotRegistered(Conflict):
    """The environment exists on nodes only, so that there is nothing to change here."""

    code = "environment_not_registered"


class EnvironmentSource(StrEnum):
    """How an environment became known."""

    SHIPPED = "shipped"
    REGISTERED = "registered"
    DISCOVERED = "discovered"


@dataclass(frozen=True)
class EnvironmentView:
    """An environment with what all nodes say of it; `row` is None if it exists on nodes only."""

    name: str
    source: EnvironmentSource
    row: EnvironmentRow | None
    nodes: tuple[NodeEnvironment, ...]

    @property
    def version(self) -> str:
        """What changes when the spec does; the ETag."""
        return environment_version(self.row.spec_hash if self.row else None)


class Environments:
    """What can be done with environments."""

    def __init__(self, *, clock: Callable[[], datetime]) -> None:
        self._clock = clock

    async def is_known(self, session: AsyncSession, name: str) -> bool:
        """Return whether a stage may name the environment."""
        if name == BASE_ENVIRONMENT or await store.find_environment(session, name) is not None:
            return True
        return any(name in node.environments for node in await all_nodes(session))

    async def views(self, session: AsyncSession, *, text: str | None = None) -> list[EnvironmentView]:
        """Return all known environments by name."""
        known = await environment_states(session)
        nodes = await all_nodes(session)
        names = {BASE_ENVIRONMENT, *known.rows, *(name for node in nodes for name in node.environments)}
        wanted = sorted(name for name in names if not text or text.casefold() in name.casefold())
        return _views(wanted, known, nodes)

    async def get(self, session: AsyncSession, name: str) -> EnvironmentView:
        """Return the environment with exactly this name."""
        if not await self.is_known(session, name):
            raise EnvironmentNotFound(environment=name)
        (view,) = _views([name], await environment_states(session), await all_nodes(session))
        return view

    async def create(self, session: AsyncSession, *, name: str, spec: str | None) -> EnvironmentView:
        """Register an environment; with a spec it can be built, without one it must be on a node already."""
        found = environment_name_violations(name, "/name")
        if name == BASE_ENVIRONMENT:
            found.append(Violation("/name", "name_reserved", {"name": name}))
        with together_with(found):
            digest = await asyncio.to_thread(_hash, spec)
        row = store.new_environment(name, spec=spec, spec_hash=digest, now=self._clock())
        await named.insert(session, row)
        return await self.get(session, name)

    async def replace_spec(
        self, session: AsyncSession, name: str, *, spec: str, check: Callable[[str], None]
    ) -> EnvironmentView:
        """Give the environment another spec; `check` is called with the version that is replaced and may refuse."""
        digest = await asyncio.to_thread(_hash, spec)
        view = await self.get(session, name)
        check(view.version)
        row = _own_row(view)
        await named.update(session, row, spec=spec, spec_hash=digest, updated_at=self._clock())
        return await self.get(session, name)

    async def delete(self, session: AsyncSession, name: str, *, check: Callable[[str], None]) -> None:
        """Delete the entry; what was built on nodes stays there."""
        view = await self.get(session, name)
        check(view.version)
        row = _own_row(view)
        methods = await methods_running_in(session, name)
        jobs = await unfinished_jobs(session, environment=name)
        if methods or jobs:
            raise EnvironmentInUse(environment=name, methods=", ".join(methods) or "–", jobs=len(jobs))
        await named.delete(session, row)


def environment_version(spec_hash: str | None) -> str:
    """Return what names the present spec of an environment in `ETag`."""
    return spec_hash or "none"


def _views(names: Sequence[str], known: EnvironmentStates, nodes: Sequence[NodeRow]) -> list[EnvironmentView]:
    by_node = [known.on(node, names) for node in nodes]
    return [
        EnvironmentView(
            name=name,
            source=_source(known.rows.get(name)),
            row=known.rows.get(name),
            nodes=tuple(environment[index] for environment in by_node),
        )
        for index, name in enumerate(names)
    ]


def _source(row: EnvironmentRow | None) -> EnvironmentSource:
    if row is None:
        return EnvironmentSource.DISCOVERED
    return EnvironmentSource.SHIPPED if row.shipped else EnvironmentSource.REGISTERED


def _own_row(view: EnvironmentView) -> EnvironmentRow:
    """Return the row that a user may change."""
    if view.row is None:
        raise EnvironmentNotRegistered(environment=view.name)
    if view.row.shipped:
        raise EnvironmentShipped(environment=view.name)
    return view.row


def _hash(spec: str | None) -> str | None:
    return None if spec is None else spec_hash(parse_spec(spec))
