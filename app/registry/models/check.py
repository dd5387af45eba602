"""Check that the weights of a model are whole, by names and headers: results of jobs and base models alike.

Shards are compared with their index, sizes with headers. No weight is read and no pickle is loaded: a truncated or
half-written file is found, wrong numbers are not. Everything here blocks: call it in a thread. What is wrong is raised
as `UnusableFile`, what is not there as `MissingFile`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from app.domain.plain_text import shown
from app.registry.models.files import (
    MAX_HEADER_BYTES,
    MIB,
    MissingFile,
    UnusableFile,
    check_tensor_file,
    check_torch_file,
    count_elements,
    read_json_object,
)

CONFIG: Final = "config.json"
PIPELINE: Final = "model_index.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
IMAGE_ADAPTER: Final = "pytorch_lora_weights.safetensors"
MLX_ADAPTER: Final = "adapters.safetensors"
MAX_JSON_BYTES: Final = 64 * MIB
MAX_HEADERS_BYTES: Final = 64 * MIB
"""Of all files of a model together."""
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)\Z")
_TORCH: Final = ("pytorch_model*.bin", "model*.bin", "diffusion_pytorch_model*.bin")
_EMBEDDINGS: Final = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "shared.weight",
    "embed_in.weight",
)  # fmt: skip
_SHOWN_FILES: Final = 8


@dataclass
class Weights:
    """What the headers of checked files say of the weights; files of torch have none."""

    max_header_bytes: int = MAX_HEADER_BYTES
    elements: int = 0
    dtypes: set[str] = field(default_factory=set)
    embedding_rows: int | None = None
    """Of the table of input tokens."""
    checked: set[Path] = field(default_factory=set)
    pickled: list[Path] = field(default_factory=list)
    _header_bytes: int = 0

    def add(self, path: Path) -> Mapping[str, Any]:
        """Check a safetensors file, count what it holds and return its tensors."""
        header = check_tensor_file(path, max_bytes=self.max_header_bytes)
        self.checked.add(path)
        self._header_bytes += header.data_offset
        if self._header_bytes > MAX_HEADERS_BYTES:
            raise UnusableFile("weights_headers_too_large", path.parent, mib=MAX_HEADERS_BYTES // MIB)
        for name, tensor in header.tensors.items():
            self.elements += count_elements(tensor["shape"])
            self.dtypes.add(shown(tensor["dtype"]))
            if name.endswith(_EMBEDDINGS) and len(tensor["shape"]) == 2:
                self.embedding_rows = max(self.embedding_rows or 0, tensor["shape"][0])
        return header.tensors


def check_weights(folder: Path, *, pickles: bool, found: Weights | None = None) -> Weights:
    """Check the weights of one folder as its index says, else all in it; return what is known of them.

    With `pickles`, files of torch are weights as well, where there are no others.
    """
    found = found or Weights()
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    weights = tensor_files(folder)
    if not weights and not indexes and (torch := torch_files(folder)):
        if not pickles:
            raise MissingFile("weights_pickled", torch[0])
        _check_torch(folder, torch)
        found.pickled += torch
        return found
    for index in indexes:
        _check_index(index, found)
    if not weights:
        raise MissingFile("weights_missing", folder, holds=listing(folder))
    if not indexes:
        check_shards(weights)
    for path in weights:
        if path not in found.checked:
            found.add(path)
    return found


def check_pipeline(folder: Path, *, pickles: bool, found: Weights | None = None) -> Weights:
    """Check a diffusers folder: every component that the index names is there, and its weights are whole."""
    found = found or Weights()
    index = read_json_object(folder / PIPELINE, max_bytes=MAX_JSON_BYTES)
    for name in sorted(components(index)):
        component = folder / name
        if Path(name).name != name or not component.is_dir() or not any(component.iterdir()):
            raise MissingFile("pipeline_component_missing", PIPELINE, component=shown(name))
        if any(component.glob("*.safetensors*")) or (pickles and torch_files(component)):
            check_weights(component, pickles=pickles, found=found)
    if not found.checked and not found.pickled and not any(folder.glob("*/*.safetensors")):
        raise MissingFile("weights_missing", folder, holds=listing(folder))
    return found


def check_adapter(folder: Path) -> None:
    """Check an adapter of PEFT."""
    read_json_object(folder / ADAPTER_CONFIG, max_bytes=MAX_JSON_BYTES)
    weights = sorted(folder.glob("adapter*.safetensors"))
    pickled = folder / "adapter_model.bin"
    if not weights and not pickled.is_file():
        raise MissingFile("adapter_weights_missing", folder)
    check_shards(weights)
    for path in weights:
        check_tensor_file(path)
    if not weights:
        check_torch_file(pickled)


def check_shards(weights: Iterable[Path]) -> None:
    """Check by their names that all of `x-00001-of-00003.safetensors` are there."""
    names = {path.name for path in weights}
    for name in sorted(names):
        if match := _SHARD.match(name):
            count = int(match["count"])
            for number in range(1, count + 1):
                expected = f"{match['stem']}-{number:05d}-of-{count:05d}{match['suffix']}"
                if expected not in names:
                    raise MissingFile("weights_shard_missing", expected, index=name)


def components(index: dict[str, Any]) -> list[str]:
    """Return the folders that a `model_index.json` names."""
    return [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and all(value)]


def tensor_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder that are no adapter's."""
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("adapter")]


def torch_files(folder: Path) -> list[Path]:
    """Return the pickled weights of a folder."""
    return sorted({path for pattern in _TORCH for path in folder.glob(pattern) if not path.is_dir()})


def has_adapter(folder: Path) -> bool:
    """Say whether the files of an adapter stand in the folder."""
    names = (ADAPTER_CONFIG, IMAGE_ADAPTER, MLX_ADAPTER)
    return any((folder / name).is_file() for name in names) or any(folder.glob("adapter_model.*"))


def looks_complete(folder: Path) -> bool:
    """Say whether the folder looks like a model with safetensors weights of its own, whole or not."""
    if (folder / PIPELINE).is_file():
        return True
    if not (folder / CONFIG).is_file():
        return False
    return any(not path.name.startswith("adapter") for path in folder.glob("*.safetensors*"))


def listing(folder: Path) -> str:
    """Return the first names in a folder as a sentence shows them; a hyphen if there are none."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return shown(", ".join(names[:_SHOWN_FILES]) + (", ..." if len(names) > _SHOWN_FILES else ""), limit=300) or "-"


def _check_index(index: Path, found: Weights) -> None:
    for shard, tensors in sorted(_placed(index).items()):
        path = index.parent / shard
        if Path(shard).name != shard or not path.is_file():
            raise MissingFile("weights_shard_missing", shard, index=index.name)
        if missing := tensors - found.add(path).keys():
            raise UnusableFile("weights_tensors_missing", path, count=len(missing), example=shown(min(missing)))


def _check_torch(folder: Path, weights: Sequence[Path]) -> None:
    for index in sorted(folder.glob("*.bin.index.json")):
        for shard in sorted(_placed(index)):
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise MissingFile("weights_shard_missing", shard, index=index.name)
    check_shards(weights)
    for path in weights:
        check_torch_file(path)


def _placed(index: Path) -> dict[str, set[str]]:
    """Return which tensors an index places in which shard."""
    placed = read_json_object(index, max_bytes=MAX_JSON_BYTES).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UnusableFile("weights_index_empty", index)
    tensors_of: dict[str, set[str]] = {}
    for tensor, file in placed.items():
        tensors_of.setdefault(str(file), set()).add(tensor)
    return tensors_of
