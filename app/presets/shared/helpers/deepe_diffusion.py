"""What the scripts of models that draw share, by means of diffusers: load, draw, measure, and a small LoRA trainer.

The trainer knows pipelines of the Stable Diffusion 1.x and 2.x kind; loading, drawing and merging know every pipeline
of diffusers. torch, diffusers and peft are imported inside functions, so that refusals come at once.
"""

import argparse
import gc
import inspect
import json
import math
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepe
import deepe_loading as loading
from deepe_captions import Captioned, read_square
from deepe_checkpoints import make_readable
from deepe_llm import TINY_BYTES, Speed, print_step
from deepe_log import log, remark, remark_plan
from deepe_rows import Refused
from deepe_scores import report_score

if TYPE_CHECKING:
    from deepe_validation import Validation

WEIGHTS = "pytorch_lora_weights.safetensors"
SMALL_KIND = "StableDiffusionPipeline"
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
STEPS = 28
GUIDANCE = 5.0
AT_ONCE = 8
STATE = "state.pt"
HELD_OUT = 1000  # numbers of held-out captions among the pictures that are kept with the job, behind those asked for


# --- pipelines ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where a model computes, and in which number format."""

    device: str
    dtype: str


def choose_machine(folder: Path, dtype: str = "auto") -> Machine:
    """Return the best device; `auto` is bfloat16 for a model that gains by it, on a GPU that has it, else float32."""
    import torch

    cuda = torch.cuda.is_available()
    brain = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        dtype = "bfloat16" if brain and not is_tiny(folder) else "float32"
    elif dtype == "bfloat16" and cuda and not brain:
        raise Refused(f"dtype=bfloat16: {torch.cuda.get_device_name()} cannot calculate with it; choose auto")
    return Machine("cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu", dtype)


def is_tiny(folder: Path) -> bool:
    """Whether the weights are so few that threads wait for each other longer than they work."""
    return sum(file.stat().st_size for file in folder.glob("*/*.safetensors")) < TINY_BYTES


def kind_of(folder: Path) -> str:
    """Return the class of a pipeline, as its `model_index.json` names it."""
    index = folder / "model_index.json"
    try:
        kind = json.loads(index.read_text("utf-8"))["_class_name"]
    except FileNotFoundError as error:
        raise Refused(f"there is no model that draws in {folder}: model_index.json is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{index} cannot be read: {error}") from error
    return str(kind)


def load_pipeline(folder: Path, machine: Machine, lora: Path | None = None, scale: float = 1.0) -> Any:
    """Return a pipeline that is ready to draw; `lora` is a folder with LoRA weights, or their file."""
    import diffusers
    import torch

    kind_of(folder)
    quiet()
    named = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, **{named: getattr(torch, machine.dtype)}, **loading.weights(folder)
    )
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        load_lora(pipeline, lora, scale)
    return pipeline.to(machine.device)


def quiet() -> None:
    """Keep progress bars out of the log, and warnings that say nothing of the user's model."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def load_lora(pipeline: Any, lora: Path, scale: float = 1.0) -> None:
    file = lora / WEIGHTS if lora.is_dir() else lora
    if not file.is_file():
        raise Refused(f"there are no LoRA weights in {lora}: {WEIGHTS} is missing")
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="trained")
    pipeline.set_adapters("trained", scale)


def side_of(pipeline: Any) -> int:
    """Return the length of a picture's side in pixels that the model was made for."""
    core = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    sample = getattr(getattr(core, "config", None), "sample_size", None)
    sample = max(sample) if isinstance(sample, (list, tuple)) else sample
    sample = sample or getattr(pipeline, "default_sample_size", None)
    return int(sample) * int(getattr(pipeline, "vae_scale_factor", 8)) if sample else 1024


def grain_of(pipeline: Any) -> int:
    """Return what the sides of a picture must be multiples of: transformers see patches of 2 x 2 latents."""
    return int(getattr(pipeline, "vae_scale_factor", 8)) * (2 if getattr(pipeline, "transformer", None) else 1)


def takes_negative(pipeline: Any) -> bool:
    """Say whether a negative prompt changes what is drawn: a model that was taught its guidance does not use one."""
    names = inspect.signature(type(pipeline).__call__).parameters
    return "negative_prompt" in names and "true_cfg_scale" not in names


def draw(pipeline: Any, captions: Sequence[str], *, seed: int, size: tuple[int, int], **how: Any) -> list[Any]:
    """Return a picture for each caption. Each has noise of its own, so that it does not depend on its neighbours."""
    import torch

    found: list[Any] = []
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "width": size[0], "height": size[1]} | how
    for start in range(0, len(captions), AT_ONCE):
        prompts = list(captions[start : start + AT_ONCE])
        noise = [torch.Generator().manual_seed(seed + start + place) for place in range(len(prompts))]
        if "negative_prompt" in how:  # one for each prompt
            settings["negative_prompt"] = [how["negative_prompt"]] * len(prompts)
        with torch.inference_mode():
            found += pipeline(prompt=prompts, generator=noise, **settings).images
        if deepe.stop_requested():
            sys.exit(deepe.STOPPED)
    return found


def forget(pipeline: Any) -> None:
    """Give a GPU's memory back."""
    import torch

    pipeline.to("cpu")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- score ----------------------------------------------------------------------------------------------------------


def score(pipeline: Any, held_out: list[Captioned], args: argparse.Namespace, phase: str) -> None:
    """Report how well noise is removed from held-out pictures, and how far drawn ones are from them."""
    if not held_out:
        return
    side = args.resolution
    pictures = [read_square(one.picture, side) for one in held_out]
    if type(pipeline).__name__ == SMALL_KIND:
        loss = denoising_loss(pipeline, pictures, [one.caption for one in held_out], args.seed)
        report_score("denoising_loss", phase, loss, len(held_out))
    shown = held_out[: args.eval_pictures]
    if not shown:
        return
    drawn = draw(pipeline, [one.caption for one in shown], seed=args.seed, size=(side, side))
    distances = [distance(wanted, given) for wanted, given in zip(pictures, drawn, strict=False)]
    report_score("image_distance", phase, sum(distances) / len(distances), len(distances))
    folder = Path(args.output_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for place, (one, picture) in enumerate(zip(shown, drawn, strict=True), start=1):
        picture.save(folder / f"{phase}-{place}.png")
        number = HELD_OUT + place
        deepe.sample(phase, number, one.caption, one.picture.name, f"{folder.name}/{phase}-{place}.png")


def distance(wanted: Any, given: Any) -> float:
    """Return the mean difference of two pictures' colour values: 0 is the same picture, 1 black for white."""
    import numpy

    first, second = (numpy.asarray(picture, dtype=numpy.float32) / 255 for picture in (wanted, given))
    return float(numpy.abs(first - second).mean())


def denoising_loss(pipeline: Any, pictures: list[Any], captions: list[str], seed: int) -> float:
    """Return the mean loss at noise and times that depend on the seed only."""
    import torch

    task = Denoising(pipeline)
    losses = []
    with torch.inference_mode():
        for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            chance = torch.Generator().manual_seed(seed + place)
            losses.append(task.loss([task.encode(picture)] * 4, [task.tell(caption)] * 4, [chance] * 4).item())
    return sum(losses) / len(losses)


class Denoising:
    """The task of a diffusion model: tell the noise that was added to a picture's latents."""

    def __init__(self, pipeline: Any) -> None:
        from diffusers import DDPMScheduler

        self.pipeline = pipeline
        self.noise = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.device = pipeline.unet.device
        self.dtype = pipeline.vae.dtype

    def encode(self, picture: Any) -> Any:
        """Return mean and deviation of a picture's latents, on the CPU."""
        import torch

        pixels = self.pipeline.image_processor.preprocess(picture).to(self.device, self.dtype)
        with torch.no_grad():
            found = self.pipeline.vae.encode(pixels).latent_dist
        return torch.stack([found.mean[0], found.std[0]]).float().cpu()

    def tell(self, caption: str) -> Any:
        """Return what the text encoder makes of a caption, on the CPU."""
        import torch

        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            caption,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            return self.pipeline.text_encoder(tokens.input_ids.to(self.device))[0][0].float().cpu()

    def is_cut(self, caption: str) -> bool:
        """Say whether a caption has more tokens than the text encoder reads."""
        tokenizer = self.pipeline.tokenizer
        return len(tokenizer(caption)["input_ids"]) > tokenizer.model_max_length

    def loss(self, latents: list[Any], told: list[Any], chances: Sequence[Any]) -> Any:
        """Return the mean loss of a batch; all that is random of a picture comes from its generator, on the CPU."""
        import torch

        def noise_like(some: Any) -> Any:
            return torch.stack([torch.randn(some.shape[1:], generator=chance) for chance in chances])

        means, deviations = torch.stack(latents).unbind(1)
        clean = (means + deviations * noise_like(means)) * self.pipeline.vae.config.scaling_factor
        noise = noise_like(clean)
        most = self.noise.config.num_train_timesteps
        times = torch.cat([torch.randint(most, (1,), generator=chance) for chance in chances])
        noisy = self.noise.add_noise(clean, noise, times)
        velocity = self.noise.config.prediction_type == "v_prediction"
        wanted = self.noise.get_velocity(clean, noise, times) if velocity else noise
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            given = self.pipeline.unet(
                noisy.to(self.device, self.dtype),
                times.to(self.device),
                encoder_hidden_states=torch.stack(told).to(self.device, self.dtype),
            ).sample
        return (given.float() - wanted.to(self.device)).square().mean()


# --- the small trainer ----------------------------------------------------------------------------------------------


class SmallTrainer:
    """LoRA on the UNet, in one process, on one device: AdamW with warm-up.

    Everything random in a step is made of the step's number only: a resumed run goes on as if nothing had been.
    """

    def __init__(
        self, pipeline: Any, learned: list[Captioned], args: argparse.Namespace, shown: "Validation | None" = None
    ) -> None:
        import torch
        from peft import LoraConfig

        self.args, self.pipeline, self.task, self.shown = args, pipeline, Denoising(pipeline), shown
        self.size = args.batch_size * args.grad_accum_steps
        self.steps = steps_of(args, len(learned))
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False)
        torch.manual_seed(args.seed)
        adapter = LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_rank, init_lora_weights="gaussian", target_modules=list(LAYERS)
        )
        pipeline.unet.add_adapter(adapter)
        self.weights = [weight for weight in pipeline.unet.parameters() if weight.requires_grad]
        for weight in self.weights:
            weight.data = weight.data.float()
        automatic = args.gradient_checkpointing == "auto" and pipeline.unet.device.type == "cuda"
        if args.gradient_checkpointing == "true" or automatic:
            pipeline.unet.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(self.weights, lr=args.learning_rate, weight_decay=args.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._course)
        told = {caption: self.task.tell(caption) for caption in dict.fromkeys(one.caption for one in learned)}
        if cut := [caption for caption in told if self.task.is_cut(caption)]:
            remark(f"{len(cut)} of {len(told)} captions are cut, they have too many tokens, such as: {cut[0]}", args)
        remark_plan(len(learned), len(learned), self.steps, args)
        seen = {
            picture: self.task.encode(read_square(picture, args.resolution))
            for picture in dict.fromkeys(one.picture for one in learned)
        }
        self.examples = [(seen[one.picture], told[one.caption]) for one in learned]

    def train(self) -> None:
        """Take all steps, from the newest complete checkpoint if there is one; a stop ends the process."""
        args = self.args
        done = self._restore() if args.resume else 0
        speed = Speed(done)
        deepe.catch_stop()
        self.pipeline.unet.train()
        for step in range(done + 1, self.steps + 1):
            values = self._step(step)
            if step % args.logging_steps == 0 or step in (1, self.steps):
                values |= speed.gauges(step, self.steps, None)
                values["epoch"] = step * self.size / len(self.examples)
                if "eta_seconds" in values and step < self.steps:
                    values["samples_per_second"] = self.size * (self.steps - step) / max(values["eta_seconds"], 0.1)
                deepe.metrics(step, **values)
                deepe.progress(step, self.steps)
                print_step(step, self.steps, "loss", values)
            if self.shown and step % self.shown.every == 0 and step < self.steps:
                self.pipeline.unet.eval()
                self.shown.draw(self.pipeline, Path(args.output_dir), str(step))
                self.pipeline.unet.train()
            if step % args.save_steps == 0 or deepe.stop_requested():
                folder = self._save_checkpoint(step)
                if deepe.stop_requested():
                    sys.stderr.write(f"stopped at step {step} of {self.steps}; {folder.name} is complete\n")
                    sys.exit(deepe.STOPPED)
        self.pipeline.unet.eval()

    def save(self, folder: Path) -> None:
        """Write the adapter in the form that diffusers loads."""
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.pipeline.unet))
        type(self.pipeline).save_lora_weights(folder, unet_lora_layers=layers)
        make_readable(folder)

    def _step(self, step: int) -> dict[str, float]:
        import torch

        loss, size, every = 0.0, self.args.batch_size, self._rows(step)
        for part in range(self.args.grad_accum_steps):
            rows = every[part * size : (part + 1) * size]
            places = range(part * size, part * size + len(rows))  # noise of a picture's own, however a step is divided
            chances = [torch.Generator().manual_seed(hash((self.args.seed, step, place)) % 2**63) for place in places]
            latents, told = zip(*(self.examples[row] for row in rows), strict=True)
            mean = self.task.loss(list(latents), list(told), chances) / self.args.grad_accum_steps
            mean.backward()
            loss += mean.item()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.args.max_grad_norm).item()
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm, "learning_rate": rate}

    def _rows(self, step: int) -> list[int]:
        """Return which examples a step sees; every pass has an order of its own."""
        places = (divmod(position, len(self.examples)) for position in range((step - 1) * self.size, step * self.size))
        return [order_of(self.args.seed, epoch, len(self.examples))[place] for epoch, place in places]

    def _course(self, step: int) -> float:
        warmup = self.args.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        if self.args.lr_scheduler == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def _save_checkpoint(self, step: int) -> Path:
        """Write to a folder beside it first and rename: a checkpoint is there as a whole or not at all."""
        import torch
        from peft import get_peft_model_state_dict

        output = Path(self.args.output_dir)
        target, draft = output / f"checkpoint-{step}", output / f".checkpoint-{step}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        state = {
            "step": step,
            "adapter": get_peft_model_state_dict(self.pipeline.unet),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        torch.save(state, draft / STATE)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        deepe.checkpoint(target, step)
        for old in checkpoints(output)[max(1, self.args.save_total_limit) :]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def _restore(self) -> int:
        """Load the newest checkpoint that can be read, and return its step; 0 starts from the beginning."""
        import torch
        from peft import set_peft_model_state_dict

        for folder in checkpoints(Path(self.args.output_dir)):
            try:  # weights_only: a checkpoint is data, loading it runs no code
                state = torch.load(folder / STATE, map_location=self.task.device, weights_only=True)
            except Exception as error:  # cut off, not a checkpoint, written by another trainer: the one before may do
                remark(f"{folder.name} cannot be used: {error}", self.args)
                continue
            set_peft_model_state_dict(self.pipeline.unet, state["adapter"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            remark(f"resumed from {folder.name}", self.args, warning=False)
            return int(state["step"])
        return 0


@lru_cache(maxsize=4)
def order_of(seed: int, epoch: int, count: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def train_small(
    args: argparse.Namespace, pipeline: Any, learned: list[Captioned], shown: "Validation | None" = None
) -> None:
    """Train with the small trainer, draw what is to be shown meanwhile, and write the adapter."""
    trainer = SmallTrainer(pipeline, learned, args, shown)
    log("StartTraining", args.model_name, args)
    trainer.train()
    trainer.save(Path(args.output_dir))


def steps_of(args: argparse.Namespace, examples: int) -> int:
    """Return how many steps a training has: as many as were asked for, else those of all passes."""
    return args.max_steps or max(1, math.ceil(args.epochs * examples / (args.batch_size * args.grad_accum_steps)))


def checkpoints(output: Path) -> list[Path]:
    """Newest first."""
    found = [folder for folder in output.glob("checkpoint-*") if folder.name[11:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[11:]), reverse=True)
