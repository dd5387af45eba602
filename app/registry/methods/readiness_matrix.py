"""Collect what the readiness matrix is made of, for methods as they stand now."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import JobKind
from app.domain.kinds import STAGES, Stage
from app.registry.environments.on_nodes import EnvironmentStates, environment_states
from app.registry.methods.readiness_cells import Cell, Finding, NodeFacts, Verdict, cell
from app.registry.methods.record import Method
from app.registry.methods.script_modules import ScriptModules
from app.registry.methods.stage_members import stage_environments
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
        self, environment: str | None, modules: Collection[str], *, files: Sequence[Finding] = ()
    ) -> tuple[Cell, ...]:
        """Return how a stage stands on every node."""
        return tuple(
            cell(facts, self.known.on(row, [environment])[0] if environment else None, modules, files)
            for facts, row in self.nodes
        )


async def matrix(session: AsyncSession, *, now: datetime) -> Matrix:
    """Read what is known now."""
    return matrix_of(await all_nodes(session), await environment_states(session), now=now)


def matrix_of(rows: Sequence[NodeRow], known: EnvironmentStates, *, now: datetime) -> Matrix:
    """Return the matrix of these nodes."""
    rows = [row for row in rows if node_status_of(row) not in GONE_STATUSES]
    facts = (_facts(row, silent=now - row.heartbeat_at >= NODE_SILENT_AFTER) for row in rows)
    return Matrix(nodes=tuple(zip(facts, rows, strict=True)), known=known)


def cells_of(
    method: Method, found: Matrix, modules: ScriptModules, stages: Sequence[Stage] = STAGES
) -> Mapping[Stage, tuple[Cell, ...]]:
    """Return the cells of those of the stages that the method configures; blocks."""
    environments = stage_environments(method.definition)
    cells = {}
    for stage in stages:
        if stage in method.files or stage in environments:
            told = _of_file(method, stage, modules)
            cells[stage] = found.cells(environments.get(stage), modules.needed_at(method, stage), files=told)
    return cells


def _of_file(method: Method, stage: Stage, modules: ScriptModules) -> Sequence[Finding]:
    """Return what is worth knowing of a stage's file."""
    pin, config = method.files.get(stage), method.definition.stage_config(stage)
    if pin is None:
        return ()
    unread = modules.model_unread(pin, config) if stage is JobKind.INFERENCE_CUSTOMIZED else None
    told = (unread, modules.unjudged(pin))
    return [Finding(Verdict.READY, one.code, one.params) for one in told if one is not None]


def _facts(row: NodeRow, *, silent: bool) -> NodeFacts:
    absent = "cell_node_silent" if silent else _ABSENT.get(node_status_of(row))
    return NodeFacts(row.name, row.platform, len(accelerators_of(row)), absent)
