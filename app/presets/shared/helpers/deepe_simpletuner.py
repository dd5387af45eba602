"""Train with SimpleTuner at arm's length: files in, a process of its own, its webhook's events out. Standard library.

SimpleTuner is under the AGPL-3.0. Nothing here imports it or contains any of it: it lives in the user's environment,
is started by its own entry point `train.py`, and is told what to do by the configuration files that its documentation
describes. `configuration`, `data_backends` and `command` are pure; `Run` is the process.

SimpleTuner's exit code is 0 after most failures, so a run has succeeded when it said that the training is complete,
ended with 0, and wrote new weights. It posts every step to the webhook and waits for the answer: a stop is carried out
there, between two steps, when no file is half written. It takes no request for a checkpoint from outside; one that is
due within seconds is awaited, else the last one of `save_steps` is what a stop leaves.
"""

import contextlib
import json
import os
import queue
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from deepe_captions import Captioned
from deepe_rows import Refused

FAMILIES = {
    "StableDiffusionPipeline": "sd1x",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2Pipeline": "flux2",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
    "Lumina2Pipeline": "lumina2",
    "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "z_image",
}
"""SimpleTuner's name of a model family by the class of its pipeline."""

OURS = frozenset(
    (
        *("model_type", "lora_type", "pretrained_model_name_or_path", "data_backend_config", "output_dir", "cache_dir"),
        *("webhook_config", "resume_from_checkpoint", "checkpointing_use_tempdir", "report_to", "num_processes"),
    )
)
"""What the options of a user cannot change: the platform depends on it."""

PRECISIONS = {
    "bfloat16": ("bf16", "adamw_bf16"),
    "float16": ("fp16", "optimi-adamw"),
    "float32": ("no", "optimi-adamw"),
}
STOP_SECONDS = 6.0  # the platform's grace is 10 s unless the operator has set it
ANSWER_SECONDS = 4.0  # SimpleTuner waits 5 s for the answer to a post
TAIL = 40
SHOWN = 10
DECLARED = "deepe-checkpoint.json"

START = """
import runpy, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a stop comes from the stage script, between two steps
import torch
if not torch.accelerator.is_available():  # page-locked memory is for copies to one; torch refuses it without
    torch.Tensor.pin_memory = lambda self, *_args, **_more: self
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Starts a Python file as the main program, on a machine without an accelerator, too."""


class Failed(Exception):
    """SimpleTuner did not come to its end; the text says why."""


@dataclass(frozen=True)
class Plan:
    """One training: everything that the configuration is made of. Paths are absolute."""

    model: Path
    family: str
    output: Path
    work: Path
    pictures: int
    resolution: int
    steps: int
    batch_size: int
    grad_accum_steps: int
    learning_rate: float
    lr_scheduler: str
    warmup_steps: int
    max_grad_norm: float
    weight_decay: float
    lora_rank: int
    dtype: str
    gradient_checkpointing: bool
    save_steps: int
    save_total_limit: int
    seed: int
    prediction: str | None = None
    processes: int = 1
    resume: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> Path:
        return self.work / "pictures"

    @property
    def cache(self) -> Path:
        return self.work / "cache"

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.grad_accum_steps * self.processes


# --- configuration --------------------------------------------------------------------------------------------------


def family_of(kind: str, wanted: str = "auto") -> str:
    """Return SimpleTuner's name for a family; `wanted` wins over the class of the pipeline."""
    if wanted != "auto":
        return wanted
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise Refused(f"the base model is a {kind}; name its family for SimpleTuner in model_family (known: {known})")
    return FAMILIES[kind]


def prediction_of(model: Path) -> str | None:
    """Return what the base model was taught to predict; SimpleTuner takes the family's usual for granted."""
    try:
        config = json.loads((model / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("prediction_type") if isinstance(config, dict) else None
    return found if found in ("v_prediction", "sample") else None


def read_options(text: str) -> dict[str, Any]:
    """Return further settings for SimpleTuner from the text of a JSON object."""
    try:
        options = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise Refused(f"simpletuner_options is not valid JSON: {error}") from error
    if not isinstance(options, dict):
        raise Refused('simpletuner_options must be a JSON object, such as {"base_model_precision": "int8-quanto"}')
    named = {name.removeprefix("--"): value for name, value in options.items()}
    if taken := sorted(OURS & named.keys()):
        raise Refused(f"simpletuner_options cannot set {', '.join(taken)}: the platform depends on it")
    if "lora_rank" in named:
        raise Refused("simpletuner_options cannot set lora_rank; set the parameter lora_rank")
    if "lora_alpha" in named:
        raise Refused(
            "simpletuner_options cannot set lora_alpha: the weights are kept without it and count as if it were "
            "lora_rank; change learning_rate instead"
        )
    return named


def configuration(plan: Plan, callback_url: str) -> dict[str, Any]:
    """Return `config.json`."""
    precision, optimizer = PRECISIONS[plan.dtype]
    settings: dict[str, Any] = {
        "model_family": plan.family,
        "model_type": "lora",
        "lora_type": "standard",
        "lora_rank": plan.lora_rank,
        "lora_alpha": plan.lora_rank,  # the weights are kept without it: another value would be lost
        "pretrained_model_name_or_path": str(plan.model),
        "data_backend_config": str(plan.work / "config" / "multidatabackend.json"),
        "output_dir": str(plan.output),
        "cache_dir": str(plan.cache),
        "resolution": plan.resolution,
        "resolution_type": "pixel",
        "minimum_image_size": 0,
        "disable_bucket_pruning": True,
        "max_train_steps": plan.steps,
        "num_train_epochs": 0,
        "train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "optimizer": optimizer,
        "optimizer_config": f"weight_decay={plan.weight_decay}",
        "learning_rate": plan.learning_rate,
        "lr_scheduler": plan.lr_scheduler,
        "lr_warmup_steps": plan.warmup_steps,
        "max_grad_norm": plan.max_grad_norm,
        "mixed_precision": precision,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "checkpoint_step_interval": plan.save_steps,
        "checkpoints_total_limit": plan.save_total_limit,
        "checkpointing_use_tempdir": True,
        "seed": plan.seed,
        "disable_benchmark": True,
        "validation_disable": True,
        "report_to": "none",
        "webhook_config": [{"webhook_type": "raw", "callback_url": callback_url, "log_level": "info"}],
    }
    if plan.prediction:
        settings["prediction_type"] = plan.prediction
    if plan.resume:
        settings["resume_from_checkpoint"] = plan.resume
    return settings | dict(plan.options)


def data_backends(plan: Plan) -> list[dict[str, Any]]:
    """Return `multidatabackend.json`: the pictures with a text file beside each, and where embeddings are kept."""
    return [
        {
            "id": "pictures",
            "type": "local",
            "instance_data_dir": str(plan.images),
            "caption_strategy": "textfile",
            "metadata_backend": "discovery",
            "resolution": plan.resolution,
            "resolution_type": "pixel",
            "minimum_image_size": 0,
            "crop": True,
            "crop_style": "center",
            "crop_aspect": "square",
            "cache_dir_vae": str(plan.cache / "vae"),
            # fewer pictures than a batch end SimpleTuner, with exit code 0
            "repeats": max(1, ceil(plan.samples_per_step / plan.pictures)),
        },
        {
            "id": "text-embeds",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": str(plan.cache / "text"),
        },
    ]


def write_configuration(plan: Plan, callback_url: str) -> None:
    """Write what SimpleTuner reads below `plan.work`; begins anew if something is there."""
    folder = plan.work / "config"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    documents = {"config.json": configuration(plan, callback_url), "multidatabackend.json": data_backends(plan)}
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=1), "utf-8")


def lay_out(learned: list[Captioned], folder: Path) -> None:
    """Lay the pictures into one folder, each with its caption beside it; links where the disk has them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, one in enumerate(learned, start=1):
        target = folder / f"{number:06d}{one.picture.suffix.lower()}"
        try:
            os.link(one.picture, target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(one.picture, target)
        target.with_suffix(".txt").write_text(one.caption + "\n", "utf-8")


def command(plan: Plan, train_py: Path) -> list[str]:
    """Return how SimpleTuner is started: alone, or once for each GPU."""
    if plan.processes == 1:
        return [sys.executable, "-u", "-c", START, str(train_py)]
    launch = [sys.executable, "-u", "-m", "accelerate.commands.launch", "--num_processes", str(plan.processes)]
    return [*launch, "--num_machines", "1", "--mixed_precision", PRECISIONS[plan.dtype][0], str(train_py)]


def environment(plan: Plan, around: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the process: nothing of the user's may redirect its configuration or the posts to us."""
    foreign = ("ENV", "SIMPLETUNER_ENV", "CONFIG_PATH", "CONFIG_TYPE", "DEEPE_EVENTS", "PYTHONSAFEPATH")
    kept = {name: value for name, value in around.items() if name not in foreign}
    own = {
        "SIMPLETUNER_ENVIRONMENT": "default",
        "CONFIG_BACKEND": "json",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if plan.resume:  # SimpleTuner cannot load a LoRA again while the hub is switched off
        del own["HF_HUB_OFFLINE"]
        kept.pop("HF_HUB_OFFLINE", None)
    return kept | own


def installed() -> Path | None:
    """Return SimpleTuner's `train.py`, None where it is not installed; imports nothing of it."""
    found = find_spec("simpletuner")
    folders = list(found.submodule_search_locations or ()) if found else []
    file = Path(folders[0]) / "train.py" if folders else None
    return file if file is not None and file.is_file() else None


def newest_declared(output: Path) -> str | None:
    """Return the name of the newest whole checkpoint, and remove what was half written: it would be in the way."""
    whole: list[int] = []
    for folder in output.glob("checkpoint-*"):
        if folder.name[11:].isdigit() and (folder / DECLARED).is_file():
            whole.append(int(folder.name[11:]))
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return f"checkpoint-{max(whole)}" if whole else None


# --- the process ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What SimpleTuner posts after a step."""

    number: int
    total: int
    values: dict[str, float]


class Post:
    """One event of SimpleTuner, which waits until it is answered."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.answered = threading.Event()


def read_step(body: Mapping[str, Any]) -> Step | None:
    """Return the step that an event tells of, if it tells of one."""
    progress = body.get("progress")
    if body.get("type") != "training.status" or not isinstance(progress, dict):
        return None
    number, total = progress.get("current"), progress.get("total")
    if not isinstance(number, int) or not isinstance(total, int):
        return None
    metrics = progress.get("metrics")
    values = {
        name: value
        for name, value in (metrics.items() if isinstance(metrics, dict) else ())
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return Step(number, total, values)


class Run:
    """One process of SimpleTuner, from its start to its end."""

    def __init__(
        self,
        plan: Plan,
        *,
        on_step: Callable[[Step], None],
        on_checkpoint: Callable[[Path], None],
        on_stage: Callable[[str], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self.plan = plan
        self.pid: int | None = None
        self.stopped_at: int | None = None
        self._on_step, self._on_checkpoint, self._on_stage = on_step, on_checkpoint, on_stage
        self._stop_requested = stop_requested
        self._inbox: queue.Queue[Post] = queue.Queue()
        self._tail: deque[str] = deque(maxlen=TAIL)
        self._error = ""
        self._complete = False
        self._last: Step | None = None
        self._last_time = self._seconds = 0.0
        self._stage = ""

    def to_the_end(self, train_py: Path) -> bool:
        """Run until it has ended; return False if it was stopped on request, raise `Failed` if it failed."""
        weights = self.plan.output / "pytorch_lora_weights.safetensors"
        weights.unlink(missing_ok=True)  # of an earlier run; new ones are the proof
        server = Receiver(self._inbox)
        write_configuration(self.plan, server.url)
        process = subprocess.Popen(
            command(self.plan, train_py),
            cwd=self.plan.work,
            env=environment(self.plan, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = process.pid
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        try:
            self._attend(process)
        finally:
            end(process)
            server.close()
        reader.join(timeout=5)
        if self.stopped_at is None and process.returncode == 0 and self._complete and weights.is_file():
            return True
        if self.stopped_at is None and not self._stop_requested():
            raise Failed(self._why(process.returncode))
        self.stopped_at = self.stopped_at if self.stopped_at is not None else self._number()
        return False

    def _attend(self, process: "subprocess.Popen[bytes]") -> None:
        """Answer the posts until the process has ended or was stopped."""
        asked: float | None = None
        while process.poll() is None or not self._inbox.empty():
            if asked is None and self._stop_requested():
                asked = time.monotonic()
            if asked is not None and (self._last is None or time.monotonic() - asked > STOP_SECONDS):
                self.stopped_at = self._number()
                return
            try:
                post = self._inbox.get(timeout=0.1)
            except queue.Empty:
                continue
            self._take(post.body)
            if asked is not None and self._may_stop(post.body, asked):
                self.stopped_at = self._number()
                return
            post.answered.set()

    def _number(self) -> int:
        return self._last.number if self._last else 0

    def _take(self, body: dict[str, Any]) -> None:
        step = read_step(body)
        if step is not None and (self._last is None or step.number > self._last.number):
            now = time.monotonic()
            self._seconds = now - self._last_time if self._last else 0.0
            self._last, self._last_time = step, now
            self._on_step(step)
        match body.get("type"):
            case "training.checkpoint":
                self._on_checkpoint(Path(str((body.get("checkpoint") or {}).get("path"))))
            case "training.status":
                data = body.get("data") or {}
                if "failed" in str(data.get("status")):
                    self._error = str(data.get("error") or "")
            case "lifecycle.stage":
                stage = body.get("stage") or {}
                key = str(stage.get("key"))
                self._complete = self._complete or key == "training_complete"
                if key != self._stage:
                    self._stage = key
                    self._on_stage(str(stage.get("label") or key))

    def _may_stop(self, body: Mapping[str, Any], asked: float) -> bool:
        """Whether the process waits for us between two steps, and no checkpoint is due within seconds."""
        if body.get("type") == "training.checkpoint":
            return True
        step = read_step(body)
        if step is None:
            return False
        left = -step.number % self.plan.save_steps  # 0: this step's checkpoint is written next
        return time.monotonic() + left * self._seconds > asked + STOP_SECONDS

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        for line in clean_lines(process.stdout):
            self._tail.append(line)
            print(line, flush=True)

    def _why(self, code: int | None) -> str:
        last = "\n".join(list(self._tail)[-SHOWN:])
        if not self._error and code == 0 and self._complete:
            return "SimpleTuner said that it is done, but wrote no weights"
        reason = self._error or next((line for line in reversed(self._tail) if "rror" in line), "")
        how = f"ended by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            how = "killed, as the operating system does when it is out of memory"
        return f"SimpleTuner failed ({how}): {reason or last or 'it said nothing'}"


class Receiver:
    """Takes SimpleTuner's posts on a free port of the loopback; the address holds a secret, so no one else posts."""

    def __init__(self, inbox: "queue.Queue[Post]") -> None:
        path = f"/{secrets.token_urlsafe(16)}"

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.path != path:
                    self.send_error(404)
                    return
                try:
                    document = json.loads(body)
                except ValueError:
                    document = None
                if isinstance(document, dict):
                    post = Post(document)
                    inbox.put(post)
                    post.answered.wait(ANSWER_SECONDS)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}{path}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def end(process: "subprocess.Popen[bytes]") -> None:
    """End the process with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BAR = re.compile(r"\d+%\|")


def clean_lines(stream: Any) -> Iterator[str]:
    """Yield the lines of an output without colours and without progress bars."""
    for raw in stream:
        for part in _CODES.sub("", raw.decode("utf-8", "replace")).split("\r"):
            line = part.rstrip()
            if line and not _BAR.search(line):
                yield line


# --- gauges ---------------------------------------------------------------------------------------------------------


def memory_mib(pid: int | None = None) -> float | None:
    """Return how much memory is used: of the first GPU that may be used, else the most that a process ever had."""
    if (used := _gpu_memory()) is not None:
        return used
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except OSError:  # no Linux, or the process has ended
        return None
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return round(int(match[1]) / 1024, 1) if match else None


def _gpu_memory() -> float | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = [program, f"--id={card}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
        return float(answer.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
