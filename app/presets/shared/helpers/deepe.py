"""What a stage script tells the platform, and what the platform told the script. Standard library only.

    import deepe

    deepe.catch_stop()
    for step in range(1, steps + 1):
        loss = train_one(batch)
        deepe.metrics(step, loss=loss, learning_rate=rate)
        deepe.progress(step, steps)
        if step % 100 == 0 or deepe.stop_requested():
            save_everything(output / f"checkpoint-{step}")
            deepe.checkpoint(output / f"checkpoint-{step}", step)
        if deepe.stop_requested():
            sys.exit(deepe.STOPPED)

Every call appends one JSON line to the file named by `$DEEPE_EVENTS`; without that variable nothing happens, so the
same script runs by hand. A line is one `write` on a file opened for appending: lines of several processes never mix.
In a group of processes (torchrun, accelerate) rank 0 speaks for all; calls of the others do nothing.
"""

import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STOPPED = 128 + signal.SIGTERM
"""Exit code of a script that was asked to stop and left a checkpoint: never a success."""

_CHECKPOINT = "deepe-checkpoint.json"
_BLOCK_BYTES = 1024 * 1024
_SAMPLES = 64

listeners: list[Callable[[int, dict[str, Any]], None]] = []
"""Called with the step and the values of every `metrics`."""

_stop = False
_catching = False


def metrics(step: int, **values: Any) -> None:
    """Report the curves' points of one training step. Names are free; what is not a finite number becomes null."""
    for listener in listeners:
        listener(int(step), values)
    _append("metrics", step=int(step), values={name: _number(value) for name, value in values.items()})


def progress(step: int, total: int | None = None, message: str | None = None) -> None:
    """Report how far the work is; `total` is None while it is unknown."""
    _append("progress", step=int(step), total=None if total is None else int(total), message=message)


def evaluation(phase: str, value: float, samples: int, name: str = "exact_match") -> None:
    """Report a score on held-out rows; `phase` is `before` or `after` the training."""
    _append("evaluation", name=name, phase=phase, value=_number(value), samples=int(samples))


def sample(phase: str, number: int, prompt: str, wanted: str, answer: str) -> None:
    """Report what a held-out prompt is answered with; `number` tells which one it is, in both phases the same.

    The platform keeps 10,000 characters of each text.
    """
    _append("sample", phase=phase, number=int(number), prompt=str(prompt), wanted=str(wanted), answer=str(answer))


def artifact(path: str | os.PathLike[str], kind: str = "file") -> None:
    """Report a file or folder that the script made, such as a checkpoint."""
    _append("artifact", path=os.fspath(path), kind=kind)


def checkpoint(folder: str | os.PathLike[str], step: int) -> None:
    """Declare a folder a whole checkpoint: everything is written. Call it last, before the next step.

    Writes `deepe-checkpoint.json` with the size and digest of every file, by which the platform knows later that the
    folder is what was written; of files above 64 MiB samples are read, so it takes the same moment for any size.
    Of a group of processes, call it when all have written their part.
    """
    if not is_first():
        return
    folder = Path(folder)
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        files = [
            {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": _digest(path)}
            for path in paths
            if _CHECKPOINT not in path.name
        ]
        draft = folder / f".{_CHECKPOINT}.part"
        draft.write_text(json.dumps({"format": 1, "step": int(step), "files": files}), "utf-8")
        os.replace(draft, folder / _CHECKPOINT)
    except OSError as error:  # the training goes on; the platform takes the checkpoint before this one
        sys.stderr.write(f"deepe: cannot declare {folder.name}: {error}\n")
        return
    artifact(folder, "checkpoint")


def resume_from() -> Path | None:
    """Return the checkpoint to go on from: that of an earlier attempt, checked and in this attempt's output folder."""
    folder = os.environ.get("DEEPE_RESUME_FROM")
    return Path(folder) if folder else None


def note(message: str) -> None:
    """Report a sentence worth reading, such as "122 of 1000 rows are longer than max_seq_length and were left out"."""
    _append("note", message=str(message))


def status(task: str, value: int) -> None:
    """Report the status of a task of DeepExtension: 1 succeeded, 2 runs, 3 failed."""
    _append("status", task=str(task), status=int(value))


def result(status: str = "success", **values: Any) -> None:
    """Print the result of a saving or deployment stage; the last JSON line of the output is the one that counts."""
    sys.stdout.write(json.dumps({"status": status, **values}, ensure_ascii=True, default=str) + "\n")
    sys.stdout.flush()


def params() -> dict[str, Any]:
    """Return all parameters of the job with their JSON types (`$DEEPE_PARAMS`); empty when run by hand."""
    file = os.environ.get("DEEPE_PARAMS")
    if not file or not Path(file).is_file():
        return {}
    loaded = json.loads(Path(file).read_text("utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def output_dir(default: str | os.PathLike[str] = "outputs") -> Path:
    """Return the folder that this attempt writes to (`$DEEPE_OUTPUT_DIR`), made if it is missing."""
    folder = Path(os.environ.get("DEEPE_OUTPUT_DIR") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def use_threads(count: int) -> None:
    """Compute with so many threads, unless OMP_NUM_THREADS says so already; call it before importing torch."""
    os.environ.setdefault("OMP_NUM_THREADS", str(count))


def catch_stop() -> None:
    """From here on SIGTERM only sets a flag: look at `stop_requested()`, save what is worth keeping, and exit."""
    global _catching
    if not _catching:
        signal.signal(signal.SIGTERM, _remember_stop)
        _catching = True


def end(code: int = 0) -> None:
    """End the process now, without the interpreter's own end; what was printed is kept."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop_requested() -> bool:
    """Whether SIGTERM has arrived since `catch_stop()`."""
    return _stop


def _remember_stop(_number: int, _frame: object) -> None:
    global _stop
    _stop = True


def is_first() -> bool:
    """Whether this process is alone, or rank 0 of a group: the one that reports, and writes what all share."""
    return os.environ.get("RANK", "0") == "0"


def _digest(path: Path) -> str:
    """Return the sha256 of a file; of a large one, that of blocks spread over it, the first and the last included."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        last = size - _BLOCK_BYTES
        whole = size <= _SAMPLES * _BLOCK_BYTES
        for offset in range(0, size, _BLOCK_BYTES) if whole else [last * i // (_SAMPLES - 1) for i in range(_SAMPLES)]:
            file.seek(offset)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _append(event: str, /, **fields: Any) -> None:
    file = os.environ.get("DEEPE_EVENTS")
    if not file or not is_first():
        return
    line = json.dumps({"type": event, "time": time.time(), **fields}, allow_nan=False, default=str) + "\n"
    try:
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
    except OSError as error:  # a full disk must not end a training of hours: the curve has a hole, the model is kept
        sys.stderr.write(f"deepe: cannot write an event: {error}\n")


def _number(value: Any) -> float | int | None:
    """Return a JSON number; tensors and numpy scalars come with `item()`, everything else that is no number is null."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError):  # more than one element
            return None
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float) and math.isfinite(value):
        return value
    return None
