"""The readiness matrix: the state of one stage on every node. Values in, cells out.

A cell is `ready` (it could run there now), `later` (it will be able to by itself: the environment is being built or is
built when a job needs it, the node is silent or drained), or `never` as things are: a person must do something first.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from app.domain.enums import Platform
from app.domain.environment_reports import EnvironmentState, Probe
from app.registry.environments.on_nodes import NodeEnvironment


class Verdict(StrEnum):
    """State of a stage on a node; of several findings the worst counts."""

    READY = "ready"
    LATER = "later"
    NEVER = "never"


_ORDER = (Verdict.READY, Verdict.LATER, Verdict.NEVER)


@dataclass(frozen=True)
class Finding:
    """One thing about a stage on a node; `verdict` READY: it only is worth knowing."""

    verdict: Verdict
    code: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A stage on a node."""

    node: str
    environment: EnvironmentState | None
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        return max((finding.verdict for finding in self.findings), key=_ORDER.index, default=Verdict.READY)


@dataclass(frozen=True)
class NodeFacts:
    """What the matrix asks of a node. `absent`: the code of why it accepts no jobs now, None if it does."""

    name: str
    platform: Platform
    accelerators: int
    absent: str | None


def cell(
    node: NodeFacts, environment: NodeEnvironment | None, modules: Collection[str], files: Sequence[Finding] = ()
) -> Cell:
    """Judge one stage on one node; `environment` is its environment there, `files` what is wrong with the file."""
    found = list(files)
    if environment is not None:
        found += _of_environment(environment)
        if environment.state is EnvironmentState.READY:
            found += _not_looked_for(environment, modules)
            if environment.report.probe is not None:
                found += _of_probe(environment, environment.report.probe, node, modules)
    if node.absent is not None:
        found.append(Finding(Verdict.LATER, node.absent, {"node": node.name}))
    found.sort(key=lambda finding: -_ORDER.index(finding.verdict))
    return Cell(node.name, environment.state if environment else None, tuple(found))


def _of_environment(environment: NodeEnvironment) -> Iterator[Finding]:
    named = {"environment": environment.name, "node": environment.node}
    match environment.state:
        case EnvironmentState.READY:
            return
        case EnvironmentState.MISSING:
            trouble = environment.trouble
            code = trouble.code if trouble else "environment_without_spec"
            yield Finding(Verdict.NEVER, code, {**named, **(trouble.params if trouble else {})})
        case EnvironmentState.FAILED if environment.trouble is not None:
            yield Finding(Verdict.LATER, environment.trouble.code, dict(environment.trouble.params))
        case state:
            yield Finding(Verdict.LATER, f"cell_environment_{state}", named)


def _not_looked_for(environment: NodeEnvironment, modules: Collection[str]) -> Iterator[Finding]:
    """Say that the node, which reports its environments, has not looked yet for all that the script imports."""
    report = environment.report
    looked_for = report.probe.modules if report.probe is not None else ()
    waiting = sorted(set(modules) - set(looked_for))
    if report.prefix is not None and waiting:
        named = {"environment": environment.name, "node": environment.node, "modules": ", ".join(waiting)}
        yield Finding(Verdict.LATER, "cell_not_looked_yet", named)


def _of_probe(
    environment: NodeEnvironment, probe: Probe, node: NodeFacts, modules: Collection[str]
) -> Iterator[Finding]:
    named = {"environment": environment.name, "node": environment.node}
    missing = sorted(set(modules) & set(probe.missing))
    if lacking := [name for name in missing if ":" not in name]:
        yield Finding(Verdict.NEVER, "cell_modules_missing", {**named, "modules": ", ".join(lacking)})
    if lacking := [name.replace(":", ".") for name in missing if ":" in name]:
        yield Finding(Verdict.NEVER, "cell_names_missing", {**named, "names": ", ".join(lacking)})
    if probe.trouble is not None:
        yield Finding(Verdict.READY, "cell_probe_failed", {**named, "detail": probe.trouble})
    if node.accelerators and node.platform is Platform.CUDA and probe.cuda == 0:
        yield Finding(Verdict.READY, "cell_accelerator_unseen", {**named, "accelerator": "CUDA"})
    if node.accelerators and node.platform is Platform.APPLE and probe.mps is False and probe.mlx is None:
        yield Finding(Verdict.READY, "cell_accelerator_unseen", {**named, "accelerator": "Metal"})
