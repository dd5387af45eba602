"""Collect what the readiness matrix is made of, for methods as they stand now."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.kinds import STAGES, Stage
from app.registry.method_files import stage_environments
from app.registry.method_record import Method
from app.registry.node_environments import EnvironmentStates, environment_states
from app.registry.readiness_cells import Cell, NodeFacts, cell
from app.registry.script_modules import ScriptModules
from app.store.nodes import GONE_STATUSES, NODE_SILENT_AFTER, NodeStatus, accelerators_of, all_nodes, node_status_of
from app.store.tables import NodeRow

_ABSENT = {
    NodeStatus.DRAINING: "cell_node_draining",
    NodeStatus.REFUSING: "cell_node_refusing",
}


@dataclass(frozen=True)
class Matrix:
    """Nodes that are registered and not given up, and what is known of their environments."""

    nodes: tuple[tuple[NodeFacts, NodeRow], ...]
    known: EnvironmentStates

    def cells(
        self, environment: str | None, modules: Collection[str], *, only_reporting: bool = False
    ) -> tuple[Cell, ...]:
        """Return how a stage stands on every node; `only_reporting`: on those that report their environments."""
        return tuple(
            cell(facts, self.known.on(row, [environment])[0] if environment else None, modules)
            for facts, row in self.nodes
            if row.environment_states or not only_reporting
        )


async def matrix(session: AsyncSession, *, now: datetime) -> Matrix:
    """Read what is known now."""
    return await _matrix_of(session, await all_nodes(session), now=now)


async def reporting(session: AsyncSession, rows: Sequence[NodeRow], *, now: datetime) -> Matrix | None:
    """Return the matrix of these nodes. None: none of them that is not given up has reported its environments."""
    if not any(row.environment_states for row in rows if node_status_of(row) not in GONE_STATUSES):
        return None
    return await _matrix_of(session, rows, now=now)


def cells_of(method: Method, found: Matrix, modules: ScriptModules) -> Mapping[Stage, tuple[Cell, ...]]:
    """Return the cells of every stage that the method configures; blocks."""
    environments = stage_environments(method.definition)
    needed = {stage: modules.needed(pin) for stage, pin in method.files.items()}
    return {
        stage: found.cells(environments.get(stage), needed.get(stage, frozenset()))
        for stage in STAGES
        if stage in method.files or stage in environments
    }


async def _matrix_of(session: AsyncSession, rows: Sequence[NodeRow], *, now: datetime) -> Matrix:
    rows = [row for row in rows if node_status_of(row) not in GONE_STATUSES]
    return Matrix(
        nodes=tuple((_facts(row, silent=now - row.heartbeat_at >= NODE_SILENT_AFTER), row) for row in rows),
        known=await environment_states(session),
    )


def _facts(row: NodeRow, *, silent: bool) -> NodeFacts:
    absent = "cell_node_silent" if silent else _ABSENT.get(node_status_of(row))
    return NodeFacts(row.name, row.platform, len(accelerators_of(row)), absent)
