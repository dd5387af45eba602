r"""Reward-Demo, training: a reward model from preferences, by TRL's RewardTrainer, with LoRA or whole weights.

The base model gets a head that gives one number for a conversation. It learns to give the better of two answers the
higher number (Bradley and Terry 1952; Ouyang et al. 2022). The number says which of several answers to the same
question is better; by itself it has no scale. GRPO-Demo and PPO-Demo take such a model as their judge
(`reward_model_path`).

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment (about half a minute):

    python app/presets/shared/tiny_base.py --output tiny-styles --answers=styles --steps=600
    python app/presets/reward-demo/reward-demo.py --model_path=tiny-styles \
        --dataset_path=app/presets/dpo-demo/dpo-demo.jsonl \
        --output_dir=reward-out --max_steps=40 --batch_size=32 --learning_rate=0.002

A row has `prompt`, `chosen` and `rejected`, as in dpo-demo.py. The score is the share of held-out pairs whose better
answer has the higher reward (`reward_accuracy`), and by how much it has more (`reward_margin`), before and after.
Held-out file, checkpoints and SIGTERM as in sft-demo.py: `output_dir` holds adapter (or model), head and tokenizer.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
import deepe_arguments as arguments
import deepe_llm as llm
from deepe_adapter_kinds import CLASSES, adapter_config, check_adapter, prepare_adapter
from deepe_log import log
from deepe_options import Options, options_of
from deepe_preparation import Preparation
from deepe_recipes import Learned, Recipe
from deepe_reward_model import RewardModel, as_written, columns, mean_margin, share_ranked_right, tokens_of_pair
from deepe_rows import PREFERENCE, Preference, Wanted
from deepe_scores import SAMPLES, evaluation_settings, report_score, score_loss, text_of
from deepe_steps import of_whole_steps
from deepe_tokens import check_tokens, make_room
from deepe_whole import check_whole, head_of, trained

LIBRARY_OPTIONS = {  # every field of these classes can be set, beside the arguments below
    "classes": {"trl.RewardConfig": {}, **CLASSES},
    "instead": {"max_length": "max_input_length and max_content_length"},
}
LEARNS = Wanted(kinds=frozenset({PREFERENCE}), tools=False)
RECIPE = Recipe({"chosen_ids": "tokens", "rejected_ids": "tokens"}, tokens_of_pair, as_written, whole=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a reward model.", allow_abbrev=False)
    arguments.add_job(parser, model_name="reward-demo")
    data = arguments.add_rows(parser, columns=None)
    arguments.add_lengths(data, of_input="a prompt", of_output="an answer")
    arguments.add_template(data)
    arguments.add_tokens(data)
    arguments.add_steps(parser, learning_rate=1e-4, warmup_ratio=0.1)
    machine = parser.add_argument_group("adapter, memory and speed")
    arguments.add_finetuning_type(machine)
    arguments.add_adapter(machine)
    arguments.add_memory(machine)
    arguments.add_held_out(arguments.add_watch(parser), answers=False)
    return parser


def main() -> None:
    args, rest = make_parser().parse_known_args()
    args.options = Options(rest, LIBRARY_OPTIONS, args)
    llm.run_stage(args, run)


def run(args: argparse.Namespace) -> None:
    check_whole(args, learning_rate=1e-5)
    check_adapter(args, lacks=("prompts",))
    llm.check(args)
    check_tokens(args)
    log("HandleWithDataset", args.dataset_path, args)
    preparation = Preparation(args, LEARNS)

    log("InitializingModel", args.model_path, args)
    machine = llm.choose(args)
    tokenizer = llm.load_tokenizer(args.model_path, args)
    learned, held_out = preparation.sequences(tokenizer, RECIPE)
    trainer = build_trainer(args, machine, tokenizer, learned, held_out)

    score(trainer, tokenizer, held_out, "before")
    llm.train(trainer, preparation.rows, args)
    llm.save_adapter(trainer, args)
    score(trainer, tokenizer, held_out, "after")
    log("TrainingSuccess", args.model_name, args)


def build_trainer(
    args: argparse.Namespace, machine: llm.Machine, tokenizer: Any, learned: Learned, held_out: list[Preference]
) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, logging
    from trl import RewardConfig, RewardTrainer

    class Ranked(of_whole_steps(RewardTrainer)):  # type: ignore[misc]
        """Counts a pair by the pairs of the step."""

        def sizes_of(self, batch: dict[str, Any]) -> tuple[int, int]:
            return len(batch["input_ids"]) // 2, 1

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *more: Any, **named: Any) -> Any:
            share = self.next_share().rows
            loss, outputs = super().compute_loss(model, inputs, True, *more, **named)
            return (loss * share, outputs) if return_outputs else loss * share

    checkpointing = llm.plan_memory(args, machine, learned.longest, method="reward")
    logging.set_verbosity_error()  # a new head is no news
    model = llm.load_weights(args, machine, AutoModelForSequenceClassification, num_labels=1)
    make_room(model, tokenizer)
    head_of(model).float()  # it learns, whatever the numbers of the base
    settings = llm.trainer_settings(args, machine, checkpointing=checkpointing)
    settings |= evaluation_settings(args, held_out)
    config = options_of(args).build(RewardConfig, max_length=None, **settings)
    with options_of(args).refusing():
        trainer = Ranked(
            **trained(
                args,
                model,
                lambda: adapter_config(args, model, llm.linear_layers(model), task="SEQ_CLS", rows=len(learned)),
            ),
            args=config,
            train_dataset=learned.dataset(),
            eval_dataset=Dataset.from_list(columns(held_out, tokenizer)) if held_out else None,
            processing_class=tokenizer,
            callbacks=llm.callbacks(args),
        )
    prepare_adapter(args, trainer)
    return trainer


def score(trainer: Any, tokenizer: Any, pairs: list[Preference], phase: str) -> None:
    """Report the held-out loss, the share of pairs that are ranked right, and the mean distance of their rewards."""
    score_loss(trainer, phase)
    if pairs and trainer.is_world_process_zero():
        rewards = RewardModel(trainer.model, tokenizer).of_pairs(pairs)
        report_score("reward_accuracy", phase, share_ranked_right(rewards), len(pairs))
        report_score("reward_margin", phase, mean_margin(rewards), len(pairs))
        for number, (pair, (better, worse)) in enumerate(list(zip(pairs, rewards, strict=True))[:SAMPLES]):
            shown = f"{better:.3f}  {text_of(pair.chosen)}\n{worse:.3f}  {text_of(pair.rejected)}"
            deepe.sample(phase, number, text_of(pair.prompt[-1]), text_of(pair.chosen), shown)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
