"""Readiness of methods over the wire: whether they could run now, where, and what stands in the way."""

from pydantic import Field

from app.api.errors import ProblemEntry, problem_entries
from app.api.schemas.common import ID, StageName
from app.domain.environment_reports import EnvironmentState
from app.domain.texts import Language, text
from app.domain.values import Value
from app.registry.methods.readiness import Readiness
from app.registry.methods.readiness_cells import Cell, Verdict
from app.registry.methods.record import Method


class ReadinessFinding(Value):
    """One thing about a stage on a node: the sentence says what to do."""

    verdict: Verdict = Field(description="`ready`: worth knowing, nothing is in the way.")
    code: str = Field(examples=["cell_modules_missing"])
    detail: str = Field(description="In the caller's language.")


class ReadinessCell(Value):
    """How a stage stands on a node."""

    node: str = Field(examples=["gpu-1"])
    verdict: Verdict = Field(
        description="`ready`: it could run there now. `later`: it will be able to by itself. `never`: not before "
        "a person changes something."
    )
    environment: EnvironmentState | None
    findings: list[ReadinessFinding] = Field(description="The gravest first; empty if all is well.")


class StageReadinessRead(Value):
    """Whether a stage could run now, where, and what stands in the way."""

    stage: StageName
    ready: bool
    environment: str | None
    nodes: list[str] = Field(description="Nodes that could run it now.", examples=[["gpu-1"]])
    problems: list[ProblemEntry]
    cells: list[ReadinessCell] = Field(description="Every node that is registered and not given up.")


class ReadinessRead(Value):
    """Whether a method could run now. What is not ready is no reason to refuse the method."""

    ready: bool
    stages: list[StageReadinessRead]


class MethodReadinessRead(ReadinessRead):
    """A row of the readiness matrix."""

    method_id: str = Field(examples=[ID])
    method: str = Field(examples=["SFT-Demo"])


def readiness_read(readiness: Readiness, language: Language) -> ReadinessRead:
    """Return the readiness in the caller's language."""
    return ReadinessRead(
        ready=readiness.ready,
        stages=[
            StageReadinessRead(
                stage=stage.stage,
                ready=stage.ready,
                environment=stage.environment,
                nodes=list(stage.nodes),
                problems=problem_entries(stage.problems, language),
                cells=[_cell(cell, language) for cell in stage.cells],
            )
            for stage in readiness.stages
        ],
    )


def method_readiness_read(method: Method, readiness: Readiness, language: Language) -> MethodReadinessRead:
    """Return a row of the matrix in the caller's language."""
    read = readiness_read(readiness, language)
    return MethodReadinessRead(method_id=method.id, method=method.name, ready=read.ready, stages=read.stages)


def _cell(cell: Cell, language: Language) -> ReadinessCell:
    return ReadinessCell(
        node=cell.node,
        verdict=cell.verdict,
        environment=cell.environment,
        findings=[
            ReadinessFinding(verdict=one.verdict, code=one.code, detail=text(one.code, language, **one.params))
            for one in cell.findings
        ],
    )
