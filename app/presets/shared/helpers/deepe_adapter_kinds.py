"""The kinds of adapters that PEFT has: how each is made, which methods can train it, whether it can be merged.

    arguments.add_adapter(group)                    # --adapter and its size
    "classes": {"trl.DPOConfig": {}, **CLASSES}     # every field of the kind's configuration can be set
    check_adapter(args, lacks=("prompts",))         # refuses a kind before a row is read
    adapter_config(args, layers)                    # the configuration, for a trainer or `get_peft_model`

Left out are kinds that need more than rows: `adaption_prompt` (one architecture), `cartridge` (a corpus of its own),
`cpt` (tokens of examples), `multitask_prompt_tuning` and `poly` (ids of tasks), `xlora` (trained adapters), `shadow`
(a second model). `trainable_tokens` is what `new_tokens` uses.
"""

import argparse
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from deepe_log import remark
from deepe_options import options_of
from deepe_rows import Refused

CLASSES = {
    "peft.LoraConfig": {
        "finetuning_type": ["lora"],
        "adapter": ["lora", "rslora", "dora", "pissa", "olora", "orthogonal"],
    },
    "peft.AdaLoraConfig": {"finetuning_type": ["lora"], "adapter": ["adalora"]},
    "peft.AdamssConfig": {"finetuning_type": ["lora"], "adapter": ["adamss"]},
    "peft.BeftConfig": {"finetuning_type": ["lora"], "adapter": ["beft"]},
    "peft.BOFTConfig": {"finetuning_type": ["lora"], "adapter": ["boft"]},
    "peft.C3AConfig": {"finetuning_type": ["lora"], "adapter": ["c3a"]},
    "peft.DeftConfig": {"finetuning_type": ["lora"], "adapter": ["deft"]},
    "peft.DeloraConfig": {"finetuning_type": ["lora"], "adapter": ["delora"]},
    "peft.FourierFTConfig": {"finetuning_type": ["lora"], "adapter": ["fourierft"]},
    "peft.FrodConfig": {"finetuning_type": ["lora"], "adapter": ["frod"]},
    "peft.GloraConfig": {"finetuning_type": ["lora"], "adapter": ["glora"]},
    "peft.GraloraConfig": {"finetuning_type": ["lora"], "adapter": ["gralora"]},
    "peft.HiraConfig": {"finetuning_type": ["lora"], "adapter": ["hira"]},
    "peft.HRAConfig": {"finetuning_type": ["lora"], "adapter": ["hra"]},
    "peft.IA3Config": {"finetuning_type": ["lora"], "adapter": ["ia3"]},
    "peft.LilyConfig": {"finetuning_type": ["lora"], "adapter": ["lily"]},
    "peft.LNTuningConfig": {"finetuning_type": ["lora"], "adapter": ["ln_tuning"]},
    "peft.LoHaConfig": {"finetuning_type": ["lora"], "adapter": ["loha"]},
    "peft.LoKrConfig": {"finetuning_type": ["lora"], "adapter": ["lokr"]},
    "peft.MissConfig": {"finetuning_type": ["lora"], "adapter": ["miss"]},
    "peft.OFTConfig": {"finetuning_type": ["lora"], "adapter": ["oft"]},
    "peft.OSFConfig": {"finetuning_type": ["lora"], "adapter": ["osf"]},
    "peft.PeanutConfig": {"finetuning_type": ["lora"], "adapter": ["peanut"]},
    "peft.PrefixTuningConfig": {"finetuning_type": ["lora"], "adapter": ["prefix_tuning"]},
    "peft.PromptEncoderConfig": {"finetuning_type": ["lora"], "adapter": ["p_tuning"]},
    "peft.PromptTuningConfig": {"finetuning_type": ["lora"], "adapter": ["prompt_tuning"]},
    "peft.PsoftConfig": {"finetuning_type": ["lora"], "adapter": ["psoft"]},
    "peft.PveraConfig": {"finetuning_type": ["lora"], "adapter": ["pvera"]},
    "peft.RandLoraConfig": {"finetuning_type": ["lora"], "adapter": ["randlora"]},
    "peft.RoadConfig": {"finetuning_type": ["lora"], "adapter": ["road"]},
    "peft.ShiraConfig": {"finetuning_type": ["lora"], "adapter": ["shira"]},
    "peft.SupertuningConfig": {"finetuning_type": ["lora"], "adapter": ["supertuning"]},
    "peft.TinyLoraConfig": {"finetuning_type": ["lora"], "adapter": ["tinylora"]},
    "peft.UniLoraConfig": {"finetuning_type": ["lora"], "adapter": ["unilora"]},
    "peft.VBLoRAConfig": {"finetuning_type": ["lora"], "adapter": ["vblora"]},
    "peft.VeraConfig": {"finetuning_type": ["lora"], "adapter": ["vera"]},
    "peft.WaveFTConfig": {"finetuning_type": ["lora"], "adapter": ["waveft"]},
}
"""Configuration classes by what has to be chosen for them. A script without `finetuning_type` trains adapters."""
EXPERTS, EXPERTS_OF_MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3")
"""What peft calls the layers of experts that transformers keeps in one weight."""


@dataclass(frozen=True)
class Kind:
    """How an adapter is made: which fields of its configuration the scripts' arguments are."""

    rate: float = 2e-4
    """Learning rate to begin with, on models of billions of weights."""
    rank: str = "r"
    alpha: str = ""
    dropout: str = ""
    seed: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    block: tuple[str, int] | None = None
    """A field that must divide the widths of all adapted layers, and its usual value."""
    lacks: str = ""
    """What a method must have for it, as in `REASONS`."""
    merges: bool = True
    four_bit: bool = False
    """Can be trained on a base in 4 bits."""


def _lora(rate: float = 2e-4, lacks: str = "", *, four_bit: bool = True, **fixed: Any) -> Kind:
    return Kind(rate, "r", "lora_alpha", "lora_dropout", fixed=fixed, lacks=lacks, four_bit=four_bit)


_PROMPT = {"rank": "", "lacks": "prompts", "merges": False, "four_bit": True}
KINDS: dict[str, Kind] = {
    "lora": _lora(),
    "rslora": _lora(1e-4, use_rslora=True),
    "dora": _lora(use_dora=True),
    "pissa": _lora(1e-4, "base", four_bit=False, init_lora_weights="pissa"),
    "olora": _lora(1e-4, "base", four_bit=False, init_lora_weights="olora"),
    "orthogonal": _lora(init_lora_weights="orthogonal"),
    "adalora": Kind(5e-4, "init_r", "lora_alpha", "lora_dropout", lacks="ranks", four_bit=True),
    "adamss": Kind(1e-3, seed="random_seed"),
    "beft": Kind(1e-3, "", merges=False),
    "boft": Kind(4e-4, "", dropout="boft_dropout", block=("boft_block_size", 4)),
    "c3a": Kind(1e-2, "", block=("block_size", 256)),
    "deft": Kind(dropout="deft_dropout"),
    "delora": Kind(1e-3, dropout="module_dropout"),
    "fourierft": Kind(1e-2, "", seed="random_loc_seed"),
    "frod": Kind(1e-3, "", dropout="frod_dropout", seed="projection_prng_key", fixed={"progressbar": False}),
    "glora": Kind(),
    "gralora": Kind(alpha="alpha", dropout="gralora_dropout"),
    "hira": Kind(1e-3, dropout="hira_dropout", four_bit=True),
    "hra": Kind(1e-3),
    "ia3": Kind(5e-3, "", fixed={"feedforward_modules": []}, four_bit=True),
    "lily": Kind(1e-3, merges=False),
    "ln_tuning": Kind(1e-3, ""),
    "loha": Kind(2e-4, alpha="alpha", dropout="rank_dropout"),
    "lokr": Kind(1e-3, alpha="alpha", dropout="rank_dropout"),
    "miss": Kind(dropout="miss_dropout"),
    "oft": Kind(4e-4, "", dropout="module_dropout", block=("oft_block_size", 32), four_bit=True),
    "osf": Kind(5e-5, ""),
    "peanut": Kind(),
    "psoft": Kind(4e-4, dropout="psoft_dropout"),
    "pvera": Kind(4e-3, dropout="pvera_dropout", seed="projection_prng_key", four_bit=True),
    "randlora": Kind(1e-4, dropout="randlora_dropout", seed="projection_prng_key", four_bit=True),
    "road": Kind(3e-3, "", block=("group_size", 64), four_bit=True),
    "shira": Kind(seed="random_seed"),
    "supertuning": Kind(rank="", dropout="lora_dropout"),
    "tinylora": Kind(1e-3, "", dropout="tinylora_dropout", seed="projection_seed"),
    "unilora": Kind(5e-3, dropout="unilora_dropout", seed="proj_seed"),
    "vblora": Kind(1e-3, dropout="vblora_dropout", block=("vector_length", 256)),
    "vera": Kind(5e-3, dropout="vera_dropout", seed="projection_prng_key", four_bit=True),
    "waveft": Kind(2e-4, "", seed="random_loc_seed"),
    "prompt_tuning": Kind(3e-2, **_PROMPT),
    "p_tuning": Kind(3e-3, **_PROMPT),
    "prefix_tuning": Kind(3e-2, **_PROMPT),
}
REASONS = {
    "prompts": (
        "trains tokens before the question, which shift what this method measures at each token; SFT-Demo and "
        "PEFT-Demo can train it"
    ),
    "ranks": "moves ranks between layers along a plan of steps, which this method does not have",
    "base": (
        "takes its start out of the weights of the base model, so that no base is left for this method to compare with"
    ),
}
WITHOUT_LAYERS = ("ln_tuning", "prompt_tuning", "p_tuning", "prefix_tuning")
CHANGING_BASE = ("pissa", "olora", "corda", "loftq")
"""Starts of LoRA that take their part out of the base's weights."""
UNPREPARED = ("corda", "loftq", "lora_ga", "eva", "pissa_niter")
"""Starts of LoRA that need more than their name, or cannot be found again when the adapter is loaded."""


def class_of(kind: str) -> Any:
    """Return the configuration class of a kind. Raises `Refused` if the installed PEFT does not have it."""
    import peft

    (path,) = [path for path, when in CLASSES.items() if kind in when["adapter"]]
    found = getattr(peft, path.rpartition(".")[2], None)
    if found is None:
        raise Refused(f"adapter={kind} needs a newer peft: the installed {peft.__version__} has no {path}")
    return found


def check_adapter(args: argparse.Namespace, *, lacks: Collection[str] = ()) -> None:
    """Refuse a kind that the method cannot train, or not with what else was asked for. `lacks`: of `REASONS`.

    Whether an adapter can learn on is looked at by `deepe_adapters.check_start`.
    """
    if getattr(args, "finetuning_type", "lora") != "lora" or args.adapter not in KINDS:
        return
    is_new = not getattr(args, "adapter_name_or_path", None)
    options_of(args).check()
    kind, given = KINDS[args.adapter], options_of(args).given
    named, start = f"adapter={args.adapter}", str(given.get("init_lora_weights", ""))
    if kind.lacks in lacks and is_new:
        raise Refused(f"{named} {REASONS[kind.lacks]}")
    if start.startswith(UNPREPARED):
        raise Refused(
            f"init_lora_weights={start} is made in a step of its own, which the training does not make; give another "
            "start, such as pissa or olora"
        )
    if "base" in lacks and start.startswith(CHANGING_BASE):
        raise Refused(f"init_lora_weights={start} {REASONS['base']}")
    if getattr(args, "load_in_4bit", False) and not (kind.four_bit and not start.startswith(CHANGING_BASE)):
        able = ", ".join(name for name, one in KINDS.items() if one.four_bit)
        raise Refused(f"{named} cannot be trained on a base model in 4 bits; these can: {able}")
    if kind.dropout and kind.dropout in given and getattr(args, "lora_dropout", 0):
        raise Refused(f"lora_dropout and {kind.dropout} both set the dropout of {named}; leave one out")
    contradicting = [name for name, value in kind.fixed.items() if name in given and given[name] != value]
    if contradicting and args.adapter != "ia3":
        (name, *_) = contradicting
        raise Refused(f"{named} and {name}={given[name]} contradict each other; leave one of them out")
    if args.adapter == "adalora" and (
        getattr(args, "early_stopping_patience", None) or given.get("load_best_model_at_end")
    ):
        raise Refused("adapter=adalora keeps the last step: the matrices of its checkpoints are cut to their ranks")
    if args.adapter == "adalora" and getattr(args, "packing", "false") == "true" and args.max_steps is None:
        raise Refused("adapter=adalora gives ranks away along the steps, which packing changes; give max_steps")
    if not kind.merges:
        remark(f"{args.adapter} cannot be merged: the customized model is the end of its way", args)


def adapter_config(
    args: argparse.Namespace, model: Any, layers: str | Sequence[str], *, task: str = "CAUSAL_LM", rows: int = 0
) -> Any:
    """Return the configuration of a new adapter at these layers; `rows` are those of an epoch, which AdaLoRA plans by.

    For the `task` SEQ_CLS, peft trains the head as well.
    """
    name, kind = args.adapter, KINDS[args.adapter]
    own: dict[str, Any] = {"task_type": task, **kind.fixed}
    if name not in WITHOUT_LAYERS:
        own["target_modules"] = layers
    arguments = {kind.rank: "lora_rank", kind.alpha: "lora_alpha", kind.dropout: "lora_dropout", kind.seed: "seed"}
    own |= {field: getattr(args, argument) for field, argument in arguments.items() if field and argument in args}
    if kind.block is not None:
        own[kind.block[0]] = _block(args, model, *kind.block)
    own |= _of_kind(args, model, rows) | learned_rows(model)
    config = options_of(args).build(class_of(name), **own)
    if not isinstance(layers, str) and has_joined_experts(model):
        _check_experts(args, config, layers)
    return config


def has_joined_experts(model: Any) -> bool:
    """Say whether a mixture keeps the layers of all its experts in two weights, as with transformers 5."""
    return any(name.endswith("experts.gate_up_proj") for name, _weight in model.named_parameters())


def _check_experts(args: argparse.Namespace, config: Any, layers: Sequence[str]) -> None:
    """Refuse, or tell, what an adapter cannot do with experts that are joined in one weight."""
    others = [name for name in layers if name not in (*EXPERTS, *EXPERTS_OF_MIXTRAL)]
    if len(others) == len(layers):
        return
    if type(config).__name__ != "LoraConfig":
        remark(f"adapter={args.adapter} leaves the experts of the mixture alone; it adapts {', '.join(others)}", args)
        return
    plain = {"use_dora": False, "lora_dropout": 0.0, "init_lora_weights": True}
    found = next((name for name, value in plain.items() if getattr(config, name) != value), None)
    if found is not None:
        raise Refused(
            f"adapter={args.adapter} with {found}={getattr(config, found)} cannot adapt the experts of a mixture, "
            "whose layers are joined in one weight; give adapter=lora without dropout, or, in PEFT-Demo, leave the "
            f"experts alone with target_modules={','.join(others)}"
        )


def _of_kind(args: argparse.Namespace, model: Any, rows: int) -> dict[str, Any]:
    """Return what a kind needs besides."""
    rank = args.lora_rank
    match args.adapter:
        case "adalora":
            steps = steps_of(args, rows)
            plan = {"tinit": steps // 10, "tfinal": steps // 4, "deltaT": max(1, steps // 50), "total_step": steps}
            return {"target_r": max(1, rank // 2), **plan}
        case "fourierft" | "waveft":  # at most one for each weight of a layer
            usual = 1000 if args.adapter == "fourierft" else 2592
            return {"n_frequency": min(usual, min(wide * high for wide, high in _shapes(model)))}
        case "randlora":
            return {"randlora_alpha": 20 * rank}
        case "psoft":
            return {"psoft_alpha": rank}
        case "prompt_tuning" | "prefix_tuning" | "p_tuning":
            width = {"encoder_hidden_size": model.config.get_text_config().hidden_size}
            more = width if args.adapter == "p_tuning" else {}
            return {"num_virtual_tokens": getattr(args, "virtual_tokens", 16), **more}
        case _:
            return {}


def steps_of(args: argparse.Namespace, rows: int) -> int:
    """Return the number of steps; ranks are given away along them."""
    if args.max_steps:
        return int(args.max_steps)
    together = args.batch_size * getattr(args, "grad_accum_steps", 1) * int(os.environ.get("WORLD_SIZE", "1"))
    return int(math.ceil(args.epochs * math.ceil(rows / together)))


def _shapes(model: Any) -> list[tuple[int, int]]:
    """Return inputs and outputs of the linear layers, but for those of heads."""
    import torch

    linear = torch.nn.Linear
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        (part.in_features, part.out_features)
        for name, part in model.named_modules()
        if isinstance(part, linear) and part is not head and name.rpartition(".")[2] not in ("score", "classifier")
    ]


def _block(args: argparse.Namespace, model: Any, name: str, usual: int) -> int:
    """Return the largest size up to the usual one that divides the widths of all layers; what was given stays."""
    usual = getattr(args, name, usual)
    if name in options_of(args).given:
        return usual
    common = math.gcd(*(width for shape in _shapes(model) for width in shape))
    found = max(size for size in range(1, usual + 1) if common % size == 0)
    if found != usual:
        remark(f"{name} is {found}: it must divide the widths of the layers, and {usual} does not", args, warning=False)
    return found


def learned_rows(model: Any) -> dict[str, Any]:
    """Return the fields of an adapter's configuration that let it learn the new tokens of a model."""
    ids = getattr(model, "new_token_ids", None)
    if not ids:
        return {}
    names = {id(part): name.rpartition(".")[2] for name, part in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
    return {"trainable_token_indices": {names[id(part)]: ids for part in parts}}


def hold_rows(model: Any) -> None:
    """Let an adapter that holds rows of embeddings be saved without whole tables, and its head be read by TRL."""
    configs = getattr(model, "peft_config", {}).values()
    if not any(getattr(config, "trainable_token_indices", None) for config in configs):
        return
    from peft.utils.other import TrainableTokensWrapper

    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    for part in model.modules():
        if isinstance(part, TrainableTokensWrapper) and not hasattr(part, "bias"):
            part.bias = getattr(part.original_module, "bias", None)  # TRL's fused head asks for it


def prepare_adapter(args: argparse.Namespace, trainer: Any) -> None:
    """Do what a trainer's adapter needs besides: rows of embeddings, ranks that move (AdaLoRA)."""
    hold_rows(trainer.model)
    if getattr(args, "finetuning_type", "lora") != "lora" or getattr(args, "adapter_name_or_path", None):
        return
    if args.adapter == "adalora":
        trainer.add_callback(rank_allocation())


def rank_allocation() -> Any:
    """Return the callback that lets AdaLoRA move ranks between layers, while the gradients are still there."""
    from train_callback import TrainerCallback

    class RankAllocation(TrainerCallback):
        def on_optimizer_step(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
            model.base_model.update_and_allocate(state.global_step)

    return RankAllocation()
