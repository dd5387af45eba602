"""Methods over the wire: their definition as callers write it, and what the service knows besides."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, StrictBool
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from app.api.errors import ProblemEntry, problem_entries
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
from app.domain.enums import JobKind, ModelState, Platform, TrainingType, VersionSource
from app.domain.environment_reports import EnvironmentState
from app.domain.errors import Violation
from app.domain.kinds import STAGES, Stage
from app.domain.texts import Language, text
from app.domain.training_types import TYPE_NAMES
from app.registry.base_models.service import is_unmade
from app.registry.methods.files import FileState, FileStatus, PinnedFile
from app.registry.methods.guide import OptionClassUse, StageParameters
from app.registry.methods.preset_install import PresetStatus
from app.registry.methods.readiness import Readiness
from app.registry.methods.readiness_cells import Cell, Verdict
from app.registry.methods.record import Method
from app.registry.scripts.root import ScriptEntry
from app.registry.scripts.versions import Tree, TreeFile

_ID = "5b0e4c1e-9f3d-4a59-8f5e-0d6f3f8f2a11"
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


class _StageSchema:
    """Makes `Stage` a named schema of its own, with the messages of an enum."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.enum_schema(JobKind, list(STAGES), sub_type="str", ref="Stage")

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        reference = handler(schema)
        description = "Step of a method: a Python file and a conda environment."
        handler.resolve_ref_schema(reference).update(title="Stage", description=description)
        return reference


StageName = Annotated[Stage, _StageSchema()]
"""A stage over the wire."""


class PinnedFileRead(BaseModel):
    """A file that a version of a method runs, by its exact bytes."""

    stage: StageName
    file: str = Field(description="Path in the script root; name of a shipped one.", examples=["finance_sft.py"])
    sha256: str = Field(examples=[_SHA256])
    size_bytes: int = Field(examples=[4711])
    shipped: bool = Field(
        description="Whether it is a file of the product, which runs from the product's own folder; else it lies in "
        "the script root.",
    )
    committed: bool = Field(description="Whether it is taken from a commit, so that nothing on disk matters.")
    tree: str | None = Field(
        description="Digest of all files that the stage runs; null if the file was pinned alone.", examples=[_SHA256]
    )
    module: str | None = Field(
        default=None,
        description="The stage's module, which this file of the script root or commit is; null: it runs as a file.",
    )


class BesideFileRead(BaseModel):
    """A file that runs with a stage's file: a module that it imports, data that it names, or an included file."""

    path: str = Field(description="Path in the script root.", examples=["helper.py"])
    sha256: str = Field(examples=[_SHA256])
    size_bytes: int = Field(examples=[4711])


_STATE = (
    "`modified`: edited on disk; the next job takes the edit up as a new version, unless the method is read-only. "
    "`missing`: the stored bytes run. `added`: the next version pins it too."
)


class BesideFileState(BesideFileRead):
    """The same, and how it stands on disk."""

    state: FileState = Field(description=_STATE)


class MethodFileRead(PinnedFileRead):
    """A pinned file, and how it stands on disk."""

    state: FileState = Field(description=_STATE)
    beside: list[BesideFileState] = Field(description="Everything else that runs with it, by path.")


class _MethodMembers(BaseModel):
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
    created_at: datetime
    updated_at: datetime


class MethodRead(MethodSummary):
    """A method with its files. What was read here can be sent back with PUT."""

    source: VersionSource = Field(description="What made the newest version.")
    files: list[MethodFileRead]
    disk_changed: bool = Field(description="Whether a file was edited or removed on disk after it was pinned.")


class PinnedTreeRead(PinnedFileRead):
    """A file that a version runs, and everything that runs with it."""

    beside: list[BesideFileRead] = Field(description="By path.")


class MethodVersionSummary(_MethodMembers):
    """One immutable version of a method, in a list."""

    id: str = Field(description="Id of the method.")
    version: int
    source: VersionSource
    created_at: datetime
    files: list[PinnedFileRead]


class MethodVersionRead(_MethodMembers):
    """One immutable version of a method."""

    id: str = Field(description="Id of the method.")
    version: int
    source: VersionSource
    created_at: datetime
    files: list[PinnedTreeRead]


class MethodCopy(BaseModel):
    """What a copy is called."""

    model_config = {"extra": "forbid"}

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


class ReadinessFinding(BaseModel):
    """One thing about a stage on a node: the sentence says what to do."""

    verdict: Verdict = Field(description="`ready`: worth knowing, nothing is in the way.")
    code: str = Field(examples=["cell_modules_missing"])
    detail: str = Field(description="In the caller's language.")


class ReadinessCell(BaseModel):
    """How a stage stands on a node."""

    node: str = Field(examples=["gpu-1"])
    verdict: Verdict = Field(
        description="`ready`: it could run there now. `later`: it will be able to by itself. `never`: not before "
        "a person changes something."
    )
    environment: EnvironmentState | None
    findings: list[ReadinessFinding] = Field(description="The gravest first; empty if all is well.")


class StageReadinessRead(BaseModel):
    """Whether a stage could run now, where, and what stands in the way."""

    stage: StageName
    ready: bool
    environment: str | None
    nodes: list[str] = Field(description="Nodes that could run it now.", examples=[["gpu-1"]])
    problems: list[ProblemEntry]
    cells: list[ReadinessCell] = Field(description="Every node that is registered and not given up.")


class ReadinessRead(BaseModel):
    """Whether a method could run now. What is not ready is no reason to refuse the method."""

    ready: bool
    stages: list[StageReadinessRead]


class MethodReadinessRead(ReadinessRead):
    """A row of the readiness matrix."""

    method_id: str = Field(examples=[_ID])
    method: str = Field(examples=["SFT-Demo"])


class OptionClassRead(BaseModel):
    """A configuration class of a library whose fields a stage's script takes."""

    path: str = Field(examples=["trl.DPOConfig"])
    when: dict[str, list[Any]] = Field(
        description="Used only with one of these values; empty: always.", examples=[{"objective": ["dpo"]}]
    )
    library: str | None = Field(examples=["trl"])
    version: str | None = Field(
        description="As it is installed in the stage's environment; null: not known yet. Until it is, the schema lists "
        "no options of the class, and those that are given are checked when the run starts.",
        examples=["1.16.0"],
    )


class StageParametersRead(BaseModel):
    """What can be set at a stage."""

    stage: StageName
    file: str | None = Field(description="Null: the module is one of the environment.")
    sha256: str | None = Field(examples=[_SHA256])
    module: str | None = Field(default=None, description="What runs instead of a file.")
    parameters: dict[str, Any] = Field(
        alias="schema",
        description="JSON Schema (2020-12). `x-platform`: filled in by the platform. `x-typical-…`: a value outside of "
        "it draws a warning.",
    )
    partly_read: bool = Field(description="There may be parameters that are not listed; unknown ones are accepted.")
    remarks: list[ProblemEntry] = Field(
        description="What could not be read or may fail, with the line, and what its version may not pin."
    )
    option_classes: list[OptionClassRead] = Field(
        description="Configuration classes of libraries whose fields can be set too; the schema marks those "
        "`x-advanced` and names their classes in `x-classes`, and in `x-when` the parameters that they depend on."
    )


class PresetSamples(BaseModel):
    """A data set, a base model and values to try a shipped method with: a submit of these needs no preparation."""

    dataset: str | None = Field(description="Name of the data set; null: it is not here.", examples=["sft-demo"])
    base_model: str | None = Field(description="Name of the base model; null: it is not here.", examples=["tiny-base"])
    parameters: dict[str, Any] = Field(description="Values that suit them.", examples=[{"max_steps": 120}])
    through: ModelState = Field(description="How far to go for a first look.")
    questions: list[str] = Field(
        description="What to ask the model before and after.", examples=[["Which is larger, 3 or 8?"]]
    )
    detail: str = Field(description="A sentence for people: what is here to begin with, or how to get it.")


class MethodParameters(BaseModel):
    """What can be set at the stages of a method, read from its scripts without running them."""

    method_id: str
    version: int
    stages: list[StageParametersRead]
    samples: PresetSamples | None = Field(
        description="What to try the method with; null for one that did not come with the product."
    )


class MethodValidation(BaseModel):
    """What creating the method would say."""

    valid: bool
    violation_count: int = Field(description="Of all problems; at most a hundred are listed.")
    violations: list[ProblemEntry]
    readiness: ReadinessRead


class ScriptRead(BaseModel):
    """A file of the script root."""

    path: str = Field(examples=["finance_sft.py"])
    sha256: str = Field(examples=[_SHA256])
    size_bytes: int = Field(examples=[4711])


class ScriptSummary(BaseModel):
    """A file of the script root in a list."""

    path: str = Field(examples=["finance_sft.py"])
    size_bytes: int = Field(examples=[4711])
    modified_at: datetime


class MethodFileList(BaseModel):
    """The files of a method."""

    items: list[MethodFileRead]


class PresetRead(BaseModel):
    """A shipped method."""

    name: str = Field(examples=["SFT-Demo"])
    description: str
    version: int = Field(description="The version that this product ships.")
    platforms: list[Platform]
    read_only: bool
    installed: bool
    installed_version: int | None
    removed: bool = Field(description="It was deleted on purpose and stays away until it is installed again.")
    method_id: str | None
    samples: PresetSamples


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


def method_files(states: Sequence[FileStatus]) -> list[MethodFileRead]:
    """Return the files of a method as they stand on disk."""
    return [
        MethodFileRead(
            stage=status.stage,
            **_pinned(status.pinned),
            state=status.state,
            beside=[BesideFileState(**_beside(one.path, one.file), state=one.state) for one in status.beside],
        )
        for status in states
    ]


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


def parameters_read(
    method: Method, stages: Sequence[StageParameters], preset: PresetStatus | None, language: Language
) -> MethodParameters:
    """Return the parameters of a method in the caller's language."""
    return MethodParameters(
        method_id=method.id,
        version=method.version,
        stages=[
            StageParametersRead(
                stage=stage.stage,
                file=stage.file.file if stage.file is not None else None,
                sha256=stage.file.sha256 if stage.file is not None else None,
                module=stage.module,
                schema=dict(stage.schema),
                partly_read=stage.partly_read,
                remarks=problem_entries(stage.remarks, language),
                option_classes=[_option_class(one) for one in stage.classes],
            )
            for stage in stages
        ],
        samples=_preset_samples(preset, language) if preset is not None else None,
    )


def _option_class(one: OptionClassUse) -> OptionClassRead:
    described = one.described
    return OptionClassRead(
        path=one.use.path,
        when={name: list(values) for name, values in one.use.when.items()},
        library=described.library if described is not None else None,
        version=described.version if described is not None else None,
    )


def script_read(file: PinnedFile) -> ScriptRead:
    """Return a file of the script root."""
    return ScriptRead(path=file.file, sha256=file.sha256, size_bytes=file.size)


def script_summary(entry: ScriptEntry) -> ScriptSummary:
    """Return a file of the script root as the list shows it."""
    return ScriptSummary(path=entry.path, size_bytes=entry.size, modified_at=entry.modified_at)


def preset_read(status: PresetStatus, language: Language) -> PresetRead:
    """Return a shipped method in the caller's language."""
    return PresetRead(
        name=status.manifest.name,
        description=status.manifest.description[language],
        version=status.manifest.version,
        platforms=list(status.manifest.platforms),
        read_only=status.manifest.read_only,
        installed=status.installed,
        installed_version=status.installed_version,
        removed=status.removed,
        method_id=status.method_id,
        samples=_preset_samples(status, language),
    )


def _preset_samples(status: PresetStatus, language: Language) -> PresetSamples:
    manifest, samples, demo = status.manifest, status.samples, status.manifest.demo
    dataset = samples.dataset.name if samples.dataset is not None else None
    base_model = samples.base_model.name if samples.base_model is not None else None
    unmade = samples.base_model is not None and is_unmade(samples.base_model)
    here = "samples_ready_base_unmade" if unmade else "samples_ready"
    code = "samples_missing" if dataset is None or base_model is None else here
    params = {"preset": manifest.name, "dataset": dataset, "base_model": base_model}
    return PresetSamples(
        dataset=dataset,
        base_model=base_model,
        parameters=demo.parameters,
        through=ModelState(manifest.definition["lifecycle"][0]),
        questions=list(demo.questions),
        detail=text(code, language, **params),
    )


def _members(method: Method) -> dict[str, Any]:
    return {
        **_definition(method),
        "id": method.id,
        "version": method.version,
        "preset": method.preset,
        "preset_version": method.preset_version,
        "read_only": method.read_only,
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
        "created_at": method.version_created_at,
    }


def _pinned(pinned: PinnedFile) -> dict[str, Any]:
    return {
        "file": pinned.file,
        "sha256": pinned.sha256,
        "size_bytes": pinned.size,
        "shipped": pinned.shipped,
        "committed": pinned.committed,
        "tree": pinned.tree,
        "module": pinned.module,
    }


def _beside(path: str, file: TreeFile) -> dict[str, Any]:
    return {"path": path, "sha256": file.sha256, "size_bytes": file.size}
