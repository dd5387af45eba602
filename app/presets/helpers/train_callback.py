"""Log records of a stage, and the Trainer callback that writes them while a model trains.

Importable without transformers: scripts of small environments need `write_log` only.
A record goes to stdout (`[log_data]: <json>`), to the day's file in `../logs`, and its metrics to `$DEEPE_EVENTS`.
"""

import json
import math
import sys
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import deepe
from enums import LevelEnum, LogEnum, StatusEnum

if TYPE_CHECKING:

    class TrainerCallback: ...
else:
    try:
        from transformers import TrainerCallback
    except Exception:  # absent, or broken by a missing library: `write_log` works without it

        class TrainerCallback:
            """Stand-in where transformers cannot be imported."""


__all__ = ["LevelEnum", "LogEnum", "StatusEnum", "TrainCallback", "TrainerCallback", "write_log"]

METRICS = (
    "step",
    "reward",
    "reward_std",
    "kl",
    "loss",
    "train_loss",
    "validation_loss",
    "bleu",
    "rouge",
    "perplexity",
    "learning_rate",
    "grad_norm",
    "epoch",
)
"""Keys of `details` in a record of code 200009; all are always there."""

_ALIASES = {"validation_loss": "eval_loss", "bleu": "eval_bleu", "rouge": "eval_rouge", "perplexity": "eval_perplexity"}
_LOG_FILE = Path("..", "logs", f"{datetime.now().astimezone():%Y-%m-%d}-deep-e-python.jsonl")


def write_log(level: Any, logEnum: Any, details: Any, train_id: Any, seq: Any, external_data: Any) -> None:
    """Write one record. Mind the names: `details` becomes `msgDetail`, `external_data` becomes `details`."""
    _write_record(level, logEnum, details, train_id, seq, external_data)
    if _value(logEnum) == LogEnum.Training.value and isinstance(external_data, dict):
        _report(external_data, _step_of(external_data), None)


class TrainCallback(TrainerCallback):
    """Report each logged step of a Trainer as a record of code 200009, with the values of that very step."""

    def __init__(self, logging_steps: int, taskUuid: str, seq: int | str) -> None:
        super().__init__()
        self.logging_steps = logging_steps
        self.taskUuid = taskUuid
        self.seq = seq
        self.metrics: list[dict[str, Any]] = []
        self.sse_queue: Queue[dict[str, Any]] = Queue()
        self._reported: dict[str, Any] | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Report what the Trainer has just measured; in a group of processes only the first one speaks."""
        if logs and getattr(state, "is_world_process_zero", True):
            self._emit(logs, int(state.global_step), getattr(state, "max_steps", 0))
            self._reported = state.log_history[-1] if state.log_history else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the newest entry of the history unless `on_log` has done so already."""
        if not state.log_history or state.log_history[-1] is self._reported:
            return
        self._reported = state.log_history[-1]
        self._emit(self._reported, int(state.global_step), getattr(state, "max_steps", 0))

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Take a report of an MLX trainer (`iteration`, `train_loss`, `learning_rate`, ...)."""
        step = _step_of(train_info, "iteration")
        self._emit({"loss": train_info.get("train_loss"), **train_info}, step, 0)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Take a validation report of an MLX trainer (`iteration`, `val_loss`, ...)."""
        self._emit({"validation_loss": val_info.get("val_loss"), **val_info}, _step_of(val_info, "iteration"), 0)

    def _emit(self, logs: dict[str, Any], step: int, total: int) -> None:
        details = {key: logs.get(key, logs.get(_ALIASES.get(key, key))) for key in METRICS} | {"step": step}
        percent = str(round(100 * step / total, 2)) if total > 0 else ""
        self.metrics.append(details)
        self.sse_queue.put(details)
        _write_record(LevelEnum.INFO, LogEnum.Training, percent, self.taskUuid, self.seq, details)
        _report(logs, step, total if total > 0 else None)


def _write_record(level: Any, code: Any, message: Any, train_id: Any, seq: Any, details: Any) -> None:
    record = {
        "level": str(getattr(level, "name", level)).lower(),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "taskUuid": train_id,
        "seq": seq,
        "msgDetail": message,
        "msg": _value(code),
        "details": details,
    }
    line = json.dumps(_finite(record), default=str)
    sys.stdout.write(f"[log_data]: {line}\n")
    sys.stdout.flush()
    if not deepe.is_first():  # of a group of processes one writes the file; what the others print carries their rank
        return
    try:
        with _LOG_FILE.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        sys.stdout.write(f"Write Error: {error}\n")


def _report(values: dict[str, Any], step: int, total: int | None) -> None:
    numbers = {key: value for key, value in values.items() if key != "step" and _is_number(value)}
    if numbers:
        deepe.metrics(step, **numbers)
    if total is not None:
        deepe.progress(step, total)


def _step_of(values: dict[str, Any], key: str = "step") -> int:
    step = values.get(key, 0)
    return int(step) if _is_number(step) and math.isfinite(step) else 0


def _value(code: Any) -> Any:
    return code.value if isinstance(code, Enum) else code


def _is_number(value: Any) -> bool:
    return hasattr(value, "item") or (isinstance(value, int | float) and not isinstance(value, bool))


def _finite(value: Any) -> Any:
    """Return `value` with NaN and infinity as null, so that every line is JSON that any reader takes."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_finite(entry) for entry in value]
        case _ if hasattr(value, "item"):
            return _finite(value.item())
        case _:
            return value
