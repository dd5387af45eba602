"""Language models in MLX, as the scripts of MLX-Demo share them: loaded, in 4 bits if wanted, and asked.

mlx and mlx-lm are imported inside functions, so that a script's `--help` and its refusals come at once.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepe_loading as loading
from deepe_chat import ends_of
from deepe_rows import Refused

GROUP = 64  # weights that share a scale in 4 bits
MEMORY = ("Unable to allocate", "Attempting to allocate", "Insufficient Memory")
WATCHDOG = ("GPU Timeout", "GPU Hang", "Impacting Interactivity")


def prepare_environment() -> None:
    """Set what the libraries read when they are imported; what the user has set stays."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")


def load_base(folder: Path, *, four_bit: bool = False) -> tuple[Any, dict[str, Any]]:
    """Return a model and its configuration. Weights are read when they are needed, so nothing is held twice."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import load_model

    if mx.default_device() == mx.Device(mx.cpu):
        mx.disable_compile()  # there it starts a C++ compiler for every kernel, and what comes of it is no faster
    try:
        trusted = {"trust_remote_code": True} if loading.code(folder).get("trust_remote_code") else {}
        model, config = load_model(folder, lazy=True, **trusted)
    except (ValueError, FileNotFoundError) as error:
        raise Refused(f"mlx-lm cannot load the model in {folder}: {error}") from error
    if four_bit and not is_quantized(config):
        nn.quantize(model, group_size=GROUP, bits=4, class_predicate=_fits_groups)
    return model, config


def add_adapter(model: Any, folder: Path) -> Any:
    """Return the model with the trained weights of a folder on it."""
    from mlx_lm.tuner.utils import load_adapters

    try:
        return load_adapters(model, str(folder))
    except ValueError as error:
        raise Refused(f"the adapter in {folder} does not fit the base model: {error}") from error


def is_quantized(config: dict[str, Any]) -> bool:
    return bool(config.get("quantization") or config.get("quantization_config"))


def wrapped(tokenizer: Any, config: dict[str, Any]) -> Any:
    """Return the tokenizer as mlx-lm generates with it: an answer ends at every token that the model ends with."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return TokenizerWrapper(tokenizer, eos_token_ids=set(ends_of(tokenizer, config.get("eos_token_id"))))


def generate(model: Any, tokenizer: Any, tokens: list[int], *, most: int, sampler: Any = None) -> Iterator[str]:
    """Yield an answer of at most `most` tokens as it is made; without a sampler it is the most likely one."""
    from mlx_lm import stream_generate

    for response in stream_generate(model, tokenizer, tokens, max_tokens=most, sampler=sampler):
        if response.text:
            yield response.text


def memory_advice(error: Exception, batch_size: int) -> str:
    """Return what to change if the machine was overloaded, else an empty text."""
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in MEMORY):
        return (
            f"out of memory: halve batch_size ({batch_size}) and double grad_accum_steps, set gradient_checkpointing "
            "to true, shorten the rows (max_input_length, max_content_length), train fewer layers (num_layers) or "
            "set load_in_4bit; close what else uses the memory, which a Mac's GPU shares"
        )
    if any(sign in text for sign in WATCHDOG):
        return (
            "macOS ended a piece of work that kept the GPU too long: halve batch_size "
            f"({batch_size}) and double grad_accum_steps, shorten the rows, and leave the screen alone meanwhile"
        )
    return ""


def _fits_groups(_path: str, layer: Any) -> bool:
    return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % GROUP == 0
