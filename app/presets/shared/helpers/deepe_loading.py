"""What of a model's author runs when the model is loaded, and what the job permits of it. Standard library only.

Weights that are pickles can run code, and a configuration can name Python files of the model to import. The platform
tells its own scripts in `DEEPE_LOADING_PERMITS` what a developer has allowed for the base model, and they refuse the
rest; where the variable is not set, in a script of a user's or one that is run by hand, the libraries decide.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PICKLED_WEIGHTS = "pickled_weights"
CUSTOM_CODE = "custom_code"
PERMITS = "DEEPE_LOADING_PERMITS"

_TORCH = ("pytorch_model*.bin", "model*.bin", "diffusion_pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth")
_STATE = ("optimizer.", "scheduler.", "rng_state", "training_args.", "state.", "scaler.")  # no library loads these here
# where libraries look for the names of Python files, and the keys that name these
_CONFIGURATIONS = (
    "config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json", "generation_config.json",
)  # fmt: skip
_KEYS = ("auto_map", "model_file", "trust_remote_code")
_MAX_BYTES = 64 * 2**20


def has_pickled_weights(folder: Path) -> bool:
    """Say whether weights of a model, a part of a pipeline or an adapter are pickles, where there are no others."""
    parts = [folder]
    if (folder / "model_index.json").is_file():
        parts += [entry for entry in folder.iterdir() if entry.is_dir()]
    return any(_pickled(part) for part in parts)


def asks_for_code(folder: Path) -> bool:
    """Say whether libraries are told to run Python files that come with the model.

    transformers by `auto_map` and the folder `custom_generate`, mlx-lm by `model_file`, diffusers by the files beside a
    `model_index.json`. What is too large to be read counts as well.
    """
    if (folder / "model_index.json").is_file() and any((*folder.glob("*.py"), *folder.glob("*/*.py"))):
        return True
    if (folder / "custom_generate" / "generate.py").is_file():
        return True
    found = (path for name in _CONFIGURATIONS for path in (folder / name, *folder.glob(f"*/{name}")))
    return any(_names_code(path) for path in found if path.is_file())


def weights(*folders: str | Path) -> dict[str, Any]:
    """Return what `from_pretrained` of a model is given; raise `Refused` for what the job does not permit."""
    permitted = _permitted()
    if permitted is None:
        return {}
    for folder in map(Path, folders):
        if PICKLED_WEIGHTS not in permitted and has_pickled_weights(folder):
            _refuse(f"the weights in {folder} are pickles, and loading them can run code", PICKLED_WEIGHTS)
    safe = {} if PICKLED_WEIGHTS in permitted else {"use_safetensors": True}
    return safe | code(*folders)


def code(*folders: str | Path) -> dict[str, Any]:
    """Return what `from_pretrained` of a tokenizer or a configuration is given; raise `Refused` like `weights`."""
    permitted = _permitted()
    if permitted is None:
        return {}
    for folder in map(Path, folders):
        if CUSTOM_CODE not in permitted and asks_for_code(folder):
            _refuse(f"a configuration in {folder} names Python files to run (auto_map, model_file)", CUSTOM_CODE)
    return {"trust_remote_code": CUSTOM_CODE in permitted}


def _pickled(folder: Path) -> bool:
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return False
    found: Iterable[Path] = (path for pattern in _TORCH for path in folder.glob(pattern))
    return any(not path.is_dir() and not path.name.startswith(_STATE) for path in found)


def _names_code(path: Path) -> bool:
    with path.open("rb") as stream:
        content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        return True
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False  # no library reads it either
    return isinstance(found, dict) and any(found.get(key) for key in _KEYS)


def _permitted() -> frozenset[str] | None:
    given = os.environ.get(PERMITS)
    return None if given is None else frozenset(given.split(","))


def _refuse(what: str, permission: str) -> None:
    from deepe_rows import Refused

    option = permission.replace("_", "-")
    raise Refused(f"{what}; a developer has to allow it for the base model: deepe base-models allow NAME --{option}")
