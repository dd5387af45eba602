"""Check whether any node could run the jobs of a submission. Refuse others unless the caller wants to wait.

Nodes count that are registered, not dead and have reported their environments: an installation whose worker
has not started yet takes jobs, and no acceptance depends on a heartbeat. A stage is refused when every one of them says
`never`: the environment is not there and cannot be built, modules that the script imports are missing in it, or labels,
accelerators or their memory do not fit what the job asks for. An environment that is merely not built is none of that.

A value of a parameter may need more, such as a package. It is refused when every node that could run the stage without
it looked and has not found it. Where no node has looked yet, that is told.
"""

from collections.abc import Iterable, Mapping, Sequence

from app.domain.accelerators import AcceleratorKind
from app.domain.demand import Demand
from app.domain.environment_reports import EnvironmentState
from app.domain.errors import Violation
from app.domain.kinds import Stage, as_stage
from app.domain.placement import Host, Mismatch, cards_of, mismatches
from app.domain.plain_text import shown
from app.domain.pointers import pointer
from app.executor.jobs.stage_parameters import Asked
from app.registry.environments.on_nodes import NodeEnvironment
from app.registry.methods.readiness_cells import Cell, Finding, Verdict
from app.registry.methods.readiness_matrix import Matrix, cells_of
from app.registry.methods.record import Method
from app.registry.methods.script_modules import ScriptModules
from app.store import jobs as store
from app.store.allow_lists import of_node
from app.store.nodes import accelerators_of
from app.store.tables import JobRow, NodeRow

POINTER = "/method"

Needs = Mapping[Stage, Mapping[str, Asked]]
"""Stage → name of a parameter → what its value needs."""


def judge_runnability(
    found: Matrix, method: Method, jobs: Sequence[JobRow], modules: ScriptModules, needs: Needs
) -> tuple[list[Violation], list[Violation]]:
    """Return why stages can run on no node, or else what is not known yet of the needs of values; blocks.

    For each stage that no node can run, it is said that it is so and what is in the way on each node.
    """
    rows = {facts.name: row for facts, row in found.nodes if row.environment_states}
    cells = cells_of(method, found, modules, [as_stage(job.kind) for job in jobs]) if rows else {}
    violations: list[Violation] = []
    warnings: list[Violation] = []
    for job in jobs:
        stage = as_stage(job.kind)
        demand = store.demand_of(job)
        by_node = {cell.node: cell for cell in cells.get(stage, ())}
        in_the_way = {name: _in_the_way(row, by_node.get(name), demand) for name, row in rows.items()}
        able = [rows[name] for name, findings in in_the_way.items() if not findings]
        if rows and not able:
            params = {"stage": job.kind.value, "environment": job.environment}
            reasons = [Violation(POINTER, one.code, one.params) for findings in in_the_way.values() for one in findings]
            violations += [Violation(POINTER, "stage_runs_nowhere", params), *reasons]
            continue
        warnings += _not_looked_for(by_node[row.name] for row in able if row.name in by_node)
        lacking, unknown = _judge_needs(needs.get(stage, {}), found, able, demand)
        violations += lacking
        warnings += unknown
    return violations, warnings


def _in_the_way(row: NodeRow, cell: Cell | None, demand: Demand) -> list[Finding]:
    """Return why the node cannot run the job, whatever its parameters, unless a person changes something."""
    found = [one for one in cell.findings if one.verdict is Verdict.NEVER] if cell is not None else []
    host = Host(
        node_id=row.id,
        name=row.name,
        environments=frozenset([demand.environment]),  # the cell knows more
        labels=row.labels,
        cards=cards_of(accelerators_of(row), held={}),
        allowed=of_node(row),
    )
    asked = demand.resources
    params = {
        "node": row.name,
        "labels": ", ".join(f"{name}={value}" for name, value in sorted(asked.labels.items())),
        "accelerators": asked.accelerators or demand.processes or 1,
        "memory": asked.accelerator_memory_mib or 0,
    }
    return found + [
        # the code is part of the API: it stays although it says misfit
        Finding(Verdict.NEVER, f"cell_misfit_{mismatch}", params)
        for mismatch in mismatches(demand.model_copy(update={"cuda": False}), host)
        if mismatch in (Mismatch.LABELS, Mismatch.ACCELERATORS, Mismatch.MEMORY, Mismatch.NOT_ALLOWED)
    ]


def _not_looked_for(cells: Iterable[Cell]) -> list[Violation]:
    """Say what no node that could run the stage has looked for yet; the job may end for the lack of it."""
    waiting = [[one for one in cell.findings if one.code == "cell_not_looked_yet"] for cell in cells]
    if not waiting or not all(waiting):
        return []
    return [Violation(POINTER, one.code, one.params) for one in waiting[0]]


def _judge_needs(
    needs: Mapping[str, Asked], found: Matrix, able: Sequence[NodeRow], demand: Demand
) -> tuple[list[Violation], list[Violation]]:
    """Return what the values need and the node that lacks least has not, and what is not known of it."""
    of_nodes = [_judged(needs, demand, row, found.known.on(row, [demand.environment])[0]) for row in able]
    return min(of_nodes or [_judged(needs, demand)], key=lambda judged: [len(part) for part in judged])


def _judged(
    needs: Mapping[str, Asked], demand: Demand, row: NodeRow | None = None, environment: NodeEnvironment | None = None
) -> tuple[list[Violation], list[Violation]]:
    """Return what the values need and a node lacks, and what is not known of it; without a node, what no node has."""
    lacking, unknown = [], []
    for name, asked in needs.items():
        at, params = pointer("parameters", name), {"name": name, "value": shown(asked.text)}
        params |= {"package": asked.need.name, "environment": demand.environment}
        if asked.need.cuda and (demand.resources.accelerators == 0 or (row is not None and not _has_cuda(row))):
            lacking.append(Violation(at, "parameter_needs_gpu", params))
            continue
        probe = None
        if environment is not None and environment.state is EnvironmentState.READY:
            probe = environment.report.probe
        if probe is None or asked.need.module not in probe.modules:
            unknown.append(Violation(at, "parameter_package_unknown", params))
        elif asked.need.module in probe.missing:
            lacking.append(Violation(at, "parameter_needs_package", params))
    return lacking, unknown


def _has_cuda(row: NodeRow) -> bool:
    return any(one.kind is AcceleratorKind.CUDA for one in accelerators_of(row))
