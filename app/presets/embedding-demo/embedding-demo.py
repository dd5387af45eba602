"""Embedding-Demo, training: teach a text encoder which texts belong together, by contrast, with LoRA.

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment (about half a minute):

    python app/presets/embedding-demo/tiny_encoder.py --output tiny-encoder
    python app/presets/embedding-demo/embedding-demo.py --model_path=tiny-encoder --output_dir=embedding-out \
        --dataset_path=app/presets/embedding-demo/embedding-demo.jsonl \
        --max_steps=200 --batch_size=24 --learning_rate=0.003

A row is a pair of texts that belong together: `anchor` and `positive` (also `query` and `document`, `question` and
`answer`, or the columns named by `input_train_name` and `output_train_name`), and optionally a `negative` or several
`negatives` that look alike and do not belong. Each text of a batch is told from all others of the batch (InfoNCE; van
den Oord et al. 2018): large batches teach more. Rows that share a text come into different batches as long as there
are others; a text that some row names as right for a query is never taken for a wrong one. `chunk_size` lets a batch
be larger than the memory: vectors first, then their gradients chunk by chunk (Gao et al. 2021), with the same result.

Pooling and prefixes are those of the base model where its folder names them, in the files of sentence-transformers.

The score is retrieval on rows put aside, before and after: how often the right text is the nearest of all
(`accuracy@1`), and one divided by its place (`mrr@10`). `output_dir` holds the adapter, the tokenizer and
`embedding.json`, which says how a vector is made of a text. A run that was interrupted goes on from the newest
checkpoint and gives the same weights.
"""

import argparse
import math
import os
import random
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
import deepe_arguments as arguments
import deepe_llm as llm
from deepe_adapter_kinds import CLASSES, adapter_config, check_adapter
from deepe_best import Best
from deepe_log import log, remark, remark_plan
from deepe_options import Options, options_of
from deepe_preparation import Preparation
from deepe_recipes import EXAMPLE, Recipe, Row, written_value
from deepe_rows import PAIR, Pair, Refused, Rendered, Wanted
from deepe_scores import report_score
from deepe_trackers import follow
from text_vectors import AUTO, Encoder, How, load_tokenizer, longest_of, pooling_of, prompts_of

LOOKED_AT = 10  # rows for each place of a batch, before rows that share a text are taken
LIBRARY_OPTIONS = {"classes": {**CLASSES}}  # every field of it can be set, beside the arguments below
LEARNS = Wanted(kinds=frozenset({PAIR}))

Right = Mapping[str, frozenset[str]]
"""The texts that some row names as right for a query."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a text encoder by contrast.", allow_abbrev=False)
    arguments.add_job(parser, model_name="embedding-demo")
    data = arguments.add_rows(parser, columns=("the query", "its text"))
    arguments.add_workers(data)
    data.add_argument("--max_seq_length", type=int, default=256, help="tokens of a text; the rest is cut off")
    data.add_argument("--query_prefix", default=AUTO, help="put before each query; auto takes the base model's own")
    data.add_argument("--document_prefix", default=AUTO, help="put before each text; auto takes the base model's own")
    data.add_argument(
        "--pooling",
        choices=[AUTO, "mean", "cls", "last"],
        default=AUTO,
        help="how tokens become a vector; auto takes the base model's own way, else mean",
    )

    steps = parser.add_argument_group("training")
    steps.add_argument("--epochs", type=float, default=1.0, help="passes over the rows, unless max_steps is given")
    steps.add_argument("--max_steps", type=int, default=None, help="number of steps, instead of epochs")
    steps.add_argument("--batch_size", type=int, default=64, help="pairs that are told from each other in one step")
    steps.add_argument("--chunk_size", type=int, default=0, help="pairs in memory at once; 0 takes the whole batch")
    steps.add_argument("--learning_rate", type=float, default=2e-4, help="highest learning rate")
    steps.add_argument("--warmup_steps", type=int, default=10, help="steps until the highest learning rate")
    steps.add_argument("--max_grad_norm", type=float, default=1.0, help="longer gradients are cut to this length")
    steps.add_argument("--scale", type=float, default=20.0, help="sharpness: similarities are multiplied by it")
    arguments.add_seed(steps)
    arguments.add_adapter(parser.add_argument_group("adapter"))
    watch = arguments.add_watch(parser, eval_samples=200)
    watch.add_argument("--eval_steps", type=int, default=100, help="steps between two points of the held-out loss")
    arguments.add_best(watch)
    return parser


def main() -> None:
    args, rest = make_parser().parse_known_args()
    args.options = Options(rest, LIBRARY_OPTIONS, args)
    llm.run_stage(args, run, advice=lambda error: memory_advice(error, args))


def run(args: argparse.Namespace) -> None:
    check(args)
    best = Best(args, ("eval_loss",))
    how = chosen_how(args)
    log("HandleWithDataset", args.dataset_path, args)
    preparation = Preparation(args, LEARNS)
    check_texts(preparation.examples()[0])

    log("InitializingModel", args.model_path, args)
    tokenizer = load_tokenizer(Path(args.model_path))
    learned, held_out = preparation.sequences(tokenizer, recipe_of(how))
    best.check_rows(held_out if is_comparable(held_out) else [])
    pairs = list(learned.rows())
    every = [*pairs, *held_out]
    right = right_texts(every)
    documents = sorted({pair.positive for pair in every})
    machine = llm.Machine(llm.device_kind(), "float32", None, four_bit=False, optimizer="adamw_torch")
    llm.plan_memory(args, machine, learned.longest, method="embedding")
    encoder = load(args, how, tokenizer)
    score(encoder, held_out, documents, right, args, "before")
    log("StartTraining", args.model_name, args)
    with follow(args):
        train(encoder, pairs, held_out, right, args, best)

    log("SaveTrainedModel", args.model_name, args)
    encoder.save(Path(args.output_dir))
    deepe.artifact(args.output_dir, "adapter")
    log("SaveTrainedModelSuccess", args.output_dir, args)
    score(encoder, held_out, documents, right, args, "after")
    for checkpoint in checkpoints(Path(args.output_dir)):  # a finished run needs none
        shutil.rmtree(checkpoint, ignore_errors=True)
    log("TrainingSuccess", args.model_name, args)


def memory_advice(error: Exception, args: argparse.Namespace) -> str:
    """Return what to change if memory was short, else an empty text."""
    if type(error).__name__ != "OutOfMemoryError" and not isinstance(error, MemoryError):
        return ""
    return (
        f"out of memory: set chunk_size to a part of batch_size ({args.batch_size}), which learns the same, "
        f"or lower max_seq_length ({args.max_seq_length})"
    )


# --- data -----------------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """Refuse what would only fail minutes later."""
    for name, least in {
        "batch_size": 2,
        "lora_rank": 1,
        "max_seq_length": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "eval_steps": 1,
    }.items():
        if getattr(args, name) < least:
            raise Refused(f"{name} must be at least {least}, it is {getattr(args, name)}")
    if not 0 <= args.eval_fraction < 1:
        raise Refused(f"eval_fraction must be at least 0 and below 1, it is {args.eval_fraction}")
    if not (Path(args.model_path) / "config.json").is_file():
        raise Refused(f"there is no base model in {args.model_path}: config.json is missing")
    options_of(args).check()
    check_adapter(args, lacks=("prompts", "ranks"))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise Refused("Embedding-Demo trains in one process: start it without torchrun or accelerate, with one GPU")


def chosen_how(args: argparse.Namespace) -> How:
    """Return how vectors are made: as asked for, else as the base model's folder says; tell what was taken from it."""
    folder = Path(args.model_path)
    pooling = pooling_of(folder) if args.pooling == AUTO else args.pooling
    query, document = (
        own if asked == AUTO else asked
        for own, asked in zip(prompts_of(folder), (args.query_prefix, args.document_prefix), strict=True)
    )
    if pooling is None:
        remark(
            "the base model's folder does not say how it makes a vector of a text (modules.json): the mean of all "
            "tokens is taken. If the model's card names another pooling, or prefixes, set pooling, query_prefix and "
            "document_prefix",
            args,
        )
    elif args.pooling == AUTO:
        told = f"pooling {pooling}, query prefix {query!r}, document prefix {document!r}"
        remark(f"vectors are made as the base model's folder says: {told}", args, warning=False)
    return How(pooling or "mean", max_length=args.max_seq_length, query_prefix=query, document_prefix=document)


def check_texts(pairs: Iterator[Pair]) -> None:
    first = next(pairs, None)
    if first is not None and all(pair.positive == first.positive for pair in pairs):
        raise Refused("there is nothing to tell apart: all rows have the same text")


def recipe_of(how: How) -> Recipe:
    """Return what is made of a row: itself; its longest text tells what memory is needed, and what is not read."""
    return Recipe(EXAMPLE, kept_pair, as_it_is, sequences=partial(longest_text, how=how))


def longest_text(pair: Pair, tokenizer: Any, _args: argparse.Namespace, *, how: How) -> list[Rendered]:
    """Return what is read of the longest text of a row."""
    documents = [how.document_prefix + text for text in (pair.positive, *pair.negatives)]
    tokens = max(tokenizer([how.query_prefix + pair.anchor, *documents])["input_ids"], key=len)
    most = longest_of(how, tokenizer)
    return [Rendered(tokens[:most], 0, pair.place, ("text_cut",) if len(tokens) > most else ())]


def kept_pair(pair: Pair, _found: list[Rendered]) -> Iterator[Row]:
    yield {"example": written_value(pair)}


def as_it_is(pair: Pair, _found: list[Rendered]) -> list[Pair]:
    return [pair]


def right_texts(pairs: Sequence[Pair]) -> Right:
    found: dict[str, set[str]] = {}
    for pair in pairs:
        found.setdefault(pair.anchor, set()).add(pair.positive)
    return {anchor: frozenset(texts) for anchor, texts in found.items()}


class Batches:
    """Rows of each step, made of the step's number only: a resumed run sees what an undisturbed one would.

    Every row comes once in an epoch; all batches of one are equally large, give or take a row. The rows of a batch
    share no text where the data allows it. The loss passes over texts that they share nevertheless.
    """

    def __init__(self, pairs: Sequence[Pair], args: argparse.Namespace) -> None:
        self.pairs, self.seed = pairs, args.seed
        self.per_epoch = math.ceil(len(pairs) / args.batch_size)
        self._epoch, self._batches = -1, list[list[Pair]]()

    def of_step(self, step: int) -> list[Pair]:
        epoch, position = divmod(step - 1, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, list(self._of_epoch(epoch))
        return self._batches[position]

    def _of_epoch(self, epoch: int) -> Iterator[list[Pair]]:
        count = len(self.pairs)
        waiting = deque(random.Random(f"{self.seed}/{epoch}").sample(self.pairs, count))
        for position in range(self.per_epoch):
            size = count * (position + 1) // self.per_epoch - count * position // self.per_epoch
            batch: list[Pair] = []
            passed: list[Pair] = []
            taken: set[str] = set()
            while waiting and len(batch) < size and len(passed) < LOOKED_AT * size:
                pair = waiting.popleft()
                texts = (pair.anchor, pair.positive, *pair.negatives)
                if taken.isdisjoint(texts):
                    batch.append(pair)
                    taken.update(texts)
                else:
                    passed.append(pair)
            missing = size - len(batch)
            waiting.extendleft(reversed(passed[missing:]))
            yield batch + passed[:missing]


# --- training -------------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace, how: How, tokenizer: Any) -> Encoder:
    import torch
    from peft import get_peft_model

    torch.manual_seed(args.seed)
    encoder = Encoder.load(Path(args.model_path), how=how, tokenizer=tokenizer)
    layers = llm.linear_layers(encoder.model)
    adapter = adapter_config(args, encoder.model, layers, task="FEATURE_EXTRACTION")
    with options_of(args).refusing():
        encoder.model = get_peft_model(encoder.model, adapter)
    return encoder


def train(
    encoder: Encoder, pairs: list[Pair], held_out: list[Pair], right: Right, args: argparse.Namespace, best: Best
) -> None:
    """AdamW with warm-up and a cosine."""
    import torch
    from peft import set_peft_model_state_dict

    batches = Batches(pairs, args)
    steps = args.max_steps or max(1, round(args.epochs * batches.per_epoch))
    weights = [weight for weight in encoder.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: course(step, args.warmup_steps, steps))
    done = resume(encoder, optimizer, schedule, args, best) if args.resume else 0
    remark_plan(len(pairs), len(pairs), steps, args)
    deepe.catch_stop()
    encoder.model.train()
    begun, seen = time.monotonic(), 0
    for step in range(done + 1, steps + 1):
        if best.ended:
            break
        batch = batches.of_step(step)
        loss, accuracy = learn(encoder, batch, right, args)
        seen += len(batch)
        norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        values: dict[str, float] = {}
        if step % args.logging_steps == 0 or step in (1, steps):
            speed = seen / (time.monotonic() - begun)
            values = {"loss": loss, "in_batch_accuracy": accuracy, "grad_norm": norm.item(), "learning_rate": rate}
            values |= {"epoch": step / batches.per_epoch, "samples_per_second": speed}
            values |= llm.memory_gauges()
        if is_comparable(held_out) and (step % args.eval_steps == 0 or step == steps):
            values["eval_loss"] = held_out_loss(encoder, held_out, right, args)
        if values:
            report(step, steps, values)
        done = step
        keep = best.add(step, values)
        if keep or step % args.save_steps == 0 or deepe.stop_requested():
            checkpoint = save_checkpoint(encoder, optimizer, schedule, args, step, best)
            if deepe.stop_requested():
                sys.stderr.write(f"stopped at step {step} of {steps}; {checkpoint.name} is complete\n")
                sys.exit(deepe.STOPPED)
    if kept := best.end(Path(args.output_dir), done, steps):
        state = torch.load(kept / "state.pt", map_location=encoder.device, weights_only=True)
        set_peft_model_state_dict(encoder.model, state["adapter"])


def course(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def learn(encoder: Encoder, batch: list[Pair], right: Right, args: argparse.Namespace) -> tuple[float, float]:
    """Add the gradients of one batch; return its loss and how many anchors find their own text in it."""
    import torch

    anchors, texts = [pair.anchor for pair in batch], candidates(batch)
    size = args.chunk_size or max(len(anchors), len(texts))
    chunks = [(part, query) for all_, query in ((anchors, True), (texts, False)) for part in parts(all_, size)]
    own, wrong = targets(batch, texts, right)
    if len(chunks) == 2:
        loss, accuracy = contrast(*vectors(encoder, chunks), own, wrong, scale=args.scale)
        loss.backward()
        return loss.item(), accuracy
    with torch.no_grad():  # first without a graph, then each chunk again with the gradients that its vectors got
        states, found = [], []
        for part, query in chunks:
            states.append(random_state())
            found.append(encoder.encode(part, query=query))
    whole = torch.cat(found).requires_grad_()
    loss, accuracy = contrast(whole[: len(anchors)], whole[len(anchors) :], own, wrong, scale=args.scale)
    loss.backward()
    after = random_state()
    gradients = torch.split(whole.grad, [len(part) for part, _ in chunks])
    for (part, query), state, gradient in zip(chunks, states, gradients, strict=True):
        set_random_state(state)  # the same dropout as the first time
        encoder.encode(part, query=query).backward(gradient)
    set_random_state(after)
    return loss.item(), accuracy


def parts(texts: list[str], size: int) -> list[list[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def candidates(batch: list[Pair]) -> list[str]:
    """Return the texts that an anchor is compared with: right and wrong ones of all rows, each once."""
    negatives = [text for pair in batch for text in pair.negatives]
    return list(dict.fromkeys([*(pair.positive for pair in batch), *negatives]))


def targets(batch: list[Pair], texts: list[str], right: Right) -> tuple[list[int], list[list[bool]]]:
    """Return the place of each anchor's own text, and which texts are wrong for it: none that is right as well."""
    places = {text: place for place, text in enumerate(texts)}
    own = [places[pair.positive] for pair in batch]
    return own, [[text not in right[pair.anchor] and text != pair.anchor for text in texts] for pair in batch]


def random_state() -> tuple[Any, Any]:
    import torch

    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: tuple[Any, Any]) -> None:
    import torch

    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def vectors(encoder: Encoder, chunks: list[tuple[list[str], bool]]) -> list[Any]:
    return [encoder.encode(part, query=query) for part, query in chunks]


def contrast(anchors: Any, texts: Any, own: list[int], wrong: list[list[bool]], *, scale: float) -> tuple[Any, float]:
    """Cross entropy of each anchor's own text among it and those that are wrong for it."""
    import torch

    similarities = (anchors @ texts.T * scale).float()
    place = torch.tensor(own, device=similarities.device)
    compared = torch.tensor(wrong, device=similarities.device).scatter(1, place[:, None], True)
    similarities = similarities.masked_fill(~compared, -math.inf)
    loss = torch.nn.functional.cross_entropy(similarities, place)
    return loss, (similarities.argmax(dim=1) == place).float().mean().item()


def report(step: int, steps: int, values: dict[str, float]) -> None:
    deepe.metrics(step, **values)
    deepe.progress(step, steps)
    if "loss" in values:
        print(f"step {step}/{steps}  loss {values['loss']:.4f}", flush=True)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(
    encoder: Encoder, optimizer: Any, schedule: Any, args: argparse.Namespace, step: int, best: Best
) -> Path:
    """Write to a folder beside it first and rename: a checkpoint is there as a whole or not at all."""
    import torch
    from peft import get_peft_model_state_dict

    output = Path(args.output_dir)
    target, draft = output / f"checkpoint-{step}", output / f".checkpoint-{step}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    state = {
        "step": step,
        "adapter": get_peft_model_state_dict(encoder.model),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": random_state(),
    }
    torch.save(state, draft / "state.pt")
    best.write(draft, step)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    deepe.checkpoint(target, step)
    for old in checkpoints(output)[max(1, args.save_total_limit) :]:
        if old.name != best.name:
            shutil.rmtree(old, ignore_errors=True)
    return target


def resume(encoder: Encoder, optimizer: Any, schedule: Any, args: argparse.Namespace, best: Best) -> int:
    """Load the newest checkpoint that can be read, and return its step; 0 starts from the beginning."""
    import torch
    from peft import set_peft_model_state_dict

    for folder in checkpoints(Path(args.output_dir)):
        try:  # weights_only: a checkpoint is data, loading it runs no code
            state = torch.load(folder / "state.pt", map_location=encoder.device, weights_only=True)
        except Exception as error:  # cut off, not a checkpoint, written by another version: the one before may do
            deepe.note(f"{folder.name} cannot be used: {error}")
            continue
        set_peft_model_state_dict(encoder.model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        set_random_state(tuple(part if part is None else part.cpu() for part in state["random"]))
        best.read(folder)
        deepe.note(f"resumed from {folder.name}")
        return int(state["step"])
    return 0


def checkpoints(output: Path) -> list[Path]:
    """Newest first."""
    found = [folder for folder in output.glob("checkpoint-*") if folder.name[11:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[11:]), reverse=True)


# --- score ----------------------------------------------------------------------------------------------------------


def score(
    encoder: Encoder, asked: list[Pair], documents: list[str], right: Right, args: argparse.Namespace, phase: str
) -> None:
    """Report the held-out loss, and where the first right text comes among all of the data set, by similarity."""
    if not asked:
        return
    if is_comparable(asked):
        report_score("eval_loss", phase, held_out_loss(encoder, asked, right, args), len(asked))
    places = [
        1 + next(place for place, text in enumerate(ranked) if text in right[pair.anchor])
        for pair, ranked in zip(asked, ranking(encoder, asked, documents), strict=True)
    ]
    first = sum(place == 1 for place in places) / len(places)
    deepe.evaluation(phase, first, len(places), name="accuracy@1")
    deepe.evaluation(phase, sum(1 / place for place in places if place <= 10) / len(places), len(places), name="mrr@10")
    print(f"right text first on {len(places)} held-out queries {phase} training: {first:.3f}", flush=True)


def is_comparable(pairs: list[Pair]) -> bool:
    """Whether there are texts to be told from each other."""
    return len(candidates(pairs)) > 1


def held_out_loss(encoder: Encoder, pairs: list[Pair], right: Right, args: argparse.Namespace) -> float:
    """Return the loss of pairs that are not learned from, in batches as large as those of a step."""
    import torch

    batches = Batches(pairs, args)
    found = 0.0
    with torch.inference_mode():
        for step in range(1, batches.per_epoch + 1):
            batch = batches.of_step(step)
            texts = candidates(batch)
            anchors = encoder.encode_all([pair.anchor for pair in batch], query=True)
            loss, _ = contrast(anchors, encoder.encode_all(texts), *targets(batch, texts, right), scale=args.scale)
            found += loss.item() * len(batch)
    return found / len(pairs)


def ranking(encoder: Encoder, asked: list[Pair], documents: list[str]) -> list[list[str]]:
    """Return the documents for each query, the nearest first."""
    import torch

    with torch.inference_mode():
        texts = encoder.encode_all(documents)
        queries = encoder.encode_all([pair.anchor for pair in asked], query=True)
        nearest = (queries @ texts.T).argsort(dim=1, descending=True).tolist()
    return [[documents[index] for index in row] for row in nearest]


if __name__ == "__main__":
    main()
