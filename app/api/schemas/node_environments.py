"""Over the wire: an environment on a node."""

from datetime import datetime

from pydantic import BaseModel, Field

from app.domain.environment_reports import EnvironmentState
from app.domain.texts import Language, text
from app.registry.environments.on_nodes import NodeEnvironment

_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


class EnvironmentTrouble(BaseModel):
    """What stands in the way, and what to do."""

    code: str = Field(examples=["environment_needs_conda"])
    detail: str = Field(description="In the caller's language.")


class NodeEnvironmentRead(BaseModel):
    """How an environment stands on a node."""

    name: str = Field(examples=["trl"])
    node: str = Field(examples=["laptop"])
    state: EnvironmentState = Field(
        description="`known`: not there, built when a job needs it. `missing`: not there, and this node cannot build "
        "it. `stale`: built from an older spec; running jobs keep it, the next job gets a new build. "
        "`failed`: the last build made nothing."
    )
    trouble: EnvironmentTrouble | None = Field(description="Why it is missing, or why the last build failed.")
    build: str | None = Field(description="Job that builds it, or that failed to.")
    source: str | None = Field(description="`built` by us; `conda`, `venv`: found on the node.", examples=["built"])
    prefix: str | None = Field(examples=["/var/lib/deepe/envs/trl-9f86d081884c"])
    spec_hash: str | None = Field(description="Digest of the spec that it was built from.", examples=[_SHA256])
    builder: str | None = Field(examples=["venv"])
    python: str | None = Field(description="Version of its Python.", examples=["3.11.7"])
    size_bytes: int | None = Field(description="Of own builds.", examples=[5_368_709_120])
    lock: str | None = Field(description="Digest of what is installed: equal on nodes that agree.", examples=[_SHA256])
    built_at: datetime | None
    used_at: datetime | None = Field(description="When a stage was last started in it.")


def node_environment_read(environment: NodeEnvironment, language: Language) -> NodeEnvironmentRead:
    """Return how the environment stands as callers see it."""
    report, trouble = environment.report, environment.trouble
    return NodeEnvironmentRead(
        name=environment.name,
        node=environment.node,
        state=environment.state,
        trouble=EnvironmentTrouble(code=trouble.code, detail=text(trouble.code, language, **trouble.params))
        if trouble
        else None,
        build=environment.build,
        source=report.source,
        prefix=report.prefix,
        spec_hash=report.spec_hash,
        builder=report.builder,
        python=report.python,
        size_bytes=report.size_bytes,
        lock=report.lock,
        built_at=report.built_at,
        used_at=report.used_at,
    )
