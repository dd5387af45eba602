"""What a stage left behind: is it a model that can be loaded, and which bytes is it made of.

The checks are those of base models (`app.registry.models.check`). They read files, which blocks: call them in a thread.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pydantic import ConfigDict

from app.domain.enums import EndReason
from app.domain.kinds import Stage
from app.domain.plain_text import shown
from app.domain.values import Value
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
from app.registry.models.folders import CHECKPOINT, copy_links_in, relative_name, walk
from app.registry.resource_paths import stays_inside

_PIECE_BYTES = 128 * 1024 * 1024
_BLOCK_BYTES = 1024 * 1024
_MAX_DETAIL = 500
_NUMBER_AT_END = re.compile(r"(\d{1,15})\Z")
_DEPTH, _FOLDERS = 3, 1000  # how far a model is looked for that lies elsewhere


class ArtifactKind(StrEnum):
    """Shape of a model on disk."""

    ADAPTER = "adapter"
    MLX_ADAPTER = "mlx-adapter"
    IMAGE_ADAPTER = "image-adapter"
    MODEL = "model"
    PIPELINE = "pipeline"


ADAPTERS: Final = frozenset({ArtifactKind.ADAPTER, ArtifactKind.MLX_ADAPTER, ArtifactKind.IMAGE_ADAPTER})
SAVED: Final = "saved"
"""Folder into which a training writes the complete model beside its adapter."""


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


class FileDigest(Value):
    """One file of a model; `path` is relative to the model's folder, in a printable form."""

    model_config = ConfigDict(frozen=True)

    path: str
    size: int
    sha256: str


class ResultManifest(Value):
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


def find_model(output_dir: Path, output: str | None, *, complete: bool) -> Artifact:
    """Return the model of a stage, where its method says that it lies: `output`, else the output folder itself.

    Of several folders that a pattern names, it is the one with the highest number at its end, else the newest. Raises
    `ArtifactProblem`; where the model lies in another folder, its text names that one and the member to write.
    """
    root: Path | None = None
    try:
        root = _named(output_dir, output)
        return check_complete(root) if complete else check_customized(root)
    except ArtifactProblem as problem:
        if root is None or not _looks_like_model(root, complete=complete):
            found = _elsewhere(output_dir, complete=complete)
            if found is not None:
                cure = MissingFile("model_lies_elsewhere", output or output_dir, found=found, output=_pattern(found))
                raise ArtifactProblem(problem.reason, f"{problem.detail} {cure}") from problem
        raise


def saved_beside(artifact: Artifact, output_dir: Path) -> Artifact | None:
    """Return the complete model in the folder `saved` beside an adapter. `None` if there is none that is whole."""
    if artifact.kind not in ADAPTERS:
        return None
    for folder in dict.fromkeys((artifact.root / SAVED, output_dir / SAVED)):
        if folder != artifact.root and looks_complete(folder):
            with suppress(ArtifactProblem):
                return check_complete(folder)
    return None


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
        saved = folder / SAVED
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
    temporary.unlink(missing_ok=True)  # a script may have put a link there
    with temporary.open("x", encoding="utf-8") as file:
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


def _named(output_dir: Path, output: str | None) -> Path:
    """Return the folder that the method names. Raises `ArtifactProblem` if there is none."""
    if output is None:
        return output_dir
    found = [path for path in output_dir.glob(output) if path.is_dir() and stays_inside(output_dir, path)]
    if not found:
        with _problems_of_files():
            raise MissingFile("output_not_there", output, holds=listing(output_dir))
    return max(found, key=lambda path: (_last_number(path.name), path.stat().st_mtime_ns, path.name))


def _last_number(name: str) -> int:
    match = _NUMBER_AT_END.search(name)
    return int(match[1]) if match else -1


def _elsewhere(output_dir: Path, *, complete: bool) -> str | None:
    """Return the folder below the output folder that looks like a model, the highest one; `None` without one."""
    waiting = [output_dir] if output_dir.is_dir() else []
    for _ in range(_DEPTH):
        below = [entry for folder in waiting for entry in sorted(folder.iterdir()) if entry.is_dir()][:_FOLDERS]
        below = [folder for folder in below if not folder.is_symlink()]
        models = [folder for folder in below if _looks_like_model(folder, complete=complete)]
        if models:
            plain = [folder for folder in models if not folder.name.startswith(CHECKPOINT)]
            best = max(plain or models, key=lambda folder: _last_number(folder.name))
            return best.relative_to(output_dir).as_posix()
        waiting = below
    return None


def _looks_like_model(folder: Path, *, complete: bool) -> bool:
    adapters = () if complete else (ADAPTER_CONFIG, IMAGE_ADAPTER, MLX_ADAPTER)
    return looks_complete(folder) or any((folder / name).is_file() for name in adapters)


def _pattern(found: str) -> str:
    """Return what a method writes to find such a folder again: the number of a checkpoint differs in each run."""
    parent, _, name = found.rpartition("/")
    name = f"{CHECKPOINT}*" if name.startswith(CHECKPOINT) else name
    return f"{parent}/{name}" if parent else name


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
