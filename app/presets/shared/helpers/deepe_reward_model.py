"""A reward model: a language model whose head gives one number for a conversation that ends with an answer.

It is a sequence classification model with one output, complete or an adapter, with the tokenizer and the chat template
that it was trained with. It reads a conversation in the same tokens in its training, in questions and as the judge of
another training.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepe_llm as llm
import deepe_loading as loading
from deepe_adapters import read_config
from deepe_checkpoints import make_readable
from deepe_examples import answers_of, fitting_pairs
from deepe_log import log, remark
from deepe_rows import (
    PREFERENCE,
    Answer,
    Preference,
    Refused,
    Rendered,
    RowProblem,
    Turn,
    Wanted,
    data_file,
    notes_of,
    read_file,
    render_answer,
    split,
    written,
)
from deepe_scores import SCORED_AT_ONCE
from deepe_tokens import grow_for

HELD_OUT_SHARE = 0.1
CLASSIFIER = "ForSequenceClassification"
CURE = "give a sequence classification model with one output, such as Reward-Demo makes"


@dataclass(frozen=True)
class RewardModel:
    """A loaded reward model with its own tokenizer."""

    model: Any
    tokenizer: Any

    def rewards(self, conversations: Sequence[Sequence[Turn]]) -> list[float]:
        """Return the reward of the last turn of each conversation."""
        return self.of_tokens([tokens_of(turns, self.tokenizer) for turns in conversations])

    def of_tokens(self, sequences: Sequence[list[int]]) -> list[float]:
        """Return the reward of each sequence of tokens."""
        import torch

        found: list[float] = []
        training = self.model.training
        self.model.eval()
        device, number = self.model.device, next(self.model.parameters()).dtype
        with torch.inference_mode(), torch.autocast(device.type, number, enabled=number != torch.float32):
            for start in range(0, len(sequences), SCORED_AT_ONCE):
                batch = {"input_ids": list(sequences[start : start + SCORED_AT_ONCE])}
                encoded = self.tokenizer.pad(batch, padding_side="right", return_tensors="pt").to(device)
                found += self.model(**encoded).logits[:, 0].float().tolist()
        self.model.train(training)
        return found

    def of_pairs(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        """Return the rewards of the better and the worse answer of each pair."""
        sequences = [one.tokens for pair in pairs for one in rendered(pair, self.tokenizer)]
        found = self.of_tokens(sequences)
        return list(zip(found[::2], found[1::2], strict=True))


def rendered(pair: Preference, tokenizer: Any) -> list[Rendered]:
    """Return the conversation with the better answer and the one with the worse, as they are learned."""
    return [render_answer(answer, tokenizer) for answer in answers_of(pair)]


def tokens_of(turns: Sequence[Turn], tokenizer: Any) -> list[int]:
    """Return a conversation in the tokens of the training.

    A model may give answers that a template does not keep whole: they are read as the template writes them.
    """
    *prompt, answer = turns
    try:
        return render_answer(Answer(prompt, answer), tokenizer).tokens
    except RowProblem:
        text = written(turns, None, tokenizer, add_generation_prompt=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokens_of_pair(_row: Preference, found: Sequence[Rendered]) -> Iterator[dict[str, list[int]]]:
    """Yield a pair in the tokens that TRL's RewardTrainer takes."""
    better, worse = found
    yield {"chosen_ids": better.tokens, "rejected_ids": worse.tokens}


def columns(pairs: Sequence[Preference], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return pairs in the tokens that TRL's RewardTrainer takes."""
    return [one for pair in pairs for one in tokens_of_pair(pair, rendered(pair, tokenizer))]


def as_written(row: Preference, found: Sequence[Rendered]) -> list[Preference]:
    """Return the row with its turns as the template takes them."""
    return [replace(row, prompt=found[0].example.prompt)]


def share_ranked_right(rewards: Sequence[tuple[float, float]]) -> float:
    """Return the share of pairs whose better answer has the higher reward."""
    return sum(better > worse for better, worse in rewards) / len(rewards)


def mean_margin(rewards: Sequence[tuple[float, float]]) -> float:
    """Return by how much better answers have more, in the mean."""
    return sum(better - worse for better, worse in rewards) / len(rewards)


# --- files ----------------------------------------------------------------------------------------------------------


def check_reward_model(folder: Path, name: str = "reward_model_path") -> None:
    """Refuse a folder that is no reward model, by its files; `name` is the argument that names it."""
    adapter, config = read_config(folder), _object(folder / "config.json")
    if not adapter and not config:
        raise Refused(f"{name}: there is no reward model in {folder}: config.json is missing")
    kinds = config.get("architectures") or ["a model of an unknown kind"]
    outputs = config.get("num_labels", len(config.get("id2label") or "ab"))  # two is what transformers takes
    if adapter and adapter.get("task_type") != "SEQ_CLS":
        task = adapter.get("task_type")
        raise Refused(f"{name}: {folder} holds an adapter for {task}, which gives no rewards; {CURE}")
    if not adapter and not kinds[0].endswith(CLASSIFIER):
        raise Refused(f"{name}: {folder} holds {kinds[0]}, which gives no rewards; {CURE}")
    if not adapter and outputs != 1:
        raise Refused(f"{name}: the model in {folder} gives {outputs} numbers, a reward is one; {CURE}")
    template = _object(folder / "tokenizer_config.json").get("chat_template")
    if not template and not (folder / "chat_template.jinja").is_file():
        raise Refused(
            f"{name}: the tokenizer in {folder} has no chat template, so that it is not known how a conversation is "
            "written for it; add the one of its training (chat_template.jinja)"
        )


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_reward_model(folder: Path, *, base: Path | None = None, dtype: str = "auto") -> RewardModel:
    """Load a complete reward model, or an adapter with its base model (`base`, else the one that it names)."""
    import torch
    from transformers import AutoTokenizer

    adapter = read_config(folder)
    weights = Path(base or adapter["base_model_name_or_path"]) if adapter else folder
    loading.weights(folder)  # refuses an adapter of pickles before anything is loaded
    tokenizer = AutoTokenizer.from_pretrained(folder, **loading.code(folder))
    device = llm.own_device()
    number = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = classifier(weights, tokenizer, dtype=torch.float32 if device == "cpu" else number)
    if adapter:
        from peft import PeftModel

        grow_for(model, folder)
        model = PeftModel.from_pretrained(model, folder)
    return RewardModel(model.to(device).eval(), tokenizer)


def classifier(path: str | Path, tokenizer: Any, **named: Any) -> Any:
    """Return a model with one number as its output; the head of a base model is new."""
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()  # a new head is no news
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **named, **loading.weights(path))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # where a sequence ends
    return model


# --- PPO-Demo's own -------------------------------------------------------------------------------------------------


def make_reward_model(args: argparse.Namespace, machine: llm.Machine, tokenizer: Any, folder: Path) -> None:
    """Train a copy of the base model to give the better of two answers the higher number; all its weights learn.

    A folder that is there already was written to its end and is kept.
    """
    if folder.is_dir():
        return
    import torch
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    log("HandleWithDataset", args.preference_path, args)
    path = data_file(Path(args.preference_path))
    pairs, found = read_file(path, Wanted(kinds=frozenset({PREFERENCE}), tools=False))
    for note in notes_of(found, path.name):
        remark(note, args)
    pairs = fitting_pairs(pairs, tokenizer, args)
    pairs, held_out = split(pairs, HELD_OUT_SHARE, len(pairs), args.seed)
    model = classifier(args.model_path, tokenizer, dtype=torch.float32)
    config = RewardConfig(
        output_dir=str(folder.with_name(f".{folder.name}.work")),
        max_steps=args.reward_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.reward_learning_rate,
        max_length=None,
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
        train_dataset=Dataset.from_list(columns(pairs, tokenizer)),
        processing_class=tokenizer,
    )
    trainer.train()
    if held_out:
        share = share_ranked_right(RewardModel(model, tokenizer).of_pairs(held_out))
        remark(f"the reward model judges {share:.0%} of {len(held_out)} held-out pairs right", args, warning=False)
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    make_readable(draft)
    draft.rename(folder)
    shutil.rmtree(config.output_dir, ignore_errors=True)
