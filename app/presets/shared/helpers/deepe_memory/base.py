"""Read how large a base model is from its folder: `config.json` and the headers of its weights."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MAX_HEADER = 100 * 2**20


class Unforeseeable(ValueError):
    """The memory of a training cannot be forecast; the text says why."""


@dataclass(frozen=True)
class Base:
    """What a base model's folder says of its size. `query` and `key_value` are the widths of all heads together."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    query: int
    key_value: int
    vocabulary: int
    normed_heads: bool
    """Queries and keys pass a norm (Qwen3, Gemma 3)."""
    norms: int
    """Norms of a layer beside those of the heads."""
    experts: int
    """0: the layers are dense."""
    active: int
    weights: int
    """Their number."""
    disk: int
    quantized: bool
    """The weights are kept as they are on the disk."""

    @property
    def linear(self) -> int:
        """Return the number of weights of a layer's linear modules."""
        return 2 * self.hidden * (self.query + self.key_value) + 3 * self.hidden * self.intermediate * max(
            self.experts, 1
        )

    @property
    def active_intermediate(self) -> int:
        """Return the width of the inner layers that a token passes."""
        return self.intermediate * (self.active if self.experts else 1)


def read_base(folder: Path) -> Base:
    """Read configuration and weight headers of a model's folder. Raises `Unforeseeable`."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Unforeseeable(f"config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise Unforeseeable("config.json is not a JSON object")
    weights, disk = _weights_on_disk(folder)
    return base_of(config, weights=weights, disk=disk)


def base_of(config: Mapping[str, Any], *, weights: int | None = None, disk: int = 0) -> Base:
    """Return the size that a config.json describes; `weights` left out are counted from it. Raises `Unforeseeable`."""
    text = config.get("text_config") or config.get("llm_config") or config
    experts = _number(text, "num_experts", "num_local_experts", "n_routed_experts") or 0
    needed = {
        "num_hidden_layers": _number(text, "num_hidden_layers"),
        "hidden_size": _number(text, "hidden_size"),
        "num_attention_heads": _number(text, "num_attention_heads"),
        "vocab_size": _number(text, "vocab_size"),
        "intermediate_size": (_number(text, "moe_intermediate_size") if experts else None)
        or _number(text, "intermediate_size"),
    }
    if missing := [name for name, value in needed.items() if value is None]:
        raise Unforeseeable(f"config.json does not say {', '.join(missing)}")
    layers, hidden, heads, vocabulary, intermediate = (value or 0 for value in needed.values())
    width = _number(text, "head_dim") or hidden // heads
    kind = str(text.get("model_type") or config.get("model_type") or "")
    base = Base(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        query=heads * width,
        key_value=(_number(text, "num_key_value_heads") or heads) * width,
        vocabulary=vocabulary,
        normed_heads=kind.startswith(("qwen3", "gemma3", "olmo2")),
        norms=4 if kind.startswith(("gemma2", "gemma3")) else 2,
        experts=experts,
        active=_number(text, "num_experts_per_tok", "moe_topk") or 1,
        weights=weights or 0,
        disk=disk,
        quantized=bool(config.get("quantization_config")),
    )
    if weights is None:
        tables = 1 if text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)) else 2
        base = replace(base, weights=layers * base.linear + tables * vocabulary * hidden)
    return base


def _number(values: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these values that is a positive whole number."""
    found = (values.get(name) for name in names)
    return next((value for value in found if type(value) is int and value > 0), None)


def _weights_on_disk(folder: Path) -> tuple[int | None, int]:
    """Return the number of weights as the headers say it, and the bytes of the files. None: no header says it."""
    files = sorted(folder.glob("*.safetensors"))
    disk = sum(file.stat().st_size for file in files or folder.glob("*.bin"))
    try:
        return (sum(_elements(file) for file in files) if files else None), disk
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None, disk


def _elements(file: Path) -> int:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > MAX_HEADER:
            raise ValueError(f"the header of {file.name} is too large")
        header = json.loads(stream.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
