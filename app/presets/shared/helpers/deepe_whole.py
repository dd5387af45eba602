"""Training the weights of the base model itself, all of them or those of its last layers, instead of an adapter.

The result is a whole model. Weights are kept in float32 while they learn, whatever the arithmetic: steps of the usual
size are lost in half precision.
"""

import argparse
from collections.abc import Callable
from typing import Any

from deepe_adapters import given_names, start_of, with_adapter
from deepe_log import remark
from deepe_rows import Refused

OF_ADAPTERS = ("adapter", "lora_rank", "lora_alpha")
HEADS = ("score", "classifier")  # of models that give numbers: new, so that they learn in any case


def trains_whole(args: argparse.Namespace) -> bool:
    """Say whether weights of the base model are trained, and no adapter."""
    return getattr(args, "finetuning_type", "lora") != "lora"


def check_whole(args: argparse.Namespace, *, learning_rate: float) -> None:
    """Refuse what does not fit together with the weights that are trained.

    Whole weights learn at a `learning_rate` below that of adapters, if none is given.
    """
    given = given_names()
    if args.finetuning_type != "freeze" and "freeze_trainable_layers" in given:
        raise Refused(
            f"freeze_trainable_layers has no effect with finetuning_type={args.finetuning_type}; leave it out, or set "
            "finetuning_type=freeze"
        )
    if not trains_whole(args):
        return
    if args.freeze_trainable_layers < 1:
        raise Refused(f"freeze_trainable_layers must be at least 1, it is {args.freeze_trainable_layers}")
    asked = f"finetuning_type={args.finetuning_type}"
    if args.load_in_4bit:
        raise Refused(f"{asked} trains the base's weights, which 4 bits are too few for; leave load_in_4bit out")
    if start_of(args) is not None:
        raise Refused(f"{asked} trains no adapter; leave adapter_name_or_path out, or set finetuning_type=lora")
    for name in OF_ADAPTERS:
        if name in given:
            raise Refused(f"{asked} makes no adapter, so that {name} has no effect; leave {name} out")
    if "learning_rate" not in given:
        args.learning_rate = learning_rate
        remark(f"{asked}: learning_rate is {learning_rate}, as whole weights learn at a low one", args, warning=False)


def trained(args: argparse.Namespace, model: Any, new: Callable[[], Any]) -> dict[str, Any]:
    """Return the model, and the configuration of a new adapter if one is trained, as the trainers of TRL take them."""
    if trains_whole(args):
        return {"model": freeze(model, args)}
    return with_adapter(args, model, new)


def freeze(model: Any, args: argparse.Namespace) -> Any:
    """Leave only the last layers trainable, where that is asked for. Raises `Refused` if there are fewer."""
    if args.finetuning_type == "freeze":
        layers = layers_of(model)
        if args.freeze_trainable_layers > len(layers):
            raise Refused(
                f"freeze_trainable_layers={args.freeze_trainable_layers}: the base model has {len(layers)} layers"
            )
        model.requires_grad_(False)
        head = head_of(model)
        for layer in [*layers[-args.freeze_trainable_layers :], *([head] if head is not None else [])]:
            layer.requires_grad_(True)
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in model.parameters()]
    trained, whole = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    print(f"trains {trained:,} of {whole:,} weights", flush=True)
    return model


def head_of(model: Any) -> Any:
    """Return the layer that gives the numbers of a classifier, None if there is none."""
    return next((getattr(model, name) for name in HEADS if hasattr(model, name)), None)


def layers_of(model: Any) -> Any:
    """Return the layers of a language model. Raises `Refused` if they are not found."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    found = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count]
    if not found:
        raise Refused("finetuning_type=freeze: the layers of this base model are not known; choose full or lora")
    return found[0]
