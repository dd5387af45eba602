"""What each training type is: one row per type. No other module asks which type it has before it.

A new type is a member of `TrainingType` and a row of `_rule`: without the row neither mypy nor the import passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, assert_never

from app.domain.enums import TrainingType


class InferenceForm(StrEnum):
    """What an inference script is called with and what it answers with."""

    TEXT = "text"  # a prompt and its history; the answer is printed
    IMAGES = "images"  # a prompt and a file name; the answer is image files


@dataclass(frozen=True, kw_only=True)
class TypeRule:
    """Everything that depends on a training type alone; what a row leaves out, the type has not."""

    label: str
    """Key of its name in `texts/form.toml`."""
    hub_task: str
    """Task of such models on model hubs: `pipeline_tag` of the model card."""
    inference_form: InferenceForm
    accepts_images: bool = False
    """Messages to such a model may carry images."""
    needs_tokenizer: bool = False
    """Its base model cannot be trained without a tokenizer."""
    needs_processor: bool = False
    """Its base model cannot be trained without a processor of images."""
    needs_pipeline: bool = False
    """Its base model is a folder of diffusers, with a `model_index.json`; that of no other type is."""
    converses: bool = False
    """Its models answer in turns, by a chat template."""

    @property
    def generates_images(self) -> bool:
        """Whether the answer is images."""
        return self.inference_form is InferenceForm.IMAGES


def _rule(training_type: TrainingType) -> TypeRule:
    match training_type:
        case TrainingType.CHAT:
            return TypeRule(
                label="label_training_type_chat",
                hub_task="text-generation",
                inference_form=InferenceForm.TEXT,
                needs_tokenizer=True,
                converses=True,
            )
        case TrainingType.EMBEDDING:
            return TypeRule(
                label="label_training_type_embedding",
                hub_task="feature-extraction",
                inference_form=InferenceForm.TEXT,
                needs_tokenizer=True,
            )
        case TrainingType.VISION_LANGUAGE:
            return TypeRule(
                label="label_training_type_vision_language",
                hub_task="image-text-to-text",
                inference_form=InferenceForm.TEXT,
                accepts_images=True,
                needs_tokenizer=True,
                needs_processor=True,
                converses=True,
            )
        case TrainingType.IMAGE_GENERATION:
            return TypeRule(
                label="label_training_type_image_generation",
                hub_task="text-to-image",
                inference_form=InferenceForm.IMAGES,
                needs_pipeline=True,
            )
        case _:
            assert_never(training_type)


TYPES: Final[Mapping[TrainingType, TypeRule]] = MappingProxyType({one: _rule(one) for one in TrainingType})

_QUOTED = [f"`{one}`" for one in TYPES]
TYPE_NAMES: Final = f"{', '.join(_QUOTED[:-1])} or {_QUOTED[-1]}"
"""The types as a description lists them."""


def inference_form(training_type: str | None) -> InferenceForm:
    """Return the form of a type as a definition names it; `TEXT` while it names none that is known."""
    return next((rule.inference_form for one, rule in TYPES.items() if one == training_type), InferenceForm.TEXT)
