"""Methods over the wire: their definition as callers write it, and what the service knows besides."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ConfigDict, Field, StrictBool

from app.api.errors import ProblemEntry, problem_entries
from app.api.schemas.common import RequestBody
from app.api.schemas.method_files import (
    BesideFileRead,
    MethodFileRead,
    PinnedFileRead,
    PinnedTreeRead,
    _beside,
    _pinned,
    method_files,
)
from app.api.schemas.readiness import ReadinessRead, readiness_read
from app.domain.definition import (
    ArgumentOptions,
    DataConfig,
    DeploymentConfig,
    InferenceSwitches,
    MethodDefinition,
    RepositoryConfig,
    StageConfig,
    Wire,
)
from app.domain.enums import ModelState, TrainingType, VersionSource
from app.domain.errors import Violation
from app.domain.kinds import Stage
from app.domain.texts import Language
from app.domain.training_types import TYPE_NAMES
from app.domain.values import Value
from app.registry.methods.files import FileStatus
from app.registry.methods.readiness import Readiness
from app.registry.methods.record import Method
from app.registry.scripts.versions import Tree


class _MethodMembers(Value):
    name: str = Field(examples=["finance-sft"])
    description: str
    training_type: TrainingType
    technique: str = Field(examples=["sft"])
    lifecycle: list[ModelState] = Field(examples=[["customized", "complete"]])
    stages: dict[str, StageConfig] = Field(
        examples=[{"training": {"file": "finance_sft.py", "conda_env": "trl", "launcher": None}}],
    )
    inference: InferenceSwitches
    deployment: DeploymentConfig | None
    arguments: ArgumentOptions
    data: DataConfig | None = Field(description="What the training script learns from; null: nothing is known.")
    repository: RepositoryConfig | None = Field(
        description="The commit that the files are taken from; null: they lie in the script root."
    )


class MethodSummary(_MethodMembers):
    """A method in a list. Its members are those that creating one takes."""

    id: str = Field(description="Never changes.", examples=["0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c"])
    version: int = Field(description="Number of the newest version.", examples=[3])
    preset: str | None = Field(description="The shipped method that this one was installed from.")
    preset_version: int | None
    read_only: bool = Field(description="An example: copied, not changed.")
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime
    updated_at: datetime


class MethodRead(MethodSummary):
    """A method with its files. What was read here can be sent back with PUT."""

    source: VersionSource = Field(description="What made the newest version.")
    files: list[MethodFileRead]
    disk_changed: bool = Field(description="Whether a file was edited or removed on disk after it was pinned.")


class MethodVersionSummary(_MethodMembers):
    """One immutable version of a method, in a list."""

    id: str = Field(description="Id of the method.")
    version: int
    source: VersionSource
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime
    files: list[PinnedFileRead]


class MethodVersionRead(_MethodMembers):
    """One immutable version of a method."""

    id: str = Field(description="Id of the method.")
    version: int
    source: VersionSource
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime
    files: list[PinnedTreeRead]


class MethodCopy(RequestBody):
    """What a copy is called."""

    name: str = Field(examples=["My SFT"])


class ArgumentPatch(Wire):
    """Changes of how a script wants its arguments."""

    false_as: str | None = Field(default=None, description="Text of a false value.")
    declared_only: StrictBool | None = Field(default=None, description="Pass only the arguments that it declares.")


class MethodPatch(Wire):
    """The members of a method to change.

    No field has a default value: generated clients would send it and change fields that the caller did not name.
    """

    model_config = ConfigDict(json_schema_extra={"example": {"description": "rank 16", "deployment": None}})

    name: str | None = Field(default=None, description="Unique name: 1 to 100 letters, digits, spaces or ._-")
    description: str | None = Field(default=None, description="Free text")
    training_type: str | None = Field(default=None, description=TYPE_NAMES)
    technique: str | None = Field(default=None, description="Label of what the method does, such as `sft`")
    lifecycle: list[str] | None = Field(default=None, description="One of the six paths, in order")
    stages: dict[str, StageConfig | None] | None = Field(
        default=None, description="Stages to add or change; a stage that is null is removed"
    )
    inference: InferenceSwitches | None = None
    deployment: DeploymentConfig | None = None
    arguments: ArgumentPatch | None = None
    data: DataConfig | None = None
    repository: RepositoryConfig | None = None


class MethodValidation(Value):
    """What creating the method would say."""

    valid: bool
    violation_count: int = Field(description="Of all problems; at most a hundred are listed.")
    violations: list[ProblemEntry]
    readiness: ReadinessRead


READ_ONLY_MEMBERS = frozenset(MethodRead.model_fields) - frozenset(MethodDefinition.model_fields)


def writable(definition: MethodDefinition) -> MethodDefinition:
    """Return the definition without what a caller cannot write, so that what was read can be sent back."""
    if READ_ONLY_MEMBERS.isdisjoint(definition.unknown):
        return definition
    members = definition.model_dump(exclude_unset=True)
    return MethodDefinition.model_validate({k: v for k, v in members.items() if k not in READ_ONLY_MEMBERS})


def method_summary(method: Method) -> MethodSummary:
    """Return the method as lists show it."""
    return MethodSummary(**_members(method))


def method_read(method: Method, states: Sequence[FileStatus]) -> MethodRead:
    """Return the method with its files as they stand on disk."""
    return MethodRead(
        **_members(method),
        source=method.source,
        files=method_files(states),
        disk_changed=any(status.changed for status in states),
    )


def method_version_summary(method: Method) -> MethodVersionSummary:
    """Return one version of a method as lists show it."""
    files = [PinnedFileRead(stage=stage, **_pinned(pinned)) for stage, pinned in method.files.items()]
    return MethodVersionSummary(**_version(method), files=files)


def method_version_read(method: Method, trees: Mapping[Stage, Tree]) -> MethodVersionRead:
    """Return one version of a method with every file that it runs."""
    return MethodVersionRead(
        **_version(method),
        files=[
            PinnedTreeRead(
                stage=stage,
                **_pinned(pinned),
                beside=[
                    BesideFileRead(**_beside(path, file))
                    for path, file in trees.get(stage, {}).items()
                    if path != pinned.file
                ],
            )
            for stage, pinned in method.files.items()
        ],
    )


def validation_read(found: Sequence[Violation], readiness: Readiness, language: Language) -> MethodValidation:
    """Return what `methods:validate` answers."""
    return MethodValidation(
        valid=not found,
        violation_count=len(found),
        violations=problem_entries(found, language),
        readiness=readiness_read(readiness, language),
    )


def _members(method: Method) -> dict[str, Any]:
    return {
        **_definition(method),
        "id": method.id,
        "version": method.version,
        "preset": method.preset,
        "preset_version": method.preset_version,
        "read_only": method.read_only,
        "created_by": method.created_by,
        "created_at": method.created_at,
        "updated_at": method.updated_at,
    }


def _definition(method: Method) -> dict[str, Any]:
    canonical = method.definition.canonical()
    return {name: canonical.get(name) for name in _MethodMembers.model_fields}


def _version(method: Method) -> dict[str, Any]:
    return {
        **_definition(method),
        "id": method.id,
        "version": method.version,
        "source": method.source,
        "created_by": method.version_created_by,
        "created_at": method.version_created_at,
    }
