"""The processes of a group, and how they share a model: each has all of it (DDP), or they divide it (FSDP2, ZeRO).

`accelerate launch` says in the environment which it is; the platform starts it with a configuration for the value of
`distributed_strategy`, by hand it is yours. A divided model cannot compute in one process alone: all of them measure,
answer and save together, and nothing can be measured before the training has divided it. torch and its relatives are
imported inside functions.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepe
from deepe_arguments import STRATEGIES
from deepe_log import remark
from deepe_needs import needs_of
from deepe_options import options_of
from deepe_rows import Refused

DIVIDING = ("fsdp2", "zero2", "zero3")
DIVIDED_ADAPTERS = ("lora", "rslora", "dora")
"""Kinds of adapters that learn the same in a divided model."""
PATIENCE = timedelta(minutes=30)  # for a process that still reads the weights, as transformers has it


# --- strategy -------------------------------------------------------------------------------------------------------


def strategy() -> str:
    """Return how this process was started to share a model with others: one of `STRATEGIES`, or "none" alone."""
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if _flag("ACCELERATE_USE_FSDP"):
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    return "ddp" if processes() > 1 else "none"


def is_divided() -> bool:
    """Say whether the processes divide what belongs to the model."""
    return strategy() in DIVIDING


def has_parts_of_weights() -> bool:
    """Say whether each process holds a part of the weights."""
    return strategy() in ("fsdp2", "zero3")


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_strategy(args: argparse.Namespace) -> None:
    """Refuse a strategy that the script was not started with, and what a divided model cannot learn."""
    asked, found = getattr(args, "distributed_strategy", None), strategy()
    if found not in (*STRATEGIES, "none"):
        raise Refused(f"accelerate was told to use {found}, which is not known here; use FSDP 2, or ZeRO 2 or 3")
    if asked not in (None, "auto", found) and (asked in DIVIDING or found != "none"):
        raise Refused(
            f"distributed_strategy={asked} is not how the script was started ({found}): in a job, ask for at least two "
            "accelerators; by hand, start it with accelerate launch and a configuration for it"
        )
    if found not in DIVIDING:
        return
    if asked is None:
        raise Refused(f"this method cannot learn with a model that is divided by {found}; start it without")
    if getattr(args, "early_stopping_patience", None) or options_of(args).given.get("load_best_model_at_end"):
        raise Refused(
            f"the weights of the best step cannot be taken up again where {found} divides the model; leave "
            "early_stopping_patience and load_best_model_at_end out"
        )
    if getattr(args, "reward_model_path", None):
        raise Refused(
            f"a reward model must be whole in each process, and {found} would divide it as well; leave "
            "reward_model_path out, or train with distributed_strategy=ddp"
        )
    optimizer = getattr(args, "optimizer", "")
    if any(need.module == "bitsandbytes" for need in needs_of({"optimizer": optimizer}).values()):
        raise Refused(
            f"optimizer={optimizer} keeps states that {found} cannot divide; choose adamw_torch_fused or adafactor"
        )
    adapter = getattr(args, "adapter", "lora")
    if adapter not in DIVIDED_ADAPTERS:
        able = ", ".join(DIVIDED_ADAPTERS)
        raise Refused(f"adapter={adapter} is not known to learn the same when {found} divides it; these are: {able}")


def join(device: str) -> None:
    """Meet the other processes before the base is read: where they hold parts of it, one process alone reads it."""
    if not is_divided():
        return
    from accelerate import PartialState

    if device == "cpu":
        _let_cpus_divide()
    PartialState(timeout=PATIENCE)


def _let_cpus_divide() -> None:
    """Have accelerate treat processes on CPUs like those on GPUs: torch and DeepSpeed divide a model there, too."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


@contextlib.contextmanager
def dividing_weights(dtype: str) -> Iterator[None]:
    """Let transformers read a model in parts for ZeRO 3; with FSDP2 it knows by itself."""
    if strategy() != "zero3":
        yield
        return
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision({"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no"))
    plugin.set_deepspeed_weakref()  # holds as long as the plugin
    yield


def check_divided(trainer: Any) -> None:
    """Refuse to train with a whole model where a divided one was asked for: accelerate may leave it out in silence."""
    found = strategy()
    there = trainer.is_fsdp_enabled if found == "fsdp2" else trainer.is_deepspeed_enabled
    if found in DIVIDING and not there:
        raise Refused(f"the trainer does not divide the model by {found} here; leave distributed_strategy out")


# --- measuring and saving -------------------------------------------------------------------------------------------


def measure(trainer: Any, phase: str, work: Callable[[], None], args: argparse.Namespace) -> None:
    """Do the work of a score. Of a divided model, that before the training is done when its parts are in place."""
    if phase != "before" or not is_divided():
        work()
        trainer.accelerator.wait_for_everyone()
        return
    from transformers import TrainerCallback

    class AtBeginning(TrainerCallback):
        def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step:
                remark("the score before the training is that of the attempt which began it", args, warning=False)
            else:
                work()

    trainer.callback_handler.callbacks.insert(0, AtBeginning())  # before the clocks of others


def answers_here(trainer: Any) -> bool:
    """Say whether this process makes answers for a score: of a whole model the first, of a divided one all."""
    return is_divided() or bool(trainer.is_world_process_zero())


def without_gradients() -> Any:
    """Return a context for answers. What is gathered in torch's inference mode could not be learned with any more."""
    import torch

    return torch.no_grad() if is_divided() else torch.inference_mode()


def save_model(trainer: Any, folder: str) -> None:
    """Write what was trained as a whole, in the form that one process writes."""
    if strategy() != "fsdp2":
        trainer.save_model(folder)
        return
    model = trainer.model
    weights = trainer.accelerator.get_state_dict(model)
    if trainer.is_world_process_zero():
        if getattr(model.config, "tie_word_embeddings", False):
            for name in getattr(model, "_tied_weights_keys", None) or ():  # the same as others, written once
                weights.pop(name, None)
        model.save_pretrained(folder, state_dict=weights)
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def checkpoint_files(folder: Path) -> tuple[str, ...] | None:
    """Return files that a checkpoint of a divided model must have, None for that of a whole one.

    Raises `Refused` if other processes divided it than there are now, which ZeRO cannot go on from.
    """
    found = strategy()
    if found == "fsdp2":
        return ("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "scheduler.pt")
    if found not in DIVIDING:
        return None
    with contextlib.suppress(OSError):
        parts = len(list((folder / (folder / "latest").read_text("utf-8").strip()).glob("*optim_states.pt")))
        if parts != processes():
            raise Refused(
                f"{folder.name} was written by {parts} processes, and {found} cannot go on from it with {processes()}: "
                f"ask for {parts} accelerators, or set resume to false"
            )
    return ("latest", "scheduler.pt")


# --- group ----------------------------------------------------------------------------------------------------------


def stop_group() -> Any:
    """Return what the processes of a group agree through, None for one that is alone; on CPUs, so no GPU waits."""
    import torch.distributed

    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.new_group(backend="gloo") if several else None


def wait_for_all(group: Any) -> None:
    if group is not None:
        import torch

        torch.distributed.barrier(group=group)


def any_stop_requested(group: Any) -> bool:
    """Whether one of the processes was asked to stop: all leave at the same step, else some would wait for the rest."""
    if group is None:
        return deepe.stop_requested()
    import torch

    requested = torch.tensor([int(deepe.stop_requested())])
    torch.distributed.all_reduce(requested, torch.distributed.ReduceOp.MAX, group=group)
    return bool(requested.item())


def leave_group(code: int = 0) -> None:
    """Part from the other processes and end; alone, do nothing.

    At once: threads that gloo left may abort the interpreter's own end (torch 2.13).
    """
    if "torch" not in sys.modules:
        return
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first to end with a code would end the one that still writes
        torch.distributed.destroy_process_group()
        deepe.end(code)


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
