"""Checkpoints of a training: the newest one that is complete, and files that others may read."""

import argparse
import json
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

from deepe_distributed import checkpoint_files
from deepe_log import remark

ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"


def newest_checkpoint(
    output: Path,
    args: argparse.Namespace,
    states: Sequence[str] = ("optimizer.pt", "scheduler.pt"),
    weights: str = ADAPTER,
) -> Path | None:
    """Return the newest checkpoint that was written to its end; a killed run may leave half of one."""
    if not args.resume:
        return None
    found = [folder for folder in output.glob("checkpoint-*") if folder.name[11:].isdigit()]
    for folder in sorted(found, key=lambda folder: int(folder.name[11:]), reverse=True):
        if has_cut_ranks(folder):
            remark(f"{folder.name} holds matrices that AdaLoRA has cut: training starts anew instead", args)
        elif is_complete(folder, checkpoint_files(folder) or (*parts_of(folder, weights), *states)):
            remark(f"resumed from {folder.name}", args, warning=False)
            return folder
        else:
            remark(f"{folder.name} is incomplete and is passed over", args)
    return None


def parts_of(folder: Path, weights: str) -> list[str]:
    """Return the files of the weights: the one, or those that an index beside it lists."""
    try:
        index = json.loads((folder / f"{weights}.index.json").read_text("utf-8"))
        return sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError):
        return [weights]


def has_cut_ranks(folder: Path) -> bool:
    """Whether AdaLoRA's matrices were saved as they are to be used; the optimizer's state is for the whole ones."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return config.get("peft_type") == "ADALORA" and bool(config.get("rank_pattern"))


def is_complete(folder: Path, names: Sequence[str]) -> bool:
    """Whether the step is that of the folder's name, and all files are there to their end."""
    try:
        step = json.loads((folder / "trainer_state.json").read_text("utf-8"))["global_step"]
        return f"checkpoint-{step}" == folder.name and all(_is_whole(folder / name) for name in names)
    except (OSError, ValueError, KeyError, struct.error):
        return False


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file has the length that it announces, or one of torch its end."""
    if not path.suffix:  # what lists the parts of a divided model
        return path.stat().st_size > 0
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        size = file.seek(0, os.SEEK_END)
    return bool(size == 8 + length + max(e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"))


def make_readable(folder: Path) -> None:
    """Weights are written as 0600 whatever the umask says; others must be able to serve them."""
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)
