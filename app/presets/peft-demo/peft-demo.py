"""PEFT-Demo, training: fine-tuning with the adapter of your choice, by PEFT and TRL's SFTTrainer.

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment (about half a minute):

    python app/presets/shared/tiny_base.py --output tiny-base
    python app/presets/peft-demo/peft-demo.py --model_path=tiny-base \
        --dataset_path=app/presets/sft-demo/sft-demo.jsonl \
        --output_dir=peft-out --adapter=dora --max_steps=120 --batch_size=32 --learning_rate=0.01

| adapter | what is trained |
|---|---|
| lora | two narrow matrices beside each linear layer |
| rslora | the same, scaled by the root of the rank: for ranks of 64 and more |
| dora | direction by LoRA and length by itself: closer to full fine-tuning, a third slower |
| pissa | LoRA that starts at the main directions of the weights: learns faster; the base is changed while it trains |
| oft | a rotation of the weights in blocks: keeps what the base knows |
| loha, lokr | products of small matrices: a high rank from few weights |
| adalora | LoRA that gives its ranks to the layers that need them; it starts anew after an interruption |
| ia3 | one factor for each output of a layer: very few weights |
| vera | factors between two fixed random matrices: very few weights |
| prompt_tuning | some tokens before the question; it cannot be merged, so that there is no complete model of it |

`load_in_4bit` trains on a base in 4 bits (QLoRA) where the package bitsandbytes is installed. Rows, held-out file,
checkpoints and SIGTERM as in sft-demo.py: `output_dir` holds adapter and tokenizer at the end.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe_llm as llm
from deepe_adapters import adopt_kind, check_start, with_adapter
from deepe_chat import json_object
from deepe_log import log, remark
from deepe_options import Options, options_of
from deepe_preparation import Learned, Preparation
from deepe_rows import CONVERSATION, TEXT, Refused, Rendered, Text, Wanted
from deepe_scores import by_length, evaluation_settings, over_tokens, score

LIBRARY_OPTIONS = {  # every field of these classes can be set, beside the arguments below
    "classes": {
        "trl.SFTConfig": {},
        "peft.LoraConfig": {"adapter": ["lora", "rslora", "dora", "pissa"]},
        "peft.OFTConfig": {"adapter": ["oft"]},
        "peft.LoHaConfig": {"adapter": ["loha"]},
        "peft.LoKrConfig": {"adapter": ["lokr"]},
        "peft.AdaLoraConfig": {"adapter": ["adalora"]},
        "peft.IA3Config": {"adapter": ["ia3"]},
        "peft.VeraConfig": {"adapter": ["vera"]},
        "peft.PromptTuningConfig": {"adapter": ["prompt_tuning"]},
    },
    "instead": {"max_length": "max_input_length and max_content_length"},
}
RATES = {  # what is customary on models of billions of weights
    "lora": 2e-4,
    "rslora": 1e-4,
    "dora": 2e-4,
    "pissa": 1e-4,
    "oft": 4e-4,
    "loha": 2e-4,
    "lokr": 1e-3,
    "adalora": 5e-4,
    "ia3": 5e-3,
    "vera": 5e-3,
    "prompt_tuning": 3e-2,
}
IN_FULL_PRECISION = ("pissa", "loha", "lokr")
NO_COMPLETE_MODEL = ("prompt_tuning",)


LEARNS = Wanted(kinds=frozenset({CONVERSATION, TEXT}))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune with an adapter of your choice.", allow_abbrev=False)
    job = parser.add_argument_group("what the platform fills in")
    job.add_argument("--train_id", default="manual", help="id of the job, for the log")
    job.add_argument("--seq", type=int, default=1, help="number of the step in the job, for the log")
    job.add_argument("--model_name", default="peft-demo", help="name of the model")
    job.add_argument("--model_path", required=True, help="folder of the base model")
    job.add_argument("--dataset_path", required=True, help="JSONL file, or a folder with one")
    job.add_argument("--adapter_name_or_path", default=None, help="folder of an adapter of the base to go on from")
    job.add_argument("--output_dir", required=True, help="folder for the adapter and the checkpoints")

    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--adapter",
        choices=[
            "lora", "rslora", "dora", "pissa", "oft", "loha", "lokr", "adalora", "ia3", "vera", "prompt_tuning",
        ],
        default="lora",
        help="kind of the adapter",
    )  # fmt: skip
    adapter.add_argument("--target_modules", default="all-linear", help="layers, separated by commas; or all-linear")
    adapter.add_argument(
        "--lora_rank", "--lora_r", "--r", type=int, default=16, help="rank; not for oft, ia3 and prompt_tuning"
    )
    adapter.add_argument("--lora_alpha", type=int, default=32, help="weight of the adapter, divided by the rank")
    adapter.add_argument("--lora_dropout", type=float, default=0.0, help="part of the adapter's inputs switched off")
    adapter.add_argument("--oft_block_size", type=int, default=32, help="width of a rotated block of oft")
    adapter.add_argument(
        "--virtual_tokens", "--num_virtual_tokens", type=int, default=16, help="tokens of prompt_tuning"
    )

    data = parser.add_argument_group("data")
    data.add_argument("--input_train_name", default=None, help="column with the input; empty finds it by itself")
    data.add_argument("--output_train_name", default=None, help="column with the output; empty finds it by itself")
    data.add_argument("--data_form", default="auto", help="form of the rows, where they can be read in several ways")
    data.add_argument("--validation_path", default=None, help="rows for the score; empty holds out a part of the data")
    data.add_argument("--max_samples", type=int, default=-1, help="rows to use; -1 takes all")
    data.add_argument("--max_input_length", type=int, default=1024, help="tokens of the input of a row")
    data.add_argument("--max_content_length", type=int, default=1024, help="tokens of the output of a row")
    data.add_argument("--chat_template", default="auto", help="auto: the base model's; none; a template or its file")
    data.add_argument(
        "--chat_template_kwargs", type=json_object, default=None, help="JSON object with arguments of the chat template"
    )
    data.add_argument(
        "--enable_thinking",
        choices=["auto", "true", "false"],
        default="auto",
        help="whether answers begin with reasoning, for templates that know it",
    )

    data.add_argument(
        "--preprocessing_workers",
        "--dataset_num_proc",
        type=int,
        default=None,
        help="processes that make tokens of the rows; empty takes as many as the cores and the rows are worth",
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
        "--batch_size", "--per_device_train_batch_size", type=int, default=8, help="rows in one forward pass"
    )
    steps.add_argument(
        "--grad_accum_steps", "--gradient_accumulation_steps", type=int, default=1, help="forward passes in one step"
    )
    steps.add_argument("--learning_rate", type=float, default=None, help="empty takes what suits the adapter")
    steps.add_argument("--warmup_steps", type=int, default=None, help="steps until the highest learning rate")
    steps.add_argument("--warmup_ratio", type=float, default=0.03, help="the same as part of all steps")
    steps.add_argument(
        "--lr_scheduler",
        "--lr_scheduler_type",
        default="cosine",
        help="course of the learning rate",
    )
    steps.add_argument(
        "--optimizer",
        "--optim",
        default="adamw_torch_fused",
        help="the 8-bit ones need bitsandbytes",
    )
    steps.add_argument("--seed", type=int, default=42, help="same seed and machine, same model")

    machine = parser.add_argument_group("memory and speed")
    machine.add_argument("--load_in_4bit", type=llm.str2bool, default=False, help="QLoRA; needs bitsandbytes")
    machine.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    machine.add_argument(
        "--attention", choices=["auto", "sdpa", "flash_attention_2", "flash_attention_3", "eager"], default="auto"
    )
    machine.add_argument("--gradient_checkpointing", choices=["auto", "true", "false"], default="auto")

    watch = parser.add_argument_group("checkpoints and score")
    watch.add_argument("--logging_steps", type=int, default=5, help="steps between two points of the curves")
    watch.add_argument("--save_steps", type=int, default=100, help="steps between two checkpoints")
    watch.add_argument("--save_total_limit", type=int, default=2, help="checkpoints that are kept")
    watch.add_argument("--resume", type=llm.str2bool, default=True, help="go on from the newest complete checkpoint")
    watch.add_argument("--eval_fraction", type=float, default=0.1, help="part of the rows held out for the score")
    watch.add_argument("--eval_samples", type=int, default=100, help="held-out rows that are used at most")
    watch.add_argument("--eval_steps", type=int, default=100, help="steps between two points of the held-out loss")
    watch.add_argument(
        "--early_stopping_patience", type=int, default=None, help="end after so many losses without improvement"
    )
    watch.add_argument("--early_stopping_threshold", type=float, default=0.0, help="what counts as an improvement")
    watch.add_argument("--eval_max_new_tokens", type=int, default=64, help="tokens of an answer that is scored")
    return parser


def main() -> None:
    args, rest = make_parser().parse_known_args()
    adopt_kind(args)
    args.options = Options(rest, LIBRARY_OPTIONS, args)
    if args.learning_rate is None:
        args.learning_rate = RATES.get(args.adapter, RATES["lora"])
    llm.run_stage(args, run)


def run(args: argparse.Namespace) -> None:
    check(args)
    log("HandleWithDataset", args.dataset_path, args)
    preparation = Preparation(args, LEARNS)
    if args.adapter in NO_COMPLETE_MODEL:
        remark(f"{args.adapter} cannot be merged: the customized model is the end of its way", args)

    log("InitializingModel", args.model_path, args)
    machine = llm.choose(args)
    tokenizer = llm.load_tokenizer(args.model_path, args)
    learned, held_out = preparation.sequences(tokenizer)
    asked = [one for one in held_out if not isinstance(one.example, Text)]
    trainer = build_trainer(args, machine, tokenizer, learned, held_out)

    score(trainer, tokenizer, asked, args, "before")
    llm.train(trainer, preparation.rows, args)
    llm.save_adapter(trainer, args)
    score(trainer, tokenizer, asked, args, "after")
    log("TrainingSuccess", args.model_name, args)


def check(args: argparse.Namespace) -> None:
    if args.load_in_4bit and args.adapter in IN_FULL_PRECISION:
        able = ", ".join(name for name in RATES if name not in IN_FULL_PRECISION)
        raise Refused(f"adapter={args.adapter} cannot be trained on a base model in 4 bits; these can: {able}")
    llm.check(args)
    check_start(args)
    for name in ("oft_block_size", "virtual_tokens"):
        if getattr(args, name) < 1:
            raise Refused(f"{name} must be at least 1, it is {getattr(args, name)}")
    if args.adapter == "adalora" and (
        args.early_stopping_patience or options_of(args).given.get("load_best_model_at_end")
    ):
        raise Refused("adapter=adalora keeps the last step: the matrices of its checkpoints are cut to their ranks")
    check_options(args)


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that say otherwise than the script's own arguments."""
    given = options_of(args).given
    own = {"rslora": ("use_rslora", "True"), "dora": ("use_dora", "True"), "pissa": ("init_lora_weights", "pissa")}
    name, value = own.get(args.adapter, ("", ""))
    if name in given and not str(given[name]).startswith(value):
        raise Refused(f"adapter={args.adapter} and {name}={given[name]} contradict each other; leave one of them out")
    for name in ("module_dropout", "rank_dropout", "vera_dropout"):
        if name in given and args.lora_dropout:
            raise Refused(f"lora_dropout and {name} both set the dropout of adapter={args.adapter}; leave one out")


def build_trainer(
    args: argparse.Namespace, machine: llm.Machine, tokenizer: Any, learned: Learned, held_out: list[Rendered]
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    checkpointing = llm.plan_memory(args, machine, learned.longest)
    model = llm.load_model(args, machine, tokenizer)
    layers = layers_of(args, model)
    model.config.use_cache = False
    longest = args.max_input_length + args.max_content_length
    settings = evaluation_settings(args, held_out) | llm.trainer_settings(args, machine, checkpointing=checkpointing)
    settings |= llm.preparing_settings(args)
    config = options_of(args).build(SFTConfig, max_length=longest, eval_packing=False, **settings)
    callbacks = llm.callbacks(args)
    if args.adapter == "adalora":
        callbacks.append(rank_allocation())
    with options_of(args).refusing():
        trainer = over_tokens(SFTTrainer)(
            **with_adapter(args, model, lambda: adapter_config(args, steps_of(args, len(learned)), layers)),
            args=config,
            train_dataset=learned.dataset(),
            eval_dataset=Dataset.from_dict(llm.columns_of(by_length(held_out))) if held_out else None,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trained, whole = trainer.model.get_nb_trainable_parameters()
    print(f"{args.adapter} trains {trained:,} weights beside {whole - trained:,} fixed ones", flush=True)
    return trainer


def layers_of(args: argparse.Namespace, model: Any) -> str | list[str]:
    """Return the layers to adapt; refuse names that no layer has, and say which there are."""
    if args.target_modules == "all-linear":
        return llm.linear_layers(model)
    linear = llm.names_of_linear(model, routers=True)
    named = [name.strip() for name in args.target_modules.split(",")]
    if unknown := [name for name in named if name not in linear]:
        there = ", ".join(sorted(linear))
        raise Refused(f"target_modules: no linear layer is called '{unknown[0]}'; there are: {there}")
    return named


def steps_of(args: argparse.Namespace, rows: int) -> int:
    """Return the number of steps; ranks are given away along them."""
    together = args.batch_size * args.grad_accum_steps * int(os.environ.get("WORLD_SIZE", "1"))
    return int(args.max_steps or math.ceil(args.epochs * math.ceil(rows / together)))


def adapter_config(args: argparse.Namespace, steps: int, layers: str | list[str]) -> Any:
    import peft

    build = options_of(args).build
    common = {"task_type": "CAUSAL_LM", "target_modules": layers}
    lora = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, **common}
    product = {"r": args.lora_rank, "alpha": args.lora_alpha, "rank_dropout": args.lora_dropout, **common}
    match args.adapter:
        case "lora":
            return build(peft.LoraConfig, **lora)
        case "rslora":
            return build(peft.LoraConfig, use_rslora=True, **lora)
        case "dora":
            return build(peft.LoraConfig, use_dora=True, **lora)
        case "pissa":
            return build(peft.LoraConfig, init_lora_weights="pissa", **lora)
        case "oft":
            return build(peft.OFTConfig, oft_block_size=args.oft_block_size, module_dropout=args.lora_dropout, **common)
        case "loha":
            return build(peft.LoHaConfig, **product)
        case "lokr":
            return build(peft.LoKrConfig, **product)
        case "adalora":
            plan = {"tinit": steps // 10, "tfinal": steps // 4, "deltaT": max(1, steps // 50), "total_step": steps}
            return build(
                peft.AdaLoraConfig, init_r=args.lora_rank, target_r=max(1, args.lora_rank // 2), **plan, **lora
            )
        case "ia3":
            return build(peft.IA3Config, feedforward_modules=[], **common)
        case "vera":
            return build(
                peft.VeraConfig,
                r=args.lora_rank,
                vera_dropout=args.lora_dropout,
                projection_prng_key=args.seed,
                **common,
            )
        case _:
            return build(peft.PromptTuningConfig, num_virtual_tokens=args.virtual_tokens, task_type="CAUSAL_LM")


def rank_allocation() -> Any:
    """Return the callback that lets AdaLoRA move ranks between layers, while the gradients are still there."""
    from train_callback import TrainerCallback

    class RankAllocation(TrainerCallback):
        def on_optimizer_step(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
            model.base_model.update_and_allocate(state.global_step)

    return RankAllocation()


if __name__ == "__main__":
    main()
