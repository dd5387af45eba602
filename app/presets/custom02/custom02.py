"""Custom02: from a base model straight to a complete model, in a training loop of plain PyTorch.

Copy it when Custom01 is too small for you: this one trains every weight of a Hugging Face causal language model, on a
GPU in bfloat16 or on a CPU, with a loop that you can read and change. Its method has no customized state, so the
*saving* stage is the one that produces the model: it gets the training's parameters besides its own paths.

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment:

    python app/presets/shared/tiny_base.py --output tiny-base
    python app/presets/custom02/custom02.py --base_path tiny-base --dataset_path app/presets/sft-demo/sft-demo.jsonl \
        --save_path custom02-complete --max_steps 100 --batch_size 32 --learning_rate 0.002

Started by torchrun or accelerate, several processes share the rows of each step and add up their gradients: the model
is the same, only sooner. Rank 0 reports, saves and writes.

Checkpoints go to `output_dir` and hold the weights, the optimizer and the state of the random numbers: a run that was
interrupted goes on from the newest and gives the same weights. The last line on stdout is the result.
"""

import argparse
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
import deepe_arguments as arguments
import deepe_llm as llm
import deepe_loading as loading
from deepe_best import Best
from deepe_chat import stop_at_turn_ends
from deepe_log import log, remark_plan
from deepe_preparation import Preparation, remove_prepared
from deepe_recipes import Recipe
from deepe_rows import CONVERSATION, Refused, Rendered, Wanted
from deepe_scores import perplexity, report_exact_match, report_loss
from deepe_trackers import check as check_trackers
from deepe_trackers import follow

TINY_BYTES = 64 * 2**20  # threads of a smaller model wait for each other longer than they work
RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
IGNORED = -100  # label of a token that is not learned: the question and the padding


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train every weight of a causal model.", allow_abbrev=False)
    parser.add_argument("--train_id", default="manual", help="id of the job, for the log")
    parser.add_argument("--seq", default="1", help="number of the step in the job, for the log")
    parser.add_argument("--model_name", default="custom02", help="name of the model")
    parser.add_argument("--base_path", required=True, help="folder of the base model")
    parser.add_argument("--save_path", required=True, help="folder for the complete model")
    parser.add_argument("--dataset_path", required=True, help="JSONL file, or a folder with one")
    parser.add_argument("--output_dir", default=None, help="folder for checkpoints; empty takes save_path")
    parser.add_argument("--dtype_str", default="float32", help="numbers of the complete model")
    parser.add_argument("--input_train_name", default="instruction", help="column with the question")
    parser.add_argument("--output_train_name", default="output", help="column with the answer")
    parser.add_argument("--validation_path", default=None, help="rows for the score; empty holds out a part")
    parser.add_argument("--max_samples", type=int, default=-1, help="rows to use; -1 takes all")
    parser.add_argument("--max_seq_length", type=int, default=512, help="tokens of a row; longer rows are left out")
    arguments.add_template(parser)
    arguments.add_workers(parser)
    parser.add_argument("--epochs", type=int, default=3, help="passes over the rows, unless max_steps is given")
    parser.add_argument("--max_steps", type=int, default=None, help="number of steps, instead of epochs")
    parser.add_argument("--batch_size", type=int, default=8, help="rows in one forward pass")
    parser.add_argument("--grad_accum_steps", type=int, default=1, help="forward passes in one step")
    parser.add_argument("--learning_rate", type=float, default=2e-5, help="highest learning rate")
    parser.add_argument("--warmup_steps", type=int, default=5, help="steps until the highest learning rate")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="longer gradients are cut to this length")
    parser.add_argument("--weight_decay", type=float, default=0.0, help="pull of the weights towards zero")
    parser.add_argument("--seed", type=int, default=42, help="same seed and machine, same model")
    parser.add_argument("--logging_steps", type=int, default=5, help="steps between two points of the curve")
    arguments.add_trackers(parser)
    parser.add_argument("--save_steps", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--eval_fraction", type=float, default=0.1, help="part of the rows held out for the score")
    parser.add_argument("--eval_samples", type=int, default=100, help="held-out rows that are used at most")
    parser.add_argument("--eval_steps", type=int, default=50, help="steps between two points of the held-out loss")
    parser.add_argument("--eval_max_new_tokens", type=int, default=64, help="tokens of an answer that is scored")
    arguments.add_best(parser)
    return parser


def main() -> None:
    args, unknown = make_parser().parse_known_args()
    if sum(file.stat().st_size for file in Path(args.base_path).glob("*.safetensors")) < TINY_BYTES:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    try:
        llm.judge_unknown(unknown, args)
        run(args)
    except Exception as error:
        if isinstance(error, Refused):
            remove_prepared(args)
        log("TrainingFailed", str(error), args, level="ERROR")
        deepe.result("failed", message=str(error))
        if isinstance(error, Refused | OSError):  # what the user can put right gets no traceback
            sys.exit(f"custom02.py: {error}")
        raise


def run(args: argparse.Namespace) -> None:
    for name in ("batch_size", "grad_accum_steps", "logging_steps", "save_steps", "eval_steps"):
        if getattr(args, name) < 1:
            raise Refused(f"{name} must be at least 1")
    best = Best(args, ("eval_loss", "eval_perplexity"))
    check_trackers(args)
    log("HandleWithDataset", args.dataset_path, args)
    preparation = Preparation(args, Wanted(kinds=frozenset({CONVERSATION})))

    log("InitializingModel", args.base_path, args)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(args.seed)
    device = join_group()
    tokenizer = llm.load_tokenizer(args.base_path, args)
    learned, held_out = preparation.sequences(tokenizer, Recipe())
    best.check_rows(held_out)
    machine = llm.Machine(torch.device(device).type, "float32", None, four_bit=False, optimizer="adamw_torch")
    llm.plan_memory(args, machine, learned.longest, method="full")
    model = AutoModelForCausalLM.from_pretrained(args.base_path, dtype=torch.float32, **loading.weights(args.base_path))
    model.to(device)
    stop_at_turn_ends(model, tokenizer)

    score(model, tokenizer, held_out, args, "before")
    log("StartTraining", args.model_name, args)
    output = Path(args.output_dir or args.save_path)
    with follow(args, model):
        train(model, learned.rows(), held_out, output, tokenizer.pad_token_id, args, best, rows=preparation.rows)
    score(model, tokenizer, held_out, args, "after")

    log("SaveTrainedModel", args.model_name, args)
    if deepe.is_first():
        save_complete(model.to(getattr(torch, args.dtype_str, torch.bfloat16)), tokenizer, Path(args.save_path))
        for checkpoint in checkpoints(output):  # a finished run needs none, and each is three times the model
            shutil.rmtree(checkpoint, ignore_errors=True)
        deepe.result(message=f"the model is complete in {args.save_path}", model_type=model.config.model_type)
    log("SaveTrainedModelSuccess", args.save_path, args)
    remove_prepared(args)
    leave_group()


# --- several processes ----------------------------------------------------------------------------------------------


def join_group() -> str:
    """Return the device of this process, after it has met the others."""
    import torch

    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if PROCESSES > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    return device


def leave_group(code: int = 0) -> None:
    """Wait for the others, part and end: the first to end would end them all. Alone, do nothing.

    At once: threads that gloo left may abort the interpreter's own end (torch 2.13).
    """
    import torch

    if PROCESSES > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        deepe.end(code)


def share_gradients(model: Any) -> None:
    """Add up what the processes found; each has weighted its tokens by their part of the step's."""
    import torch

    if PROCESSES > 1:
        for parameter in model.parameters():
            if parameter.grad is None:  # this process had no row in a short step
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)


def summed(model: Any, *values: float) -> list[float]:
    """Return each value added up over the processes."""
    import torch

    shared = torch.tensor(values, dtype=torch.float64, device=model.device)
    if PROCESSES > 1:
        torch.distributed.all_reduce(shared)
    return shared.tolist()


# --- the loop -------------------------------------------------------------------------------------------------------


def train(
    model: Any,
    examples: Sequence[Rendered],
    held_out: list[Rendered],
    output: Path,
    pad: int,
    args: argparse.Namespace,
    best: Best,
    *,
    rows: int,
) -> None:
    """AdamW with warm-up and a cosine; a step is `grad_accum_steps` forward passes.

    Its loss is the mean over all learned tokens of the step, however they are spread over passes and processes.
    """
    import torch

    rows_of_step = args.batch_size * args.grad_accum_steps
    per_epoch = math.ceil(len(examples) / rows_of_step)
    steps = args.max_steps or args.epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, course(args.warmup_steps, steps))
    done = resume(model, optimizer, schedule, output, best)
    remark_plan(rows, len(examples), steps, args)
    order: list[int] = []
    deepe.catch_stop()
    model.train()
    first = done + 1
    for step in range(first, steps + 1):
        if best.ended:
            break
        epoch, position = divmod(step - 1, per_epoch)
        if position == 0 or step == first:  # the order depends on the epoch only: a resumed run sees the same rows
            order = random.Random(f"{args.seed}/{epoch}").sample(range(len(examples)), len(examples))
        batch = [examples[place] for place in order[position * rows_of_step : (position + 1) * rows_of_step]]
        tokens = sum(learned_tokens(one) for one in batch)
        own = batch[RANK::PROCESSES]
        loss = 0.0
        for start in range(0, len(own), args.batch_size):
            part = own[start : start + args.batch_size]
            part_loss = loss_of(model, part, pad) / tokens
            part_loss.backward()
            loss += part_loss.item()
        share_gradients(model)
        loss, stops = summed(model, loss, deepe.stop_requested())  # all leave the loop at the same step
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        metrics: dict[str, float] = {}
        if step % args.logging_steps == 0 or step in (1, steps):
            metrics = {"loss": loss, "grad_norm": norm.item(), "learning_rate": rate, "epoch": step / per_epoch}
            metrics |= llm.memory_gauges()
        if held_out and (step % args.eval_steps == 0 or step == steps):
            metrics["eval_loss"] = held_out_loss(model, held_out, pad, args)
            metrics["eval_perplexity"] = perplexity(metrics["eval_loss"])
        if metrics and deepe.is_first():
            report(args, step, steps, metrics)
        keep = best.add(step, metrics)
        if deepe.is_first() and (step % args.save_steps == 0 or stops or keep):
            save_checkpoint(model, optimizer, schedule, output, step, best)
        done = step
        if stops:
            print(f"stopped at step {step} of {steps}; its checkpoint is complete", file=sys.stderr)
            leave_group(deepe.STOPPED)
            sys.exit(deepe.STOPPED)
    if kept := best.end(output, done, steps):
        model.load_state_dict(torch.load(kept / "state.pt", map_location="cpu", weights_only=True)["model"])


def loss_of(model: Any, batch: list[Rendered], pad: int) -> Any:
    """Return the sum of the losses of the learned tokens."""
    import torch

    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        mean = model(**collate(batch, pad, model.device)).loss
    return mean * sum(learned_tokens(one) for one in batch)


def held_out_loss(model: Any, held_out: list[Rendered], pad: int, args: argparse.Namespace) -> float:
    """Return the mean loss of a token of rows that are not learned from; the processes share the rows."""
    import torch

    own = sorted(held_out, key=lambda one: len(one.tokens))[RANK::PROCESSES]
    learning = model.training
    model.eval()
    with torch.no_grad():
        parts = [own[start : start + args.batch_size] for start in range(0, len(own), args.batch_size)]
        loss = sum(loss_of(model, part, pad).item() for part in parts)
    model.train(learning)
    loss, tokens = summed(model, loss, sum(map(learned_tokens, own)))
    return loss / tokens


def course(warmup: int, steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def learned_tokens(one: Rendered) -> int:
    return len(one.tokens) - max(1, one.start)  # nothing foretells the first token


def collate(batch: list[Rendered], pad: int, device: Any) -> dict[str, Any]:
    import torch

    width = max(len(one.tokens) for one in batch)
    missing = [width - len(one.tokens) for one in batch]
    columns = {
        "input_ids": [one.tokens + [pad] * gap for one, gap in zip(batch, missing, strict=True)],
        "attention_mask": [[1] * (width - gap) + [0] * gap for gap in missing],
        "labels": [one.labels + [IGNORED] * gap for one, gap in zip(batch, missing, strict=True)],
    }
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}


def report(args: argparse.Namespace, step: int, steps: int, metrics: dict[str, float]) -> None:
    """A record of code 200009 is a line of the log, a point of the curves and a step of the progress bar."""
    from train_callback import TrainCallback

    state = SimpleNamespace(global_step=step, max_steps=steps, log_history=[])
    TrainCallback(args.logging_steps, args.train_id, args.seq).on_log(None, state, None, logs=metrics)
    if "loss" in metrics:
        print(f"step {step}/{steps}  loss {metrics['loss']:.4f}", flush=True)


# --- checkpoints and the complete model -----------------------------------------------------------------------------


def save_checkpoint(model: Any, optimizer: Any, schedule: Any, output: Path, step: int, best: Best) -> None:
    """Write to a folder beside it first and rename: a checkpoint is there as a whole or not at all."""
    import torch

    target, draft = output / f"checkpoint-{step}", output / f".checkpoint-{step}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(state, draft / "state.pt")
    best.write(draft, step)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    deepe.checkpoint(target, step)
    for old in checkpoints(output)[2:]:
        if old.name != best.name:
            shutil.rmtree(old, ignore_errors=True)


def resume(model: Any, optimizer: Any, schedule: Any, output: Path, best: Best) -> int:
    """Load the newest checkpoint that can be read, and return its step; 0 starts from the beginning."""
    import torch

    for folder in checkpoints(output):
        try:  # weights_only: a checkpoint is data, loading it runs no code
            state = torch.load(folder / "state.pt", map_location=model.device, weights_only=True)
        except Exception as error:  # cut off, not a checkpoint, written by another version: the one before may do
            print(f"{folder.name} cannot be used: {error}", file=sys.stderr)
            continue
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"].cpu())
        best.read(folder)
        deepe.note(f"resumed from {folder.name}")
        return int(state["step"])
    return 0


def checkpoints(output: Path) -> list[Path]:
    """Newest first."""
    found = [folder for folder in output.glob("checkpoint-*") if folder.name[11:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[11:]), reverse=True)


def save_complete(model: Any, tokenizer: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="10GB")
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # written as 0600, whatever the umask says
    deepe.artifact(folder, "model")


# --- score ----------------------------------------------------------------------------------------------------------


def score(model: Any, tokenizer: Any, held_out: list[Rendered], args: argparse.Namespace, phase: str) -> None:
    """Report the held-out loss, and how many questions are answered with exactly the wanted text."""
    if not held_out:
        return
    report_loss(held_out_loss(model, held_out, tokenizer.pad_token_id, args), phase, len(held_out))
    if deepe.is_first():
        report_exact_match(model, tokenizer, held_out, args, phase)


if __name__ == "__main__":
    main()
