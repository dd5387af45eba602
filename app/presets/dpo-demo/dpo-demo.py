r"""DPO-Demo, training: learning from preferences with LoRA, by TRL's trainers for DPO, KTO and ORPO.

| objective | needs | learns |
|---|---|---|
| dpo | pairs | to tell the better answer from the worse, compared with the base model |
| kto | pairs, or single answers with a label | what is good and what is bad, each by itself |
| orpo | pairs | to answer like the better one and to avoid the worse, without a reference: the least memory |

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment (about half a minute):

    python app/presets/shared/tiny_base.py --output tiny-styles --answers=styles --steps=600
    python app/presets/dpo-demo/dpo-demo.py --model_path=tiny-styles \
        --dataset_path=app/presets/dpo-demo/dpo-demo.jsonl \
        --output_dir=dpo-out --max_steps=60 --batch_size=32 --learning_rate=0.001 \
        --sft_weight=1

A row has `prompt`, `chosen` and `rejected` (texts, or lists of turns), or `chosen` and `rejected` alone, which are then
whole conversations that differ in their last turn; for kto also `prompt`, `completion` and `label` (true or false).
Held-out file, checkpoints and SIGTERM as in sft-demo.py: `output_dir` holds adapter and tokenizer at the end.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe_arguments as arguments
import deepe_llm as llm
from deepe_adapter_kinds import CLASSES, adapter_config, check_adapter, prepare_adapter
from deepe_adapters import adopt_kind, check_start
from deepe_distributed import answers_here, measure, without_gradients
from deepe_examples import answers_of
from deepe_log import log, remark
from deepe_options import Options, options_of
from deepe_preparation import Preparation
from deepe_recipes import Learned, Recipe, Row
from deepe_rows import LABELLED, PREFERENCE, Labelled, Preference, Refused, Rendered, Wanted, render_answer
from deepe_scores import evaluation_settings, report_exact_match, report_score, score_loss
from deepe_steps import of_whole_steps
from deepe_tokens import check_tokens
from deepe_whole import check_whole, trained

LIBRARY_OPTIONS = {  # every field of these classes can be set, beside the arguments below
    "classes": {
        "trl.DPOConfig": {"objective": ["dpo"]},
        "trl.KTOConfig": {"objective": ["kto"]},
        "trl.experimental.orpo.ORPOConfig": {"objective": ["orpo"]},
        **CLASSES,
    },
    "instead": {"max_length": "max_input_length and max_content_length", "max_completion_length": "max_content_length"},
}
Judged = Preference | Labelled

SCORED_AT_ONCE = 4  # the probabilities of whole rows over a large vocabulary take gigabytes


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Learn from preferences.", allow_abbrev=False)
    arguments.add_job(parser, model_name="dpo-demo", goes_on=True)
    method = parser.add_argument_group("method")
    method.add_argument(
        "--objective", choices=["dpo", "kto", "orpo"], default="dpo", help="how preferences are learned"
    )
    method.add_argument(
        "--beta", type=float, default=0.1, help="dpo, kto: ties to the base model; orpo: weight of pairs"
    )
    method.add_argument(
        "--sft_weight", type=float, default=0.0, help="dpo: weight of learning the better answer itself"
    )
    data = arguments.add_rows(parser, columns=None)
    arguments.add_lengths(data, of_input="a prompt", of_output="an answer")
    arguments.add_template(data)
    arguments.add_tokens(data)
    arguments.add_workers(data)
    arguments.add_steps(parser, learning_rate=1e-5, warmup_ratio=0.1)
    machine = parser.add_argument_group("adapter, memory and speed")
    arguments.add_finetuning_type(machine)
    arguments.add_adapter(machine)
    arguments.add_memory(machine)
    arguments.add_strategy(machine)
    arguments.add_held_out(arguments.add_watch(parser))
    return parser


def main() -> None:
    args, rest = make_parser().parse_known_args()
    adopt_kind(args)
    args.options = Options(rest, LIBRARY_OPTIONS, args)
    llm.run_stage(args, run)


def run(args: argparse.Namespace) -> None:
    check_whole(args, learning_rate=1e-6)
    check_adapter(args, lacks=("prompts",) if args.objective == "orpo" else ("prompts", "base"))
    llm.check(args)
    check_start(args, compares=args.objective != "orpo")
    check_tokens(args, copies_base=args.objective != "orpo")
    if args.beta <= 0:
        raise Refused(f"beta must be above 0, it is {args.beta}")
    if args.sft_weight < 0:
        raise Refused(f"sft_weight must be at least 0, it is {args.sft_weight}")
    if args.objective == "kto" and args.batch_size < 2:
        raise Refused(
            "objective=kto needs a batch_size of at least 2: it compares an answer with another one of its batch. To "
            "save memory set gradient_checkpointing=true, or lower max_input_length and max_content_length"
        )
    log("HandleWithDataset", args.dataset_path, args)
    kinds = {PREFERENCE, LABELLED} if args.objective == "kto" else {PREFERENCE}
    preparation = Preparation(args, Wanted(kinds=frozenset(kinds), tools=False))

    log("InitializingModel", args.model_path, args)
    machine = llm.choose(args)
    tokenizer = llm.load_tokenizer(args.model_path, args)
    learned, held_out = preparation.sequences(tokenizer, RECIPES[args.objective])
    trainer = build_trainer(args, machine, tokenizer, learned, held_out)

    if held_out:
        sentence = f"eval_loss is the loss of {args.objective} on held-out rows, not that of tokens: no perplexity"
        remark(sentence, args, warning=False)
    score(trainer, tokenizer, held_out, args, "before")
    llm.train(trainer, preparation.rows, args)
    llm.save_adapter(trainer, args)
    score(trainer, tokenizer, held_out, args, "after")
    log("TrainingSuccess", args.model_name, args)


def build_trainer(
    args: argparse.Namespace, machine: llm.Machine, tokenizer: Any, learned: Learned, held_out: list[Judged]
) -> Any:
    from datasets import Dataset

    checkpointing = llm.plan_memory(args, machine, learned.longest, method="preferences")
    model = llm.load_model(args, machine, tokenizer, dropout=False)
    longest = args.max_input_length + args.max_content_length
    settings = llm.trainer_settings(args, machine, checkpointing=checkpointing)
    settings |= evaluation_settings(args, held_out)
    trainer_class, config_class = trainer_of(args.objective)
    if args.objective == "orpo":
        settings["remove_unused_columns"] = False
    if args.objective == "dpo" and args.sft_weight:
        if named := sorted({"loss_type", "loss_weights"} & options_of(args).given.keys()):
            raise Refused(f"sft_weight and {' and '.join(named)} both say what the loss is made of; leave one out")
        settings |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, args.sft_weight]}
    measured = columns(args.objective, held_out, tokenizer)
    config = options_of(args).build(config_class, beta=args.beta, max_length=longest, **settings)
    if args.objective == "kto":
        tell_balance(learned.dataset()["label"], config, args)
    with options_of(args).refusing():
        trainer = trainer_class(
            **trained(args, model, lambda: adapter_config(args, model, llm.linear_layers(model), rows=len(learned))),
            args=config,
            train_dataset=learned.dataset(),
            eval_dataset=Dataset.from_list(measured) if measured else None,
            processing_class=tokenizer,
            callbacks=llm.callbacks(args),
        )
    prepare_adapter(args, trainer)
    return trainer


def trainer_of(objective: str) -> tuple[Any, Any]:
    match objective:
        case "kto":  # compares with the mean of each forward pass, by definition
            from trl import KTOConfig, KTOTrainer

            class Kto(KTOTrainer):  # type: ignore[misc]
                """Takes tokens as they are. The divergence is estimated with another answer of the batch."""

                def _prepare_dataset(self, dataset: Any, _tokenizer: Any, config: Any, _name: str) -> Any:
                    if not self.calculate_KL:
                        return dataset
                    with config.main_process_first():
                        return dataset.map(
                            with_others_answers, batched=True, batch_size=config.per_device_train_batch_size
                        )

            return Kto, KTOConfig
        case "orpo":
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            class Odds(of_whole_steps(ORPOTrainer)):  # type: ignore[misc]
                """Counts a pair by the pairs of the step, a token by its tokens.

                Takes tokens as they are: by itself TRL would add a second end behind what a template writes.
                """

                sizes_of = staticmethod(sizes_of)

                def __init__(self, *, train_dataset: Any, eval_dataset: Any, **named: Any) -> None:
                    empty = type(train_dataset).from_list([{"prompt": "", "chosen": "", "rejected": ""}])
                    super().__init__(train_dataset=empty, eval_dataset=eval_dataset and empty, **named)
                    self.train_dataset, self.eval_dataset = train_dataset, eval_dataset  # not mapped to what they are

                def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
                    return {}

                def compute_loss(self, *args: Any, **named: Any) -> Any:
                    self.next_share()
                    return super().compute_loss(*args, **named)

                def concatenated_forward(self, *args: Any) -> tuple[Any, ...]:
                    found = super().concatenated_forward(*args)
                    return *found[:4], found[4] * self.share.tokens, *found[5:]

                def odds_ratio_loss(self, *args: Any) -> tuple[Any, ...]:
                    losses, *found = super().odds_ratio_loss(*args)
                    return losses * self.share.rows, *found

            return Odds, ORPOConfig
        case _:
            from trl import DPOConfig, DPOTrainer

            class Direct(of_whole_steps(DPOTrainer)):  # type: ignore[misc]
                """Counts a pair by the pairs of the step, a token that is learned as well by its tokens.

                Takes tokens as they are.
                """

                def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                    return dataset

                sizes_of = staticmethod(sizes_of)

                def compute_loss(self, *args: Any, **named: Any) -> Any:
                    share = self.next_share()
                    weights = self.args.loss_weights or [1.0] * len(self.loss_types)
                    self.loss_weights = [
                        weight * (share.tokens if kind == "sft" else share.rows)
                        for kind, weight in zip(self.loss_types, weights, strict=True)
                    ]
                    return super().compute_loss(*args, **named)

            return Direct, DPOConfig


def sizes_of(batch: dict[str, Any]) -> tuple[int, int]:
    """Return the pairs of a batch, and the tokens of what TRL learns of their better answers."""
    if "chosen_attention_mask" in batch:  # ORPO learns the prompt as well
        return len(batch["chosen_attention_mask"]), int(batch["chosen_attention_mask"][:, 1:].sum())
    better = batch["completion_mask"][: len(batch["completion_mask"]) // 2]
    return len(better), int(better[:, 1:].sum())


def tell_balance(labels: list[bool], config: Any, args: argparse.Namespace) -> None:
    """Tell when good and bad answers weigh too differently; KTO's paper (equation 8) wants 1 to 4/3 of good ones."""
    good = sum(labels)
    weights = config.desirable_weight * good, config.undesirable_weight * (len(labels) - good)
    if good in (0, len(labels)):
        remark(f"all {len(labels)} answers are {'good' if good else 'bad'} ones: there is nothing to tell apart", args)
    elif 2 * good != len(labels) and not 1 <= round(weights[0] / weights[1], 2) <= 1.34:
        remark(
            f"{good} of {len(labels)} answers are good ones; KTO learns best when their weight (desirable_weight times "
            f"their number) is 1 to 1.33 times that of the bad ones, here it is {weights[0] / weights[1]:.2f} times",
            args,
        )


def with_others_answers(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    answers = rows["completion_ids"]
    return {"KL_completion_ids": [answers[-1], *answers[:-1]]}


# --- rows -----------------------------------------------------------------------------------------------------------


def columns(objective: str, rows: list[Judged], tokenizer: Any) -> list[Row]:
    """Return rows as the trainer of an objective takes them."""
    table = RECIPES[objective].table
    return [one for row in rows for one in table(row, [render_answer(each, tokenizer) for each in answers_of(row)])]


def pair(_row: Preference, found: list[Rendered]) -> Iterator[Row]:
    """Yield a pair as tokens; what the template writes alike before both answers is the prompt."""
    better, worse = found
    start = min(better.start, worse.start)
    answers = {"chosen_ids": better.tokens[start:], "rejected_ids": worse.tokens[start:]}
    yield {"prompt_ids": better.tokens[:start], **answers}


def odds(_row: Preference, found: list[Rendered]) -> Iterator[Row]:
    """Yield a pair as tokens, in the columns of ORPO's collator."""
    parts = {"prompt": found[1].tokens[: found[1].start], "chosen": found[0].tokens, "rejected": found[1].tokens}
    yield {
        **{f"{name}_input_ids": tokens for name, tokens in parts.items()},
        **{f"{name}_attention_mask": [1] * len(tokens) for name, tokens in parts.items()},
        **{f"{name}_labels": one.labels for name, one in zip(("chosen", "rejected"), found, strict=True)},
    }


def singles(row: Judged, found: list[Rendered]) -> Iterator[Row]:
    """Yield every answer by itself, with whether it is a good one; of a pair it is the chosen one."""
    for one, label in zip(found, labels_of(row), strict=True):
        yield {"prompt_ids": one.tokens[: one.start], "completion_ids": one.tokens[one.start :], "label": label}


def as_written(row: Judged, found: list[Rendered]) -> list[Judged]:
    """Return the row with its turns as the template takes them."""
    return [replace(row, prompt=found[0].example.prompt)]


def recipe_of(table: Any, *tokens: str, **others: str) -> Recipe:
    return Recipe(dict.fromkeys(tokens, "tokens") | others, table, as_written, whole=True)


SIDES = [f"{side}_{what}" for side in ("chosen", "rejected") for what in ("input_ids", "attention_mask", "labels")]
RECIPES = {
    "dpo": recipe_of(pair, "prompt_ids", "chosen_ids", "rejected_ids"),
    "kto": recipe_of(singles, "prompt_ids", "completion_ids", label="flag"),
    "orpo": recipe_of(odds, "prompt_input_ids", "prompt_attention_mask", *SIDES),
}


def labels_of(row: Judged) -> list[bool]:
    return [True, False] if isinstance(row, Preference) else [row.label]


# --- score ----------------------------------------------------------------------------------------------------------


def score(trainer: Any, tokenizer: Any, rows: list[Judged], args: argparse.Namespace, phase: str) -> None:
    """Report the held-out loss, the share of pairs with the likelier better answer, and of answers exactly it."""
    measure(trainer, phase, lambda: report(trainer, tokenizer, rows, args, phase), args)


def report(trainer: Any, tokenizer: Any, rows: list[Judged], args: argparse.Namespace, phase: str) -> None:
    score_loss(trainer, phase)
    if rows and answers_here(trainer):
        both = [row for row in rows if isinstance(row, Preference)]
        if both:
            pairs = [[render_answer(one, tokenizer) for one in answers_of(row)] for row in both]
            value = preference_accuracy(trainer.model, tokenizer, pairs)
            report_score("preference_accuracy", phase, value, len(pairs))
        liked = [
            render_answer(one, tokenizer)
            for row in rows
            for one, label in zip(answers_of(row), labels_of(row), strict=True)
            if label
        ]
        if liked:
            report_exact_match(trainer.model, tokenizer, liked, args, phase)


def preference_accuracy(model: Any, tokenizer: Any, pairs: list[list[Rendered]]) -> float:
    """Return the share of pairs whose better answer has the higher probability per token."""
    better, worse = (
        [
            value
            for start in range(0, len(pairs), SCORED_AT_ONCE)
            for value in likelihoods(model, tokenizer, [both[side] for both in pairs[start : start + SCORED_AT_ONCE]])
        ]
        for side in (0, 1)
    )
    return sum(good > bad for good, bad in zip(better, worse, strict=True)) / len(pairs)


def likelihoods(model: Any, tokenizer: Any, answers: list[Rendered]) -> list[float]:
    """Return the mean log probability of the learned tokens of each answer."""
    import torch

    model.eval()
    width = max(len(one.tokens) for one in answers)
    tokens, learned = (
        torch.tensor(rows, device=model.device)
        for rows in (
            [one.tokens + [tokenizer.pad_token_id] * (width - len(one.tokens)) for one in answers],
            [[one.start <= place < len(one.tokens) for place in range(1, width)] for one in answers],
        )
    )
    there = torch.tensor([[place < len(one.tokens) for place in range(width)] for one in answers], device=model.device)
    with without_gradients():
        logits = model(input_ids=tokens, attention_mask=there.long()).logits[:, :-1].float()
    found = torch.gather(logits.log_softmax(-1), 2, tokens[:, 1:, None])[..., 0]
    return ((found * learned).sum(1) / learned.sum(1)).tolist()


if __name__ == "__main__":
    main()
