"""The parameters that the platform knows: what its training scripts require, the demo's values, what is typical.

A value outside of the typical range is unusual, not wrong. Labels and help stand in `texts/parameters.toml` under
`label_parameter_<name>` and `help_parameter_<name>`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from app.domain.enums import JobKind
from app.domain.kinds import Stage
from app.domain.rendering import filled_arguments
from app.domain.script_parameters import ParameterKind
from app.domain.texts import Language, text


@dataclass(frozen=True)
class KnownParameter:
    """One parameter of the platform's training form."""

    name: str
    kind: ParameterKind
    default: Any = None
    required: bool = False
    """DeepExtension's scripts end at once when it is missing, so the platform always has a value for it."""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    yields_to: str | None = None
    """The parameter that leaves this one without effect when both are given."""

    def label(self, language: Language) -> str:
        """Return what the form calls it."""
        return text(f"label_parameter_{self.name}", language)

    def help(self, language: Language) -> str:
        """Return one sentence that explains it."""
        return text(f"help_parameter_{self.name}", language)

    def is_typical(self, value: float) -> bool:
        """Whether a number is one that people usually take."""
        above = self.minimum is None or value >= self.minimum
        below = self.maximum is None or value <= self.maximum
        return above and below and (not self.choices or value in self.choices)


_STRING, _INTEGER, _NUMBER, _BOOLEAN = (
    ParameterKind.STRING,
    ParameterKind.INTEGER,
    ParameterKind.NUMBER,
    ParameterKind.BOOLEAN,
)

_TABLE = (
    KnownParameter("max_seq_length", _INTEGER, 1024, True, 256, 2048, (512, 1024, 2048)),
    KnownParameter("max_input_length", _INTEGER, 1024, True, 256, 2048),
    KnownParameter("max_content_length", _INTEGER, 1024, True, 256, 2048),
    KnownParameter("max_samples", _INTEGER, 1000, True, -1),
    KnownParameter("lora_rank", _INTEGER, 8, True, 4, 16, (4, 8, 16)),
    KnownParameter("load_in_4bit", _BOOLEAN, True, True),
    KnownParameter("num_generations", _INTEGER, 2, True, 1, 10),
    KnownParameter("batch_size", _INTEGER, 2, True, 1, 64),
    KnownParameter("grad_accum_steps", _INTEGER, 2, True, 1, 16),
    KnownParameter("learning_rate", _NUMBER, 2e-5, True),
    KnownParameter("warmup_steps", _INTEGER, 2, True, 0, 5000),
    KnownParameter("max_grad_norm", _NUMBER, 0.5, True, 0.5, 5),
    KnownParameter("max_steps", _INTEGER, 10, False, 100, 50_000),
    KnownParameter("epochs", _INTEGER, 1, False, 1, 50, yields_to="max_steps"),
    KnownParameter("warmup_ratio", _NUMBER, 0.01, False, 0.01, 0.2, yields_to="warmup_steps"),
    KnownParameter("input_train_name", _STRING),
    KnownParameter("output_train_name", _STRING),
    KnownParameter("pic_relative_path", _STRING),
    KnownParameter("train_name", _STRING),
    KnownParameter("training_name", _STRING),
)

KNOWN: Mapping[str, KnownParameter] = MappingProxyType({parameter.name: parameter for parameter in _TABLE})


def known_at(stage: Stage, *, producing: bool = False) -> Mapping[str, KnownParameter]:
    """Return the known parameters of a stage: those of the training, and of a saving script that produces."""
    return KNOWN if stage is JobKind.TRAINING or producing else {}


def reserved_at(stage: Stage, *, producing: bool = False) -> frozenset[str]:
    """Return the names of the arguments that the platform fills in at `stage`."""
    return frozenset(filled_arguments(stage)) | (
        frozenset(filled_arguments(JobKind.TRAINING)) if producing else frozenset()
    )
