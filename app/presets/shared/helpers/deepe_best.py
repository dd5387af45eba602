"""The best step of a training on held-out rows, and early stopping by it, for loops that a script writes itself.

`deepe_scores` has the same for transformers' Trainer; what is refused and what is told is one.

    best = Best(args, ("eval_loss",))         # refuses at once what cannot work
    best.check_rows(held_out)
    done = resume(...)                        # with best.read(folder)
    for step in range(done + 1, steps + 1):
        if best.ended:
            break
        ...
        measured = best.add(step, metrics)    # then write a checkpoint, with best.write(folder, step)
    folder = best.end(output, step, steps)    # a folder: load its weights; None: they are the ones to keep

When older checkpoints are removed, the one with the name `best.name` stays.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepe_log import remark
from deepe_rows import Refused

STATE = "trainer_state.json"  # where the Trainer has it: by this name the platform hands the best on with the newest


def check_steps(args: argparse.Namespace, asked: str) -> None:
    """Refuse steps at which what is measured as the best would not be kept; `asked` names the argument."""
    if args.save_steps % args.eval_steps:
        raise Refused(
            f"{asked} keeps the best checkpoint: save_steps ({args.save_steps}) must be a multiple of "
            f"eval_steps ({args.eval_steps})"
        )


def check_rows(held_out: Sequence[Any], asked: str) -> None:
    """Refuse when there is nothing to measure on."""
    if not held_out:
        raise Refused(f"{asked} needs rows to measure on: hold some out with eval_fraction")


def tell_ended(step: int, steps: int, curve: str, args: argparse.Namespace) -> None:
    """Tell that a training has ended early."""
    times = args.early_stopping_patience
    remark(f"ended early at step {step} of {steps}: {curve} has not improved {times} times", args, warning=False)


def tell_best(step: int, curve: str, value: float, args: argparse.Namespace) -> None:
    """Tell which step's weights are kept."""
    remark(f"the weights are those of step {step}, the best: {curve} {value:.4g}", args, warning=False)


def tell_no_best(step: int, args: argparse.Namespace) -> None:
    """Tell that no step was the best, so that the last one's weights are kept."""
    remark(f"no best checkpoint is there; the weights are those of step {step}", args)


class Best:
    """The best step so far by a curve whose lower values are better, and how often in a row it was not improved."""

    def __init__(self, args: argparse.Namespace, curves: Sequence[str]) -> None:
        self.args, self.curve = args, f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        self.step, self.value, self.missed = 0, math.inf, 0
        patience = args.early_stopping_patience
        asked = {"early_stopping_patience": patience is not None, "load_best_model_at_end": args.load_best_model_at_end}
        self.asked = next((name for name, given in asked.items() if given), None)
        if patience is not None and patience < 1:
            raise Refused(f"early_stopping_patience must be at least 1, it is {patience}")
        if self.curve not in curves:
            raise Refused(f"metric_for_best_model is {self.curve}; what is measured: {', '.join(curves)}")
        if self.asked:
            check_steps(args, self.asked)

    def check_rows(self, held_out: Sequence[Any]) -> None:
        """Refuse when there is nothing to measure on."""
        if self.asked:
            check_rows(held_out, self.asked)

    @property
    def name(self) -> str:
        """Return the name of the best step's checkpoint."""
        return f"checkpoint-{self.step}"

    @property
    def ended(self) -> bool:
        """Whether the training is to end early."""
        return self.args.early_stopping_patience is not None and self.missed >= self.args.early_stopping_patience

    def add(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take what was measured at a step; return whether its checkpoint is to be written. NaN improves nothing.

        As the Trainer does: any lower value is the best, but patience counts what improves by more than the threshold.
        """
        if not self.asked or self.curve not in metrics:
            return False
        value = metrics[self.curve]
        self.missed = 0 if self.value - value > self.args.early_stopping_threshold else self.missed + 1
        if value < self.value:
            self.step, self.value = step, value
        return True

    def write(self, folder: Path, step: int, **more: Any) -> None:
        """Write into a checkpoint what a run that goes on has to know, with the script's own `more`."""
        found = {"best_global_step": self.step, "best_metric": self.value} if self.step else {}
        state = {"global_step": step, **found, "metric_for_best_model": self.curve, "missed": self.missed, **more}
        (folder / STATE).write_text(json.dumps(state), "utf-8")

    def read(self, folder: Path) -> None:
        """Go on from what a checkpoint says; a best one by another curve, or that is not there, is forgotten."""
        if not self.asked or not (folder / STATE).is_file():  # an older version of the script wrote none
            return
        state = json.loads((folder / STATE).read_text("utf-8"))
        if state.get("metric_for_best_model") != self.curve:
            return
        self.missed = state["missed"]
        if step := state.get("best_global_step"):
            if folder.with_name(f"checkpoint-{step}").is_dir():
                self.step, self.value = step, state["best_metric"]
            else:
                self.missed = 0
                remark(f"checkpoint-{step}, the best so far, is gone: the best of the later steps is kept", self.args)

    def end(self, output: Path, step: int, steps: int) -> Path | None:
        """Tell what is kept; return the checkpoint whose weights are to be loaded, None if they are the last ones."""
        if step < steps:
            tell_ended(step, steps, self.curve, self.args)
        if not self.asked:
            return None
        if not self.step:
            tell_no_best(step, self.args)
            return None
        tell_best(self.step, self.curve, self.value, self.args)
        return output / self.name if self.step != step else None
