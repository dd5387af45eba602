r"""SD-Demo, training: teach a model that draws a new subject or style, with LoRA.

`trainer` says who trains:

- `simpletuner`: SimpleTuner, for Stable Diffusion 1.x, XL and 3, Flux, PixArt, Sana, ... on GPUs. It is under the
  AGPL-3.0 and lives in an environment of yours (`environments/simpletuner.yml`); this script starts it in a process
  of its own, writes its configuration files and listens to its webhook, and neither imports nor contains any of it.
- `diffusers`: the small trainer in `deepe_diffusion.py`, a plain loop on diffusers and peft for Stable Diffusion 1.x
  and 2.x. It needs no more than the `trl` environment and runs on a CPU, too.
- `auto`: SimpleTuner where the environment has it, else the small trainer.

Both write `pytorch_lora_weights.safetensors`, as diffusers loads it. Try it by hand, in a checkout of the product, with
the interpreter of the `trl` environment (about a minute):

    python app/presets/sd-demo/tiny_diffusion.py --output tiny-diffusion
    python -m app.presets.sample_data samples                       # with the service's interpreter
    python app/presets/sd-demo/sd-demo.py --model_path=tiny-diffusion --dataset_path=samples/sd-demo \
        --output_dir=sd-out --resolution=64 --max_steps=150 --batch_size=16 --learning_rate=0.003

Data: JSONL rows that name a picture (`images`, `image` or `file_name`) and hold its caption (`caption`, `text` or
`prompt`); or a folder of pictures. A caption may also stand in a `.txt` file beside its picture. Pictures are scaled to
`resolution` and cut to their middle square; with `aspect_ratio_buckets` SimpleTuner keeps their shape, and each batch
has pictures of one shape.

The score is on pictures put aside: `denoising_loss`, how well noise is told from the picture (Stable Diffusion 1.x and
2.x), and `image_distance`, how far what the model draws for their captions is from them, in colour values from 0 to 1.
The second says something where a caption describes the whole picture; look at `<output_dir>/samples` in any case. What
the model makes of `validation_prompts` before, during and after the training lies there as well.
"""

import argparse
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
import deepe_arguments as arguments
import deepe_diffusion as diffusion
import deepe_simpletuner as simpletuner
import deepe_simpletuner_run as runs
import deepe_validation as validation
from deepe_captions import Captioned, check_readable, load_captioned, split
from deepe_llm import judge_unknown, print_step
from deepe_log import log, remark
from deepe_rows import Refused
from deepe_trackers import check as check_trackers
from deepe_trackers import follow

LEAST = {
    **dict.fromkeys(("batch_size", "grad_accum_steps", "lora_rank", "logging_steps", "save_steps"), 1),
    **dict.fromkeys(("save_total_limit",), 1),
    **dict.fromkeys(("warmup_steps", "eval_samples", "eval_pictures", "seed"), 0),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Teach a model that draws, with LoRA.", allow_abbrev=False)
    arguments.add_job(
        parser,
        model_name="sd-demo",
        model="folder of the base model, a pipeline of diffusers",
        dataset="JSONL file, a folder with one, or a folder of pictures",
        output="folder for the LoRA weights and the checkpoints",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--pic_relative_path", default=None, help="folder of the pictures; empty finds it by itself")
    data.add_argument("--input_train_name", default=None, help="column with the caption; empty finds it by itself")
    data.add_argument("--max_samples", type=int, default=-1, help="pictures to use; -1 takes all")
    data.add_argument("--resolution", type=int, default=512, help="side of the pictures in pixels")
    data.add_argument(
        "--aspect_ratio_buckets",
        type=arguments.str2bool,
        default=False,
        help="keep the shape of each picture, with the area of a square of that side",
    )

    method = parser.add_argument_group("method")
    method.add_argument("--trainer", choices=["auto", "simpletuner", "diffusers"], default="auto", help="who trains")
    method.add_argument("--model_family", default="auto", help="SimpleTuner's name of the model family")
    method.add_argument("--simpletuner_options", default="", help="further settings of SimpleTuner, a JSON object")
    method.add_argument("--lora_rank", type=int, default=16, help="rank of the adapter's matrices")

    steps = parser.add_argument_group("training")
    steps.add_argument("--epochs", type=float, default=10.0, help="passes over the pictures, unless max_steps is given")
    steps.add_argument("--max_steps", type=int, default=None, help="number of steps, instead of epochs")
    steps.add_argument("--batch_size", type=int, default=4, help="pictures in memory at once")
    steps.add_argument("--grad_accum_steps", type=int, default=1, help="batches between two changes of weights")
    steps.add_argument("--learning_rate", type=float, default=1e-4, help="highest learning rate")
    steps.add_argument("--lr_scheduler", choices=["cosine", "constant"], default="cosine")
    steps.add_argument("--warmup_steps", type=int, default=10, help="steps until the highest learning rate")
    steps.add_argument("--max_grad_norm", type=float, default=1.0, help="longer gradients are cut to this length")
    steps.add_argument("--weight_decay", type=float, default=0.01, help="pull of the adapter towards zero")
    arguments.add_seed(steps)

    machine = parser.add_argument_group("memory and speed")
    machine.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    machine.add_argument("--gradient_checkpointing", choices=["auto", "true", "false"], default="auto")

    watch = arguments.add_watch(parser, rows="pictures", eval_samples=16)
    watch.add_argument("--eval_pictures", type=int, default=4, help="held-out captions that are drawn; 0 draws none")
    validation.add_arguments(parser)
    return parser


def main() -> None:
    args, unknown = make_parser().parse_known_args()
    prepare_environment(Path(args.model_path))
    try:
        judge_unknown(unknown, args)
        run(args)
    except (Refused, runs.Failed) as error:
        advice = memory_advice(error, args)
        log("TrainingFailed", f"{error}\n{advice}".strip(), args, level="ERROR")
        sys.exit(f"sd-demo.py: {error}")
    except Exception as error:
        advice = memory_advice(error, args)
        log("TrainingFailed", f"{type(error).__name__}: {error}\n{advice}".strip(), args, level="ERROR")
        raise


def prepare_environment(base: Path) -> None:
    """Set what the libraries read when they are imported; what the user has set stays."""
    if diffusion.is_tiny(base):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of a tiny model wait for each other
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run(args: argparse.Namespace) -> None:
    check(args)
    shown = validation.validation_of(args)
    kind = diffusion.kind_of(Path(args.model_path))
    trainer = trainer_of(args, kind)
    log("HandleWithDataset", args.dataset_path, args)
    found = load_captioned(args)
    ratios = check_readable(found, args)
    learned, held_out = split(found, args)
    if not learned:
        raise Refused("no picture is left to learn from; lower eval_fraction or add pictures")

    log("InitializingModel", args.model_path, args)
    machine = diffusion.choose_machine(Path(args.model_path), args.dtype)
    remark(
        f"{len(learned)} pictures are learned by {trainer}, on {machine.device} in {machine.dtype}", args, warning=False
    )
    if trainer == "simpletuner":
        measure(args, machine, held_out, shown, "before")
        plan = plan_of(args, learned, kind, machine.dtype, ratios, shown)
        with follow(args):
            train_with_simpletuner(args, plan, learned)
    else:
        pipeline = diffusion.load_pipeline(Path(args.model_path), machine)
        look(pipeline, args, held_out, shown, "before")
        with follow(args):
            diffusion.train_small(args, pipeline, learned, shown)
    log("SaveTrainedModel", args.model_name, args)
    tidy(Path(args.output_dir))
    deepe.artifact(args.output_dir, "adapter")
    log("SaveTrainedModelSuccess", args.output_dir, args)
    measure(args, machine, held_out, shown, "after", Path(args.output_dir))
    log("TrainingSuccess", args.model_name, args)


def measure(
    args: argparse.Namespace,
    machine: diffusion.Machine,
    held_out: list[Captioned],
    shown: validation.Validation | None,
    phase: str,
    lora: Path | None = None,
) -> None:
    """Load the model, look at what it draws, and give the memory back; one that is too large is passed over."""
    if not held_out and not shown:
        return
    import torch

    try:
        pipeline = diffusion.load_pipeline(Path(args.model_path), machine, lora)
        look(pipeline, args, held_out, shown, phase)
        diffusion.forget(pipeline)
    except torch.OutOfMemoryError:
        remark(f"no score {phase} the training: the whole model does not fit into the memory of the GPU", args)


def look(
    pipeline: object,
    args: argparse.Namespace,
    held_out: list[Captioned],
    shown: validation.Validation | None,
    phase: str,
) -> None:
    """Report the score of a model, and draw the validation pictures."""
    diffusion.score(pipeline, held_out, args, phase)
    if shown:
        shown.draw(pipeline, Path(args.output_dir), phase)


def check(args: argparse.Namespace) -> None:
    """Refuse what would only fail minutes later."""
    check_trackers(args)
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise Refused(f"{name} must be at least {least}, it is {getattr(args, name)}")
    if args.max_steps is not None and args.max_steps < 1:
        raise Refused(f"max_steps must be at least 1, it is {args.max_steps}; leave it out to train by epochs")
    if args.resolution < 32 or args.resolution % 8:
        raise Refused(f"resolution must be a multiple of 8 and at least 32, it is {args.resolution}")
    if not 0 <= args.eval_fraction < 1:
        raise Refused(f"eval_fraction must be at least 0 and below 1, it is {args.eval_fraction}")


def trainer_of(args: argparse.Namespace, kind: str) -> str:
    """Return who trains; refuse what the environment or the base model does not allow."""
    there = simpletuner.installed() is not None
    trainer = args.trainer if args.trainer != "auto" else "simpletuner" if there else "diffusers"
    if trainer == "simpletuner":
        if not there:
            raise Refused(
                "SimpleTuner is not installed in this environment; run the training in one that has it (its "
                "description: environments/simpletuner.yml), or choose trainer=diffusers"
            )
        family = simpletuner.family_of(kind, args.model_family)
        options = simpletuner.read_options(args.simpletuner_options)
        simpletuner.check_base(Path(args.model_path), family, args.resolution, options)
    elif kind != diffusion.SMALL_KIND:
        raise Refused(
            f"trainer=diffusers trains Stable Diffusion 1.x and 2.x ({diffusion.SMALL_KIND}), the base model is a "
            f"{kind}; use trainer=simpletuner in an environment that has SimpleTuner"
        )
    elif simpletuner.read_options(args.simpletuner_options):
        raise Refused("simpletuner_options has no effect with trainer=diffusers; leave it out, or take simpletuner")
    elif args.aspect_ratio_buckets:
        raise Refused("aspect_ratio_buckets: trainer=diffusers learns squares only; leave it out, or take simpletuner")
    return trainer


def train_with_simpletuner(args: argparse.Namespace, plan: simpletuner.Plan, learned: list[Captioned]) -> None:
    """Have SimpleTuner train; a stop ends this process."""
    train_py = simpletuner.installed()
    assert train_py is not None
    simpletuner.lay_out(learned, plan.images)
    gauges = Gauges(args, plan)
    run = runs.Run(
        plan,
        on_step=lambda step: gauges.step(step, run.pid),
        on_checkpoint=gauges.checkpoint,
        on_stage=gauges.stage,
        stop_requested=deepe.stop_requested,
    )
    log("StartTraining", args.model_name, args)
    deepe.catch_stop()
    ended = run.to_the_end(train_py)
    gauges.take_pictures()
    if not ended:
        kept = simpletuner.newest_declared(plan.output)
        shutil.rmtree(plan.work, ignore_errors=True)
        what = (
            f"{kept} is complete" if kept else f"there is no checkpoint yet, the first one comes at {plan.save_steps}"
        )
        sys.stderr.write(f"stopped at step {run.stopped_at} of {plan.steps}; {what}\n")
        sys.exit(deepe.STOPPED)


def plan_of(
    args: argparse.Namespace,
    learned: list[Captioned],
    kind: str,
    dtype: str,
    ratios: dict[Path, float],
    shown: validation.Validation | None,
) -> simpletuner.Plan:
    buckets = Counter(ratios[one.picture] for one in learned)
    if args.aspect_ratio_buckets:
        few = {f"{ratio:g}": count for ratio, count in sorted(buckets.items())}
        remark(f"pictures by aspect ratio: {', '.join(f'{name} {n}' for name, n in few.items())}", args, warning=False)
    if args.lr_scheduler == "cosine" and args.warmup_steps:
        remark("SimpleTuner's cosine begins at the highest learning rate: warmup_steps has no effect", args)
    output = Path(args.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for folder in output.glob("checkpoint-*"):  # SimpleTuner writes no checkpoint over another
            shutil.rmtree(folder, ignore_errors=True)
    resume = simpletuner.newest_declared(output)
    if resume:
        remark(f"resumed from {resume}", args, warning=False)
    names = (
        *("resolution", "batch_size", "grad_accum_steps", "learning_rate", "lr_scheduler", "warmup_steps"),
        *("max_grad_norm", "weight_decay", "lora_rank", "save_steps", "save_total_limit", "seed"),
    )
    return simpletuner.Plan(
        **{name: getattr(args, name) for name in names},
        model=Path(args.model_path).resolve(),
        family=simpletuner.family_of(kind, args.model_family),
        output=output,
        work=output / "simpletuner",
        pictures=len(learned),
        steps=diffusion.steps_of(args, len(learned)),
        dtype=dtype,
        gradient_checkpointing=args.gradient_checkpointing != "false",
        rarest=min(buckets.values()) if args.aspect_ratio_buckets else None,
        validation=shown,
        prediction=simpletuner.prediction_of(Path(args.model_path)),
        processes=gpus(),
        resume=resume,
        options=simpletuner.read_options(args.simpletuner_options),
    )


def gpus() -> int:
    """Return how many GPUs the platform gave to the job; 1 where there is none or it said nothing."""
    given = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card.strip()]
    return max(1, len(given))


class Gauges:
    """Turns what SimpleTuner tells into the platform's curves, progress and checkpoints."""

    def __init__(self, args: argparse.Namespace, plan: simpletuner.Plan) -> None:
        self.args, self.plan = args, plan
        self.done = 0
        self._first: tuple[int, float] | None = None
        self._peak = 0.0

    def step(self, step: runs.Step, pid: int | None) -> None:
        self.done, now = step.number, time.monotonic()
        self._first = self._first or (step.number, now)
        if step.number % self.args.logging_steps and step.number not in (1, step.total):
            return
        values = dict(step.values)
        self._peak = max(self._peak, runs.memory_mib(pid) or 0.0)
        values |= {"memory_peak_mib": self._peak} if self._peak else {}
        steps, seconds = step.number - self._first[0], now - self._first[1]
        if steps and seconds:
            values["samples_per_second"] = steps * self.plan.samples_per_step / seconds
            values["eta_seconds"] = seconds / steps * (step.total - step.number)
        deepe.metrics(step.number, **values)
        deepe.progress(step.number, step.total)
        if "loss" in values:
            print_step(step.number, step.total, "loss", values)

    def stage(self, label: str) -> None:
        self.take_pictures()
        deepe.progress(self.done, self.plan.steps, label)

    def take_pictures(self) -> None:
        """Keep what SimpleTuner has drawn."""
        if self.plan.validation:
            self.plan.validation.take(self.plan.output / "validation_images", self.plan.output)

    def checkpoint(self, folder: Path) -> None:
        if folder.is_dir():
            diffusion.make_readable(folder)
            deepe.checkpoint(folder, self.done)


def tidy(output: Path) -> None:
    """Leave the weights, the pictures and the settings: checkpoints and caches have done their work."""
    for folder in (
        *diffusion.checkpoints(output),
        *(output / name for name in ("simpletuner", "logs", "assets", "validation_images")),
    ):
        shutil.rmtree(folder, ignore_errors=True)
    lists = (*output.glob("all_*_files_*.json"), *output.glob("aspect_resolution_map-*.json"))
    for file in (*lists, output / "README.md"):  # SimpleTuner's lists, an empty form
        file.unlink(missing_ok=True)
    diffusion.make_readable(output)


def memory_advice(error: Exception, args: argparse.Namespace) -> str:
    """Return what to change if memory was short, and tell the user; else an empty text."""
    text = f"{type(error).__name__} {error}".lower()
    if not any(sign in text for sign in ("outofmemory", "out of memory", "memoryerror", "t allocate memory")):
        return ""
    advice = (
        f"out of memory: halve batch_size ({args.batch_size}) and double grad_accum_steps ({args.grad_accum_steps}), "
        f"lower resolution ({args.resolution}), set gradient_checkpointing to true, set eval_pictures to 0; with "
        f'SimpleTuner also simpletuner_options={{"base_model_precision": "int8-quanto"}}'
    )
    deepe.note(advice)
    return advice


if __name__ == "__main__":
    main()
