"""SFT-Demo, training: supervised fine-tuning of a causal language model with LoRA, by TRL's SFTTrainer.

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment (about half a minute):

    python app/presets/shared/tiny_base.py --output tiny-base
    python app/presets/sft-demo/sft-demo.py --model_path=tiny-base --dataset_path=app/presets/sft-demo/sft-demo.jsonl \
        --output_dir=sft-out --max_steps=150 --batch_size=32 --learning_rate=0.01 --lora_rank=16

A real model on a GPU needs no more than `--model_path`, `--dataset_path` and `--output_dir`: numbers in bfloat16, flash
attention where it is installed (else SDPA, where the base has it), a fused optimizer, gradient checkpointing when the
memory asks for it. Every one of these choices is a parameter.

`finetuning_type=full` trains all weights of the base instead of an adapter, `freeze` those of its last layers: the
result is a whole model, which `save_model.py` brings into the numbers that are asked for.

`packing` puts several rows into one sequence, so that a step learns from many more rows and there are fewer steps.
`auto` packs only with flash attention, which keeps the rows apart at no cost, in a training by epochs that is left
with 100 steps or more.

A row is a conversation (`messages`, or ShareGPT's `conversations`; with tools, too), `prompt` and `completion`,
`instruction`, `input` and `output`, `question` and `answer`, plain `text`, or the columns named by `input_train_name`
and `output_train_name`.
A folder may hold `heldout.jsonl` beside the data: the model is scored on it, else on a part of the rows put aside.

`output_dir` holds the adapter (or the whole model) and the tokenizer at the end, and `checkpoint-<step>` folders on
the way: a run that was interrupted goes on from the newest complete one. SIGTERM writes a checkpoint and ends with code
143.
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
from deepe_adapter_kinds import CLASSES, adapter_config, check_adapter, prepare_adapter
from deepe_adapters import adopt_kind, check_start
from deepe_log import log, remark
from deepe_options import Options, options_of
from deepe_preparation import Learned, Preparation
from deepe_rows import CONVERSATION, TEXT, Refused, Rendered, Text, Wanted
from deepe_scores import by_length, evaluation_settings, over_tokens, score
from deepe_tokens import check_tokens
from deepe_whole import check_whole, trained

LIBRARY_OPTIONS = {  # every field of these classes can be set, beside the arguments below
    "classes": {"trl.SFTConfig": {}, **CLASSES},
    "instead": {"max_length": "max_seq_length"},
}
PACKED_STEPS = 100  # that packing must leave
SEPARATED = ("full_attention", "sliding_attention", "chunked_attention")  # layers that can keep packed rows apart
LEARNS = Wanted(kinds=frozenset({CONVERSATION, TEXT}))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune a causal language model with LoRA.", allow_abbrev=False)
    arguments.add_job(parser, model_name="sft-demo", goes_on=True)
    data = arguments.add_rows(parser, columns=("the input", "the output"))
    data.add_argument("--max_seq_length", type=int, default=1024, help="tokens of a row; longer rows are left out")
    arguments.add_lengths(data)
    arguments.add_template(data)
    arguments.add_tokens(data)
    data.add_argument(
        "--packing",
        choices=["auto", "true", "false"],
        default="auto",
        help="put several rows into one sequence; auto does it with flash attention where 100 steps are left",
    )
    arguments.add_workers(data)
    arguments.add_steps(parser, learning_rate=2e-4)
    lora = parser.add_argument_group("what is trained")
    arguments.add_finetuning_type(lora)
    arguments.add_adapter(lora)
    machine = parser.add_argument_group("memory and speed")
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
    check_whole(args, learning_rate=1e-5)
    check_adapter(args)
    llm.check(args)
    check_start(args)
    check_tokens(args)
    if args.max_seq_length < 1:
        raise Refused(f"max_seq_length must be at least 1, it is {args.max_seq_length}")


def build_trainer(
    args: argparse.Namespace, machine: llm.Machine, tokenizer: Any, learned: Learned, held_out: list[Rendered]
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    may_pack = args.packing == "true" or (args.packing == "auto" and machine.attention in llm.FLASH_ATTENTION)
    longest = args.max_seq_length if may_pack else learned.longest
    checkpointing = llm.plan_memory(args, machine, longest)
    model = llm.load_model(args, machine, tokenizer)
    model.config.use_cache = False
    packing = packs(args, machine, model, learned)
    config = options_of(args).build(
        SFTConfig,
        max_length=args.max_seq_length,
        packing=packing,
        eval_packing=False,
        **llm.preparing_settings(args, packing=packing),
        **evaluation_settings(args, held_out),
        **llm.trainer_settings(args, machine, checkpointing=checkpointing),
    )
    with options_of(args).refusing():
        trainer = over_tokens(SFTTrainer)(
            **trained(args, model, lambda: adapter_config(args, model, llm.linear_layers(model), rows=len(learned))),
            args=config,
            train_dataset=learned.dataset(),
            eval_dataset=Dataset.from_dict(llm.columns_of(by_length(held_out))) if held_out else None,
            processing_class=tokenizer,
            callbacks=llm.callbacks(args),
        )
    prepare_adapter(args, trainer)
    return trainer


def packs(args: argparse.Namespace, machine: llm.Machine, model: Any, learned: Learned) -> bool:
    """Return whether rows are packed; tell why, and what it does to the steps."""
    if args.packing == "false":
        return False
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    mixing = sorted(set(kinds) - set(SEPARATED)) or [name for name in vars(config) if name in ("state_size", "ssm_cfg")]
    together = args.batch_size * args.grad_accum_steps * int(os.environ.get("WORLD_SIZE", "1"))
    packed = math.ceil(learned.tokens / args.max_seq_length)  # hardly more: TRL packs well
    steps, left = (math.ceil(count / together * args.epochs) for count in (len(learned), packed))
    if args.packing == "auto":
        why = ""
        if machine.attention not in llm.FLASH_ATTENTION:
            why = "without flash attention they would be kept apart only at a cost"
        elif mixing:
            why = f"the base model has layers that would mix them ({', '.join(mixing)})"
        elif args.max_steps is not None:
            why = "max_steps fixes the steps, so that each would learn from more rows than batch_size says"
        elif left < PACKED_STEPS:
            why = f"{left} of {steps} steps would be left"
        if why:
            log("ConfigTrainingParams", f"packing=auto: rows are not packed: {why}", args)
        else:
            remark(f"packing=auto: rows are packed: about {left} steps instead of {steps}", args, warning=False)
        return not why
    if mixing:
        raise Refused(
            f"packing=true would mix the rows of a sequence: the base model has layers that cannot keep them apart "
            f"({', '.join(mixing)}); leave packing out"
        )
    if args.max_steps is None:
        told = f"there are about {left} steps instead of {steps}"
    else:
        often = max(1, round(len(learned) / packed))
        told = f"{args.max_steps} steps pass over the rows about {often} times as often"
    slow = "" if machine.attention in llm.FLASH_ATTENTION else "; without flash attention it is slower than no packing"
    remark(f"packing=true puts {len(learned)} sequences into about {packed}: {told}{slow}", args)
    return True


if __name__ == "__main__":
    main()
