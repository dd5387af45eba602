"""What the training scripts of language models share: machine, model, training with a Trainer, curves.

`args` are the parsed arguments of the script; every script declares the ones that are read here. torch and its
relatives are imported inside functions, so that a script's `--help` and its refusals come at once.
"""

import argparse
import difflib
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import deepe
import deepe_chat as chat
import deepe_loading as loading
import deepe_memory as memory
import deepe_trackers
from deepe_adapter_kinds import EXPERTS, EXPERTS_OF_MIXTRAL, has_joined_experts
from deepe_adapters import folder_with, leave_reference_out, start_of
from deepe_arguments import str2bool as str2bool  # noqa: PLC0414 (copies of older scripts take it from here)
from deepe_checkpoints import ADAPTER, MODEL, make_readable, newest_checkpoint
from deepe_distributed import (
    any_stop_requested,
    check_divided,
    check_strategy,
    dividing_weights,
    has_parts_of_weights,
    join,
    leave_group,
    processes,
    save_model,
    stop_group,
    strategy,
    wait_for_all,
)
from deepe_log import log, remark, remark_plan
from deepe_needs import FLASH_ATTENTION, needs_of
from deepe_options import PASSED_BY_PLATFORM, PASSED_TO_ALL, options_of
from deepe_preparation import remove_prepared
from deepe_rows import Refused, Rendered
from deepe_scores import early_stopping, tell_kept
from deepe_tokens import add_tokens, make_room
from deepe_whole import HEADS, trains_whole

TINY_BYTES = 64 * 2**20  # threads of a smaller model wait for each other longer than they work
POSITIVE = (
    *("batch_size", "grad_accum_steps", "lora_rank", "logging_steps"),
    *("save_steps", "save_total_limit", "eval_steps", "early_stopping_patience"),
)
SAME_OPTIONS = {"r": "lora_rank", "lora_dropout": "lora_dropout", "optim": "optimizer"}  # of libraries, and ours
FLASH_CAPABILITY = {"flash_attention_3": (9, 0), "flash_attention_2": (8, 0)}  # of the GPU
CHANGING = frozenset({"packing", "shuffle_dataset", "max_length", "truncation_mode"})  # options that need TRL's maps
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
LIKE_MIXTRAL = ("mixtral", "minimax", "minimax_m2")
PASSED_TO_PRODUCING = frozenset({"model_path", "adapter_path", "model_usage_type"})  # a saving stage that trains
_expected_mib: dict[str, float] = {}  # of this process's training


# --- the script -----------------------------------------------------------------------------------------------------


def run_stage(
    args: argparse.Namespace,
    work: Callable[[argparse.Namespace], None],
    advice: Callable[[Exception], str] | None = None,
    *,
    unknown: Sequence[str] = (),
) -> None:
    """Do the work of a training stage; a failure becomes a log record, a refusal one sentence and exit code 1.

    `advice` says what to change when memory was short, or nothing; left out, it is what suits torch. `unknown` are
    the arguments that the script does not know.
    """
    prepare_environment(args)
    try:
        judge_unknown(unknown, args)
        deepe_trackers.check(args)
        work(args)
        remove_prepared(args)
        leave_group()
    except Refused as error:
        remove_prepared(args)
        log("TrainingFailed", str(error), args, level="ERROR")
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except Exception as error:
        if sentence := advice(error) if advice else _memory_advice(error, args):
            deepe.note(sentence)
        log("TrainingFailed", f"{type(error).__name__}: {error}\n{sentence}".strip(), args, level="ERROR")
        raise


def judge_unknown(arguments: Sequence[str], args: argparse.Namespace) -> None:
    """Refuse unknown arguments of a script that is started by hand; in a job, tell that they have no effect.

    Jobs of the platform bring arguments that not every script has a use for.
    """
    names = [text[2:].partition("=")[0] for text in arguments if text.startswith("--")]
    lost = [name for name in names if name not in PASSED_BY_PLATFORM | PASSED_TO_ALL | PASSED_TO_PRODUCING]
    stray = [] if names else list(arguments)
    if not lost and not stray:
        return
    if "DEEPE_JOB_ID" in os.environ:
        remark(f"this script does not know {', '.join(lost or stray)}: without effect", args)
        return
    close = difflib.get_close_matches((lost or stray)[0], vars(args), n=1, cutoff=0.75)
    meant = f"; did you mean --{close[0]}?" if close else ""
    raise Refused(f"unknown arguments: {', '.join(lost or stray)}{meant} (--help lists those that there are)")


def prepare_environment(args: argparse.Namespace) -> None:
    """Set what the libraries read when they are imported; what the user has set stays."""
    weights = sum(file.stat().st_size for file in Path(args.model_path).glob("*.safetensors"))
    if weights < TINY_BYTES:
        deepe.use_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # 0 allows a name on the hub as model_path
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def check(args: argparse.Namespace) -> None:
    """Refuse what would only fail minutes later."""
    for name in POSITIVE:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise Refused(f"{name} must be at least 1, it is {value}")
    if args.max_steps is not None and args.max_steps < 1:
        raise Refused(f"max_steps must be at least 1, it is {args.max_steps}; leave it out to train by epochs")
    if not 0 <= args.eval_fraction < 1:
        raise Refused(f"eval_fraction must be at least 0 and below 1, it is {args.eval_fraction}")
    if not (Path(args.model_path) / "config.json").is_file() and os.environ["HF_HUB_OFFLINE"] != "0":
        raise Refused(f"there is no base model in {args.model_path}: config.json is missing")
    options_of(args).check()
    if "attention" in args:  # scripts that train with torch
        _check_packages(args)
    check_strategy(args)


def _check_packages(args: argparse.Namespace) -> None:
    """Refuse what the environment has no package for: a run that goes on without it is another one."""
    for name, need in needs_of({**vars(args), **options_of(args).given}).items():
        if not importlib.util.find_spec(need.module):
            value = getattr(args, name, options_of(args).given.get(name))
            raise Refused(
                f"{name}={str(value).lower()} needs the package {need.name}, which this environment does not have; "
                f"install it there, or leave {name} out"
            )


def _memory_advice(error: Exception, args: argparse.Namespace) -> str:
    """Return what to change if memory was short, else an empty text."""
    names = (type(error).__name__ == "OutOfMemoryError", isinstance(error, MemoryError))
    if not any(names) and "t allocate memory" not in str(error):
        return ""
    pictures = ""
    if "max_image_side" in args:
        pictures = f"lower max_image_side ({args.max_image_side}), show fewer pictures in a row, "
    smallest = 2 if getattr(args, "objective", None) == "kto" else 1  # KTO compares rows of a batch
    batch = f"halve batch_size ({args.batch_size}) and double grad_accum_steps ({args.grad_accum_steps}), "
    batch = batch if args.batch_size >= 2 * smallest else ""
    return (
        f"out of memory: {batch}{pictures}set gradient_checkpointing to true, shorten the rows, "
        "or set load_in_4bit where bitsandbytes is installed"
    )


# --- machine --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What this run uses of the machine, decided once."""

    device: str
    dtype: str
    attention: str | None
    """None: what transformers takes for the architecture."""
    four_bit: bool
    optimizer: str


def choose(args: argparse.Namespace) -> Machine:
    """Decide on device and formats; refuse what is asked for and not there."""
    import torch

    use_one_gpu(args)
    join(device_kind())
    cuda = torch.cuda.is_available()
    brain = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = args.dtype
    if dtype == "auto":
        dtype = ("bfloat16" if brain else "float16") if cuda else "float32"
    elif dtype == "bfloat16" and cuda and not brain:
        raise Refused(f"dtype=bfloat16: {torch.cuda.get_device_name()} cannot calculate with it; choose auto")
    return Machine(
        device=device_kind(),
        dtype=dtype,
        attention=_attention(args, dtype, torch.cuda.get_device_capability() if cuda else None),
        four_bit=args.load_in_4bit,
        optimizer=args.optimizer,
    )


def device_kind() -> str:
    """Return what torch computes on: "cuda", "mps" or "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def own_device() -> str:
    """Return the device of this process, as torch names it."""
    kind = device_kind()
    return f"{kind}:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else kind


def use_one_gpu(args: argparse.Namespace) -> None:
    """Without a launcher (torchrun, accelerate) a process trains on one GPU; hide the others before CUDA starts."""
    import torch

    if "WORLD_SIZE" in os.environ or torch.cuda.device_count() < 2:
        return
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    remark(f"{torch.cuda.device_count()} GPUs are visible, GPU {first} is used; start with torchrun to use all", args)
    os.environ["CUDA_VISIBLE_DEVICES"] = first


def _attention(args: argparse.Namespace, dtype: str, capability: tuple[int, int] | None) -> str | None:
    """Return the implementation of attention, None for what suits the base; `capability` is that of the GPU, if any."""
    if args.attention not in (*FLASH_ATTENTION, "auto"):
        return str(args.attention)
    able = [] if capability is None else [name for name, least in FLASH_CAPABILITY.items() if capability >= least]
    fitting = able if dtype in ("bfloat16", "float16") else []
    if args.attention == "auto":
        installed = [name for name in fitting if importlib.util.find_spec(FLASH_ATTENTION[name].module)]
        return installed[0] if installed else None  # sdpa, where the architecture has it: Gemma 2 has not
    if args.attention not in fitting:
        lacks = "numbers of 16 bits" if args.attention in able else "a newer GPU" if capability else "an NVIDIA GPU"
        raise Refused(f"attention={args.attention} needs {lacks} (here: dtype {dtype}); choose auto or sdpa")
    return str(args.attention)


# --- model ----------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str, args: argparse.Namespace) -> Any:
    """Return the tokenizer of a base model, with the chat template that is asked for; a turn ends with its eos.

    Going on from an adapter it is the one beside it, which has the chat template of its training.
    """
    from transformers import AutoTokenizer

    start = start_of(args)
    has_own = start is not None and (start / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(start if has_own else path, **loading.code(path))
    add_tokens(tokenizer, args)
    chat.choose_template(tokenizer, Path(path), args)
    chat.tell_end(tokenizer, chat.end_turns(tokenizer, Path(path)), args)
    return tokenizer


def load_model(
    args: argparse.Namespace, machine: Machine, tokenizer: Any, auto_class: Any = None, *, dropout: bool = True
) -> Any:
    """Return the base model as `load_weights` does. It stops at the ends that the tokenizer knows."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = load_weights(args, machine, auto_class or AutoModelForCausalLM, dropout=dropout)
    make_room(model, tokenizer)
    if (folder := folder_with(args, chat.NAME)) == start_of(args):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    chat.stop_at_turn_ends(model, tokenizer)
    return model


def load_weights(
    args: argparse.Namespace, machine: Machine, auto_class: Any, *, dropout: bool = True, **named: Any
) -> Any:
    """Return the base model, after fixing the seed: adapters and heads that are made next start equally.

    `auto_class` is the one of transformers that loads it, `named` what it is given besides. `dropout=False` switches
    the base's own dropout off: a method that compares probabilities needs the same ones each time.
    """
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig, set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_seed(args.seed)
    more = {**named, **loading.weights(args.model_path)}
    dtype = "float32" if trains_whole(args) else machine.dtype
    if machine.device == "cuda" and not has_parts_of_weights():
        more["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    if machine.four_bit:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, machine.dtype),
            llm_int8_skip_modules=list(HEADS) if named else None,
            # only numbers with a point can be divided
            bnb_4bit_quant_storage=getattr(torch, machine.dtype) if has_parts_of_weights() else torch.uint8,
        )
    if not dropout:
        more["config"] = AutoConfig.from_pretrained(args.model_path, **loading.code(args.model_path))
        text = more["config"].get_text_config()
        for name in [name for name, value in vars(text).items() if "drop" in name and isinstance(value, float)]:
            setattr(text, name, 0.0)
    with dividing_weights(dtype):
        return auto_class.from_pretrained(
            args.model_path, dtype=getattr(torch, dtype), attn_implementation=machine.attention, **more
        )


def sample_as_scored(model: Any) -> None:
    """Leave out what the base's generation settings do to probabilities: answers come from those that are scored.

    A penalty or a limit of `generation_config.json` would otherwise hold wherever a call names no value of its own.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    kept = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**kept)


def lora(args: argparse.Namespace, layers: str | list[str], task: str = "CAUSAL_LM") -> Any:
    """Return the configuration of a LoRA adapter at these layers. Copies of older scripts use it."""
    from peft import LoraConfig

    own = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "target_modules": layers, "task_type": task}
    return options_of(args).build(LoraConfig, **own)


def linear_layers(model: Any) -> str | list[str]:
    """Return peft's name of all linear layers; of a mixture of experts their names, without those of the routers."""
    names = names_of_linear(model)
    if names == names_of_linear(model, routers=True):
        return "all-linear"
    head = {name.rpartition(".")[2] for name, part in model.named_modules() if part is model.get_output_embeddings()}
    return sorted(names - head)


def names_of_linear(model: Any, *, routers: bool = False) -> set[str]:
    """Return the last names of the linear layers; routers of a mixture only if asked for."""
    import torch

    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    config = model.config.get_text_config()
    if not any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return names
    if has_joined_experts(model):  # peft finds them by the names that they had
        names |= {"gate", *(EXPERTS_OF_MIXTRAL if config.model_type in LIKE_MIXTRAL else EXPERTS)}
    return names if routers else names - ROUTERS


def plan_memory(
    args: argparse.Namespace, machine: Machine, tokens: int, *, method: str = "sft", share: float = 1.0
) -> bool:
    """Return whether to recompute activations; tell what memory is expected, refuse what cannot fit.

    `tokens` is the length of the longest sequence, `share` the part of the free memory that the training may take.
    """
    asked = getattr(args, "gradient_checkpointing", "false")
    used = {"load_in_4bit": machine.four_bit, "optimizer": machine.optimizer, "attention": machine.attention}
    values = vars(args) | {name: value for name, value in used.items() if name in args}
    given = options_of(args).given
    values |= {own: given[name] for name, own in SAME_OPTIONS.items() if name in given}
    if "distributed_strategy" in values:
        values["distributed_strategy"] = strategy()
    _expected_mib.clear()
    try:
        base = memory.read_base(Path(args.model_path if "model_path" in args else args.base_path))
    except memory.Unforeseeable as error:
        remark(f"the memory that the training needs is not known before it starts: {error}", args, warning=False)
        return asked == "true" or (asked == "auto" and machine.device == "cuda")
    free = share * free_memory(machine.device)
    step = memory.step_of(
        method, values, device=machine.device, dtype=machine.dtype, tokens=tokens, processes=processes()
    )
    step = replace(step, checkpointing=memory.recomputes(base, step, asked, free))
    expected = memory.forecast(base, step)
    compared = machine.device == "cuda" or (machine.device == "cpu" and expected.weights > memory.LARGE)
    if compared and (sentence := memory.refusal(base, step, values, free)):
        raise Refused(sentence)
    short = f"; only {memory.in_words(free)} are free" if compared and expected.total > free else ""
    remark(f"expected memory: {expected.sentence()}{short}", args, warning=bool(short))
    _expected_mib["memory_expected_mib"] = round(expected.total / memory.MIB, 1)
    return step.checkpointing


def free_memory(device: str) -> float:
    """Return the bytes that this process may still take of the device's memory."""
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0])
    return memory.free_main_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def columns_of(sequences: Sequence[Rendered]) -> dict[str, list[list[int]]]:
    """Return what a trainer is given: tokens, and which of them are learned (`labels`, -100 for the others).

    Sequences of which nothing is learned are left out, as TRL does it.
    """
    some = [one for one in sequences if one.start < len(one.tokens)]
    return {"input_ids": [one.tokens for one in some], "labels": [one.labels for one in some]}


def preparing_settings(args: argparse.Namespace, *, packing: bool = False) -> dict[str, Any]:
    """Return what tells TRL that sequences are prepared and fit, unless it is asked to change them."""
    if packing or CHANGING & options_of(args).given.keys():
        return {"dataset_num_proc": args.preprocessing_workers}
    return {"dataset_kwargs": {"skip_prepare_dataset": True}}


# --- training with a Trainer ----------------------------------------------------------------------------------------


def trainer_settings(args: argparse.Namespace, machine: Machine, *, checkpointing: bool) -> dict[str, Any]:
    """Return what every TRL configuration is given."""
    log("ConfigTrainingParams", f"{machine}, gradient checkpointing {checkpointing}", args)
    if machine.device != "cuda":
        score_learned_only()
    return {
        "output_dir": args.output_dir,
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps or -1,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.grad_accum_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.lr_scheduler,
        "warmup_steps": args.warmup_ratio if args.warmup_steps is None else args.warmup_steps,  # below 1: a ratio
        "optim": machine.optimizer,
        "activation_checkpointing": checkpointing,
        "bf16": machine.dtype == "bfloat16",
        "fp16": machine.dtype == "float16",
        "use_cpu": machine.device == "cpu" and not strategy().startswith("zero"),  # DeepSpeed finds it by itself
        "logging_steps": args.logging_steps,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": args.save_steps,
        "save_total_limit": args.save_total_limit,
        "seed": args.seed,
        "report_to": "none",  # what is asked for comes with `callbacks`
        "run_name": deepe_trackers.run_name(args),
        "project": deepe_trackers.PROJECT,
        "trackio_static_space_id": False,
        "disable_tqdm": True,
    }


def score_learned_only() -> None:
    """Let TRL work out the probabilities of learned tokens only, as it does on CUDA.

    Elsewhere it does so for every token, for compilers that want equal shapes (Neuron): most are those of questions.
    """
    if importlib.metadata.version("trl").startswith("1.16."):
        from trl.trainer import utils

        utils._use_triton = lambda _device: True  # here it only says which positions; the kernels ask for themselves


def callbacks(args: argparse.Namespace, shown: str = "loss") -> list[Any]:
    """Return what reports and guards a training; `shown` is the value in the line for people."""
    from train_callback import TrainCallback, TrainerCallback

    class Gauges(TrainerCallback):
        """Adds speed, memory and the time that is left to what is logged."""

        def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            self.speed = Speed(state.global_step)

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and shown in logs:
                logs.update(self.speed.gauges(state.global_step, state.max_steps, logs.get("num_tokens")))

    class Watch(TrainerCallback):
        """One line for people, readable checkpoints, and a stop that leaves one."""

        group: Any = None

        def on_train_begin(self, *_args: Any, **_: Any) -> None:
            self.group = stop_group()

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and shown in logs and state.is_world_process_zero:
                print_step(state.global_step, state.max_steps, shown, logs)

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            if any_stop_requested(self.group):
                control.should_save = control.should_training_stop = True

        def on_evaluate(self, config: Any, _state: Any, control: Any, **_: Any) -> None:
            control.should_save |= config.load_best_model_at_end  # what is measured as the best has to be there

        def on_save(self, config: Any, state: Any, _control: Any, **_: Any) -> None:
            folder = Path(config.output_dir) / f"checkpoint-{state.global_step}"
            wait_for_all(self.group)  # each process has written its part
            if state.is_world_process_zero and folder.is_dir():
                make_readable(folder)
                deepe.checkpoint(folder, state.global_step)

    return [
        Gauges(),
        TrainCallback(args.logging_steps, args.train_id, args.seq),
        *deepe_trackers.callbacks(args),
        Watch(),
        *early_stopping(args),
    ]


class Speed:
    """Measures a training from its start, or from where it was resumed; `memory` gives the peak if torch does not."""

    def __init__(self, step: int, memory: Callable[[], float] | None = None) -> None:
        self._memory = memory or memory_peak
        self._began = self._last = time.monotonic()
        self._first_step = step
        self._tokens: float | None = None if step else 0.0

    def gauges(self, step: int, steps: int, tokens: float | None) -> dict[str, float]:
        """Return speed, memory and time left; `tokens` is the number seen so far."""
        now = time.monotonic()
        found = memory_gauges(self._memory)
        if step > self._first_step:
            found["eta_seconds"] = round((now - self._began) / (step - self._first_step) * (steps - step), 1)
        if tokens is not None:
            if self._tokens is not None and now > self._last:
                found["tokens_per_second"] = round((float(tokens) - self._tokens) / (now - self._last), 1)
            self._tokens, self._last = float(tokens), now
        return found


def memory_gauges(peak: Callable[[], float] | None = None) -> dict[str, float]:
    """Return the most memory used so far, and what `plan_memory` expected: the platform compares them."""
    return {"memory_peak_mib": (peak or memory_peak)(), **_expected_mib}


def memory_peak() -> float:
    """Return the most memory used so far in MiB: the GPU's, without one the process's."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10, 1)


def print_step(step: int, steps: int, shown: str, values: dict[str, Any]) -> None:
    left = f"  {values['eta_seconds']:.0f} s left" if "eta_seconds" in values else ""
    print(f"step {step}/{steps}  {shown} {float(values[shown]):.4f}{left}", flush=True)


def train(trainer: Any, rows: int, args: argparse.Namespace) -> None:
    """Train to the end, from the newest complete checkpoint if there is one; a stop ends the process.

    `rows` is the number of rows that the trainer's sequences were made of.
    """
    from transformers import PrinterCallback, TrainerCallback

    options_of(args).fit(trainer)
    count_weights_once(trainer.model)
    check_divided(trainer)

    class Plan(TrainerCallback):
        def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            remark_plan(rows, len(trainer.train_dataset), state.max_steps, args)

    trainer.add_callback(Plan())
    trainer.remove_callback(PrinterCallback)
    trainer.create_model_card = lambda *_args, **_kwargs: None
    weights = MODEL if trains_whole(args) else ADAPTER
    checkpoint = newest_checkpoint(Path(args.output_dir), args, weights=weights)
    log("StartTraining", args.model_name, args)
    deepe.catch_stop()
    with options_of(args).refusing(if_named=True):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if any_stop_requested(stop_group()):
        end_stopped(trainer.state.global_step)
    tell_kept(trainer, args)


def count_weights_once(model: Any) -> None:
    """Let the Trainer's estimate of operations count the weights once, not at each step."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "num_parameters"):  # of models of sentence-transformers nothing is estimated
        base.num_parameters = cache(base.num_parameters)


def end_stopped(step: int) -> None:
    """End the process as one that was asked to stop and has kept what it did."""
    sys.stderr.write(f"stopped at step {step}; its checkpoint is complete\n")
    leave_group(deepe.STOPPED)
    sys.exit(deepe.STOPPED)


def save_adapter(trainer: Any, args: argparse.Namespace) -> None:
    """Write what was trained (an adapter, or the whole model) and tokenizer, and where answers end."""
    log("SaveTrainedModel", args.model_name, args)
    if trains_whole(args):
        trainer.model.config.use_cache = True  # off while it learned
    save_model(trainer, args.output_dir)
    generates = getattr(trainer.model, "can_generate", None)  # a model of sentence-transformers has none
    if generates is not None and generates():
        write_ends(trainer.model, args)
    announce_adapter(args)


def write_ends(model: Any, args: argparse.Namespace) -> None:
    if deepe.is_first():
        ends = model.generation_config.eos_token_id
        chat.write_ends(folder_with(args, chat.NAME), Path(args.output_dir), ends)


def announce_adapter(args: argparse.Namespace) -> None:
    """Leave out what the libraries write besides, and let others read the rest."""
    leave_reference_out(Path(args.output_dir))
    for name in ("training_args.bin", "README.md"):  # a pickle without a use, an empty form
        (Path(args.output_dir) / name).unlink(missing_ok=True)
    make_readable(Path(args.output_dir))
    deepe.artifact(args.output_dir, "model" if trains_whole(args) else "adapter")
    log("SaveTrainedModelSuccess", args.output_dir, args)
