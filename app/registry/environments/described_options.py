"""Configuration classes of libraries, as the nodes' environments have them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.environment_reports import EnvironmentReport, EnvironmentState
from app.domain.library_options import DescribedOptions, OptionClass
from app.presets.catalogue import option_table
from app.store import option_classes
from app.store.nodes import all_nodes
from app.store.tables import NodeRow


@dataclass(frozen=True)
class EnvironmentOptions:
    """The classes of an environment by their paths, and why others could not be described there.

    `prefix`: where a node has the environment ready, perhaps on this machine.
    """

    classes: Mapping[str, OptionClass] = field(default_factory=dict)
    trouble: Mapping[str, str] = field(default_factory=dict)
    prefix: Path | None = None


Described = Mapping[str, EnvironmentOptions]
"""Environment → its classes."""


class OptionClasses:
    """Reads descriptions; they never change, so that each is read once."""

    def __init__(self) -> None:
        self._known: dict[str, OptionClass | None] = {}

    async def of(
        self, session: AsyncSession, environments: Collection[str], nodes: Sequence[NodeRow] | None = None
    ) -> Described:
        """Return the classes that these environments have; of several nodes the first by name counts."""
        rows = await all_nodes(session) if nodes is None else nodes
        probes = {environment: _probes(rows, environment) for environment in environments}
        named = {environment: _joined(probes[environment], "options") for environment in environments}
        unread = {digest for digests in named.values() for digest in digests.values()} - self._known.keys()
        for digest, document in (await option_classes.load(session, unread)).items():
            self._known[digest] = _read(document)
        return {
            environment: EnvironmentOptions(
                classes={path: known for path, digest in digests.items() if (known := self._known.get(digest))},
                trouble=_joined(probes[environment], "options_trouble"),
                prefix=_prefix(rows, environment),
            )
            for environment, digests in named.items()
        }


def described_options(described: Described, environment: str) -> DescribedOptions:
    """Return what is known of the options in an environment, with what no method takes."""
    found = described.get(environment, EnvironmentOptions())
    return DescribedOptions(found.classes, environment, option_table(), found.trouble)


def prefix_of(described: Described, environment: str) -> Path | None:
    """Return where a node has the environment ready."""
    return described.get(environment, EnvironmentOptions()).prefix


def _probes(nodes: Sequence[NodeRow], environment: str) -> list[Mapping[str, Any]]:
    """Return what nodes found in the environment when they looked into it."""
    states = (state for node in nodes for state in node.environment_states or [] if state.get("name") == environment)
    return [state.get("probe") or {} for state in states]


def _prefix(nodes: Sequence[NodeRow], environment: str) -> Path | None:
    reports = (EnvironmentReport.read(node.environment_states or []).get(environment) for node in nodes)
    ready = (one.prefix for one in reports if one is not None and one.state is EnvironmentState.READY)
    return next((Path(prefix) for prefix in ready if prefix is not None), None)


def _joined(probes: Iterable[Mapping[str, Any]], member: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for probe in probes:
        found = {**probe.get(member, {}), **found}
    return found


def _read(document: Mapping[str, Any]) -> OptionClass | None:
    try:
        return OptionClass.model_validate(document)
    except ValidationError:  # what another version of the product wrote
        return None
