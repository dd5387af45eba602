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
import deepe_arguments as arguments
import deepe_llm as llm
from deepe_adapters import adopt_kind, check_start, with_adapter
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
    arguments.add_job(parser, model_name="peft-demo", goes_on=True)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--adapter", choices=list(RATES), default="lora", help="kind of the adapter")
    adapter.add_argument("--target_modules", default="all-linear", help="layers, separated by commas; or all-linear")
    arguments.add_lora(adapter, rank="rank; not for oft, ia3 and prompt_tuning")
    adapter.add_argument("--lora_dropout", type=float, default=0.0, help="part of the adapter's inputs switched off")
    adapter.add_argument("--oft_block_size", type=int, default=32, help="width of a rotated block of oft")
    adapter.add_argument(
        "--virtual_tokens", "--num_virtual_tokens", type=int, default=16, help="tokens of prompt_tuning"
    )
    data = arguments.add_rows(parser, columns=("the input", "the output"))
    arguments.add_lengths(data)
    arguments.add_template(data)
    arguments.add_workers(data)
    arguments.add_steps(parser, learning_rate=None, learning_rate_help="empty takes what suits the adapter")
    machine = parser.add_argument_group("memory and speed")
    arguments.add_memory(machine)
    arguments.add_strategy(machine)
    arguments.add_held_out(arguments.add_watch(parser))
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
