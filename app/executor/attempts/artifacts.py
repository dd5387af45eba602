"""What a stage left behind: is it a model that can be loaded, and which bytes is it made of.

The checks are those of base models (`app.registry.models.check`). They read files, which blocks: call them in a thread.
"""

import asyncio
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from app.domain.enums import EndReason
from app.domain.kinds import Stage
from app.domain.plain_text import shown
from app.registry.models.check import (
    ADAPTER_CONFIG,
    CONFIG,
    IMAGE_ADAPTER,
    MAX_JSON_BYTES,
    MLX_ADAPTER,
    PIPELINE,
    check_adapter,
    check_pipeline,
    check_weights,
    listing,
    looks_complete,
    torch_files,
)
from app.registry.models.files import MissingFile, UnusableFile, check_tensor_file, read_json_object
from app.registry.models.folders import copy_links_in, relative_name, walk

_PIECE_BYTES = 128 * 1024 * 1024
_BLOCK_BYTES = 1024 * 1024
_MAX_DETAIL = 500


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

    Links to files become copies. Raises `ArtifactProblem` if there is neither or if it cannot be loaded.
    """
    _require_folder(folder)
    with _problems_of_files():
        copy_links_in(folder)
        return customized_artifact(folder)


def customized_artifact(folder: Path) -> Artifact:
    """Return the customized model in `folder`; its files stay as they are. Raises `UnusableFile`."""
    for name, kind in ((IMAGE_ADAPTER, ArtifactKind.IMAGE_ADAPTER), (MLX_ADAPTER, ArtifactKind.MLX_ADAPTER)):
        if (weights := folder / name).is_file():
            check_tensor_file(weights)
            return Artifact(kind, folder)
    if (folder / ADAPTER_CONFIG).is_file():
        check_adapter(folder)
        return Artifact(ArtifactKind.ADAPTER, folder)
    if looks_complete(folder) or ((folder / CONFIG).is_file() and torch_files(folder)):
        return complete_artifact(folder)
    if any(folder.glob("adapter_model.*")):
        raise MissingFile("model_file_missing", ADAPTER_CONFIG)
    raise MissingFile("no_model_in_folder", folder, holds=listing(folder))


def check_complete(folder: Path) -> Artifact:
    """Return the self-contained model in `folder`, else the one in `folder/saved`.

    Links to files become copies. Raises `ArtifactProblem`.
    """
    _require_folder(folder)
    with _problems_of_files():
        copy_links_in(folder)
        saved = folder / "saved"
        return complete_artifact(folder if looks_complete(folder) or not looks_complete(saved) else saved)


def check_safetensors(path: Path) -> frozenset[str]:
    """Return the names of the tensors. Raises `ArtifactProblem` unless header and size fit each other."""
    with _problems_of_files():
        return frozenset(check_tensor_file(path).tensors)


async def digest_files(root: Path) -> tuple[FileDigest, ...]:
    """Return size and sha256 of every file of the model in `root`.

    A large model takes many minutes. It is read in pieces, each in a thread, so a cancellation is met within moments.
    """
    digests = []
    for path in (await asyncio.to_thread(walk, root)).files:
        digest, size = hashlib.sha256(), 0
        while read := await asyncio.to_thread(_digest_piece, digest, path, size):
            size += read
        digests.append(FileDigest(path=relative_name(root, path), size=size, sha256=digest.hexdigest()))
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


def complete_artifact(root: Path) -> Artifact:
    """Return the self-contained model in `root`; its files stay as they are. Raises `UnusableFile`."""
    if (root / PIPELINE).is_file():
        check_pipeline(root, pickles=False)
        return Artifact(ArtifactKind.PIPELINE, root)
    if not (root / CONFIG).is_file():
        raise MissingFile("model_config_missing", CONFIG, holds=listing(root))
    read_json_object(root / CONFIG, max_bytes=MAX_JSON_BYTES)
    check_weights(root, pickles=False)
    return Artifact(ArtifactKind.MODEL, root)


@contextmanager
def _problems_of_files() -> Iterator[None]:
    try:
        yield
    except UnusableFile as exc:
        missing = isinstance(exc, MissingFile)
        raise ArtifactProblem(EndReason.OUTPUT_MISSING if missing else EndReason.OUTPUT_INVALID, str(exc)) from exc


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ArtifactProblem(EndReason.OUTPUT_MISSING, f"the folder {folder.name} does not exist")
