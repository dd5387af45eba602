"""Checkpoints that attempts left: which one is whole, and how the next attempt gets it.

A checkpoint is a folder in an attempt's output. It counts when it is proven whole, in one of two ways. The helper
`deepe.checkpoint` writes `deepe-checkpoint.json` last: files, sizes and digests. Without that file, a folder
`checkpoint-<step>` that transformers' Trainer wrote counts: its `trainer_state.json` comes last, and every file that
can be checked without a machine-learning library is. Anything else is passed over: to begin anew costs time, a broken
beginning costs the attempt.

Large files are digested by samples (`SAMPLES` blocks of `BLOCK_BYTES`, the first and the last among them): size and
samples find what was cut off, overwritten or never reached the disk, and cost the same however large the file is.

The next attempt gets hard links in its own output folder, copies where links are not possible; nothing is moved, since
a process on an unreachable node may still write. Everything here reads and writes files: call it in a thread.
"""

import contextlib
import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.executor.attempts.artifacts import ArtifactProblem, check_safetensors
from app.executor.runs.run_folder import RunFolder
from app.registry.models.files import MIB, UnusableFile, read_json_object
from app.store.home import Home

MANIFEST = "deepe-checkpoint.json"
TRAINER_STATE = "trainer_state.json"
BLOCK_BYTES = 1024 * 1024
SAMPLES = 64
_MAX_JSON_BYTES = 64 * MIB
_NAMED_BY_STEP = re.compile(r"checkpoint-(\d+)\Z")
_TORCH = frozenset({".pt", ".pth", ".bin"})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole, and whose it is."""

    job_id: str
    attempt: int
    folder: Path
    step: int

    def record(self) -> dict[str, Any]:
        """Return what an attempt that resumes from it remembers."""
        return {"job": self.job_id, "attempt": self.attempt, "checkpoint": self.folder.name, "step": self.step}


class _NotWhole(Exception):
    """The folder is not a checkpoint to resume from."""


def newest_checkpoint(home: Home, job_id: str, *, before: int | None = None) -> Checkpoint | None:
    """Return the checkpoint of the job that is farthest, of the attempts before `before`; None if none is whole."""
    found = [
        (step, attempt, folder)
        for attempt in _attempts(home, job_id)
        if before is None or attempt < before
        for folder, step in _candidates(RunFolder(home.run_folder(job_id, attempt)).output)
    ]
    for claimed, attempt, folder in sorted(found, reverse=True):
        with contextlib.suppress(_NotWhole, OSError):
            step = whole_step(folder)
            if step == claimed:
                return Checkpoint(job_id=job_id, attempt=attempt, folder=folder, step=step)
    return None


def hand_on(checkpoint: Checkpoint, output: Path) -> Path:
    """Put the checkpoint into another attempt's output folder and return it there; safe to repeat.

    The one that a Trainer keeps as its best so far goes with it.
    """
    if (best := _best_before(checkpoint.folder)) is not None:
        _copy(best, output)
    return _copy(checkpoint.folder, output)


def whole_step(folder: Path) -> int:
    """Return the step of a checkpoint that is whole; raise `_NotWhole` or `OSError` for any other folder."""
    if (folder / MANIFEST).is_file():
        manifest = _read_object(folder / MANIFEST)
        _check_against(folder, manifest)
        return _step(manifest.get("step"))
    state = _read_object(folder / TRAINER_STATE)
    step = _step(state.get("global_step"))
    if folder.name != f"checkpoint-{step}":
        raise _NotWhole(f"{folder.name} holds step {step}")
    if not sum(_is_weights(path) for path in _files(folder)):
        raise _NotWhole(f"{folder.name} holds no weights")
    for path in _files(folder):
        _check_structure(path)
    return step


# ---- finding --------------------------------------------------------------------------------------------------------


def _attempts(home: Home, job_id: str) -> Sequence[int]:
    runs = home.run_folder(job_id, 1).parent
    if not runs.is_dir():
        return ()
    return [int(path.name) for path in runs.iterdir() if path.name.isdigit()]


def _candidates(output: Path) -> Iterator[tuple[Path, int]]:
    """Return the folders that may be checkpoints, with the step that they claim."""
    if not output.is_dir():
        return
    for folder in output.iterdir():
        if folder.name.startswith(".") or folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(_NotWhole, OSError):
            if (folder / MANIFEST).is_file():
                yield folder, _step(_read_object(folder / MANIFEST).get("step"))
            elif named := _NAMED_BY_STEP.match(folder.name):
                yield folder, int(named[1])


# ---- checking -------------------------------------------------------------------------------------------------------


def _check_against(folder: Path, manifest: Mapping[str, Any]) -> None:
    files = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(files, list) or not files:
        raise _NotWhole("a manifest of another kind")
    for entry in files:
        try:
            path, size, digest = folder / entry["path"], entry["size"], entry["sha256"]
        except (TypeError, KeyError) as error:
            raise _NotWhole("a manifest of another kind") from error
        if not path.resolve().is_relative_to(folder.resolve()):
            raise _NotWhole(f"{entry['path']} is outside of the checkpoint")
        if path.stat().st_size != size or sampled_digest(path) != digest:
            raise _NotWhole(f"{entry['path']} is not what was written")


def sampled_digest(path: Path) -> str:
    """Return the sha256 of the file, of a large one that of its samples; as the helper `deepe` does."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        last = size - BLOCK_BYTES
        whole = size <= SAMPLES * BLOCK_BYTES
        offsets = range(0, size, BLOCK_BYTES) if whole else [last * i // (SAMPLES - 1) for i in range(SAMPLES)]
        for offset in offsets:
            file.seek(offset)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _check_structure(path: Path) -> None:
    if path.suffix == ".safetensors":
        try:
            check_safetensors(path)
        except ArtifactProblem as problem:
            raise _NotWhole(problem.detail) from problem
    elif path.suffix in _TORCH and not zipfile.is_zipfile(path):
        raise _NotWhole(f"{path.name} is cut off or no torch file")
    elif path.suffix == ".json":
        _read_object(path)


def _is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.suffix in _TORCH


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, max_bytes=_MAX_JSON_BYTES)
    except UnusableFile as error:
        raise _NotWhole(f"{path.name} cannot be read: {error}") from error


def _step(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _NotWhole("its step is no count")
    return value


# ---- handing on -----------------------------------------------------------------------------------------------------


def _best_before(folder: Path) -> Path | None:
    """Return the checkpoint that the Trainer's state of another one names as the best; None if it is not whole."""
    with contextlib.suppress(_NotWhole, OSError):
        best = _step(_read_object(folder / TRAINER_STATE).get("best_global_step"))
        if (found := folder.with_name(f"checkpoint-{best}")) != folder and whole_step(found) == best:
            return found
    return None


def _copy(folder: Path, output: Path) -> Path:
    target = output / folder.name
    if target.exists():  # a crash behind the rename: it came whole
        return target
    draft = output / f".{folder.name}.handed-on"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(folder, draft, copy_function=_link_or_copy, ignore=_links)
    draft.rename(target)
    return target


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links; a full disk says so again
        shutil.copy2(source, target)
    return target


def _links(folder: str, names: list[str]) -> list[str]:
    """Leave links out: what they point to is no part of the checkpoint."""
    return [name for name in names if Path(folder, name).is_symlink()]
