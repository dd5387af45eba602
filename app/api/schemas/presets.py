"""Shipped methods over the wire, and what to try them with."""

from typing import Any

from pydantic import Field

from app.domain.enums import ModelState, Platform
from app.domain.texts import Language, text
from app.domain.values import Value
from app.registry.base_models.service import is_unmade
from app.registry.methods.preset_install import PresetStatus


class PresetSamples(Value):
    """A data set, a base model and values to try a shipped method with: a submit of these needs no preparation."""

    dataset: str | None = Field(description="Name of the data set; null: it is not here.", examples=["sft-demo"])
    base_model: str | None = Field(description="Name of the base model; null: it is not here.", examples=["tiny-base"])
    parameters: dict[str, Any] = Field(description="Values that suit them.", examples=[{"max_steps": 120}])
    through: ModelState = Field(description="How far to go for a first look.")
    questions: list[str] = Field(
        description="What to ask the model before and after.", examples=[["Which is larger, 3 or 8?"]]
    )
    detail: str = Field(description="A sentence for people: what is here to begin with, or how to get it.")


class PresetRead(Value):
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
