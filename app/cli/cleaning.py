"""What the clean-up of this node's environments would remove, read where the worker would read it."""

import asyncio
import os
from typing import TYPE_CHECKING, Any

from app.cli.exits import CliFailure

if TYPE_CHECKING:
    from app.settings import Settings


def planned(settings: "Settings") -> list[dict[str, Any]]:
    """Return what would go, and why."""
    return asyncio.run(_planned(settings))


def ask_worker(settings: "Settings") -> None:
    """Let the worker of this node clean up at its next look."""
    from app.executor.environments.environment_cleaning import WISH

    (settings.node_home / WISH).touch()


async def _planned(settings: "Settings") -> list[dict[str, Any]]:
    from app.executor.environments.builders import BuildRules
    from app.executor.environments.conda import CondaSearch
    from app.executor.environments.environment_cleaning import Why, unfinished
    from app.executor.environments.environments import size_of
    from app.executor.environments.local_environments import LocalEnvironments
    from app.store.environments import all_environments
    from app.store.home import NodeHome
    from app.store.nodes import NodeNotFound, get_node
    from app.store.session import Database
    from app.worker import environment_cleaning

    envs_dir = NodeHome(settings.node_home).environments
    database = Database(settings.database_url)
    try:
        async with database.reading() as session:
            specs = {row.name: row.spec for row in await all_environments(session)}
            node = await get_node(session, settings.node_name)
        search = CondaSearch.of(os.environ, root=settings.conda_root)
        seen = LocalEnvironments(envs_dir=envs_dir, search=search, rules=BuildRules()).look(specs)
        chosen = await environment_cleaning(settings, database).plan(node.id, seen)
    except NodeNotFound as error:
        raise CliFailure(error.detail(), notes=("Run this on a node, with the variables of its worker.",)) from None
    finally:
        await database.close()
    found: list[dict[str, Any]] = [
        {"environment": one.name, "prefix": str(one.prefix), "why": why.value, "size_bytes": one.size_bytes}
        for one, why in chosen
    ]
    for prefix in unfinished(envs_dir):
        left = {"environment": "", "prefix": str(prefix), "why": Why.UNFINISHED.value, "size_bytes": size_of(prefix)}
        found.append(left)
    return found
