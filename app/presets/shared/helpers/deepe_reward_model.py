"""A reward model: made from preference data, and asked what an answer is worth."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepe_llm as llm
from deepe_checkpoints import make_readable
from deepe_examples import fitting_pairs
from deepe_log import log, remark
from deepe_rewards import Columns
from deepe_rows import PREFERENCE, Preference, Turn, Wanted, data_file, message, notes_of, read_file, split
from deepe_scores import SCORED_AT_ONCE

HELD_OUT_SHARE = 0.1
Worth = Callable[[list[str], list[list[Turn]], Columns], list[float]]


def make_reward_model(args: argparse.Namespace, machine: llm.Machine, tokenizer: Any, folder: Path) -> None:
    """Train a copy of the base model to give the better of two answers the higher number; all its weights learn.

    A folder that is there already was written to its end and is kept.
    """
    if folder.is_dir():
        return
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    log("HandleWithDataset", args.preference_path, args)
    path = data_file(Path(args.preference_path))
    pairs, found = read_file(path, Wanted(kinds=frozenset({PREFERENCE}), tools=False))
    for note in notes_of(found, path.name):
        remark(note, args)
    pairs = fitting_pairs(pairs, tokenizer, args)
    pairs, held_out = split(pairs, HELD_OUT_SHARE, len(pairs), args.seed)
    model = load_reward_model(args.model_path, tokenizer, machine, dtype="float32")
    config = RewardConfig(
        output_dir=str(folder.with_name(f".{folder.name}.work")),
        max_steps=args.reward_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.reward_learning_rate,
        max_length=args.max_input_length + args.max_content_length,
        activation_checkpointing=False,
        bf16=machine.dtype == "bfloat16",
        use_cpu=machine.device == "cpu",
        save_strategy="no",
        seed=args.seed,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([_for_trl(pair) for pair in pairs]),
        processing_class=tokenizer,
    )
    trainer.train()
    if held_out:
        share = f"{pair_accuracy(model, tokenizer, held_out):.0%} of {len(held_out)}"
        remark(f"the reward model judges {share} held-out pairs right", args, warning=False)
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    make_readable(draft)
    draft.rename(folder)
    shutil.rmtree(config.output_dir, ignore_errors=True)


def _for_trl(pair: Preference) -> dict[str, Any]:
    return {"prompt": pair.prompt, "chosen": [pair.chosen], "rejected": [pair.rejected]}


def load_reward_model(path: str | Path, tokenizer: Any, machine: llm.Machine, dtype: str | None = None) -> Any:
    """Return a model with one number as its output."""
    import torch
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()  # a new head is no news
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=getattr(torch, dtype or machine.dtype)
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(machine.device).eval()


def worth_by(model: Any, tokenizer: Any) -> Worth:
    """Return what tells the worth of answers."""

    def worth(completions: list[str], prompts: list[list[Turn]], _columns: Columns) -> list[float]:
        conversations = [[*turns, message("assistant", text)] for turns, text in zip(prompts, completions, strict=True)]
        return worths(model, tokenizer, conversations)

    return worth


def worths(model: Any, tokenizer: Any, conversations: list[list[Turn]]) -> list[float]:
    import torch

    found: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(conversations), SCORED_AT_ONCE):
            texts = [
                tokenizer.apply_chat_template(turns, tokenize=False)
                for turns in conversations[start : start + SCORED_AT_ONCE]
            ]
            encoded = tokenizer(
                texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
            ).to(model.device)
            encoded.pop("token_type_ids", None)
            found += model(**encoded).logits[:, 0].float().tolist()
    return found


def pair_accuracy(model: Any, tokenizer: Any, pairs: list[Preference]) -> float:
    """Return the share of pairs whose better answer gets the higher number."""
    model.eval()
    good, bad = (
        worths(model, tokenizer, [[*pair.prompt, getattr(pair, name)] for pair in pairs])
        for name in ("chosen", "rejected")
    )
    return sum(a > b for a, b in zip(good, bad, strict=True)) / len(pairs)
