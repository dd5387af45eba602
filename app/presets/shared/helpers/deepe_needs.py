"""What a value of a parameter needs that the packages of a method do not bring along.

The scripts refuse such a value where the package is missing, and the platform refuses it before that, at the submit,
by what nodes found in the environment. Names and values are those of the libraries' configuration classes and of the
scripts. Standard library only.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Need:
    """A module that the environment must have, the package that brings it, and whether an NVIDIA GPU is needed."""

    module: str
    package: str = ""
    cuda: bool = False

    @property
    def name(self) -> str:
        """Return what pip calls the package."""
        return self.package or self.module


FLASH_ATTENTION = {
    "flash_attention_3": Need("flash_attn_interface", "flash-attn-3", cuda=True),
    "flash_attention_2": Need("flash_attn", "flash-attn", cuda=True),
}
_BITSANDBYTES = Need("bitsandbytes")
_TORCHAO = Need("torchao")
_OPTIMIZERS = {  # the first pattern that fits counts
    "adamw_torch_[48]bit": _TORCHAO,
    "adamw_anyprecision": Need("torchdistx"),
    "galore_*": Need("galore_torch", "galore-torch"),
    "apollo_*": Need("apollo_torch", "apollo-torch"),
    "*lomo": Need("lomo_optim", "lomo-optim"),
    "grokadamw": Need("grokadamw"),
    "schedule_free_*": Need("schedulefree"),
    "stable_adamw": Need("optimi", "torch-optimi"),
    "ademamix*": _BITSANDBYTES,
    "lion_*": _BITSANDBYTES,
    "paged_*": _BITSANDBYTES,
    "rmsprop_bnb*": _BITSANDBYTES,
    "*_8bit": _BITSANDBYTES,
}
TRACKERS = {
    "mlflow": Need("mlflow", "mlflow-skinny"),
    "wandb": Need("wandb"),
    "trackio": Need("trackio"),
    "swanlab": Need("swanlab"),
}
_TRUE = {"true": _BITSANDBYTES}
_VLLM = {"true": Need("vllm")}

TABLE: Mapping[str, Mapping[str, Need]] = {
    "load_in_4bit": _TRUE,
    "load_in_8bit": _TRUE,
    "optimizer": _OPTIMIZERS,
    "optim": _OPTIMIZERS,
    "attention": FLASH_ATTENTION,
    "attn_implementation": FLASH_ATTENTION,
    "vllm": _VLLM,
    "use_vllm": _VLLM,
    "report_to": {f"*{name}*": need for name, need in TRACKERS.items()},
    "distributed_strategy": {"zero[23]": Need("deepspeed")},
    "use_liger_kernel": {"true": Need("liger_kernel", "liger-kernel")},
}
"""Parameter → pattern of its values in lower case → what they need."""

MODULES = frozenset(need.module for patterns in TABLE.values() for need in patterns.values())


def needs_of(values: Mapping[str, Any]) -> dict[str, Need]:
    """Return what the values need, by the name of the parameter."""
    found = {name: _need(TABLE[name], value) for name, value in values.items() if name in TABLE}
    return {name: need for name, need in found.items() if need is not None}


def _need(patterns: Mapping[str, Need], value: Any) -> Need | None:
    text = str(value).lower()
    fitting: Iterable[Need] = (need for pattern, need in patterns.items() if fnmatchcase(text, pattern))
    return next(iter(fitting), None)
