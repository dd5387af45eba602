"""Environments over the wire."""

from datetime import datetime

from pydantic import Field

from app.api.schemas.common import SHA256, RequestBody
from app.domain.environment_reports import EnvironmentState
from app.domain.texts import Language, text
from app.domain.values import Value
from app.registry.environments.on_nodes import NodeEnvironment
from app.registry.environments.service import EnvironmentSource, EnvironmentView

_SPEC = "channels:\n  - conda-forge\ndependencies:\n  - python>=3.11\n  - pip\n  - pip:\n      - trl==1.16.0\n"


_MAX_SPEC = 64 * 1024


class EnvironmentCreate(RequestBody):
    """A conda environment to register by name."""

    name: str = Field(description="As conda knows it.", examples=["trl"])
    spec: str | None = Field(
        default=None,
        max_length=_MAX_SPEC,
        description="Text of an `environment.yml` to build it from; without one it must be on a node already.",
        examples=[_SPEC],
    )


class EnvironmentSpecReplace(RequestBody):
    """Another spec for an environment."""

    spec: str = Field(max_length=_MAX_SPEC, description="Text of an `environment.yml`.", examples=[_SPEC])


class EnvironmentBuildOptions(RequestBody):
    """How to build; without a body as the spec says."""

    locked: bool = Field(default=False, description="Install exactly what another node installed for this spec.")
    lock_of: str | None = Field(
        default=None,
        description="That of this node, by id or name; implies `locked`. Default: of the one that built it last.",
        examples=["laptop"],
    )


class EnvironmentTrouble(Value):
    """What stands in the way, and what to do."""

    code: str = Field(examples=["environment_needs_conda"])
    detail: str = Field(description="In the caller's language.")


class NodeEnvironmentRead(Value):
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
    spec_hash: str | None = Field(description="Digest of the spec that it was built from.", examples=[SHA256])
    builder: str | None = Field(examples=["venv"])
    python: str | None = Field(description="Version of its Python.", examples=["3.11.7"])
    size_bytes: int | None = Field(description="Of own builds.", examples=[5_368_709_120])
    lock: str | None = Field(description="Digest of what is installed: equal on nodes that agree.", examples=[SHA256])
    built_at: datetime | None
    used_at: datetime | None = Field(description="When a stage was last started in it.")


class EnvironmentRead(Value):
    """A conda environment that stages can name."""

    name: str = Field(examples=["trl"])
    source: EnvironmentSource = Field(description="`discovered`: found on a node, or `base`; there is no entry.")
    spec: str | None = Field(examples=[_SPEC])
    spec_hash: str | None = Field(description="Digest of what the spec installs.", examples=[SHA256])
    nodes: list[NodeEnvironmentRead]
    created_by: str | None = Field(
        description="Name of the caller that made it; empty: the service itself.", examples=["ada"]
    )
    created_at: datetime | None
    updated_at: datetime | None


def environment_read(view: EnvironmentView, language: Language) -> EnvironmentRead:
    """Return the environment as callers see it."""
    row = view.row
    return EnvironmentRead(
        name=view.name,
        source=view.source,
        spec=row and row.spec,
        spec_hash=row and row.spec_hash,
        nodes=[node_environment_read(environment, language) for environment in view.nodes],
        created_by=row and row.created_by,
        created_at=row and row.created_at,
        updated_at=row and row.updated_at,
    )


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
