"""The card of a base model: what its folder says about it, read from JSON files and weight headers.

No machine-learning library is needed and no weight is read. What is no model, or no whole one, is refused; what a
folder does not say is unknown (None). What follows from a card for a training stands in `base_model_findings`.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, Final

from pydantic import ConfigDict, Field

from app.domain.errors import Invalid, Violation
from app.domain.plain_text import shown, storable_document
from app.domain.values import Value
from app.presets.shared.helpers.deepe_loading import asks_for_code
from app.registry.base_models.kinds import TRAINING_STATE, refuse_links, refuse_other_kinds
from app.registry.models.check import CONFIG, PIPELINE, Weights, check_pipeline, check_weights
from app.registry.models.files import MAX_NUMBER, MIB, UnusableFile, read_json_object
from app.registry.models.folders import walk
from app.registry.models.tokenizer_files import Tokenizer, read_tokenizer

PRESENT_CHECK: Final = 2
"""Number of the checks that a card was read with; 0 for cards of earlier releases, which know less."""

_PROCESSORS: Final = frozenset({"preprocessor_config.json", "processor_config.json", "image_processor_config.json"})
_MAX_JSON_BYTES: Final = 4 * MIB
_MAX_HEADER_BYTES: Final = 4 * MIB
_MAX_COMPONENTS: Final = 100
# what the configuration of every model with weights names
_OF_TRANSFORMERS: Final = (
    "hidden_size",
    "d_model",
    "n_embd",
    "vocab_size",
    "num_hidden_layers",
    "transformers_version",
)


class NotABaseModel(Invalid):
    """The folder has neither `config.json` nor `model_index.json`."""

    code = "not_a_base_model"


class BaseModelUnreadable(Invalid):
    """The configuration is there but no JSON object, or no small one."""

    code = "base_model_unreadable"


class BaseModelKind(StrEnum):
    """What the folder of a base model is."""

    MODEL = "model"
    PIPELINE = "pipeline"
    DESCRIPTION = "description"


class CardProblem(Value):
    """Something that is wrong with a part of the model that not every training needs."""

    model_config = ConfigDict(frozen=True)

    code: str
    params: dict[str, Any]


class BaseModelCard(Value):
    """What a base model's folder says about it; null: it does not say."""

    model_config = ConfigDict(frozen=True)

    check: int = Field(default=0, description="Number of the checks it was read with; 0: by an earlier release.")
    kind: BaseModelKind = Field(
        default=BaseModelKind.MODEL,
        description="`pipeline`: a folder of diffusers; `description`: a `config.json` alone, for methods that make "
        "all weights themselves.",
    )
    library: str | None = Field(
        default=None, description="`sentence-transformers` if the folder is one.", examples=["sentence-transformers"]
    )
    architecture: str | None
    model_type: str | None
    hidden_size: int | None
    layers: int | None
    vocabulary: int | None
    context_length: int | None
    dtype: str | None = Field(description="As the configuration says.", examples=["bfloat16"])
    weight_dtypes: tuple[str, ...] = Field(default=(), description="As the weights are stored.", examples=[["BF16"]])
    parameters: int | None
    weights: str | None
    quantization: str | None
    tokenizer: bool
    tokenizer_size: int | None = Field(default=None, description="Number of its ids.", examples=[151665])
    tokenizer_problem: CardProblem | None = None
    embedding_rows: int | None = Field(default=None, description="Ids that the weights know.", examples=[151936])
    special_tokens: dict[str, str] = Field(default={}, examples=[{"eos_token": "<|im_end|>"}])
    unknown_tokens: tuple[str, ...] = Field(default=(), description="Special tokens that the vocabulary lacks.")
    adds_bos: bool | None = Field(default=None, description="Whether the tokenizer puts its BOS before a text.")
    chat_template: bool
    template_has_bos: bool | None = None
    turn_end: str | None = Field(
        default=None, description="The token that ends an assistant's turn.", examples=["<|im_end|>"]
    )
    stop_tokens: tuple[str, ...] = Field(default=(), description="Tokens at which an answer ends.")
    processor: bool | None = Field(default=None, description="Whether a processor of images is there.")
    custom_code: bool = Field(default=False, description="The model needs Python files of its own.")
    training_state: tuple[str, ...] = Field(default=(), description="Files of the training that made it.")
    size_bytes: int
    components: tuple[str, ...]


def read_card(folder: Path, *, roots: Sequence[Path]) -> BaseModelCard:
    """Return the card of the model in `folder`; its links may lead to files below `roots`. Blocks.

    Raises `UnusableFile` for what is no model or no whole one, `NotABaseModel` and `BaseModelUnreadable`.
    """
    found = walk(folder, roots=roots)
    refuse_links(folder, found)
    refuse_other_kinds(folder)
    names = frozenset(path.name for path in found.files if path.parent == folder)
    config = _read_object(folder / _configuration(folder, names))
    weights = Weights(max_header_bytes=_MAX_HEADER_BYTES)
    text = _inner(config, "text_config")
    kind = _check(folder, names, text, weights)
    tokenizer = read_tokenizer(folder, names, config) if kind is not BaseModelKind.PIPELINE else Tokenizer()
    return BaseModelCard(
        check=PRESENT_CHECK,
        kind=kind,
        library="sentence-transformers" if "modules.json" in names else None,
        architecture=_first_text(config.get("architectures"), config.get("_class_name")),
        model_type=_first_text(config.get("model_type")),
        hidden_size=_number(text, "hidden_size", "n_embd", "d_model", "dim"),
        layers=_number(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        vocabulary=_number(text, "vocab_size"),
        context_length=_number(text, "max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"),
        dtype=_first_text(config.get("dtype"), config.get("torch_dtype"), text.get("dtype"), text.get("torch_dtype")),
        weight_dtypes=tuple(sorted(weights.dtypes)),
        parameters=weights.elements if 0 < weights.elements < MAX_NUMBER else None,
        weights="pytorch" if weights.pickled else "safetensors" if weights.checked else None,
        quantization=_quantization(config),
        tokenizer=tokenizer.present or (folder / "tokenizer").is_dir(),
        tokenizer_size=tokenizer.ids,
        tokenizer_problem=_problem(tokenizer.problem),
        embedding_rows=weights.embedding_rows,
        special_tokens=dict(tokenizer.special),
        unknown_tokens=tuple(tokenizer.unknown),
        adds_bos=tokenizer.adds_bos,
        chat_template=tokenizer.chat_template,
        template_has_bos=tokenizer.template_has_bos,
        turn_end=tokenizer.turn_end,
        stop_tokens=tuple(tokenizer.stops),
        processor=not names.isdisjoint(_PROCESSORS),
        custom_code=asks_for_code(folder),
        training_state=tuple(name for name in TRAINING_STATE if name in names),
        size_bytes=sum(file.stat().st_size for file in found.files),
        components=_components(config) if "_class_name" in config else (),
    )


def _configuration(folder: Path, names: frozenset[str]) -> str:
    for name in (CONFIG, PIPELINE):
        if name in names:
            return name
    raise NotABaseModel(path=shown(folder.name), pointer="/path")


def _check(folder: Path, names: frozenset[str], config: Mapping[str, Any], weights: Weights) -> BaseModelKind:
    if PIPELINE in names:
        check_pipeline(folder, pickles=True, found=weights)
        return BaseModelKind.PIPELINE
    if names == {CONFIG} and not any(name in config for name in _OF_TRANSFORMERS):
        return BaseModelKind.DESCRIPTION
    check_weights(folder, pickles=True, found=weights)
    return BaseModelKind.MODEL


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json_object(path, max_bytes=_MAX_JSON_BYTES)
    except UnusableFile as exc:
        raise BaseModelUnreadable(file=path.name, problem=shown(str(exc), limit=300), pointer="/path") from exc
    cleaned: dict[str, Any] = storable_document(value)
    return cleaned


def _problem(found: Violation | None) -> CardProblem | None:
    return CardProblem(code=found.code, params=found.params) if found is not None else None


def _inner(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the language model's part of a vision-language configuration, else the whole."""
    inner = config.get(name)
    return {**config, **inner} if isinstance(inner, dict) else config


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_NUMBER:
            return value
    return None


def _first_text(*values: Any) -> str | None:
    for value in values:
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, str) and first:
            return shown(first)
    return None


def _quantization(config: Mapping[str, Any]) -> str | None:
    match config.get("quantization_config") or config.get("quantization"):
        case {"quant_method": str(method), **rest}:
            bits = rest.get("bits") or (4 if rest.get("load_in_4bit") else 8 if rest.get("load_in_8bit") else None)
            return shown(f"{method} {bits} bit" if bits else method)
        case {"bits": int(bits)}:
            return shown(f"mlx {bits} bit")
        case _:
            return None


def _components(index: Mapping[str, Any]) -> tuple[str, ...]:
    parts = (shown(name) for name, value in index.items() if isinstance(value, list) and len(value) == 2)
    return tuple(islice(parts, _MAX_COMPONENTS))
