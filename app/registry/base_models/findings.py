"""What follows from the card of a base model for a training of one type: what cannot work, what is worth knowing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pydantic import ConfigDict, Field

from app.domain.enums import TrainingType
from app.domain.errors import Violation
from app.domain.training_types import TYPES, TypeRule
from app.domain.values import Value
from app.presets.shared.helpers.deepe_loading import (
    CUSTOM_CODE,
    PICKLED_WEIGHTS,
    asks_for_code,
    has_pickled_weights,
)
from app.registry.base_models.card import BaseModelCard, BaseModelKind
from app.store.tables import BaseModelRow

POINTER: Final = "/base_model"
# what a quantization is called in `quant_method`, and what follows from it
_QUANTIZED: Final = {
    "bitsandbytes": "base_model_quantized_bitsandbytes",
    "fp8": "base_model_quantized_float8",
    "mxfp4": "base_model_quantized_float8",
    "modelopt": "base_model_quantized_float8",
    "mlx": "base_model_quantized_mlx",
}
_FOR_ADAPTERS: Final = "base_model_quantized"  # GPTQ, AWQ and others
_BY_PERMISSION: Final = {PICKLED_WEIGHTS: "base_model_pickled", CUSTOM_CODE: "base_model_has_custom_code"}
_WITHOUT_ANSWERS: Final = ("ForMaskedLM", "Classification", "ForQuestionAnswering")
_ENCODERS: Final = frozenset(
    {"BertModel", "RobertaModel", "XLMRobertaModel", "MPNetModel", "DistilBertModel", "NomicBertModel"}
)


class Severity(StrEnum):
    """Whether a submit refuses for it."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Finding:
    """One thing about a base model; its sentence says what follows and what helps."""

    severity: Severity
    violation: Violation


class LoadingPermission(Value):
    """What of a base model's author may run when the platform's scripts load it, and who allowed that."""

    model_config = ConfigDict(frozen=True)

    pickled_weights: bool = Field(default=False, description="Weights that are pickles (`*.bin`).")
    custom_code: bool = Field(default=False, description="Python files that the configuration names (`auto_map`).")
    allowed_by: str = Field(default="", description="Name of the caller.", examples=["ada"])
    allowed_at: datetime | None = None

    @property
    def permits(self) -> tuple[str, ...]:
        """Return the names of what is allowed, as stage scripts are told."""
        return tuple(name for name in (PICKLED_WEIGHTS, CUSTOM_CODE) if getattr(self, name))

    @classmethod
    def of(cls, row: BaseModelRow | None) -> "LoadingPermission":
        """Return what is allowed for a base model; for one without a row, nothing is."""
        return cls.model_validate((row.loading_permission if row is not None else None) or {})


NOTHING_ALLOWED: Final = LoadingPermission()


def findings(
    card: BaseModelCard,
    training_type: TrainingType,
    allowed: LoadingPermission = NOTHING_ALLOWED,
    *,
    own_script: bool = False,
) -> list[Finding]:
    """Return what follows for a training of this type, errors first.

    What runs code of the model's author is one unless it is allowed; where a script of the user's loads the model, it
    is only said.
    """
    if card.kind is BaseModelKind.DESCRIPTION:
        return []  # a method that takes such a one makes all that it needs itself
    found = [*_errors(card, TYPES[training_type]), *_warnings(card, TYPES[training_type])]
    if not own_script:
        refused = {code for name, code in _BY_PERMISSION.items() if not getattr(allowed, name)}
        found = [replace(one, severity=Severity.ERROR) if one.violation.code in refused else one for one in found]
    return sorted(found, key=lambda one: one.severity is Severity.WARNING)


def loading_violations(
    folder: Path, allowed: LoadingPermission, *, model: str, base_model: str, at: str
) -> list[Violation]:
    """Return why the platform's scripts do not load the model or adapter in `folder`. Blocks."""
    found = []
    if not allowed.pickled_weights and has_pickled_weights(folder):
        found.append(Violation(at, "model_pickled", {"model": model, "base_model": base_model}))
    if not allowed.custom_code and asks_for_code(folder):
        found.append(Violation(at, "model_has_custom_code", {"model": model, "base_model": base_model}))
    return found


def _errors(card: BaseModelCard, needs: TypeRule) -> Iterator[Finding]:
    if needs.needs_pipeline:
        if card.kind is not BaseModelKind.PIPELINE:
            yield _error("base_model_needs_pipeline")
        return
    if card.kind is BaseModelKind.PIPELINE:
        yield _error("base_model_is_pipeline")
        return
    if needs.needs_tokenizer and not card.tokenizer:
        yield _error("base_model_without_tokenizer")
    if needs.needs_tokenizer and card.tokenizer_problem is not None:
        yield _error(card.tokenizer_problem.code, **card.tokenizer_problem.params)
    if needs.needs_processor and card.processor is False:
        yield _error("base_model_without_processor")


def _warnings(card: BaseModelCard, needs: TypeRule) -> Iterator[Finding]:
    if (card.kind is BaseModelKind.PIPELINE) is not needs.needs_pipeline:
        return  # it is refused; what else there is to say is about other trainings
    if card.weights == "pytorch":
        yield _warning("base_model_pickled")
    if card.quantization is not None or any(dtype.startswith(("F8", "F4")) for dtype in card.weight_dtypes):
        method = (card.quantization or "fp8").split(" ")[0].lower()
        code = _QUANTIZED.get(method, _FOR_ADAPTERS)
        yield _warning(code, quantization=card.quantization or ", ".join(card.weight_dtypes))
    if card.training_state:
        yield _warning("base_model_has_training_state", files=", ".join(card.training_state))
    if card.custom_code:
        yield _warning("base_model_has_custom_code")
    if needs.needs_tokenizer:
        yield from _about_tokens(card)
    if needs.converses:
        yield from _about_turns(card)


def _about_tokens(card: BaseModelCard) -> Iterator[Finding]:
    rows = card.embedding_rows or card.vocabulary
    if card.tokenizer_size is not None and rows is not None and card.tokenizer_size > rows:
        yield _warning("base_model_tokens_beyond_weights", tokens=card.tokenizer_size, rows=rows)
    if card.unknown_tokens:
        yield _warning("base_model_unknown_tokens", tokens=", ".join(card.unknown_tokens))


def _about_turns(card: BaseModelCard) -> Iterator[Finding]:
    architecture = card.architecture or ""
    if card.library or architecture in _ENCODERS or any(part in architecture for part in _WITHOUT_ANSWERS):
        yield _warning("base_model_answers_nothing", architecture=card.library or architecture)
    if card.tokenizer and not card.chat_template:
        yield _warning("base_model_without_template")
    if card.turn_end is not None and card.stop_tokens and card.turn_end not in card.stop_tokens:
        yield _warning("base_model_turn_does_not_stop", turn_end=card.turn_end, stops=", ".join(card.stop_tokens))
    if card.adds_bos and card.template_has_bos is False:
        yield _warning("base_model_template_without_bos", bos=card.special_tokens.get("bos_token", ""))


def _error(code: str, **params: Any) -> Finding:
    return Finding(Severity.ERROR, Violation(POINTER, code, params))


def _warning(code: str, **params: Any) -> Finding:
    return Finding(Severity.WARNING, Violation(POINTER, code, params))
