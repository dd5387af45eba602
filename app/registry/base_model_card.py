"""The card of a base model: what its folder says about it, read from JSON files and weight headers.

No machine-learning library is needed and no weight is read; what cannot be read is unknown (None), except for the
configuration itself, without which a folder is no model.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from app.domain.errors import Invalid
from app.domain.plain_text import shown, storable_document
from app.registry.model_files import MAX_NUMBER, MIB, UnusableFile, count_elements, read_json_object, read_tensor_file
from app.registry.resource_paths import stays_inside

CONFIG: Final = "config.json"
PIPELINE: Final = "model_index.json"
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_WEIGHTS: Final = {".safetensors": "safetensors", ".bin": "pytorch", ".pt": "pytorch", ".gguf": "gguf", ".npz": "mlx"}
_MAX_JSON_BYTES: Final = 4 * MIB
_MAX_HEADER_BYTES: Final = 4 * MIB
_MAX_HEADERS_BYTES: Final = 64 * MIB  # of all files together
_MAX_ENTRIES: Final = 10_000
_MAX_COMPONENTS: Final = 100


class NotABaseModel(Invalid):
    """The folder has neither `config.json` nor `model_index.json`."""

    code = "not_a_base_model"


class BaseModelUnreadable(Invalid):
    """The configuration is there but no JSON object, or no small one."""

    code = "base_model_unreadable"


class BaseModelCard(BaseModel):
    """What a base model's folder says about it; null: it does not say."""

    model_config = ConfigDict(frozen=True)

    architecture: str | None
    model_type: str | None
    hidden_size: int | None
    layers: int | None
    vocabulary: int | None
    context_length: int | None
    dtype: str | None
    parameters: int | None
    weights: str | None
    quantization: str | None
    tokenizer: bool
    chat_template: bool
    size_bytes: int
    components: tuple[str, ...]


def read_card(folder: Path, *, root: Path) -> BaseModelCard:
    """Return the card of the model in `folder`; files that links lead out of `root` to are not read. Blocks."""
    files = sorted(_files(folder, root))
    if folder / CONFIG in files:
        config = _read_object(folder / CONFIG)
    elif folder / PIPELINE in files:
        config = _read_object(folder / PIPELINE)
    else:
        raise NotABaseModel(path=shown(folder.name), pointer="/path")
    names = {file.name for file in files if file.parent == folder}
    tokenizer = _read_optional(folder / "tokenizer_config.json") if "tokenizer_config.json" in names else {}
    text = _inner(config, "text_config")
    return BaseModelCard(
        architecture=_first_text(config.get("architectures"), config.get("_class_name")),
        model_type=_first_text(config.get("model_type")),
        hidden_size=_number(text, "hidden_size", "n_embd", "d_model", "dim"),
        layers=_number(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        vocabulary=_number(text, "vocab_size"),
        context_length=_number(text, "max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"),
        dtype=_first_text(config.get("dtype"), config.get("torch_dtype"), text.get("dtype"), text.get("torch_dtype")),
        parameters=_count_parameters(file for file in files if file.suffix == ".safetensors"),
        weights=_weights(files),
        quantization=_quantization(config),
        tokenizer=not names.isdisjoint(_TOKENIZERS) or (folder / "tokenizer").is_dir(),
        chat_template=bool(tokenizer.get("chat_template"))
        or not names.isdisjoint({"chat_template.jinja", "chat_template.json"}),
        size_bytes=sum(file.stat().st_size for file in files),
        components=_components(config) if "_class_name" in config else (),
    )


def _files(folder: Path, root: Path) -> Iterator[Path]:
    for path in islice(folder.rglob("*"), _MAX_ENTRIES):  # does not follow links to folders
        if path.is_file() and (not path.is_symlink() or stays_inside(root, path)):
            yield path


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json_object(path, max_bytes=_MAX_JSON_BYTES)
    except (OSError, UnusableFile) as exc:
        problem = shown(str(exc)) if isinstance(exc, UnusableFile) else type(exc).__name__
        raise BaseModelUnreadable(file=path.name, problem=problem, pointer="/path") from exc
    cleaned: dict[str, Any] = storable_document(value)
    return cleaned


def _read_optional(path: Path) -> dict[str, Any]:
    try:
        return _read_object(path)
    except BaseModelUnreadable:
        return {}


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


def _weights(files: Iterable[Path]) -> str | None:
    found = [_WEIGHTS[file.suffix] for file in files if file.suffix in _WEIGHTS]
    return next((kind for kind in _WEIGHTS.values() if kind in found), None)


def _count_parameters(files: Iterable[Path]) -> int | None:
    """Return the number of weights by the headers of the safetensors files; packed weights count packed.

    None if there are no headers, or more of them than are read.
    """
    total = read = 0
    for file in files:
        try:
            header = read_tensor_file(file, max_bytes=_MAX_HEADER_BYTES)
            read += header.data_offset
            if read > _MAX_HEADERS_BYTES:
                return None
            total += sum(count_elements(entry["shape"]) for entry in header.tensors.values())
        except (OSError, UnusableFile, KeyError, TypeError):
            continue  # a pointer of a large-file store, or half a download
    return total if 0 < total < MAX_NUMBER else None
