"""Arguments that several training scripts have, each declared once, so that it means the same in all of them.

    parser = argparse.ArgumentParser(description="...", allow_abbrev=False)
    add_job(parser, model_name="sft-demo")
    data = add_rows(parser, columns=("the input", "the output"))
    add_template(data)
    add_steps(parser, learning_rate=2e-4)

The platform reads what is declared here as it reads the script itself, without running it: names, defaults and help
have to be constants, or arguments of these functions. Standard library only.
"""

import argparse
import json
from typing import Any

AUTO = ["auto", "true", "false"]
DTYPES = ["auto", "bfloat16", "float16", "float32"]
STRATEGIES = ["auto", "ddp", "fsdp2", "zero2", "zero3"]
ADAPTERS = [  # kinds of PEFT; deepe_adapter_kinds.py says how each is made
    *("lora", "rslora", "dora", "pissa", "olora", "orthogonal", "adalora", "adamss", "beft", "boft", "c3a"),
    *("deft", "delora", "fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3", "lily", "ln_tuning", "loha"),
    *("lokr", "miss", "oft", "osf", "peanut", "psoft", "pvera", "randlora", "road", "shira", "supertuning"),
    *("tinylora", "unilora", "vblora", "vera", "waveft", "prompt_tuning", "p_tuning", "prefix_tuning"),
]
ATTENTION = ["auto", "sdpa", "flash_attention_2", "flash_attention_3", "eager"]


def str2bool(text: str) -> bool:
    """Return the truth that an argument says. Raises `ArgumentTypeError`."""
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off", ""):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def json_object(text: str) -> dict[str, Any]:
    """Return the object that an argument is the JSON of. Raises `ArgumentTypeError`."""
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError('must be a JSON object, such as {"enable_thinking": false}')
    return found


def add_job(
    parser: argparse.ArgumentParser,
    *,
    model_name: str,
    model: str = "folder of the base model",
    dataset: str = "JSONL file, or a folder with one",
    output: str = "folder for the adapter and the checkpoints",
    goes_on: bool = False,
) -> Any:
    """Declare what the platform fills in; `goes_on`: the training can go on from an adapter."""
    group = parser.add_argument_group("what the platform fills in")
    group.add_argument("--train_id", default="manual", help="id of the job, for the log")
    group.add_argument("--seq", type=int, default=1, help="number of the step in the job, for the log")
    group.add_argument("--model_name", default=model_name, help="name of the model")
    group.add_argument("--model_path", required=True, help=model)
    group.add_argument("--dataset_path", required=True, help=dataset)
    if goes_on:
        group.add_argument(
            "--adapter_name_or_path", default=None, help="folder of an adapter of the base to go on from"
        )
    group.add_argument("--output_dir", required=True, help=output)
    return group


def add_rows(parser: argparse.ArgumentParser, *, columns: tuple[str, str] | None) -> Any:
    """Declare which rows are learned; `columns` says what two columns hold that can be named. Returns the group."""
    group = parser.add_argument_group("data")
    if columns is not None:
        group.add_argument(
            "--input_train_name", default=None, help=f"column with {columns[0]}; empty finds it by itself"
        )
        group.add_argument(
            "--output_train_name", default=None, help=f"column with {columns[1]}; empty finds it by itself"
        )
    group.add_argument("--data_form", default="auto", help="form of the rows, where they can be read in several ways")
    group.add_argument("--validation_path", default=None, help="rows for the score; empty holds out a part of the data")
    group.add_argument("--max_samples", type=int, default=-1, help="rows to use; -1 takes all")
    return group


def add_lengths(
    group: Any,
    *,
    input_tokens: int = 1024,
    output_tokens: int = 1024,
    of_input: str = "the input of a row",
    of_output: str = "the output of a row",
) -> None:
    """Declare how long the two parts of a row may be."""
    group.add_argument("--max_input_length", type=int, default=input_tokens, help=f"tokens of {of_input}")
    group.add_argument("--max_content_length", type=int, default=output_tokens, help=f"tokens of {of_output}")


def add_template(group: Any) -> None:
    """Declare how turns are written."""
    group.add_argument("--chat_template", default="auto", help="auto: the base model's; none; a template or its file")
    group.add_argument(
        "--chat_template_kwargs", type=json_object, default=None, help="JSON object with arguments of the chat template"
    )
    group.add_argument(
        "--enable_thinking",
        choices=AUTO,
        default="auto",
        help="whether answers begin with reasoning, for templates that know it",
    )


def add_tokens(group: Any) -> None:
    """Declare which tokens the base model is taught."""
    group.add_argument(
        "--new_tokens",
        "--add_tokens",
        default=None,
        help="tokens to add and learn: JSON list, JSON object of tokens and meanings, or a file",
    )
    group.add_argument(
        "--new_tokens_special", type=str2bool, default=False, help="leave them out of the text of answers"
    )


def add_workers(group: Any) -> None:
    """Declare how many processes prepare rows."""
    group.add_argument(
        "--preprocessing_workers",
        "--dataset_num_proc",
        type=int,
        default=None,
        help="processes that make tokens of the rows; empty takes as many as the cores and the rows are worth",
    )


def add_steps(
    parser: argparse.ArgumentParser,
    *,
    learning_rate: float | None,
    learning_rate_help: str = "highest learning rate",
    rows: str = "rows",
    batch_size: int = 8,
    grad_accum_steps: int = 1,
    warmup_ratio: float = 0.03,
    scheduler: str = "cosine",
) -> Any:
    """Declare how the optimizer goes through the rows, for trainings by transformers' Trainer. Returns the group."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs",
        "--num_train_epochs",
        type=float,
        default=1.0,
        help="passes over the rows, unless max_steps is given",
    )
    group.add_argument("--max_steps", type=int, default=None, help="number of steps, instead of epochs")
    group.add_argument(
        "--batch_size",
        "--per_device_train_batch_size",
        type=int,
        default=batch_size,
        help=f"{rows} in one forward pass",
    )
    group.add_argument(
        "--grad_accum_steps",
        "--gradient_accumulation_steps",
        type=int,
        default=grad_accum_steps,
        help="forward passes in one step",
    )
    group.add_argument("--learning_rate", type=float, default=learning_rate, help=learning_rate_help)
    group.add_argument("--warmup_steps", type=int, default=None, help="steps until the highest learning rate")
    group.add_argument("--warmup_ratio", type=float, default=warmup_ratio, help="the same as part of all steps")
    group.add_argument("--lr_scheduler", "--lr_scheduler_type", default=scheduler, help="course of the learning rate")
    group.add_argument(
        "--optimizer", "--optim", default="adamw_torch_fused", help="the 8-bit ones need bitsandbytes and a GPU"
    )
    add_seed(group)
    return group


def add_seed(group: Any) -> None:
    """Declare the seed."""
    group.add_argument("--seed", type=int, default=42, help="same seed and machine, same model")


def add_finetuning_type(group: Any) -> None:
    """Declare whether an adapter or weights of the base learn."""
    group.add_argument(
        "--finetuning_type",
        choices=["lora", "full", "freeze"],
        default="lora",
        help="lora: an adapter; full: all weights of the base; freeze: those of its last layers",
    )
    group.add_argument("--freeze_trainable_layers", type=int, default=2, help="last layers that freeze trains")


def add_adapter(group: Any) -> None:
    """Declare kind and size of an adapter."""
    group.add_argument("--adapter", choices=ADAPTERS, default="lora", help="kind of the adapter")
    add_lora(group, rank="rank of the adapter's matrices, for kinds that have one")


def add_lora(group: Any, *, rank: str = "rank of the adapter's matrices") -> None:
    """Declare the size of a low-rank adapter."""
    group.add_argument("--lora_rank", "--lora_r", "--r", type=int, default=16, help=rank)
    group.add_argument("--lora_alpha", type=int, default=32, help="weight of the adapter, divided by the rank")


def add_memory(group: Any, *, dtypes: list[str] = DTYPES) -> None:
    """Declare what a training on PyTorch can do about memory and speed."""
    group.add_argument("--load_in_4bit", type=str2bool, default=False, help="QLoRA; needs a GPU and bitsandbytes")
    group.add_argument("--dtype", choices=dtypes, default="auto", help="numbers of the base model")
    group.add_argument(
        "--attention",
        choices=ATTENTION,
        default="auto",
        help="auto takes flash attention where it is installed, else sdpa",
    )
    group.add_argument(
        "--gradient_checkpointing",
        choices=AUTO,
        default="auto",
        help="recompute activations instead of keeping them; auto does it when memory is short",
    )


def add_strategy(group: Any) -> None:
    """Declare how the processes of a group share a model; the platform starts them by it."""
    group.add_argument(
        "--distributed_strategy",
        choices=STRATEGIES,
        default="auto",
        help="how several processes share the model; auto: each has all of it",
    )


def add_watch(
    parser: argparse.ArgumentParser,
    *,
    logging_steps: int = 5,
    save_steps: int = 100,
    rows: str = "rows",
    eval_samples: int = 100,
) -> Any:
    """Declare when curves get a point, what is kept, and what is held out for the score. Returns the group."""
    group = parser.add_argument_group("checkpoints and score")
    group.add_argument(
        "--logging_steps", type=int, default=logging_steps, help="steps between two points of the curves"
    )
    add_trackers(group)
    group.add_argument("--save_steps", type=int, default=save_steps, help="steps between two checkpoints")
    group.add_argument("--save_total_limit", type=int, default=2, help="checkpoints that are kept")
    group.add_argument("--resume", type=str2bool, default=True, help="go on from the newest complete checkpoint")
    group.add_argument("--eval_fraction", type=float, default=0.1, help=f"part of the {rows} held out for the score")
    group.add_argument("--eval_samples", type=int, default=eval_samples, help=f"held-out {rows} that are used at most")
    return group


def add_trackers(group: Any) -> None:
    """Declare which trackers get the curves."""
    group.add_argument(
        "--report_to",
        default="",
        help="mlflow, wandb, trackio, swanlab, several with commas; TensorBoard's files are always written",
    )


def add_held_out(group: Any, *, answers: bool = True) -> None:
    """Declare what is measured on held-out rows while the training runs; `answers`: the model gives some as well."""
    group.add_argument("--eval_steps", type=int, default=100, help="steps between two points of the held-out loss")
    add_early_stopping(group)
    if answers:
        group.add_argument("--eval_max_new_tokens", type=int, default=64, help="tokens of an answer that is scored")


def add_early_stopping(group: Any) -> None:
    """Declare whether a training ends early by what is measured on held-out rows."""
    group.add_argument(
        "--early_stopping_patience", type=int, default=None, help="end after so many losses without improvement"
    )
    group.add_argument("--early_stopping_threshold", type=float, default=0.0, help="what counts as an improvement")


def add_best(group: Any) -> None:
    """Declare early stopping, and what keeps the best step, for a loop that the script writes itself."""
    add_early_stopping(group)
    group.add_argument(
        "--load_best_model_at_end", type=str2bool, default=False, help="keep the best step, also without early stopping"
    )
    group.add_argument("--metric_for_best_model", default="eval_loss", help="curve whose lowest value is the best")


def add_rule_reward(group: Any) -> None:
    """Declare what answers are rewarded for by computed rules."""
    group.add_argument(
        "--answer_pattern",
        default=r"(?:####|\\boxed\{)[ *$\\]*(-?\$?(?:\\?[dt]?frac\{\d+\}\{\d+\}|[\d.,]+(?:/\d+)?))",
        help="where the result stands in an answer",
    )
    group.add_argument("--answer_weight", type=float, default=1.0, help="reward for the right result")
    group.add_argument("--format_weight", type=float, default=0.5, help="reward for the form of answer_pattern")
    group.add_argument("--length_weight", type=float, default=0.0, help="reward for an answer that is short enough")
    group.add_argument("--target_length", type=int, default=1000, help="characters of a short answer")
    group.add_argument("--reward_file", default=None, help="Python file with functions ..._reward")
    group.add_argument("--reward_file_weight", type=float, default=1.0, help="weight of each of its functions")


def add_rollouts(group: Any) -> None:
    """Declare what a model may do while it answers, and what is kept of its answers."""
    group.add_argument(
        "--tools_file", default=None, help="Python file with functions that the model may call, or an environment"
    )
    group.add_argument(
        "--kept_completions", type=int, default=8, help="answers of each logged step that are kept; 0 keeps none"
    )


def add_system_prompt(group: Any) -> None:
    """Declare what is said before each question."""
    group.add_argument(
        "--system_prompt",
        default="Think step by step. Write the result into the last line, like this: #### 42",
        help="instruction before each question; empty gives none",
    )
