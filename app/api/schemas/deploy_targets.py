"""Deploy targets over the wire."""

from datetime import datetime
from typing import Any

from pydantic import Field

from app.api.schemas.common import ID, RequestBody
from app.domain.deploy_targets import DeployTargetKind
from app.domain.values import Value
from app.store.tables import DeployTargetRow


class DeployTargetCreate(RequestBody):
    """A place where online models are served."""

    name: str = Field(description="Unique name; not `custom`.", examples=["gpu-box"])
    kind: DeployTargetKind = Field(description="`custom`: a script of yours deploys to it.")
    url: str = Field(description="Address of the tool's HTTP API.", examples=["http://gpu-box:11434"])
    port: int | None = Field(default=None, ge=1, le=65535, description="If the address has none.", examples=[None])
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Of a `custom` target: arguments for the script besides the contract's. No secrets: everyone can "
        "read them.",
    )
    file: str | None = Field(
        default=None,
        max_length=1000,
        description="Of a `custom` target: script for methods that deploy to it and name none.",
        examples=[None],
    )
    conda_env: str | None = Field(
        default=None, max_length=300, description="Of a `custom` target: environment for `file`.", examples=[None]
    )


class DeployTargetPatch(RequestBody):
    """What changes of a deploy target (JSON merge patch); its name and its kind stay."""

    url: str = Field(default_factory=str, description="Address of the tool's HTTP API.", examples=["http://box:11434"])
    port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Of the address given with it, if that has none; else of the address as it is. Null takes it away.",
        examples=[11435],
    )
    settings: dict[str, Any] | None = Field(
        default=None,
        description="Settings to set; one that is null is removed.",
        examples=[{"replicas": 3, "old": None}],
    )
    file: str | None = Field(default=None, max_length=1000, description="Null removes it.", examples=["push.py"])
    conda_env: str | None = Field(default=None, max_length=300, description="Null removes it.", examples=["base"])


class DeployTargetRead(Value):
    """A configured deploy target."""

    id: str = Field(examples=[ID])
    name: str = Field(examples=["gpu-box"])
    kind: DeployTargetKind
    url: str = Field(examples=["http://gpu-box:11434"])
    settings: dict[str, Any]
    file: str | None = Field(examples=[None])
    conda_env: str | None = Field(examples=[None])
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime


class DeployTargetAnswer(Value):
    """Whether the server of a deploy target answers."""

    usable: bool = Field(description="A deployment can reach it from here; it runs on a node.")
    status: int | None = Field(description="HTTP status of its start page.", examples=[200])
    detail: str = Field(description="In the caller's language.")


def deploy_target_read(row: DeployTargetRow) -> DeployTargetRead:
    """Return the deploy target as callers see it."""
    return DeployTargetRead(
        id=row.id,
        name=row.name,
        kind=DeployTargetKind(row.kind),
        url=row.url,
        settings=row.settings,
        file=row.file,
        conda_env=row.conda_env,
        created_by=row.created_by,
        created_at=row.created_at,
    )
