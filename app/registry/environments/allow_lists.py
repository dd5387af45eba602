"""What may use an environment, and what may run on a node: set by administrators, asked by submit, claim and launch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.access import Caller
from app.domain.allow_lists import AllowList
from app.domain.errors import InvalidRequest, Violation
from app.domain.plain_text import shown
from app.domain.pointers import pointer
from app.registry.environments.service import EnvironmentNotFound, Environments
from app.store import allow_lists as store
from app.store.clock import database_now
from app.store.nodes import get_node


@dataclass(frozen=True)
class WantedList:
    """What an administrator wants to allow: methods by name or id, projects, and for a node environments."""

    methods: Sequence[str] = ()
    projects: Sequence[str] = ()
    environments: Sequence[str] = ()


class AllowLists:
    """Reads and sets allow-lists."""

    def __init__(self, environments: Environments) -> None:
        self._environments = environments

    async def of_environment(self, session: AsyncSession, environment: str) -> AllowList:
        """Return the allow-list of an environment; `EnvironmentNotFound` if nobody knows it."""
        if not await self._environments.is_known(session, environment):
            raise EnvironmentNotFound(environment=environment)
        return (await store.of_environments(session)).get(environment, AllowList())

    async def set_of_environment(
        self, session: AsyncSession, environment: str, wanted: WantedList, *, by: Caller, check: Callable[[str], None]
    ) -> AllowList:
        """Set what may use an environment; jobs that have been launched go on. `check` may refuse the version."""
        check((await self.of_environment(session, environment)).version)
        allowed = await self._resolved(session, wanted)
        await store.set_of_environment(session, environment, allowed, by=by.name, now=await database_now(session))
        return allowed

    async def of_node(self, session: AsyncSession, node: str) -> AllowList:
        """Return the allow-list of a node."""
        return store.of_node(await get_node(session, node))

    async def set_of_node(
        self, session: AsyncSession, node: str, wanted: WantedList, *, check: Callable[[str], None]
    ) -> AllowList:
        """Set what may run on a node; jobs that it has taken go on."""
        row = await get_node(session, node, lock=True)
        check(store.of_node(row).version)
        allowed = await self._resolved(session, wanted)
        await store.set_of_node(session, row, allowed)
        return allowed

    async def _resolved(self, session: AsyncSession, wanted: WantedList) -> AllowList:
        found: list[Violation] = []
        methods = []
        for number, name in enumerate(wanted.methods):
            method = await store.find_method(session, name)
            if method is None:
                found.append(Violation(pointer("methods", number), "unknown_method", {"method": shown(name)}))
            else:
                methods.append(method)
        for project in await store.unknown_projects(session, wanted.projects):
            at = pointer("projects", list(wanted.projects).index(project))
            found.append(Violation(at, "allowed_project_unknown", {"project": shown(project)}))
        for number, environment in enumerate(wanted.environments):
            if not await self._environments.is_known(session, environment):
                at = pointer("environments", number)
                found.append(Violation(at, "allowed_environment_unknown", {"environment": shown(environment)}))
        if found:
            raise InvalidRequest(found)
        return AllowList(
            methods=tuple({method.id: method for method in methods}.values()),
            projects=tuple(dict.fromkeys(wanted.projects)),
            environments=tuple(dict.fromkeys(wanted.environments)),
        )
