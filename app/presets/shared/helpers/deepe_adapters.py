"""The adapter that a training changes: a new one, or the one of an earlier training, which learns on.

`adapter_name_or_path` names the folder of the adapter to go on from. Kind, rank and layers are its own, and so are the
tokenizer, the chat template and the ends of answers that lie beside it. A method that compares with a reference takes
the adapter as it is at the start for it, not the bare base model.
"""

import argparse
import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepe_loading as loading
from deepe_adapter_kinds import CHANGING_BASE, KINDS
from deepe_log import remark
from deepe_options import options_of
from deepe_rows import Refused
from deepe_tokens import grow_for

ADAPTER = "default"  # peft's name of the one that learns
REFERENCE = "ref"  # TRL's name of the copy that stays as it was
OWN_NAMES = {  # arguments of the scripts, and what peft's configurations call them
    "lora_rank": ("r", "init_r"),
    "lora_alpha": ("lora_alpha", "alpha"),
    "lora_dropout": ("lora_dropout", "rank_dropout", "module_dropout", "vera_dropout"),
    "target_modules": ("target_modules",),
    "oft_block_size": ("oft_block_size",),
    "virtual_tokens": ("num_virtual_tokens",),
}
ALIASES = {"lora_r": "lora_rank", "r": "lora_rank", "num_virtual_tokens": "virtual_tokens"}
COMPARABLE = (
    "lora",
    "rslora",
    "dora",
    "orthogonal",
    "oft",
    "loha",
    "lokr",
    "ia3",
    "vera",
)  # kinds a copy of which can lie beside


def start_of(args: argparse.Namespace) -> Path | None:
    """Return the folder of the adapter to go on from, `None` for a new adapter."""
    given = getattr(args, "adapter_name_or_path", None)
    return Path(given) if given else None


def folder_with(args: argparse.Namespace, file: str) -> Path:
    """Return the folder of the adapter to go on from if it has the file, else the base model's."""
    start = start_of(args)
    return start if start is not None and (start / file).is_file() else Path(args.model_path)


def kind_of(config: dict[str, Any]) -> str:
    """Return the kind of an adapter, as the scripts name it."""
    kind = str(config.get("peft_type", "")).lower()
    if kind != "lora":
        return kind
    if config.get("use_dora"):
        return "dora"
    start = str(config.get("init_lora_weights", "")).partition("_")[0]
    if start != "lora" and start in KINDS:
        return start
    return "rslora" if config.get("use_rslora") else "lora"


def adopt_kind(args: argparse.Namespace) -> None:
    """Make the kind of the adapter to go on from the script's, unless one was named."""
    start = start_of(args)
    if start is not None and "adapter" not in given_names():
        args.adapter = kind_of(read_config(start)) or args.adapter


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter, an empty one if there is none."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def check_start(args: argparse.Namespace, *, compares: bool = False) -> None:
    """Refuse an adapter that cannot learn on here, and values that it does not have.

    `compares`: the method needs a second copy of the adapter as its reference.
    """
    folder = start_of(args)
    if folder is None:
        return
    config = read_config(folder)
    if not config:
        more = "; it holds a complete model: give it as model_path" if (folder / "config.json").is_file() else ""
        raise Refused(f"adapter_name_or_path: there is no adapter in {folder} (adapter_config.json){more}")
    _check_base(args, folder, config)
    kind = kind_of(config)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise Refused(f"the adapter in {folder} is one for {config['task_type']}: it gives no answers to learn from")
    if kind == "adalora":
        raise Refused(
            f"the adapter in {folder} is of the kind adalora, which has cut its matrices at the end of its training; "
            "save it as a complete model and train from that"
        )
    changing = str(config.get("init_lora_weights", "")).startswith(CHANGING_BASE)
    if compares and (changing or kind not in COMPARABLE):
        named = config["init_lora_weights"] if changing else kind
        cure = "save it as a complete model and train from that" if changing else "go on from another kind"
        raise Refused(
            f"the adapter in {folder} is of the kind {named}, which has no second copy to compare with; {cure}"
        )
    if compares and has_tokens(config):
        raise Refused(
            f"the adapter in {folder} has learned new tokens, which a second copy to compare with would not have; save "
            "it as a complete model and train from that"
        )
    _check_values(args, folder, config)


def has_tokens(config: dict[str, Any]) -> bool:
    """Say whether an adapter holds rows of embeddings."""
    return bool(config.get("trainable_token_indices"))


def _check_base(args: argparse.Namespace, folder: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter of another base model. A base that is not where it was is known by its name."""
    made_for, base = Path(str(config.get("base_model_name_or_path") or "")), Path(args.model_path)
    same = made_for.samefile(base) if made_for.exists() and base.exists() else made_for.name == base.name
    if not same:
        raise Refused(
            f"the adapter in {folder} was made for the base model {made_for}, this training is of {base}; "
            f"give {made_for} as model_path, or another adapter"
        )


def _check_values(args: argparse.Namespace, folder: Path, config: dict[str, Any]) -> None:
    own = {name: names for name, names in OWN_NAMES.items() if name in args and name in given_names()}
    given = {name: (getattr(args, name), names) for name, names in own.items()}
    given |= {name: (value, (name,)) for name, value in options_of(args).of_library("peft").items()}
    if "adapter" in args and "adapter" in given_names():
        given["adapter"] = (args.adapter, ("adapter",))
    known = {**config, "adapter": kind_of(config)}
    for name, (value, names) in given.items():
        held = [known[one] for one in names if one in known]
        if held and _comparable(value) not in [_comparable(one) for one in held]:
            raise Refused(
                f"{name}={value}: the adapter in {folder} has {_shown(held[0])}, and that adapter learns on; "
                f"leave {name} out, or adapter_name_or_path for a new adapter"
            )
    for name, names in OWN_NAMES.items():  # what the memory is estimated from
        if type(getattr(args, name, None)) is int:
            setattr(args, name, next((config[one] for one in names if config.get(one)), getattr(args, name)))


def given_names() -> set[str]:
    """Return the names of the arguments on the command line."""
    found = {word[2:].partition("=")[0].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")}
    return found | {own for alias, own in ALIASES.items() if alias in found}


def _comparable(value: Any) -> Any:
    if isinstance(value, str) and "," in value:
        value = re.split(r"\s*,\s*", value.strip())
    return sorted(map(str, value)) if isinstance(value, (list, set, tuple)) else value


def _shown(value: Any) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, list) else str(value)


def with_adapter(args: argparse.Namespace, model: Any, new: Callable[[], Any]) -> dict[str, Any]:
    """Return the model and the configuration of a new adapter, as the trainers of TRL take them.

    Going on from an adapter the model has it already, and there is no configuration.
    """
    if start_of(args) is None:
        return {"model": model, "peft_config": new()}
    return {"model": load_start(args, model), "peft_config": None}


def load_start(args: argparse.Namespace, model: Any) -> Any:
    """Return the base model with the adapter to go on from, ready to learn. Raises `Refused` if they do not fit."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    folder = str(start_of(args))
    loading.weights(folder)  # PEFT would load pickles as well
    grow_for(model, Path(folder))
    try:
        adapted = PeftModel.from_pretrained(model, folder, adapter_name=ADAPTER, is_trainable=True)
    except (RuntimeError, ValueError) as error:  # sizes that differ, layers that are not there
        raise Refused(f"the adapter in {folder} does not fit the base model {args.model_path}: {error}") from error
    rows_only: dict[str, Any] = {"save_embedding_layers": False} if has_tokens(read_config(Path(folder))) else {}
    if load_peft_weights(folder, device="cpu").keys() != get_peft_model_state_dict(adapted, **rows_only).keys():
        raise Refused(f"the adapter in {folder} does not fit the base model {args.model_path}: its layers are others")
    config = adapted.peft_config[ADAPTER]
    config.base_model_name_or_path = args.model_path
    remark(f"goes on from the adapter in {folder} ({kind_of(config.to_dict() | _type(config))})", args, warning=False)
    return adapted


def _type(config: Any) -> dict[str, str]:
    return {"peft_type": config.peft_type.value}


@contextlib.contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Let the model answer as it did at the start: with the copy of its adapter, else without one."""
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE)
    try:
        yield
    finally:
        model.set_adapter(ADAPTER)


def leave_reference_out(folder: Path) -> None:
    """Remove the copy that trainers of TRL save beside the adapter that has learned."""
    shutil.rmtree(folder / REFERENCE, ignore_errors=True)
