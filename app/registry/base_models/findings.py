"""What follows from the card of a base model for a training of one type: what cannot work, what is worth knowing."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from app.domain.enums import TrainingType
from app.domain.errors import Violation
from app.domain.training_types import TYPES, TypeRule
from app.registry.base_models.card import BaseModelCard, BaseModelKind

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


def findings(card: BaseModelCard, training_type: TrainingType) -> list[Finding]:
    """Return what follows for a training of this type, errors first."""
    if card.kind is BaseModelKind.DESCRIPTION:
        return []  # a method that takes such a one makes all that it needs itself
    found = [*_errors(card, TYPES[training_type]), *_warnings(card, TYPES[training_type])]
    return sorted(found, key=lambda one: one.severity is Severity.WARNING)


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
