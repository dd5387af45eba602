"""Configuration classes of libraries, as the nodes' environments have them."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.library_options import DescribedOptions, OptionClass
from app.presets.catalogue import option_table
from app.store import option_classes
from app.store.nodes import all_nodes
from app.store.tables import NodeRow

Described = Mapping[str, Mapping[str, OptionClass]]
"""Environment → path → class."""


class OptionClasses:
    """Reads descriptions; they never change, so that each is read once."""

    def __init__(self) -> None:
        self._known: dict[str, OptionClass | None] = {}

    async def of(
        self, session: AsyncSession, environments: Collection[str], nodes: Iterable[NodeRow] | None = None
    ) -> Described:
        """Return the classes that these environments have; of several nodes the first by name counts."""
        rows = await all_nodes(session) if nodes is None else nodes
        named = {environment: _digests(rows, environment) for environment in environments}
        unread = {digest for digests in named.values() for digest in digests.values()} - self._known.keys()
        for digest, document in (await option_classes.load(session, unread)).items():
            self._known[digest] = _read(document)
        return {
            environment: {path: known for path, digest in digests.items() if (known := self._known.get(digest))}
            for environment, digests in named.items()
        }


def described_options(described: Described, environment: str) -> DescribedOptions:
    """Return what is known of the options in an environment, with what no method takes."""
    return DescribedOptions(described.get(environment, {}), environment, option_table())


def _digests(nodes: Iterable[NodeRow], environment: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in nodes:
        for state in node.environment_states or []:
            if state.get("name") == environment:
                found = {**(state.get("probe") or {}).get("options", {}), **found}
    return found


def _read(document: Mapping[str, Any]) -> OptionClass | None:
    try:
        return OptionClass.model_validate(document)
    except ValidationError:  # what another version of the product wrote
        return None
