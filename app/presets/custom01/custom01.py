"""Custom01, training: the shortest complete training script. Copy it, keep the frame, put your own model in.

It trains a real (very small) model with nothing but the standard library: a bag of words with a softmax over the
answers of the data set. What a script of your own needs is all here: arguments, data with clear errors, steps with
metrics and progress, checkpoints, resume, a clean stop, and a score on held-out rows before and after.

Try it by hand, in a checkout of the product:

    python app/presets/custom01/custom01.py --dataset_path=app/presets/custom01/custom01.jsonl \
        --model_path=app/presets/custom01/custom01-base --output_dir=custom01-out

The platform passes one `--name=value` per parameter and more of them than this script declares (lora_rank,
max_seq_length, load_in_4bit, ...): declare those that you want to use, the others are ignored.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import struct
import sys
import zlib
from array import array
from pathlib import Path

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
from deepe_rows import CONVERSATION, Conversation, Refused, Wanted, load
from train_callback import LevelEnum, LogEnum, write_log

WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
FEATURES = 2048  # words are hashed into this many columns, unless the base model says otherwise


def make_parser() -> argparse.ArgumentParser:
    """Declare the parameters; the platform reads types, defaults and help from here to build its form."""
    parser = argparse.ArgumentParser(description="Train Custom01.", allow_abbrev=False)
    parser.add_argument("--train_id", default="manual", help="id of the job, for the log")
    parser.add_argument("--seq", type=int, default=1, help="number of the step in the job, for the log")
    parser.add_argument("--model_name", default="custom01", help="name of the model")
    parser.add_argument("--model_path", required=True, help="folder of the base model")
    parser.add_argument("--dataset_path", required=True, help="JSONL file, or a folder with one")
    parser.add_argument("--output_dir", required=True, help="folder for the trained model and its checkpoints")
    parser.add_argument("--input_train_name", default="question", help="column with the question")
    parser.add_argument("--output_train_name", default="answer", help="column with the answer")
    parser.add_argument("--validation_path", default=None, help="rows for the score; empty holds out a part")
    parser.add_argument("--max_samples", type=int, default=-1, help="rows to use; -1 takes all")
    parser.add_argument("--max_input_length", type=int, default=1024, help="words of a question that are read")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the rows, unless max_steps is given")
    parser.add_argument("--max_steps", type=int, default=None, help="number of steps, instead of epochs")
    parser.add_argument("--batch_size", type=int, default=8, help="rows in one step")
    parser.add_argument("--learning_rate", type=float, default=0.5, help="size of a step; falls to 0 at the end")
    parser.add_argument("--eval_fraction", type=float, default=0.2, help="part of the rows held out for the score")
    parser.add_argument("--eval_samples", type=int, default=100, help="held-out rows that are used at most")
    parser.add_argument("--seed", type=int, default=42, help="same seed, same model")
    parser.add_argument("--logging_steps", type=int, default=5, help="steps between two points of the curve")
    parser.add_argument("--save_steps", type=int, default=50, help="steps between two checkpoints")
    return parser


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    deepe.catch_stop()
    try:
        run(args)
    except (
        Refused,
        ValueError,
        OSError,
    ) as error:  # what the user can put right: one sentence, no traceback
        write_log(LevelEnum.ERROR, LogEnum.TrainingFailed, str(error), args.train_id, args.seq, None)
        sys.exit(f"custom01.py: {error}")


def run(args: argparse.Namespace) -> None:
    def log(code: LogEnum, message: str) -> None:
        write_log(LevelEnum.INFO, code, message, args.train_id, args.seq, None)

    for name in ("batch_size", "logging_steps", "save_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1")
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    log(LogEnum.HandleWithDataset, args.dataset_path)
    parts = load(args, Wanted(kinds=frozenset({CONVERSATION}), tools=False))
    for note in parts.notes:
        deepe.note(note)
    train_rows, held_out = ([pair for row in part for pair in pairs_of(row)] for part in (parts.train, parts.held_out))
    if not held_out:
        deepe.note("too few rows to hold some out: the score is on rows that are learned")
        held_out = train_rows
    rows = [*train_rows, *held_out]
    log(LogEnum.InitializingModel, args.model_path)
    model = Model(features_of(Path(args.model_path)), sorted({answer for _, answer in rows}), args.max_input_length)

    if cut := sum(model.is_cut(question) for question, _ in rows):
        deepe.note(f"{cut} of {len(rows)} questions have more than max_input_length words; the others are not read")
    deepe.evaluation("before", exact_match(model, held_out), len(held_out))
    log(LogEnum.StartTraining, args.model_name)
    train(model, train_rows, output, args)
    score = exact_match(model, held_out)
    deepe.evaluation("after", score, len(held_out))
    print(f"exact match on {len(held_out)} rows: {score:.3f}")

    log(LogEnum.SaveTrainedModel, args.model_name)
    model.save(output, {"base_model_name_or_path": args.model_path})
    deepe.artifact(output / "adapter_model.safetensors", "weights")
    log(LogEnum.SaveTrainedModelSuccess, args.output_dir)
    log(LogEnum.TrainingSuccess, args.model_name)


def train(model: "Model", rows: list[tuple[str, str]], output: Path, args: argparse.Namespace) -> None:
    """Do the steps from the newest checkpoint on, if there is one. A resumed run ends with the very same weights."""
    per_epoch = math.ceil(len(rows) / args.batch_size)
    steps = args.max_steps or args.epochs * per_epoch
    done = resume(model, output)
    deepe.note(f"{len(rows)} rows -> {steps} steps")
    order: list[tuple[str, str]] = []
    for step in range(done + 1, steps + 1):
        epoch, position = divmod(step - 1, per_epoch)
        if position == 0 or step == done + 1:
            order = random.Random(f"{args.seed}/{epoch}").sample(rows, len(rows))  # depends on the epoch only
        batch = order[position * args.batch_size : (position + 1) * args.batch_size]
        rate = args.learning_rate * (1 - (step - 1) / steps)
        loss = model.learn(batch, rate)

        if step % args.logging_steps == 0 or step in (1, steps):
            deepe.metrics(step, loss=loss, learning_rate=rate, epoch=step / per_epoch)
            deepe.progress(step, steps)
            print(f"step {step}/{steps}  loss {loss:.4f}", flush=True)
        if step % args.save_steps == 0 or deepe.stop_requested():
            checkpoint = save_checkpoint(model, output, step)
            if deepe.stop_requested():
                print(f"stopped at step {step} of {steps}; {checkpoint.name} is complete", file=sys.stderr)
                sys.exit(deepe.STOPPED)


class Model:
    """Logits = weights x words + bias; one row of weights for each answer."""

    def __init__(self, features: int, answers: list[str], max_words: int) -> None:
        self.features, self.answers, self.max_words = features, answers, max_words
        self.weight = [array("d", bytes(8 * features)) for _ in answers]
        self.bias = array("d", bytes(8 * len(answers)))

    def words(self, question: str) -> list[int]:
        """Columns of the question's words; every Chinese character is a word of its own."""
        words = WORD.findall(question.lower())
        return [zlib.crc32(word.encode()) % self.features for word in words[: self.max_words]]

    def is_cut(self, question: str) -> bool:
        return len(WORD.findall(question)) > self.max_words

    def probabilities(self, columns: list[int]) -> list[float]:
        logits = [bias + sum(row[c] for c in columns) for row, bias in zip(self.weight, self.bias, strict=True)]
        highest = max(logits)
        powers = [math.exp(logit - highest) for logit in logits]
        return [power / sum(powers) for power in powers]

    def answer(self, question: str) -> str:
        probabilities = self.probabilities(self.words(question))
        return self.answers[probabilities.index(max(probabilities))]

    def learn(self, batch: list[tuple[str, str]], rate: float) -> float:
        """One step of gradient descent; the mean cross entropy of the batch before it."""
        loss = 0.0
        for question, answer in batch:
            columns = self.words(question)
            probabilities = self.probabilities(columns)
            right = self.answers.index(answer)
            loss -= math.log(max(probabilities[right], 1e-12)) / len(batch)
            for index, probability in enumerate(probabilities):
                gradient = rate * (probability - (index == right)) / len(batch)
                self.bias[index] -= gradient
                for column in columns:
                    self.weight[index][column] -= gradient
        return loss

    def save(self, folder: Path, more: dict, kind: str = "f") -> None:
        """Write what the saving and the inference script read: the weights, and what the columns and rows mean."""
        tensors = {
            "weight": ([len(self.answers), self.features], self.weight),
            "bias": ([len(self.answers)], [self.bias]),
        }
        write_safetensors(folder / "adapter_model.safetensors", tensors, kind)
        config = {"model_type": "bag-of-words", "features": self.features, "answers": self.answers, **more}
        write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False).encode())


def pairs_of(row: Conversation) -> list[tuple[str, str]]:
    """Return each answer of a row with all that is said before it."""
    return [
        ("\n".join(turn["content"] for turn in answer.prompt), answer.completion["content"]) for answer in row.answers()
    ]


def exact_match(model: Model, rows: list[tuple[str, str]]) -> float:
    return sum(model.answer(question) == answer for question, answer in rows) / len(rows)


def features_of(base: Path) -> int:
    """The base model of this method is no more than the number of columns in its config.json."""
    config = base / "config.json"
    return int(json.loads(config.read_text("utf-8")).get("features", FEATURES)) if config.is_file() else FEATURES


def save_checkpoint(model: Model, output: Path, step: int) -> Path:
    """Write to a folder beside it first and rename: a checkpoint is there as a whole or not at all."""
    target, draft = output / f"checkpoint-{step}", output / f".checkpoint-{step}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    model.save(draft, {"step": step}, kind="d")  # full precision, so that a resumed run gives the same numbers
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    deepe.checkpoint(target, step)  # from here on another attempt of the job may go on from it
    for old in checkpoints(output)[2:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def resume(model: Model, output: Path) -> int:
    """Load the newest checkpoint that can be read and fits, and return its step; 0 starts from the beginning."""
    for folder in checkpoints(output):
        try:
            config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
            tensors = read_safetensors(folder / "adapter_model.safetensors")
            if config["answers"] != model.answers or config["features"] != model.features:
                continue
            flat, width = tensors["weight"], model.features
            model.weight = [flat[i * width : (i + 1) * width] for i in range(len(model.answers))]
            model.bias = tensors["bias"]
        except (OSError, ValueError, KeyError, struct.error) as error:
            print(f"{folder.name} cannot be used: {error}", file=sys.stderr)
            continue
        deepe.note(f"resumed from {folder.name}")
        return int(config["step"])
    return 0


def checkpoints(output: Path) -> list[Path]:
    """Newest first."""
    found = [folder for folder in output.glob("checkpoint-*") if folder.name[11:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[11:]), reverse=True)


# safetensors: 8 bytes length of the header, the header as JSON, then the numbers, little endian, one after the other.


def write_safetensors(path: Path, tensors: dict, kind: str) -> None:
    """Write `{name: (shape, rows)}`; `kind` is "f" for 32 and "d" for 64 bit floats."""
    header, blocks, offset = {}, [], 0
    for name, (shape, rows) in tensors.items():
        block = b"".join(array(kind, row).tobytes() for row in rows)
        dtype = {"f": "F32", "d": "F64"}[kind]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(block)]}
        blocks.append(block)
        offset += len(block)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    write_atomically(path, struct.pack("<Q", len(head)) + head + b"".join(blocks))


def read_safetensors(path: Path) -> dict[str, array]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        start, end = entry["data_offsets"]
        if 8 + length + end > len(data):
            raise ValueError(f"{path.name} is cut off")
        tensors[name] = array({"F32": "f", "F64": "d"}[entry["dtype"]])
        tensors[name].frombytes(data[8 + length + start : 8 + length + end])
    return tensors


def write_atomically(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.part")
    draft.write_bytes(data)
    os.replace(draft, path)


if __name__ == "__main__":
    main()
