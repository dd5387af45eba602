"""Whether a method could run now, and where. What is missing here is no reason to refuse a method."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from app.domain.definition import MethodDefinition
from app.domain.errors import Violation
from app.domain.kinds import STAGES, Stage
from app.domain.names import BASE_ENVIRONMENT
from app.registry.methods.readiness_cells import Cell, Verdict
from app.registry.methods.stage_members import file_pointer, member_pointer, stage_environments, stage_files
from app.store.nodes import NODE_SILENT_AFTER
from app.store.registry_facts import RegistryFacts


@dataclass(frozen=True)
class StageReadiness:
    """Nodes that could run the stage now, and everything that prevents it."""

    stage: Stage
    environment: str | None
    nodes: tuple[str, ...]
    problems: tuple[Violation, ...]
    cells: tuple[Cell, ...] = ()

    @property
    def ready(self) -> bool:
        return bool(self.nodes) and not self.problems


@dataclass(frozen=True)
class Readiness:
    """Readiness of every stage that the method configures."""

    stages: tuple[StageReadiness, ...]

    @property
    def ready(self) -> bool:
        return all(stage.ready for stage in self.stages)


def with_cells(found: Readiness, cells: Mapping[Stage, tuple[Cell, ...]]) -> Readiness:
    """Return the readiness with the state of each stage on every node; the cells say where it could run now."""
    return Readiness(stages=tuple(_with_cells(stage, cells.get(stage.stage, ())) for stage in found.stages))


def _with_cells(stage: StageReadiness, cells: tuple[Cell, ...]) -> StageReadiness:
    able = {one.node for one in cells if one.verdict is Verdict.READY}
    nodes = tuple(name for name in stage.nodes if name in able)
    problems = list(stage.problems)
    if stage.nodes and not nodes:  # the environment is ready somewhere, and yet it cannot run there
        pointer = member_pointer(stage.stage, "conda_env")
        found = {finding.code: finding for cell in cells for finding in cell.findings if cell.node in stage.nodes}
        problems += [Violation(pointer, one.code, one.params) for one in found.values()]
    return replace(stage, nodes=nodes, problems=tuple(problems), cells=cells)


def readiness(
    definition: MethodDefinition,
    facts: RegistryFacts,
    *,
    file_problems: Mapping[Stage, tuple[Violation, ...]],
    now: datetime,
) -> Readiness:
    """Judge every stage that has a file or an environment; `file_problems` are what is known of the files."""
    files, named = stage_files(definition), stage_environments(definition)
    return Readiness(
        stages=tuple(
            _stage(stage, named.get(stage), facts, file_problems.get(stage, ()), now=now)
            for stage in STAGES
            if stage in files or stage in named or stage in file_problems
        )
    )


def _stage(
    stage: Stage,
    environment: str | None,
    facts: RegistryFacts,
    file_problems: tuple[Violation, ...],
    *,
    now: datetime,
) -> StageReadiness:
    alive = [node for node in facts.nodes if now - node.heartbeat_at < NODE_SILENT_AFTER]
    nodes = tuple(node.name for node in alive if environment is not None and environment in node.environments)
    problems = list(file_problems)
    if not alive:
        problems.append(Violation(file_pointer(stage), "no_node_alive"))
    elif environment is not None and not nodes:
        specified = environment in facts.specified_environments or environment == BASE_ENVIRONMENT
        code = "environment_not_built" if specified else "environment_on_no_node"
        problems.append(Violation(member_pointer(stage, "conda_env"), code, {"environment": environment}))
    return StageReadiness(stage, environment, nodes, tuple(problems))
