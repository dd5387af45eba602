"""Forecast the memory of a training step of a language model. Sizes are bytes, lengths are tokens.

The figures were measured with torch 2.13, transformers 5.13, peft 0.20 and TRL 1.16, as docs/decisions/0018-memory.md
tells; tests/presets/test_memory.py measures them again.
"""

from dataclasses import dataclass
from enum import StrEnum

from .base import Base

MIB = 2**20
CONTEXT = 600 * MIB
"""What CUDA and its libraries take beside the tensors. Assumed, not measured here."""
PROCESS = 900 * MIB
"""What Python, torch, transformers and TRL take of the main memory. Assumed, not measured here."""
FRAGMENTATION = 0.1
"""Share of activations and logits that the allocator loses. Assumed, not measured here."""
FOUR_BIT = 0.516
"""Bytes of a weight in nf4 with constants that are quantized as well (bitsandbytes: 4.127 bits)."""
TILE_TOKENS, TILE_COLUMNS = 4096, 32768
"""The part of the logits that TRL's fused head holds at once."""
LIKE_LORA = ("lora", "rslora", "pissa")
WITH_PRODUCTS = ("dora", "oft", "loha", "lokr")
"""Adapters of PEFT that keep a product of the size of each adapted weight."""


class Head(StrEnum):
    """How a loss is made of the last layer's states."""

    FUSED = "fused"
    """By TRL's head that makes logits tile by tile (SFT, DPO, KTO, GRPO)."""
    ODDS = "odds"
    """By ORPO: all logits of both answers."""
    CROSS_ENTROPY = "cross-entropy"
    """By the model's own loss: all logits, in float32 as well."""
    POLICY = "policy"
    """By PPO-Demo: logits of the answer, their distribution and its entropy."""
    NONE = "none"


# bytes of logits that are alive at the peak, for each token and each of the vocabulary
_BYTES_OF_LOGITS = {Head.ODDS: 18.0, Head.CROSS_ENTROPY: 13.5, Head.POLICY: 19.5, Head.NONE: 0.0}
_FOLDED = 29  # by the fused head where there is no Triton, for each token and column of a tile


@dataclass(frozen=True)
class Step:
    """What of a training decides on its memory: one forward and backward pass, and what stays between them."""

    rows: int
    """Sequences in one forward pass: two for each row of DPO, ORPO and a reward model."""
    tokens: int
    """Of the longest sequence, to which the others are padded."""
    head: Head = Head.FUSED
    scored: int | None = None
    """Tokens of a sequence whose logits are made. None: all."""
    rank: int | None = 16
    """Of the adapter. None: all weights are trained."""
    trained_layers: int | None = None
    """Without an adapter: the last layers whose weights are trained. None: all weights."""
    reference: bool = False
    """The base model lies beside the weights that are trained."""
    adapter: str = "lora"
    dropout: bool = False
    """Part of the adapter's inputs is switched off."""
    dtype: str = "float32"
    autocast: bool = False
    """Arithmetic in half precision on weights in float32."""
    device: str = "cpu"
    optimizer: str = "adamw_torch_fused"
    four_bit: bool = False
    attention: str = "sdpa"
    checkpointing: bool = False
    weights_among: int = 1
    """Processes that divide the weights. A layer is whole while it is computed, and the next one comes meanwhile."""
    states_among: int = 1
    """Processes that divide gradients and the optimizer's states."""

    @property
    def half(self) -> bool:
        """Return whether the arithmetic is in half precision."""
        return self.autocast or self.dtype in ("bfloat16", "float16")


@dataclass(frozen=True)
class Memory:
    """A forecast: bytes by what takes them."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    attention: int
    logits: int
    reserve: int
    """For the context of the device or the process, and for fragmentation."""

    def parts(self) -> dict[str, int]:
        """Return the parts by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def total(self) -> int:
        """Return what must be free."""
        return sum(self.parts().values())

    @property
    def peak(self) -> int:
        """Return the highest sum of tensors: what CUDA's allocator reports."""
        return self.total - self.reserve

    def sentence(self) -> str:
        """Return the total and the parts that matter, the largest first."""
        parts = sorted(self.parts().items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {in_words(size)}" for name, size in parts if size >= 0.01 * self.total)
        return f"{in_words(self.total)} ({shown})"


def in_words(size: float) -> str:
    """Return a size as people read it."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / MIB:.0f} MiB"


def forecast(base: Base, step: Step) -> Memory:
    """Return the memory that a training with these steps needs."""
    activations = _activations(base, step)
    logits = _logits(base, step)
    trained = _trained(base, step)
    moving = activations + logits
    weights = _weights(base, step)
    if step.weights_among > 1:
        weights = weights // step.weights_among + 2 * weights // (base.layers + 1)
    return Memory(
        weights=weights,
        adapter=0 if step.rank is None else 4 * trained // step.weights_among,
        gradients=4 * trained // step.states_among,
        optimizer=round(trained * _bytes_of_optimizer(step.optimizer)) // step.states_among,
        activations=activations,
        attention=_attention(base, step),
        logits=logits,
        reserve=CONTEXT + round(FRAGMENTATION * moving) if step.device == "cuda" else PROCESS,
    )


def _trained(base: Base, step: Step) -> int:
    """Return the number of weights that are trained."""
    if step.rank is not None:
        return base.layers * step.rank * _in_and_out(base)
    return base.weights if step.trained_layers is None else min(step.trained_layers, base.layers) * base.linear


def _weights(base: Base, step: Step) -> int:
    if base.quantized:
        return base.disk
    size = 4 if step.rank is None or step.dtype == "float32" else 2
    inner = base.layers * base.linear
    if step.four_bit:
        return round(min(inner, base.weights) * FOUR_BIT) + max(0, base.weights - inner) * size
    return base.weights * size * (2 if step.reference else 1)


def _in_and_out(base: Base) -> int:
    """Return the inputs and outputs of a layer's adapted modules; the experts of a mixture are not adapted."""
    attention = 2 * (base.hidden + base.query) + 2 * (base.hidden + base.key_value)
    return attention if base.experts else attention + 3 * (base.hidden + base.intermediate)


def _bytes_of_optimizer(name: str) -> float:
    """Return the bytes of the optimizer's state for each trained weight."""
    if "8bit" in name:
        return 2.1
    return 0.5 if name == "adafactor" else 8.0


def _activations(base: Base, step: Step) -> int:
    """Return what the layers keep for the backward pass, with the copies of weights that autocast makes."""
    tokens = step.rows * step.tokens
    kept = tokens * _bytes_of_token(base, step) + _copies(base, step)
    outside = tokens * base.hidden * (8 if step.rank is None else 4)  # embeddings, last norm
    if not step.checkpointing:
        return round(base.layers * kept + outside)
    return round(base.layers * tokens * base.hidden * (4 if step.dtype == "float32" else 2) + kept + outside)


def _bytes_of_token(base: Base, step: Step) -> float:
    """Return what a layer keeps of a token."""
    inner = base.active_intermediate
    whole = step.rank is None
    if step.half:
        factors = (26, 4, 4, 8) if whole else (18, 6, 4, 8)
        of_norms, of_heads, of_modules, of_dropout = 8 if whole else 4, 8 if whole else 4, 2, 4
    else:
        factors = (24, 8, 8, 16) if whole else (16, 8, 8, 16)
        of_norms, of_heads, of_modules, of_dropout = 8 if whole else 4, 8 if whole else 4, 4, 6
    widths = (base.hidden, base.query, base.key_value, inner)
    kept: float = sum(factor * width for factor, width in zip(factors, widths, strict=True))
    kept += of_norms * base.hidden * (base.norms - 2) + 4 * base.norms
    if base.normed_heads:
        kept += of_heads * (base.query + base.key_value)
    if base.experts:  # the states of a token for the router and for each of its experts
        kept += base.hidden * (2 * base.active + 2.5)
    if step.rank is not None:
        kept += of_modules * step.rank * (4 if base.experts else 7)
        if step.dropout or step.adapter not in LIKE_LORA:
            kept += of_dropout * (5 * base.hidden + base.query + inner)
    return kept


def _copies(base: Base, step: Step) -> float:
    """Return what a layer keeps whatever the number of tokens."""
    size = 0.0
    if step.half and step.rank is not None:
        size += 2 * step.rank * _in_and_out(base)
    if step.autocast and step.dtype == "float32":
        size += 2 * base.linear
    if step.rank is not None and step.adapter in WITH_PRODUCTS:
        size += (2.6 if step.half else 4.7) * base.linear
    return size


def _attention(base: Base, step: Step) -> int:
    """Return what attention keeps beside its inputs: scores where it is eager, a mask where rows are padded."""
    squares = step.rows * step.tokens**2
    if step.attention == "eager":
        return squares * base.heads * (1 if step.checkpointing else base.layers) * (6 if step.half else 4)
    return 3 * squares if step.attention == "sdpa" and step.rows > 1 else 0


def _logits(base: Base, step: Step) -> int:
    """Return logits and what is made of them at the start of the backward pass, and the gradient of the states."""
    tokens = step.rows * (step.scored or step.tokens)
    states = 4 * step.rows * step.tokens * base.hidden
    if step.head is not Head.FUSED:
        return round(_BYTES_OF_LOGITS[step.head] * tokens * base.vocabulary) + states
    tile = min(tokens, TILE_TOKENS) * TILE_COLUMNS * (2 if step.half else 4)
    if step.device != "cuda":  # where Triton folds a tile in place
        tile += _FOLDED * min(tokens, TILE_TOKENS) * min(base.vocabulary, TILE_COLUMNS)
    return tile + states
