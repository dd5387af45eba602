"""How environments stand on nodes: what a node last said, corrected by what the database knows better.

A node looks every few seconds and reports changes with its heartbeat. Builds, their failures and specifications that
changed meanwhile are read from the database, so that no reader waits for the next report.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason, JobStatus
from app.domain.environment_reports import EnvironmentReport, EnvironmentState, Trouble
from app.domain.names import BASE_ENVIRONMENT
from app.domain.transitions import TERMINAL
from app.store.environments import LastBuild, all_environments, last_builds
from app.store.tables import EnvironmentRow, NodeRow

BUILT = "built"


@dataclass(frozen=True)
class NodeEnvironment:
    """An environment on one node. `build` is the job that builds it, or whose failure left it unbuilt."""

    node: str
    name: str
    state: EnvironmentState
    report: EnvironmentReport
    build: str | None = None
    trouble: Trouble | None = None


@dataclass(frozen=True)
class EnvironmentStates:
    """Everything that is known of environments on nodes at this moment.

    Specifications and builds only ever make usable what a node calls missing, never the reverse.
    """

    rows: Mapping[str, EnvironmentRow]
    builds: Mapping[tuple[str, str], LastBuild]

    def on(self, node: NodeRow, names: Sequence[str] | None = None) -> Sequence[NodeEnvironment]:
        """Return the environments `names` of the node; by default all that it has or could have."""
        documents = node.environment_states or []
        if names is not None:  # one of many: the others are not parsed
            documents = [document for document in documents if document.get("name") in names]
        reports = EnvironmentReport.read(documents)
        listed = frozenset(node.environments)
        wanted = sorted({*reports, *listed, *self.rows, BASE_ENVIRONMENT}) if names is None else names
        return [self._environment(node, name, reports.get(name), listed=name in listed) for name in wanted]

    def _environment(
        self, node: NodeRow, name: str, report: EnvironmentReport | None, *, listed: bool
    ) -> NodeEnvironment:
        row = self.rows.get(name)
        buildable = name == BASE_ENVIRONMENT or (row is not None and row.spec is not None)
        if report is None:
            unsaid = EnvironmentState.KNOWN if buildable else EnvironmentState.MISSING
            report = EnvironmentReport(name=name, state=EnvironmentState.READY if listed else unsaid)
        state, job, trouble = environment_state_of(report, row=row, last=self.builds.get((name, node.id)))
        return NodeEnvironment(node.name, name, state, report, job, trouble)


AS_REPORTED = EnvironmentStates(rows={}, builds={})
"""What nodes say alone."""


def modules_found(nodes: Iterable[NodeRow], environments: Collection[str]) -> frozenset[str]:
    """Return the modules that nodes found in the environments when they looked for what scripts import."""
    reports = [EnvironmentReport.read(node.environment_states or []) for node in nodes]
    probes = [report.probe for named in reports for name, report in named.items() if name in environments]
    return frozenset(module for probe in probes if probe for module in probe.modules if module not in probe.missing)


def environment_state_of(
    report: EnvironmentReport, *, row: EnvironmentRow | None, last: LastBuild | None
) -> tuple[EnvironmentState, str | None, Trouble | None]:
    """Return the state of an environment on a node, the job behind it, and what is in the way."""
    state = report.state
    if state is EnvironmentState.READY and report.source == BUILT and row is not None and row.spec_hash is not None:
        state = EnvironmentState.READY if report.spec_hash == row.spec_hash else EnvironmentState.STALE
    if state is EnvironmentState.READY or last is None:
        return state, None, report.trouble
    if last.status not in TERMINAL:
        return EnvironmentState.BUILDING, last.job_id, None
    of_this_spec = last.spec == (row.spec if row is not None else None)
    if last.status in (JobStatus.FAILED, JobStatus.CANCELLED) and of_this_spec:
        reason = last.reason or EndReason.ENV_BUILD_FAILED
        return EnvironmentState.FAILED, last.job_id, Trouble(code=f"reason_{reason}", params=last.params)
    return state, None, report.trouble


async def environment_states(session: AsyncSession) -> EnvironmentStates:
    """Read what is known; two short queries."""
    return EnvironmentStates(
        rows={row.name: row for row in await all_environments(session)}, builds=await last_builds(session)
    )
