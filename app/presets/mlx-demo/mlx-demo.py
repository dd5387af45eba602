"""MLX-Demo, training: LoRA, DoRA or full fine-tuning of a language model with MLX, on Apple silicon or a CPU.

Try it by hand, in a checkout of the product, with the interpreter of the `mlx` environment (about half a minute);
the base model is built by the one of the `trl` environment:

    python app/presets/shared/tiny_base.py --output tiny-base
    python app/presets/mlx-demo/mlx-demo.py --model_path=tiny-base --dataset_path=app/presets/sft-demo/sft-demo.jsonl \
        --output_dir=mlx-out --max_steps=120 --batch_size=32 --learning_rate=0.01 --lora_scale=2

| fine_tune_type | what is trained |
|---|---|
| lora | two narrow matrices beside each linear layer of the last `num_layers` blocks |
| dora | direction by LoRA and length by itself: closer to full fine-tuning, slower |
| full | all weights of these blocks |

A base model that is quantized on disk, or `load_in_4bit`, makes it QLoRA. Every option of mlx-lm's own configuration
(`mlx_lm.lora.CONFIG_DEFAULTS`) can be set as well. Those that it counts in forward passes, such as `iters`, must make
whole steps of `grad_accum_steps` passes. Rows and held-out file are those of sft-demo.py. The layers and the form of
the adapter are mlx-lm's, so its own commands take what is made here (`python -m mlx_lm generate --model tiny-base
--adapter-path mlx-out`). The loop is ours: mlx-lm's keeps neither the optimizer's state nor its place in the data, and
could not go on as if nothing had been.

A checkpoint holds weights and optimizer; the rows and the random numbers of a step follow from its number. SIGTERM
writes one and ends the script with code 143. A resumed run gives the same weights as an undisturbed one.
"""

import argparse
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
import deepe_arguments as arguments
import deepe_llm as llm
import deepe_mlx as mlx_models
import deepe_mlx_options as options
from deepe_best import STATE as TRAINER_STATE
from deepe_best import Best
from deepe_chat import ends_of, write_ends
from deepe_checkpoints import newest_checkpoint
from deepe_examples import encode, load_examples
from deepe_log import log, remark, remark_plan
from deepe_options import Options
from deepe_rows import CONVERSATION, TEXT, Refused, Rendered, Text, Wanted
from deepe_scores import perplexity, prompt_of, report_loss, report_right, to_answer
from deepe_trackers import follow

LIBRARY_OPTIONS = {  # every entry of it can be set, beside the arguments below
    "classes": {"mlx_lm.lora.CONFIG_DEFAULTS": {}}
}
LEARNS = Wanted(kinds=frozenset({CONVERSATION, TEXT}))
WEIGHTS, STATE = "adapters.safetensors", "optimizer.safetensors"
WIDTH = 32  # rows are padded to a multiple of it: a step is compiled once for each width


class Example(NamedTuple):
    """Tokens of a row; the model learns those from `start` on, which is at least 1: nothing foretells the first."""

    tokens: list[int]
    start: int


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune a language model with MLX.", allow_abbrev=False)
    arguments.add_job(parser, model_name="mlx-demo")

    adapter = parser.add_argument_group("what is trained")
    adapter.add_argument("--fine_tune_type", choices=["lora", "dora", "full"], default="lora")
    adapter.add_argument("--num_layers", type=int, default=-1, help="blocks, counted from the last; -1 takes all")
    adapter.add_argument("--lora_rank", "--lora_r", "--r", type=int, default=16, help="rank of the adapter's matrices")
    adapter.add_argument("--lora_scale", type=float, default=20.0, help="weight of the adapter")
    adapter.add_argument("--lora_dropout", type=float, default=0.0, help="part of the adapter's inputs switched off")

    data = arguments.add_rows(parser, columns=("the input", "the output"))
    arguments.add_lengths(data)
    arguments.add_template(data)
    data.add_argument(
        "--mask_prompt", type=arguments.str2bool, default=True, help="learn the answers, not the questions"
    )

    steps = parser.add_argument_group("training")
    steps.add_argument(
        "--epochs",
        "--num_train_epochs",
        type=float,
        default=1.0,
        help="passes over the rows, unless max_steps is given",
    )
    steps.add_argument("--max_steps", type=int, default=None, help="number of steps, instead of epochs")
    steps.add_argument(
        "--batch_size", "--per_device_train_batch_size", type=int, default=4, help="rows in one forward pass"
    )
    steps.add_argument(
        "--grad_accum_steps",
        "--grad_accumulation_steps",
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        help="forward passes in one step",
    )
    steps.add_argument("--learning_rate", type=float, default=1e-5, help="highest learning rate")
    steps.add_argument("--warmup_steps", type=int, default=None, help="steps until the highest learning rate")
    steps.add_argument("--warmup_ratio", type=float, default=0.03, help="the same as part of all steps")
    steps.add_argument(
        "--lr_scheduler",
        "--lr_scheduler_type",
        choices=["cosine", "linear", "constant"],
        default="cosine",
        help="course of the learning rate",
    )
    steps.add_argument("--optimizer", "--optim", default="adamw", help="one of mlx-lm's")
    steps.add_argument("--max_grad_norm", type=float, default=1.0, help="longer gradients are cut to this length")
    steps.add_argument("--weight_decay", type=float, default=0.0, help="pull of the weights towards zero")
    arguments.add_seed(steps)

    machine = parser.add_argument_group("memory and speed")
    machine.add_argument(
        "--load_in_4bit", type=arguments.str2bool, default=False, help="QLoRA: the base model in 4 bits"
    )
    machine.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="auto keeps the base model's own",
    )
    machine.add_argument(
        "--gradient_checkpointing",
        "--grad_checkpoint",
        type=arguments.str2bool,
        default=False,
        help="recompute activations instead of keeping",
    )

    watch = arguments.add_watch(parser)
    watch.add_argument("--eval_steps", type=int, default=50, help="steps between two losses on the held-out rows")
    arguments.add_best(watch)
    watch.add_argument("--eval_max_new_tokens", type=int, default=64, help="tokens of an answer that is scored")
    return parser


def main() -> None:
    args, rest = make_parser().parse_known_args()
    args.options = Options(rest, LIBRARY_OPTIONS, args)
    mlx_models.prepare_environment()
    llm.run_stage(args, run, advice=lambda error: mlx_models.memory_advice(error, args.batch_size))


def run(args: argparse.Namespace) -> None:
    check(args)
    best = Best(args, ("eval_loss", "eval_perplexity"))
    log("HandleWithDataset", args.dataset_path, args)
    parts = load_examples(args, LEARNS)

    log("InitializingModel", args.model_path, args)
    tokenizer = llm.load_tokenizer(args.model_path, args)
    examples = [learned_part(one, args) for one in encode(parts.train, tokenizer, args)]
    held_out = encode(parts.held_out, tokenizer, args, held_out=True)
    unseen = [learned_part(one, args) for one in held_out]
    best.check_rows(held_out)
    learner = Learner(args, best)

    score(learner, tokenizer, held_out, unseen, "before")
    with follow(args):
        train(learner, tokenizer, examples, unseen, rows=len(parts.train))
    learner.write(Path(args.output_dir), tokenizer)
    llm.announce_adapter(args)
    score(learner, tokenizer, held_out, unseen, "after")
    for checkpoint in checkpoints(Path(args.output_dir)):  # a finished run needs none
        shutil.rmtree(checkpoint, ignore_errors=True)
    log("TrainingSuccess", args.model_name, args)


def check(args: argparse.Namespace) -> None:
    llm.check(args)
    options.take(args, usual=make_parser().get_default)
    for name, least in {"eval_steps": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise Refused(f"{name} must be at least {least}, it is {getattr(args, name)}")
    if not 0 <= args.lora_dropout < 1:
        raise Refused(f"lora_dropout must be at least 0 and below 1, it is {args.lora_dropout}")
    if args.num_layers != -1 and args.num_layers < 1:
        raise Refused(f"num_layers must be at least 1, or -1 for all, it is {args.num_layers}")
    if args.fine_tune_type == "full" and args.load_in_4bit:
        raise Refused(
            "weights in 4 bits cannot be trained: take fine_tune_type lora or dora, or leave load_in_4bit off"
        )


# --- data -----------------------------------------------------------------------------------------------------------


def learned_part(one: Rendered, args: argparse.Namespace) -> Example:
    """Return a sequence with what is learned of it: the answer, or with `mask_prompt=false` all of it."""
    return Example(one.tokens, max(1, one.start) if args.mask_prompt else 1)


class Batches:
    """Rows of each step, made of the step's number only: a resumed run sees what an undisturbed one would."""

    def __init__(self, examples: list[Example], args: argparse.Namespace) -> None:
        self.examples, self.size, self.passes, self.seed = examples, args.batch_size, args.grad_accum_steps, args.seed
        self.per_epoch = math.ceil(math.ceil(len(examples) / self.size) / self.passes)
        self._epoch, self._order = -1, []

    def of_step(self, step: int) -> list[list[Example]]:
        """Return what is learned in one step, as one list for each forward pass."""
        epoch, place = divmod(step - 1, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[place * self.passes : (place + 1) * self.passes]

    def _shuffled(self, epoch: int) -> list[list[Example]]:
        """Put rows of one width together, so that little is padded, and the batches in any order."""
        order = random.Random(f"{self.seed}/{epoch}")
        rows = sorted(order.sample(self.examples, len(self.examples)), key=width)
        batches = [rows[start : start + self.size] for start in range(0, len(rows), self.size)]
        return order.sample(batches, len(batches))


def width(example: Example) -> int:
    """Return the columns of a row: its last token is only foretold, never read."""
    return WIDTH * max(1, math.ceil((len(example.tokens) - 1) / WIDTH)) + 1


def arrays(batch: list[Example]) -> tuple[Any, Any]:
    """Return tokens, `(rows, columns)`, and which of them are learned, as 1 and 0, without the first column."""
    import mlx.core as mx

    columns = max(width(example) for example in batch)
    tokens = [example.tokens + [0] * (columns - len(example.tokens)) for example in batch]
    learned = [
        [float(example.start <= place < len(example.tokens)) for place in range(1, columns)] for example in batch
    ]
    return mx.array(tokens), mx.array(learned)


def learned_tokens(batches: list[list[Example]]) -> int:
    return sum(len(example.tokens) - example.start for batch in batches for example in batch)


# --- training -------------------------------------------------------------------------------------------------------


def train(learner: "Learner", tokenizer: Any, examples: list[Example], unseen: list[Example], *, rows: int) -> None:
    """Take all steps, from the newest complete checkpoint on; a stop writes one and ends the process."""
    from train_callback import TrainCallback

    args = learner.args
    batches = Batches(examples, args)
    steps = args.max_steps or max(1, math.ceil(args.epochs * batches.per_epoch))
    done = learner.restore()
    remark_plan(rows, len(examples), steps, args)
    report, speed = TrainCallback(args.logging_steps, args.train_id, args.seq), llm.Speed(done, learner.memory_peak)
    log("StartTraining", args.model_name, args)
    deepe.catch_stop()
    take_step = learner.compiled()
    losses: list[float] = []
    for step in range(done + 1, steps + 1):
        if learner.best.ended:
            break
        rate = options.learning_rate(step - 1, steps, args)
        loss, norm = take_step(step, batches.of_step(step), rate)
        losses.append(loss)
        values: dict[str, float] = {}
        if step % args.logging_steps == 0 or step in (1, steps):
            values = {"loss": sum(losses) / len(losses), "grad_norm": norm}
            values |= {} if learner.sets_rate else {"learning_rate": rate}
            values |= {"epoch": step / batches.per_epoch, **speed.gauges(step, steps, learner.tokens_seen)}
            llm.print_step(step, steps, "loss", values)
            losses = []
        if unseen and (step % args.eval_steps == 0 or step == steps):
            measured = len(unseen) if args.val_batches == -1 else args.val_batches * args.batch_size
            values["eval_loss"] = learner.loss_on(unseen[:measured])
            values["eval_perplexity"] = perplexity(values["eval_loss"])
        if values:
            state = SimpleNamespace(global_step=step, max_steps=steps, log_history=[], is_world_process_zero=True)
            report.on_log(None, state, None, logs=values)
        done, stopping = step, deepe.stop_requested()
        keep = learner.best.add(step, values)
        if stopping or keep or (step % args.save_steps == 0 and step < steps):
            learner.checkpoint(step, tokenizer)
        if stopping:
            llm.end_stopped(step)
    if kept := learner.best.end(Path(args.output_dir), done, steps):
        learner.take(kept)


class Learner:
    """The model, its optimizer, and how both are kept."""

    def __init__(self, args: argparse.Namespace, best: Best) -> None:
        import mlx.core as mx

        self.args, self.best, self.tokens_seen = args, best, 0
        if mx.metal.is_available():  # keep the weights where the GPU reaches them
            mx.set_wired_limit(mx.device_info()["max_recommended_working_set_size"])
        mx.random.seed(args.seed)  # adapters that are made next start equally
        self.model, self.config = mlx_models.load_base(Path(args.model_path), four_bit=args.load_in_4bit)
        if args.dtype != "auto":
            self.model.set_dtype(getattr(mx, args.dtype))
        self._choose_weights()
        mx.eval(self.model.parameters())
        self.optimizer = options.optimizer_of(args)
        self.optimizer.init(self.model.trainable_parameters())
        self.sets_rate = bool(getattr(self.optimizer, "relative_step", False))
        if self.sets_rate:
            remark("relative_step: the optimizer sets its learning rate itself, learning_rate has no effect", args)

    def _choose_weights(self) -> None:
        """Freeze the model but for what is to be learned."""
        from mlx.utils import tree_flatten
        from mlx_lm.tuner.utils import linear_to_lora_layers

        args, blocks = self.args, self.model.layers
        if args.num_layers > len(blocks):
            raise Refused(f"num_layers is {args.num_layers}, but the model has {len(blocks)} layers; -1 takes all")
        if args.fine_tune_type == "full" and mlx_models.is_quantized(self.config):
            raise Refused(f"the base model in {args.model_path} is quantized: take fine_tune_type lora or dora")
        self.model.freeze()
        if args.fine_tune_type == "full":
            for block in blocks[-max(args.num_layers, 0) :]:
                block.unfreeze()
        else:
            options.check_keys(self.model, args.lora_keys)
            linear_to_lora_layers(
                self.model, args.num_layers, self._settings()["lora_parameters"], use_dora=args.fine_tune_type == "dora"
            )
        trained = sum(weights.size for _, weights in tree_flatten(self.model.trainable_parameters()))
        print(f"{args.fine_tune_type} trains {trained:,} weights", flush=True)

    def _settings(self) -> dict[str, Any]:
        """Return what adapter_config.json says: mlx-lm loads the adapter by it."""
        args = self.args
        keys = {"keys": args.lora_keys} if args.lora_keys else {}
        return {
            "model": args.model_path,
            "fine_tune_type": args.fine_tune_type,
            "num_layers": args.num_layers,
            "lora_parameters": {"rank": args.lora_rank, "scale": args.lora_scale, "dropout": args.lora_dropout} | keys,
            "load_in_4bit": args.load_in_4bit,
            "optimizer": args.optimizer,
        }

    def compiled(self) -> Callable[[int, list[list[Example]], float], tuple[float, float]]:
        """Return the function that takes a step with a learning rate: its loss, and how long the gradient was."""
        import mlx.core as mx
        import mlx.nn as nn
        import mlx.optimizers
        from mlx.utils import tree_map
        from mlx_lm.tuner.trainer import grad_checkpoint

        if self.args.gradient_checkpointing:
            grad_checkpoint(self.model.layers[0])
        model, optimizer = self.model, self.optimizer
        differentiate = nn.value_and_grad(model, loss_of)
        kept = self.args.options.given.get("clear_cache_threshold", 0)
        seen, changed = [model.state, mx.random.state], [model.state, optimizer.state]

        @partial(mx.compile, inputs=seen, outputs=seen)
        def look(tokens: Any, learned: Any, total: Any) -> tuple[Any, Any]:
            return differentiate(model, tokens, learned, total)

        @partial(mx.compile, inputs=changed, outputs=changed)
        def change(gradients: Any) -> Any:
            gradients, norm = mlx.optimizers.clip_grad_norm(gradients, self.args.max_grad_norm)
            optimizer.update(model, gradients)
            return norm

        def take(step: int, batches: list[list[Example]], rate: float) -> tuple[float, float]:
            model.train()
            mx.random.seed(self.args.seed + step)  # of dropout: nothing to keep, a resumed run draws the same
            optimizer.learning_rate = rate
            total = mx.array(float(max(1, learned_tokens(batches))))
            loss, gradients = look(*arrays(batches[0]), total)
            for batch in batches[1:]:
                mx.eval(loss, gradients)  # or all forward passes would be in memory together
                more, added = look(*arrays(batch), total)
                loss, gradients = loss + more, tree_map(lambda a, b: a + b, gradients, added)
            norm = change(gradients)
            mx.eval(seen, changed, loss, norm)
            self.tokens_seen += sum(len(example.tokens) for batch in batches for example in batch)
            if mx.get_cache_memory() > kept:
                mx.clear_cache()  # buffers of this width: the next step may need others
            return loss.item(), norm.item()

        return take

    def loss_on(self, examples: list[Example]) -> float:
        """Return the mean loss of a token of rows that are not learned from."""
        import mlx.core as mx

        self.model.eval()
        rows, size, found = sorted(examples, key=width), self.args.batch_size, 0.0
        total = mx.array(float(max(1, learned_tokens([rows]))))
        for start in range(0, len(rows), size):
            found += loss_of(self.model, *arrays(rows[start : start + size]), total).item()
        return found

    @staticmethod
    def memory_peak() -> float:
        import mlx.core as mx

        return round(mx.get_peak_memory() / 2**20, 1)

    # --- what is kept ---

    def write(self, folder: Path, tokenizer: Any) -> None:
        """Write the adapter with its tokenizer, as mlx-lm loads it."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / WEIGHTS), dict(tree_flatten(self.model.trainable_parameters())))
        (folder / "adapter_config.json").write_text(json.dumps(self._settings(), indent=1), "utf-8")
        tokenizer.save_pretrained(folder)
        write_ends(Path(self.args.model_path), folder, ends_of(tokenizer, self.config.get("eos_token_id")))

    def checkpoint(self, step: int, tokenizer: Any) -> None:
        """Write all that the next step depends on, as a whole or not at all."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        draft = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(draft, ignore_errors=True)
        self.write(draft, tokenizer)
        mx.save_safetensors(str(draft / STATE), dict(tree_flatten(self.optimizer.state)))
        self.best.write(draft, step, tokens_seen=self.tokens_seen)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        deepe.checkpoint(folder, step)
        for old in checkpoints(folder.parent)[self.args.save_total_limit :]:
            if old.name != self.best.name:
                shutil.rmtree(old, ignore_errors=True)

    def take(self, folder: Path) -> None:
        """Take the weights of a checkpoint."""
        import mlx.core as mx

        self.model.load_weights(str(folder / WEIGHTS), strict=False)
        mx.eval(self.model.parameters())

    def restore(self) -> int:
        """Take everything from the newest complete checkpoint; return its step, 0 without one."""
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        folder = newest_checkpoint(Path(self.args.output_dir), self.args, [STATE], weights=WEIGHTS)
        if folder is None:
            return 0
        made = {"optimizer": "adamw", **json.loads((folder / "adapter_config.json").read_text("utf-8"))}
        if made != self._settings():
            raise Refused(
                f"{folder} was made with other settings of model or adapter; empty output_dir, or set resume to false"
            )
        self.take(folder)
        self.optimizer.state = tree_unflatten(list(mx.load(str(folder / STATE)).items()))
        mx.eval(self.optimizer.state)
        self.best.read(folder)
        seen = json.loads((folder / TRAINER_STATE).read_text("utf-8"))
        self.tokens_seen = seen["tokens_seen"]
        return int(seen["global_step"])


def loss_of(model: Any, tokens: Any, learned: Any, total: Any) -> Any:
    """Return the batch's part of the mean over `total` tokens: parts of several batches add up."""
    import mlx.core as mx
    import mlx.nn as nn

    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return (losses.astype(mx.float32) * learned).sum() / total


def checkpoints(output: Path) -> list[Path]:
    """Newest first."""
    found = [folder for folder in output.glob("checkpoint-*") if folder.name[11:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[11:]), reverse=True)


# --- score ----------------------------------------------------------------------------------------------------------


def score(learner: Learner, tokenizer: Any, held_out: list[Rendered], unseen: list[Example], phase: str) -> None:
    """Report the held-out loss, and how many questions get exactly the wanted answer."""
    if unseen:
        report_loss(learner.loss_on(unseen), phase, len(unseen))
    asked = [one for one in held_out if not isinstance(one.example, Text)]
    if not asked:
        return
    learner.model.eval()
    speaking, most = mlx_models.wrapped(tokenizer, learner.config), learner.args.eval_max_new_tokens
    prompts = [prompt_of(one, tokenizer) for one in to_answer(asked, tokenizer, learner.args)]
    given = []
    for prompt in prompts:
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        given.append("".join(mlx_models.generate(learner.model, speaking, tokens, most=most)))
        if deepe.stop_requested():
            sys.exit(deepe.STOPPED)
    report_right(prompts, given, asked, tokenizer, learner.args, phase)


if __name__ == "__main__":
    main()
