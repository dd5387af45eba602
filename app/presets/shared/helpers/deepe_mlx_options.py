"""The options of mlx-lm's own configuration, as MLX-Demo takes them.

What counts forward passes becomes steps, what comes as an object wins over the arguments that say the same, and what
mlx-lm would pass over is refused. mlx and mlx-lm are imported inside functions, so that refusals come at once.
"""

import argparse
import difflib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from deepe_fields import fields_of, load
from deepe_log import remark
from deepe_rows import Refused

CLASS = "mlx_lm.lora.CONFIG_DEFAULTS"
IN_PASSES = {  # option of mlx-lm, counted in forward passes → argument, counted in steps
    "iters": "max_steps",
    "steps_per_report": "logging_steps",
    "steps_per_eval": "eval_steps",
    "save_every": "save_steps",
}
LORA = {"rank": "lora_rank", "scale": "lora_scale", "dropout": "lora_dropout"}


def take(args: argparse.Namespace, *, usual: Callable[[str], Any]) -> None:
    """Take what was given in mlx-lm's own terms; refuse what would have no effect. `usual` knows the defaults."""
    given = args.options.given
    for name, ours in IN_PASSES.items():
        if name not in given:
            continue
        if getattr(args, ours) != usual(ours):
            raise Refused(f"{name} and {ours} say the same; give one of them")
        steps, over = divmod(given[name], args.grad_accum_steps)
        if steps < 1 or over:
            raise Refused(
                f"{name} counts forward passes: it must be a multiple of grad_accum_steps ({args.grad_accum_steps}), "
                f"it is {given[name]}"
            )
        setattr(args, ours, steps)
    if "max_seq_length" in given:
        args.max_seq_length = given["max_seq_length"]
        if args.max_seq_length < 1:
            raise Refused(f"max_seq_length must be at least 1, it is {args.max_seq_length}")
    _take_adapter(args, given.get("lora_parameters"))
    args.val_batches = given.get("val_batches", -1)
    if args.val_batches != -1 and args.val_batches < 1:
        raise Refused(f"val_batches must be at least 1, or -1 for all, it is {args.val_batches}")
    if args.optimizer != usual("optimizer") or "optimizer_config" in given:
        optimizer_of(args)  # refuses before the base model is loaded
    args.schedule = _schedule_of(given["lr_schedule"]) if given.get("lr_schedule") else None
    if args.schedule:
        names = ("learning_rate", "lr_scheduler", "warmup_steps", "warmup_ratio")
        if without := [name for name in names if getattr(args, name) != usual(name)]:
            remark(f"lr_schedule says what the learning rate is: {', '.join(without)} have no effect", args)


def _take_adapter(args: argparse.Namespace, given: Any) -> None:
    """Take `lora_parameters`, which win over the arguments that say the same."""
    args.lora_keys = None
    if not given:
        return
    if args.fine_tune_type == "full":
        raise Refused("lora_parameters has no effect with fine_tune_type=full; leave it out")
    _check_names("lora_parameters", given, (*LORA, "keys"))
    for name, ours in LORA.items():
        wanted = int if name == "rank" else (int, float)
        if not isinstance(value := given.get(name, getattr(args, ours)), wanted) or isinstance(value, bool):
            raise Refused(f"lora_parameters: {name} must be a number, it is {value}")
        setattr(args, ours, value)
    if args.lora_rank < 1:
        raise Refused(f"lora_parameters: rank must be at least 1, it is {args.lora_rank}")
    if (keys := given.get("keys")) is not None:
        if not (isinstance(keys, list) and keys and all(isinstance(key, str) for key in keys)):
            raise Refused(f'lora_parameters: keys must be a list of names, such as ["self_attn.q_proj"], it is {keys}')
        args.lora_keys = sorted(set(keys))


def _check_names(option: str, given: Any, known: Iterable[str]) -> None:
    """Refuse an object with names that the library would ignore."""
    if not isinstance(given, dict):
        raise Refused(f"{option} must be a JSON object with {', '.join(known)}, it is {given}")
    for name in given.keys() - set(known):
        near = difflib.get_close_matches(name, list(known), n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise Refused(f"{option}: there is no {name}; {meant}")


def _schedule_of(given: Any) -> Callable[[int], float]:
    """Return the function that gives a step its learning rate, as mlx-lm makes it; steps count from 0."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import build_schedule

    _check_names("lr_schedule", given, ("name", "arguments", "warmup", "warmup_init"))
    try:
        schedule = build_schedule(given)
        schedule(mx.array(0))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Refused(f"mlx-lm does not accept lr_schedule={json.dumps(given)}: {error}") from error
    return lambda step: float(mx.array(schedule(mx.array(step))).item())


def optimizer_of(args: argparse.Namespace) -> Any:
    """Return the optimizer: what the method sets, under what `optimizer_config` says of it."""
    import mlx.optimizers

    kinds = {name.lower(): one for name, one in vars(mlx.optimizers).items() if isinstance(one, type)}
    known = [name for name in fields_of(load(CLASS))["optimizer"].choices or kinds if name in kinds]
    if args.optimizer not in known:
        raise Refused(f"optimizer must be one of {', '.join(known)}; it is '{args.optimizer}'")
    given = args.options.given.get("optimizer_config") or {}
    _check_names("optimizer_config", given, known)
    if others := [name for name, settings in given.items() if settings and name != args.optimizer]:
        raise Refused(f"optimizer_config says something of {others[0]}, but the optimizer is {args.optimizer}")
    kind = kinds[args.optimizer]
    taken = inspect.signature(kind).parameters
    if args.weight_decay and "weight_decay" not in taken:
        raise Refused(f"weight_decay has no effect with optimizer={args.optimizer}; leave it out, or take adamw")
    own = {"weight_decay": args.weight_decay, "bias_correction": True, "relative_step": False}
    settings = {name: value for name, value in own.items() if name in taken} | (given.get(args.optimizer) or {})
    _check_names(f"optimizer_config: {args.optimizer}", settings, [name for name in taken if name != "learning_rate"])
    with args.options.refusing():
        return kind(learning_rate=args.learning_rate, **settings)


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Return the learning rate of a step; `step` counts from 0."""
    if args.schedule:
        return float(args.schedule(step))
    return float(args.learning_rate * _course(step, steps, args))


def _course(step: int, steps: int, args: argparse.Namespace) -> float:
    """Return which part of the highest learning rate a step has; `step` counts from 0."""
    warmup = args.warmup_ratio * steps if args.warmup_steps is None else args.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    gone = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * gone)), "linear": 1 - gone, "constant": 1.0}[args.lr_scheduler]


def check_keys(model: Any, keys: Sequence[str] | None) -> None:
    """Refuse names of layers that the model does not have: mlx-lm passes over them."""
    from mlx.utils import tree_flatten

    leaves = {name.rpartition(".")[0] for name, _ in tree_flatten(model.layers[-1].parameters())}
    known = leaves | {name for name, _ in model.named_modules()}
    for key in keys or ():
        if key not in known:
            there = ", ".join(sorted(leaves))
            raise Refused(f"lora_parameters: the model has no layer {key} for an adapter; there are {there}")
