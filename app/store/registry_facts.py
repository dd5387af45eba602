"""What a method may name, and where it could run now: deploy targets, environments, nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.deploy_targets import DeployTargetKind
from app.domain.enums import Platform
from app.domain.names import BASE_ENVIRONMENT
from app.store.environments import all_environments
from app.store.nodes import all_nodes
from app.store.tables import DeployTargetRow


@dataclass(frozen=True)
class NodeFacts:
    """What a node last said of itself."""

    name: str
    platform: Platform
    environments: frozenset[str]
    heartbeat_at: datetime


@dataclass(frozen=True)
class RegistryFacts:
    """What is known at this moment."""

    deploy_targets: Mapping[str, DeployTargetRow]
    specified_environments: frozenset[str]
    named_environments: frozenset[str]
    nodes: tuple[NodeFacts, ...]
    specs: Mapping[str, str] = field(default_factory=dict)
    """Specifications of environments, by name."""

    @property
    def custom_targets(self) -> Sequence[str]:
        """Names of the targets that scripts of users deploy to, sorted."""
        return sorted(name for name, row in self.deploy_targets.items() if row.kind == DeployTargetKind.CUSTOM)

    @property
    def environments(self) -> frozenset[str]:
        """Names of all environments that are registered or were seen on a node; `base` is always known."""
        seen = [node.environments for node in self.nodes]
        return self.named_environments.union([BASE_ENVIRONMENT], *seen)


async def load(session: AsyncSession) -> RegistryFacts:
    """Return the facts as the database has them."""
    environments = await all_environments(session)
    return RegistryFacts(
        deploy_targets={row.name: row for row in (await session.exec(select(DeployTargetRow))).all()},
        specified_environments=frozenset(row.name for row in environments if row.spec),
        named_environments=frozenset(row.name for row in environments),
        specs={row.name: row.spec for row in environments if row.spec},
        nodes=tuple(
            NodeFacts(
                name=row.name,
                platform=row.platform,
                environments=frozenset(row.environments),
                heartbeat_at=row.heartbeat_at,
            )
            for row in await all_nodes(session)
        ),
    )
