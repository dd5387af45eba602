"""What SimpleTuner is told: its configuration files, and how it is started. Standard library.

SimpleTuner is under the AGPL-3.0. Nothing here imports it or contains any of it: it lives in the user's environment,
is started by its own entry point `train.py`, and is told what to do by the configuration files that its documentation
describes. `deepe_simpletuner_run` has the process.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from deepe_captions import Captioned
from deepe_rows import Refused
from deepe_validation import Validation

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
GRAIN = 64  # pixels; SimpleTuner rounds the sides of what is learned to it

OURS = frozenset(
    (
        *("model_type", "lora_type", "pretrained_model_name_or_path", "data_backend_config", "output_dir", "cache_dir"),
        *("webhook_config", "resume_from_checkpoint", "checkpointing_use_tempdir", "report_to", "num_processes"),
    )
)
"""What the options of a user cannot change: the platform depends on it."""
PARAMETERS = {
    **{name: name for name in ("lora_rank", "model_family", "validation_guidance", "validation_resolution")},
    **{name: name for name in ("validation_negative_prompt", "validation_seed")},
    **dict.fromkeys(("validation_disable", "validation_prompt", "user_prompt_library"), "validation_prompts"),
    **dict.fromkeys(("validation_step_interval", "validation_steps"), "validation_steps"),
    "validation_num_inference_steps": "validation_inference_steps",
}
"""What has a parameter of its own: setting of SimpleTuner → the parameter."""

PRECISIONS = {
    "bfloat16": ("bf16", "adamw_bf16"),
    "float16": ("fp16", "optimi-adamw"),
    "float32": ("no", "optimi-adamw"),
}
DECLARED = "deepe-checkpoint.json"
PROMPTS = "prompts.json"

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
    rarest: int | None = None
    """How many pictures have the rarest aspect ratio, for a training in buckets; None learns squares."""
    validation: Validation | None = None
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
    """Return SimpleTuner's name for a family: that of the pipeline's class; `wanted` names that of an unknown one."""
    if wanted not in ("auto", FAMILIES.get(kind, wanted)):
        raise Refused(
            f"the base model is a {kind}, whose family is {FAMILIES[kind]}: model_family={wanted} does not fit; "
            "leave it out"
        )
    if wanted != "auto":
        return wanted
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise Refused(f"the base model is a {kind}; name its family for SimpleTuner in model_family (known: {known})")
    return FAMILIES[kind]


def prediction_of(model: Path) -> str | None:
    """Return what the base model was taught to predict; SimpleTuner takes the family's usual for granted."""
    found = _json(model / "scheduler" / "scheduler_config.json").get("prediction_type")
    return found if found in ("v_prediction", "sample") else None


def check_base(model: Path, family: str, resolution: int, options: Mapping[str, Any]) -> None:
    """Refuse what SimpleTuner would train otherwise than it was asked to, or not at all."""
    if resolution % GRAIN:
        raise Refused(f"SimpleTuner learns sides that are multiples of {GRAIN}: resolution cannot be {resolution}")
    distilled = family == "flux" and _json(model / "transformer" / "config.json").get("guidance_embeds") is False
    if distilled and not {"model_flavour", "assistant_lora_path", "disable_assistant_lora"} & options.keys():
        raise Refused(
            "the base model takes no guidance, as FLUX.1-schnell does: SimpleTuner trains it with an assistant adapter "
            'only. Name its file, simpletuner_options={"model_flavour": "schnell", "flux_fast_schedule": true, '
            '"assistant_lora_path": "..."}, or say that it is not distilled, {"disable_assistant_lora": true}'
        )


def _json(file: Path) -> dict[str, Any]:
    """Return the object in a file, an empty one where there is none."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
    for name in PARAMETERS.keys() & named.keys():
        raise Refused(f"simpletuner_options cannot set {name}; set the parameter {PARAMETERS[name]}")
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
        "pretrained_vae_model_name_or_path": str(plan.model),  # left out, XL gets another one, from a hub
        "data_backend_config": str(plan.work / "config" / "multidatabackend.json"),
        "output_dir": str(plan.output),
        "cache_dir": str(plan.cache),
        "resolution": plan.resolution,
        "resolution_type": sizes_of(plan),
        "minimum_image_size": 0,
        "disable_bucket_pruning": True,
        "max_train_steps": plan.steps,
        "num_train_epochs": 0,
        "train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "optimizer": optimizer,
        "optimizer_config": f"weight_decay={plan.weight_decay}",
        "learning_rate": plan.learning_rate,
        **course_of(plan),
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
    if plan.validation:
        settings |= pictures_of(plan, plan.validation)
    if plan.prediction:
        settings["prediction_type"] = plan.prediction
    if plan.resume:
        settings["resume_from_checkpoint"] = plan.resume
    return settings | dict(plan.options)


def course_of(plan: Plan) -> dict[str, Any]:
    """Return how the learning rate runs: SimpleTuner's `cosine` takes steps of a warm-up for the length of its fall."""
    if plan.lr_scheduler == "cosine":
        return {"lr_scheduler": "cosine", "lr_warmup_steps": plan.steps}
    return {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": plan.warmup_steps}


def sizes_of(plan: Plan) -> str:
    """Return what `resolution` means: the side of a square, or of the square whose area each bucket has."""
    return "pixel" if plan.rarest is None else "pixel_area"


def pictures_of(plan: Plan, wanted: Validation) -> dict[str, Any]:
    """Return the settings of the pictures that SimpleTuner draws while it trains."""
    return {
        "validation_disable": False,
        "validation_disable_unconditional": True,
        "validation_step_interval": wanted.every,
        "validation_resolution": "x".join(map(str, wanted.size)),
        "validation_num_inference_steps": wanted.steps,
        "validation_guidance": wanted.guidance,
        "validation_seed": wanted.seed,
        "validation_negative_prompt": wanted.negative,
        "user_prompt_library": str(plan.work / "config" / PROMPTS),
    }


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
            "resolution_type": sizes_of(plan),
            "minimum_image_size": 0,
            "crop": True,
            "crop_style": "center",
            "crop_aspect": "square" if plan.rarest is None else "preserve",
            "cache_dir_vae": str(plan.cache / "vae"),
            # fewer pictures than a batch end SimpleTuner, with exit code 0; batches are of one bucket
            "repeats": max(1, ceil(plan.samples_per_step / (plan.rarest or plan.pictures))),
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
    documents: dict[str, Any] = {
        "config.json": configuration(plan, callback_url),
        "multidatabackend.json": data_backends(plan),
    }
    if plan.validation:
        documents[PROMPTS] = plan.validation.library()
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
