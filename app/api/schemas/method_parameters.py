"""Over the wire: what can be set at the stages of a method."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from app.api.errors import ProblemEntry, problem_entries
from app.api.schemas.common import SHA256, StageName
from app.api.schemas.presets import PresetSamples, _preset_samples
from app.domain.texts import Language
from app.domain.values import Value
from app.registry.methods.guide import OptionClassUse, StageParameters
from app.registry.methods.preset_install import PresetStatus
from app.registry.methods.record import Method


class OptionClassRead(Value):
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


class StageParametersRead(Value):
    """What can be set at a stage."""

    stage: StageName
    file: str | None = Field(description="Null: the module is one of the environment.")
    sha256: str | None = Field(examples=[SHA256])
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


class MethodParameters(Value):
    """What can be set at the stages of a method, read from its scripts without running them."""

    method_id: str
    version: int
    stages: list[StageParametersRead]
    samples: PresetSamples | None = Field(
        description="What to try the method with; null for one that did not come with the product."
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
