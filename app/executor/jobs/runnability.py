"""Check whether any node could run the jobs of a submission. Refuse others unless the caller wants to wait.

Nodes count that are registered, not dead and have reported their environments: an installation whose worker
has not started yet takes jobs, and no acceptance depends on a heartbeat. A stage is refused when every one of them says
`never`: the environment is not there and cannot be built, modules that the script imports are missing in it, or labels,
accelerators or their memory do not fit what the job asks for. An environment that is merely not built is none of that.
"""

from collections.abc import Sequence

from app.domain.demand import Demand
from app.domain.errors import Violation
from app.domain.kinds import as_stage
from app.domain.placement import Host, Mismatch, cards_of, mismatches
from app.registry.methods.readiness_cells import Cell, Finding, Verdict
from app.registry.methods.readiness_matrix import Matrix, cells_of
from app.registry.methods.record import Method
from app.registry.methods.script_modules import ScriptModules
from app.store import jobs as store
from app.store.nodes import accelerators_of
from app.store.tables import JobRow, NodeRow

POINTER = "/method"


def unrunnable(found: Matrix, method: Method, jobs: Sequence[JobRow], modules: ScriptModules) -> list[Violation]:
    """Return, for every stage that no node can run, that it is so and what is in the way on each node; blocks."""
    rows = {facts.name: row for facts, row in found.nodes if row.environment_states}
    if not rows:
        return []
    cells = cells_of(method, found, modules, [as_stage(job.kind) for job in jobs])
    violations: list[Violation] = []
    for job in jobs:
        demand = store.demand_of(job)
        by_node = {cell.node: cell for cell in cells.get(as_stage(job.kind), ())}
        in_the_way = [_in_the_way(row, by_node.get(name), demand) for name, row in rows.items()]
        if all(in_the_way):
            params = {"stage": job.kind.value, "environment": job.environment}
            reasons = [Violation(POINTER, one.code, one.params) for findings in in_the_way for one in findings]
            violations += [Violation(POINTER, "stage_runs_nowhere", params), *reasons]
    return violations


def _in_the_way(row: NodeRow, cell: Cell | None, demand: Demand) -> list[Finding]:
    """Return why the node cannot run the job unless a person changes something."""
    found = [one for one in cell.findings if one.verdict is Verdict.NEVER] if cell is not None else []
    host = Host(
        node_id=row.id,
        name=row.name,
        environments=frozenset([demand.environment]),  # the cell knows more
        labels=row.labels,
        cards=cards_of(accelerators_of(row), held={}),
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
        for mismatch in mismatches(demand, host)
        if mismatch in (Mismatch.LABELS, Mismatch.ACCELERATORS, Mismatch.MEMORY)
    ]
