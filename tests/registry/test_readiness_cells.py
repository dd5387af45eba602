"""How a stage stands on a node."""

from typing import Any

import pytest

from app.domain.enums import Platform
from app.domain.environment_reports import EnvironmentReport, EnvironmentState, Probe, Trouble
from app.domain.texts import Language, text
from app.registry.environments.on_nodes import NodeEnvironment
from app.registry.methods.readiness_cells import Cell, NodeFacts, Verdict, cell

NEEDS_CONDA = Trouble(code="environment_needs_conda", params={"packages": "x"})
NODE = NodeFacts("gpu-1", Platform.CUDA, 1, None)


def environment(
    state: EnvironmentState, *, probe: Probe | None = None, trouble: Trouble | None = None
) -> NodeEnvironment:
    report = EnvironmentReport(name="trl", state=state, probe=probe)
    return NodeEnvironment("gpu-1", "trl", state, report, trouble=trouble)


def reported(*looked_for: str) -> NodeEnvironment:
    probe = Probe(modules=looked_for) if looked_for else None
    report = EnvironmentReport(name="trl", state=EnvironmentState.READY, prefix="/envs/trl", probe=probe)
    return NodeEnvironment("gpu-1", "trl", EnvironmentState.READY, report)


def ready(**probe: Any) -> NodeEnvironment:
    return environment(EnvironmentState.READY, probe=Probe(**probe))


def codes(found: Cell) -> list[str]:
    for finding in found.findings:
        assert all(text(finding.code, language, **finding.params) for language in Language)
    return [finding.code for finding in found.findings]


@pytest.mark.parametrize(
    ("environment", "verdict", "found"),
    [
        (environment(EnvironmentState.READY), Verdict.READY, []),
        (ready(modules=("torch",), cuda=1), Verdict.READY, []),
        (ready(modules=("torch",), missing=("torch",)), Verdict.NEVER, ["cell_modules_missing"]),
        (ready(modules=("vllm",), missing=("vllm",)), Verdict.READY, []),  # another method's
        (reported(), Verdict.LATER, ["cell_not_looked_yet"]),
        (reported("vllm"), Verdict.LATER, ["cell_not_looked_yet"]),
        (reported("vllm", "torch", "peft"), Verdict.READY, []),
        (ready(cuda=0), Verdict.READY, ["cell_accelerator_unseen"]),
        (ready(trouble="ImportError: libcudart"), Verdict.READY, ["cell_probe_failed"]),
        (environment(EnvironmentState.KNOWN), Verdict.LATER, ["cell_environment_known"]),
        (environment(EnvironmentState.BUILDING), Verdict.LATER, ["cell_environment_building"]),
        (environment(EnvironmentState.STALE), Verdict.LATER, ["cell_environment_stale"]),
        (environment(EnvironmentState.FAILED), Verdict.LATER, ["cell_environment_failed"]),
        (
            environment(
                EnvironmentState.FAILED, trouble=Trouble(code="reason_env_build_failed", params={"detail": "x"})
            ),
            Verdict.LATER,
            ["reason_env_build_failed"],
        ),
        (environment(EnvironmentState.MISSING), Verdict.NEVER, ["environment_without_spec"]),
        (
            environment(
                EnvironmentState.MISSING, trouble=Trouble(code="environment_needs_conda", params={"packages": "x"})
            ),
            Verdict.NEVER,
            ["environment_needs_conda"],
        ),
        (None, Verdict.READY, []),
    ],
)
def test_verdict(environment: NodeEnvironment | None, verdict: Verdict, found: list[str]) -> None:
    judged = cell(NODE, environment, {"torch"})

    assert (judged.verdict, codes(judged)) == (verdict, found)


@pytest.mark.parametrize("absent", ["cell_node_silent", "cell_node_draining", "cell_node_refusing"])
def test_absent_node_may_come_back_and_the_gravest_comes_first(absent: str) -> None:
    node = NodeFacts("gpu-1", Platform.CPU, 0, absent)

    assert cell(node, environment(EnvironmentState.READY), ()).verdict is Verdict.LATER
    assert codes(cell(node, environment(EnvironmentState.MISSING), ())) == ["environment_without_spec", absent]


def test_apple_is_seen_by_torch_or_mlx() -> None:
    mac = NodeFacts("mac", Platform.APPLE, 1, None)

    assert codes(cell(mac, ready(mps=False), ())) == ["cell_accelerator_unseen"]
    assert codes(cell(mac, ready(mps=False, mlx="Device(gpu, 0)"), ())) == []
