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
| pissa, olora | LoRA that starts at the main directions of the weights: learns faster; it changes the base meanwhile |
| oft, boft | a rotation of the weights in blocks: keeps what the base knows |
| loha, lokr | products of small matrices: a high rank from few weights |
| adalora | LoRA that gives its ranks to the layers that need them; it starts anew after an interruption |
| ia3 | one factor for each output of a layer: very few weights |
| vera, randlora | factors between fixed random matrices: very few weights |
| prompt_tuning, p_tuning, prefix_tuning | some tokens before the question; no complete model can be made of them |

The other kinds of PEFT are in `deepe_adapter_kinds.py`; its documentation explains them.
`load_in_4bit` trains on a base in 4 bits (QLoRA) where the package bitsandbytes is installed. Rows, held-out file,
checkpoints and SIGTERM as in sft-demo.py: `output_dir` holds adapter and tokenizer at the end.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe_arguments as arguments
import deepe_llm as llm
from deepe_adapter_kinds import CLASSES, KINDS, adapter_config, check_adapter, prepare_adapter
from deepe_adapters import adopt_kind, check_start, with_adapter
from deepe_log import log
from deepe_options import Options, options_of
from deepe_preparation import Learned, Preparation
from deepe_rows import CONVERSATION, TEXT, Refused, Rendered, Text, Wanted
from deepe_scores import by_length, evaluation_settings, over_tokens, score
from deepe_tokens import check_tokens

LIBRARY_OPTIONS = {  # every field of these classes can be set, beside the arguments below
    "classes": {"trl.SFTConfig": {}, **CLASSES},
    "instead": {"max_length": "max_input_length and max_content_length"},
}
LEARNS = Wanted(kinds=frozenset({CONVERSATION, TEXT}))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune with an adapter of your choice.", allow_abbrev=False)
    arguments.add_job(parser, model_name="peft-demo", goes_on=True)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--target_modules", default="all-linear", help="layers, separated by commas; or all-linear")
    arguments.add_adapter(adapter)
    adapter.add_argument("--lora_dropout", type=float, default=0.0, help="part of the adapter's inputs switched off")
    adapter.add_argument("--oft_block_size", type=int, default=32, help="width of a rotated block of oft")
    adapter.add_argument(
        "--virtual_tokens", "--num_virtual_tokens", type=int, default=16, help="tokens of prompt_tuning"
    )
    data = arguments.add_rows(parser, columns=("the input", "the output"))
    arguments.add_lengths(data)
    arguments.add_template(data)
    arguments.add_tokens(data)
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
        args.learning_rate = KINDS.get(args.adapter, KINDS["lora"]).rate
    llm.run_stage(args, run)


def run(args: argparse.Namespace) -> None:
    check(args)
    log("HandleWithDataset", args.dataset_path, args)
    preparation = Preparation(args, LEARNS)

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
    check_adapter(args)
    llm.check(args)
    check_start(args)
    for name in ("oft_block_size", "virtual_tokens"):
        if getattr(args, name) < 1:
            raise Refused(f"{name} must be at least 1, it is {getattr(args, name)}")
    check_tokens(args)


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
    with options_of(args).refusing():
        trainer = over_tokens(SFTTrainer)(
            **with_adapter(args, model, lambda: adapter_config(args, model, layers, rows=len(learned))),
            args=config,
            train_dataset=learned.dataset(),
            eval_dataset=Dataset.from_dict(llm.columns_of(by_length(held_out))) if held_out else None,
            processing_class=tokenizer,
            callbacks=llm.callbacks(args),
        )
    prepare_adapter(args, trainer)
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


if __name__ == "__main__":
    main()
