"""What a stage left behind: is it a model that can be loaded, and which bytes is it made of.

Weights are checked by their header, without any machine-learning library: a truncated or half-written file is found,
wrong numbers are not. The checks read files, which blocks: call them in a thread.
"""

import asyncio
import hashlib
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from app.domain.enums import EndReason
from app.domain.kinds import Stage
from app.domain.plain_text import MAX_PATH_LENGTH, shown
from app.registry.model_files import MIB, UnusableFile, count_elements, read_json_object, read_tensor_file

_MAX_JSON_BYTES = 64 * MIB
_PIECE_BYTES = 128 * 1024 * 1024
_BLOCK_BYTES = 1024 * 1024
_MAX_DETAIL = 500
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors\Z")


class ArtifactKind(StrEnum):
    """Shape of a model on disk."""

    ADAPTER = "adapter"
    MLX_ADAPTER = "mlx-adapter"
    IMAGE_ADAPTER = "image-adapter"
    MODEL = "model"
    PIPELINE = "pipeline"


class ArtifactProblem(Exception):
    """The folder holds no model that can be loaded. `reason` is `output_missing` or `output_invalid`."""

    def __init__(self, reason: EndReason, detail: str) -> None:
        self.reason = reason
        self.detail = shown(detail, limit=_MAX_DETAIL)  # names of files stand in it
        super().__init__(self.detail)


@dataclass(frozen=True)
class Artifact:
    """A model on disk that passed the check."""

    kind: ArtifactKind
    root: Path


class FileDigest(BaseModel):
    """One file of a model; `path` is relative to the model's folder, in a printable form."""

    model_config = ConfigDict(frozen=True)

    path: str
    size: int
    sha256: str


class ResultManifest(BaseModel):
    """What an attempt that succeeded made, byte for byte."""

    model_config = ConfigDict(frozen=True)

    format: int = 1
    job_id: str
    attempt: int
    stage: Stage
    kind: ArtifactKind | None = None
    root: str | None = None
    files: tuple[FileDigest, ...] = ()
    created_at: datetime
    result: dict[str, Any] | None = None

    @property
    def size_bytes(self) -> int:
        """Return the size of all files."""
        return sum(file.size for file in self.files)


def check_customized(folder: Path) -> Artifact:
    """Return the customized model in `folder`: an adapter (PEFT, MLX, image), else complete weights.

    Raises `ArtifactProblem` if there is neither or if it cannot be loaded.
    """
    _require_folder(folder)
    if (weights := folder / "pytorch_lora_weights.safetensors").is_file():
        check_safetensors(weights)
        return Artifact(ArtifactKind.IMAGE_ADAPTER, folder)
    if (weights := folder / "adapters.safetensors").is_file():
        check_safetensors(weights)
        return Artifact(ArtifactKind.MLX_ADAPTER, folder)
    if (folder / "adapter_config.json").is_file():
        _check_peft_adapter(folder)
        return Artifact(ArtifactKind.ADAPTER, folder)
    if _looks_complete(folder):
        return check_complete(folder)
    if any(folder.glob("adapter_model.*")):
        raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"adapter_config.json is missing in {folder.name}")
    raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"no adapter and no model in {folder.name}: {_listing(folder)}")


def check_complete(folder: Path) -> Artifact:
    """Return the self-contained model in `folder`, else the one in `folder/saved`. Raises `ArtifactProblem`."""
    _require_folder(folder)
    root = folder if _looks_complete(folder) or not _looks_complete(folder / "saved") else folder / "saved"
    if (root / "model_index.json").is_file():
        _check_pipeline(root)
        return Artifact(ArtifactKind.PIPELINE, root)
    if not (root / "config.json").is_file():
        raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"config.json is missing in {root.name}: {_listing(root)}")
    _read_object(root / "config.json")
    _check_weights(root)
    return Artifact(ArtifactKind.MODEL, root)


def check_safetensors(path: Path) -> frozenset[str]:
    """Return the names of the tensors. Raises `ArtifactProblem` unless header and size fit each other."""
    try:
        header = read_tensor_file(path)
        spans = [_span(entry) for entry in header.tensors.values()]
    except UnusableFile as exc:
        raise _invalid(path, str(exc)) from exc
    except (ValueError, TypeError, KeyError) as exc:
        raise _invalid(path, "its header cannot be read") from exc
    except OSError as exc:
        raise _invalid(path, exc.strerror or "it cannot be read") from exc
    if not spans:
        raise _invalid(path, "it holds no tensors")
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise _invalid(path, "its tensors overlap or leave gaps")
        position = end
    if (expected := header.data_offset + position) != header.size_bytes:
        raise _invalid(path, f"it has {header.size_bytes} bytes, its header says {expected}")
    return frozenset(header.tensors)


async def digest_files(root: Path) -> tuple[FileDigest, ...]:
    """Return size and sha256 of every file of the model in `root`; checkpoints and links are no part of it.

    A large model takes many minutes. It is read in pieces, each in a thread, so a cancellation is met within moments.
    """
    digests = []
    for path in await asyncio.to_thread(lambda: sorted(_model_files(root))):
        digest, size = hashlib.sha256(), 0
        while read := await asyncio.to_thread(_digest_piece, digest, path, size):
            size += read
        name = shown(path.relative_to(root).as_posix(), limit=MAX_PATH_LENGTH)
        digests.append(FileDigest(path=name, size=size, sha256=digest.hexdigest()))
    return tuple(digests)


def _digest_piece(digest: "hashlib._Hash", path: Path, offset: int) -> int:
    """Add what follows `offset` to the digest and return how much that was, 0 at the end of the file."""
    done = 0
    # opened for each piece: after a cancellation, a file that a thread still reads would stay open
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < _PIECE_BYTES and (block := file.read(_BLOCK_BYTES)):
            digest.update(block)
            done += len(block)
    return done


def write_result(path: Path, manifest: ResultManifest) -> None:
    """Write the manifest so that a reader sees all of it or none, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_result(path: Path) -> ResultManifest | None:
    """Return the manifest; None if none was written."""
    try:
        return ResultManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None


def _check_peft_adapter(folder: Path) -> None:
    _read_object(folder / "adapter_config.json")
    weights = sorted(folder.glob("adapter*.safetensors"))
    pickled = folder / "adapter_model.bin"
    if not weights and not pickled.is_file():
        raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"adapter weights are missing in {folder.name}")
    _check_shards_complete(weights)
    for path in weights:
        check_safetensors(path)
    if not weights:
        _check_torch_archive(pickled)


def _check_weights(folder: Path) -> None:
    """Check the weights of one folder: as its index says, else all safetensors files in it."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    for index in indexes:
        _check_index(index)
    weights = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("adapter")]
    if not weights:
        raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"no *.safetensors weights in {folder.name}")
    if not indexes:
        _check_shards_complete(weights)
    for path in weights:
        check_safetensors(path)


def _check_index(index: Path) -> None:
    placed = _read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise _invalid(index, "it has no weight_map")
    tensors_of: dict[str, set[str]] = {}
    for tensor, file in placed.items():
        tensors_of.setdefault(str(file), set()).add(tensor)
    for shard in sorted(tensors_of):
        path = index.parent / shard
        if Path(shard).name != shard or not path.is_file():
            raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"{index.name} names {shard}, which is missing")
        missing = tensors_of[shard] - check_safetensors(path)
        if missing:
            raise _invalid(path, f"{len(missing)} tensors of the index are missing, such as {min(missing)}")


def _check_shards_complete(weights: Iterable[Path]) -> None:
    """Check by their names that all of `x-00001-of-00003.safetensors` are there."""
    names = {path.name for path in weights}
    for name in sorted(names):
        if match := _SHARD.match(name):
            count = int(match["count"])
            for number in range(1, count + 1):
                expected = f"{match['stem']}-{number:05d}-of-{count:05d}.safetensors"
                if expected not in names:
                    raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"{expected} is missing")


def _check_pipeline(folder: Path) -> None:
    """Check a diffusers folder: every component that the index names is there, and its weights load."""
    index = _read_object(folder / "model_index.json")
    components = [name for name, value in index.items() if isinstance(value, list) and all(value)]
    for name in sorted(components):
        component = folder / name
        if not component.is_dir() or not any(component.iterdir()):
            raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"model_index.json names {name}, which is missing")
        if any(component.glob("*.safetensors*")):
            _check_weights(component)
    if not any(folder.glob("*/*.safetensors")):
        raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"no *.safetensors weights in {folder.name}")


def _check_torch_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise _invalid(path, "it is cut off or no torch file")


def _looks_complete(folder: Path) -> bool:
    if (folder / "model_index.json").is_file():
        return True
    if not (folder / "config.json").is_file():
        return False
    return any(not path.name.startswith("adapter") for path in folder.glob("*.safetensors*"))


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"the folder {folder.name} does not exist")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, max_bytes=_MAX_JSON_BYTES)
    except UnusableFile as exc:
        raise _invalid(path, str(exc)) from exc
    except OSError as exc:
        raise _invalid(path, exc.strerror or "it cannot be read") from exc


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of one tensor; raises ValueError if they do not fit its shape."""
    begin, end = entry["data_offsets"]
    dtype = entry["dtype"]
    if not isinstance(dtype, str):
        raise ValueError("the type of the numbers has no name")
    bits = _BITS.get(dtype)  # a type newer than this list cannot be checked
    elements = count_elements(entry["shape"])
    if not isinstance(begin, int) or not isinstance(end, int) or not 0 <= begin <= end:
        raise ValueError("offsets out of order")
    if bits is not None and (end - begin) * 8 != elements * bits:
        raise ValueError("offsets do not fit the shape")
    return begin, end


def _model_files(root: Path) -> Iterator[Path]:
    for directory, folders, names in os.walk(root):
        here = Path(directory)
        folders[:] = [name for name in folders if not name.startswith("checkpoint-") and not (here / name).is_symlink()]
        yield from (path for name in names if (path := here / name).is_file() and not path.is_symlink())


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return "it is empty"
    return "it holds " + ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _invalid(path: Path, what: str) -> ArtifactProblem:
    return ArtifactProblem(EndReason.OUTPUT_INVALID, f"{path.name} cannot be loaded: {what}")
