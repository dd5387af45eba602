"""The Trainer callback that writes log records while a model trains; `write_log` is here for scripts that expect it.

Importable without transformers. Where that is installed, this takes as long as importing it, which is most of a start:
who only logs imports `deepe_log`.
"""

from queue import Queue
from typing import TYPE_CHECKING, Any

from deepe_log import report, step_of, write_log, write_record
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
        step = step_of(train_info, "iteration")
        self._emit({"loss": train_info.get("train_loss"), **train_info}, step, 0)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Take a validation report of an MLX trainer (`iteration`, `val_loss`, ...)."""
        self._emit({"validation_loss": val_info.get("val_loss"), **val_info}, step_of(val_info, "iteration"), 0)

    def _emit(self, logs: dict[str, Any], step: int, total: int) -> None:
        details = {key: logs.get(key, logs.get(_ALIASES.get(key, key))) for key in METRICS} | {"step": step}
        percent = str(round(100 * step / total, 2)) if total > 0 else ""
        self.metrics.append(details)
        self.sse_queue.put(details)
        write_record(LevelEnum.INFO, LogEnum.Training, percent, self.taskUuid, self.seq, details)
        report(logs, step, total if total > 0 else None)
