r"""GRPO-Demo, training: reinforcement learning from rewards that are computed, with LoRA, by TRL's GRPOTrainer.

The model answers each question several times. Answers with more reward than the others of their group become more
likely, those with less become rarer. What earns a reward:

| reward | parameter | earned by |
|---|---|---|
| answer | `answer_weight` | the right result, in the form of `answer_pattern` |
| format | `format_weight` | the form of `answer_pattern`, whatever the result |
| length | `length_weight` | at most `target_length` characters; none from twice as many |
| your own | `reward_file`, `reward_file_weight` | what functions `..._reward(completions, **columns)` of a file say |
| model | `reward_model_path`, `reward_model_weight` | what a reward model says, such as one of Reward-Demo |
| environment | `tools_file` | what the environment's `get_reward` says |

With `tools_file` the model may call functions while it answers, or act in an environment, in several turns
(`deepe_rollouts`). The first answers of each logged step are kept beside the adapter, in `completions.jsonl`.

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment (about half a minute):

    python app/presets/shared/tiny_base.py --output tiny-styles --answers=styles --steps=600
    python app/presets/grpo-demo/grpo-demo.py --model_path=tiny-styles \
        --dataset_path=app/presets/grpo-demo/grpo-demo.jsonl \
        --output_dir=grpo-out --system_prompt= --max_steps=40 --batch_size=64 --num_generations=8 \
        --learning_rate=0.001 --max_content_length=24

A row is a question and its result (`question` and `answer`, `prompt` and `completion`, ..., or the columns named by
`input_train_name` and `output_train_name`); of a solution that tells its way, the result is what `answer_pattern`
finds. Held-out file, checkpoints and SIGTERM as in sft-demo.py: `output_dir` holds adapter and tokenizer at the end.
"""

import argparse
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe_arguments as arguments
import deepe_llm as llm
import deepe_vllm as vllm
from deepe_adapter_kinds import CLASSES, adapter_config, check_adapter, prepare_adapter
from deepe_adapters import adopt_kind, check_start
from deepe_distributed import answers_here, measure
from deepe_log import log, remark
from deepe_options import Options, options_of
from deepe_preparation import Preparation
from deepe_recipes import Learned
from deepe_reward_model import check_reward_model, load_reward_model
from deepe_rewards import Judge, for_trl, judge_of, rows_for_trl
from deepe_rollouts import PLAIN, Rollouts, keep_completions, prepare_template, rollouts_of, score_rollouts
from deepe_rows import QUESTION, Question, Refused, Wanted
from deepe_scores import begin_curves, measure_meanwhile, score_rewards
from deepe_tokens import check_tokens
from deepe_whole import check_whole, trained

LIBRARY_OPTIONS = {  # every field of these classes can be set, beside the arguments below
    "classes": {"trl.GRPOConfig": {}, **CLASSES},
    "instead": {
        "beta": "kl_coef",
        "max_completion_length": "max_content_length",
        "reward_weights": "answer_weight, format_weight, length_weight, reward_file_weight and reward_model_weight",
        "use_vllm": "vllm",
    },
}
LEARNS = Wanted(kinds=frozenset({QUESTION}), tools=False)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Reinforcement learning from computed rewards.", allow_abbrev=False)
    arguments.add_job(parser, model_name="grpo-demo", goes_on=True)

    reward = parser.add_argument_group("reward")
    arguments.add_rule_reward(reward)
    reward.add_argument("--reward_model_path", default=None, help="folder of a reward model")
    reward.add_argument("--reward_model_weight", type=float, default=1.0, help="weight of what it says")

    data = arguments.add_rows(parser, columns=("the question", "the result"))
    arguments.add_system_prompt(data)
    arguments.add_lengths(data, of_input="a question", of_output="an answer", output_tokens=512)
    arguments.add_template(data)
    arguments.add_tokens(data)
    arguments.add_workers(data)

    method = parser.add_argument_group("method")
    method.add_argument("--num_generations", type=int, default=8, help="answers to each question that are compared")
    method.add_argument("--temperature", type=float, default=1.0, help="how different the answers are")
    method.add_argument("--kl_coef", type=float, default=0.0, help="pull back to the base model; 0 saves its pass")
    arguments.add_rollouts(method)
    method.add_argument(
        "--vllm",
        choices=["auto", "true", "false", "server"],
        default="auto",
        help="answer by vLLM: true on the same GPU, server by one of its own",
    )
    method.add_argument("--vllm_environment", default="vllm", help="environment that a server is started from")
    arguments.add_steps(
        parser,
        rows="answers",
        grad_accum_steps=4,
        learning_rate=1e-5,
        warmup_ratio=0.0,
        scheduler="constant",
    )
    machine = parser.add_argument_group("adapter, memory and speed")
    arguments.add_finetuning_type(machine)
    arguments.add_adapter(machine)
    arguments.add_memory(machine)
    arguments.add_strategy(machine)
    watch = arguments.add_watch(parser, logging_steps=1, save_steps=50)
    watch.add_argument("--eval_steps", type=int, default=50, help="steps between two points of the held-out reward")
    return parser


def main() -> None:
    args, rest = make_parser().parse_known_args()
    adopt_kind(args)
    args.options = Options(rest, LIBRARY_OPTIONS, args)
    llm.run_stage(args, run)


def run(args: argparse.Namespace) -> None:
    check(args)
    rollouts = rollouts_of(args)
    judge = judge_of(args, by_environment=rollouts.rewards)

    def check_row(row: Question) -> None:
        judge.check(row)
        rollouts.check(row)

    log("HandleWithDataset", args.dataset_path, args)
    preparation = Preparation(args, replace(LEARNS, tools=not rollouts.are_plain), check_row)

    log("InitializingModel", args.model_path, args)
    gpus = vllm.part_accelerators(args)
    machine = llm.choose(args)
    if args.reward_model_path:
        reward_model = load_reward_model(Path(args.reward_model_path), dtype=machine.dtype)
        judge = judge.with_model(reward_model, args.reward_model_weight)
    remark(judge.told(), args, warning=False)
    tokenizer = llm.load_tokenizer(args.model_path, args)
    prepare_template(tokenizer, rollouts, args)
    tasks, held_out = preparation.sequences(tokenizer, judge.recipe(args.system_prompt, rollouts.schemas))
    with vllm.serving(args, machine, gpus, tokens=tasks.longest + args.max_content_length) as server:
        trainer = build_trainer(args, machine, tokenizer, tasks, judge, rollouts, server)
        keep_completions(trainer, args)
        score(trainer, tokenizer, held_out, judge, rollouts, args, "before")
        llm.train(trainer, preparation.rows, args)
        llm.save_adapter(trainer, args)
        score(trainer, tokenizer, held_out, judge, rollouts, args, "after")
    log("TrainingSuccess", args.model_name, args)


def check(args: argparse.Namespace) -> None:
    check_whole(args, learning_rate=1e-6)
    check_adapter(args, lacks=("prompts", "ranks", *(("base",) if args.kl_coef else ())))
    llm.check(args)
    check_start(args, compares=True)
    check_tokens(args, copies_base=bool(args.kl_coef))
    vllm.check(args)
    if args.reward_model_path:
        check_reward_model(Path(args.reward_model_path))
        if not args.reward_model_weight:
            raise Refused(
                "reward_model_weight is 0: the reward model would have no effect; leave reward_model_path out"
            )
    if args.num_generations < 2:
        raise Refused(f"num_generations must be at least 2, it is {args.num_generations}: answers are compared")
    together = args.batch_size * args.grad_accum_steps
    if together % args.num_generations:
        raise Refused(
            f"batch_size times grad_accum_steps ({together}) must be a multiple of num_generations "
            f"({args.num_generations}): the answers to a question stay together"
        )
    if args.kept_completions < 0:
        raise Refused(f"kept_completions must be at least 0, it is {args.kept_completions}")
    if args.temperature <= 0:
        raise Refused(f"temperature must be above 0, it is {args.temperature}: equal answers teach nothing")


def build_trainer(
    args: argparse.Namespace,
    machine: llm.Machine,
    tokenizer: Any,
    tasks: Learned,
    judge: Judge,
    rollouts: Rollouts = PLAIN,
    server: vllm.Server | None = None,
) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    answering = generation(args, machine)
    checkpointing = llm.plan_memory(
        args,
        machine,
        tasks.longest + args.max_content_length,
        method="grpo",
        share=1 - answering.get("vllm_gpu_memory_utilization", 0),
    )
    model = llm.load_model(args, machine, tokenizer, dropout=False)
    llm.sample_as_scored(model)
    config = options_of(args).build(
        GRPOConfig,
        num_generations=args.num_generations,
        max_completion_length=args.max_content_length,
        temperature=args.temperature,
        beta=args.kl_coef,
        reward_weights=list(judge.weights),
        mask_truncated_completions=True,  # what has no end says nothing about its result
        **answering,
        **llm.trainer_settings(args, machine, checkpointing=checkpointing),
    )
    if config.use_vllm:  # it knows the ends of the base model's files only
        config.generation_kwargs = {"stop_token_ids": [tokenizer.eos_token_id], **(config.generation_kwargs or {})}
    with options_of(args).refusing(), vllm.answered_by(server, args):
        trainer = GRPOTrainer(
            **trained(args, model, lambda: adapter_config(args, model, llm.linear_layers(model))),
            args=config,
            reward_funcs=[for_trl(function) for function in judge.functions],
            train_dataset=tasks.dataset(rows_for_trl),
            processing_class=tokenizer,
            callbacks=[*llm.callbacks(args, shown="reward"), *vllm.callbacks(server)],
            **rollouts.arguments(),
        )
    prepare_adapter(args, trainer)
    return trainer


def generation(args: argparse.Namespace, machine: llm.Machine) -> dict[str, Any]:
    """Return how answers are made: by a server, by vLLM on the same GPU where it is there, else by the model itself."""
    if args.vllm == "true" and args.new_tokens:
        raise Refused("vllm=true answers from the base model's own files, which do not know new_tokens; choose auto")
    if args.vllm == "false" or args.new_tokens:
        return {}
    if vllm.is_asked(args):
        return vllm.configuration()
    there = machine.device == "cuda" and importlib.util.find_spec("vllm") is not None
    if there and not machine.four_bit:
        return {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
    if args.vllm == "true":
        missing = "a base model that is not in 4 bits" if there else "an NVIDIA GPU"
        raise Refused(f"vllm=true needs {missing}; leave it at auto, and the model answers by itself")
    return {}


def score(
    trainer: Any,
    tokenizer: Any,
    tasks: list[Question],
    judge: Judge,
    rollouts: Rollouts,
    args: argparse.Namespace,
    phase: str,
) -> None:
    """Report the rewards of held-out questions; before the training, have them measured meanwhile as well."""

    def found(phase: str | None = None) -> dict[str, float]:
        here = tasks and answers_here(trainer)
        return score_rewards(trainer.model, tokenizer, tasks, judge, args, phase) if here else {}

    def work() -> None:
        if tasks and not rollouts.are_plain:
            score_rollouts(trainer, tasks, judge, args, phase)
        elif (curves := found(phase)) and phase == "before":
            begin_curves(trainer, curves)

    if phase == "before" and tasks and rollouts.are_plain:
        measure_meanwhile(trainer, args.eval_steps, found)
    measure(trainer, phase, work, args)


if __name__ == "__main__":
    main()
