"""Experiment trackers: TensorBoard's event files always, MLflow, W&B, trackio and SwanLab where they are asked for.

The callbacks are those of transformers. A Trainer takes them from `callbacks`; a training loop of its own is followed:

    with deepe_trackers.follow(args):
        ...  # every deepe.metrics(step, ...) goes to the trackers as well

A tracker that fails is left out from there on, with a note on the job: no training ends for the want of one. Addresses
and keys are the trackers' own variables (MLFLOW_TRACKING_URI, WANDB_API_KEY) in the worker's environment. A key may
stand in a file that NAME_FILE names: it is read here.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import deepe
from deepe_log import remark
from deepe_needs import TRACKERS
from deepe_rows import Refused

PROJECT = "deepextension"
_CLASSES = {
    "tensorboard": "TensorBoardCallback",
    "mlflow": "MLflowCallback",
    "wandb": "WandbCallback",
    "trackio": "TrackioCallback",
    "swanlab": "SwanLabCallback",
}
_KEYS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY", "SWANLAB_API_KEY")
_PATIENCE = {  # a server that is down costs seconds, not minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_INIT_TIMEOUT": "30",
}


def names(args: argparse.Namespace) -> list[str]:
    """Return the trackers that are asked for, each once."""
    asked = (part.strip().lower() for part in (getattr(args, "report_to", None) or "").split(","))
    return list(dict.fromkeys(name for name in asked if name not in ("", "none", "tensorboard")))


def check(args: argparse.Namespace) -> None:
    """Refuse trackers that there are not, or whose package the environment lacks."""
    for name in names(args):
        if name not in TRACKERS:
            raise Refused(f"report_to names {name}; known are tensorboard, {', '.join(TRACKERS)}")
        need = TRACKERS[name]
        if not importlib.util.find_spec(need.module):
            raise Refused(
                f"report_to={name} needs the package {need.name}, which this environment does not have; "
                f"choose an environment that has it, or leave {name} out"
            )


def run_name(args: argparse.Namespace) -> str:
    """Return what the run is called: the id of the job."""
    return os.environ.get("DEEPE_JOB_ID") or str(args.train_id)


def callbacks(args: argparse.Namespace) -> list[Any]:
    """Return transformers' callbacks, each behind a guard; in a group of processes only the first one reports."""
    # not at the top: it imports transformers, which takes longer than refusing a training
    from train_callback import TrainerCallback

    class Guard(_Guard, TrainerCallback):
        """What a Trainer takes."""

    return _guards(args, Guard)


def _guards(args: argparse.Namespace, kind: "type[_Guard]") -> list[Any]:
    if not deepe.is_first():
        return []
    _prepare(args)
    return [kind(name, args) for name in ("tensorboard", *names(args))]


@contextlib.contextmanager
def follow(args: argparse.Namespace, model: Any = None) -> Iterator[None]:
    """Report every step of a training loop that is no Trainer's."""
    guards = _guards(args, _Guard)
    state = SimpleNamespace(
        global_step=0, max_steps=0, is_world_process_zero=True, is_hyper_param_search=False, log_history=[]
    )
    config = _Config(args)

    def log(step: int, values: dict[str, Any]) -> None:
        state.global_step = step
        logs = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for guard in guards:
            guard.on_log(config, state, None, logs=logs)

    for guard in guards:
        guard.on_train_begin(config, state, None, model=model)
    deepe.listeners.append(log)
    try:
        yield
    finally:
        deepe.listeners.remove(log)
        for guard in guards:
            guard.on_train_end(config, state, None, model=model)


class _Guard:
    """Calls a callback of transformers until it fails."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self._name, self._args = name, args
        self._inner: Any = None
        self._failed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        def begin() -> None:
            from transformers.integrations import integration_utils

            self._inner = getattr(integration_utils, _CLASSES[self._name])()
            self._inner.on_train_begin(args, state, control, **others)
            if hasattr(self._inner, "_async_log"):
                self._inner._async_log = False  # else the death of a server stays unseen
            if link := _link(self._name):
                deepe.note(f"{self._name}: {link}")

        self._guarded(begin)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if self._inner is not None:
            self._guarded(lambda: self._inner.on_log(args, state, control, logs=dict(logs or {}), **others))

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._inner is not None:
            self._guarded(lambda: self._inner.on_save(args, state, control, **others))

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._inner is not None:
            self._guarded(lambda: self._inner.on_train_end(args, state, control, **others))

    def _guarded(self, call: Any) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            said = " ".join(str(error).split())[:300] or type(error).__name__
            if self._name == "tensorboard" and not names_tensorboard(self._args):
                sys.stderr.write(f"no event files for TensorBoard: {said}\n")
                return
            remark(f"{self._name} gets nothing more of this training, which goes on: {said}", self._args)


def names_tensorboard(args: argparse.Namespace) -> bool:
    """Return whether TensorBoard is asked for; without that, an environment may lack it."""
    return "tensorboard" in (getattr(args, "report_to", None) or "").lower()


class _Config:
    """What the callbacks read of a Trainer's arguments, for loops that have none."""

    trackio_space_id = trackio_bucket_id = hub_private_repo = None
    trackio_static_space_id = False
    push_to_hub = False
    project = PROJECT

    def __init__(self, args: argparse.Namespace) -> None:
        self._values = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float)}
        self.output_dir = str(_output(args))
        self.logging_dir = str(event_folder(args))  # transformers 4 looks here, not at the variable
        self.run_name = run_name(args)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._values)

    to_sanitized_dict = to_dict

    def to_json_string(self) -> str:
        return json.dumps(self._values, indent=2)


def event_folder(args: argparse.Namespace) -> Path:
    """Return where TensorBoard's files go: beside the events of the attempt, or into the output when run by hand."""
    events = os.environ.get("DEEPE_EVENTS")
    return (Path(events).parent if events else _output(args)) / "tensorboard"


def _output(args: argparse.Namespace) -> Path:
    return Path(args.output_dir or args.save_path)


def _prepare(args: argparse.Namespace) -> None:
    """Name the run in every tracker's own words, and read keys that stand in files."""
    said = {
        "job": run_name(args),
        "method": Path(sys.argv[0]).stem,
        "base": Path(getattr(args, "model_path", None) or args.base_path).name,
    }
    defaults = {
        **_PATIENCE,
        "TENSORBOARD_LOGGING_DIR": str(event_folder(args)),
        "MLFLOW_EXPERIMENT_NAME": PROJECT,
        "MLFLOW_TAGS": json.dumps(said),
        "WANDB_PROJECT": PROJECT,
        "WANDB_TAGS": ",".join(f"{name}:{value}"[:64] for name, value in said.items()),
        "WANDB_DIR": str(event_folder(args).parent),
        "WANDB_SILENT": "true",
        "SWANLAB_PROJECT": PROJECT,
        "SWANLAB_LOG_DIR": str(event_folder(args).parent / "swanlab"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in _KEYS:
        file = os.environ.get(f"{name}_FILE")
        if file and name not in os.environ:
            try:
                os.environ[name] = Path(file).read_text("utf-8").strip()
            except OSError as error:
                remark(f"{name}_FILE cannot be read: {error}", args)


def _link(name: str) -> str | None:
    """Return where the run can be looked at, without credentials. None if the tracker does not say."""
    with contextlib.suppress(Exception):
        if name == "mlflow":
            import mlflow

            run, place = mlflow.active_run(), urlsplit(mlflow.get_tracking_uri())
            if place.scheme in ("http", "https"):
                bare = place._replace(netloc=place.netloc.rpartition("@")[2])
                return f"{urlunsplit(bare).rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        if name == "wandb":
            import wandb

            return str(wandb.run.url) if wandb.run.url else None
        if name == "swanlab":
            import swanlab

            url = swanlab.get_run().public.cloud.experiment_url
            return str(url) if url else None
    return None
