"""SFT-Demo, training: supervised fine-tuning of a causal language model with LoRA, by TRL's SFTTrainer.

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment (about half a minute):

    python app/presets/tiny_base.py --output tiny-base
    python app/presets/scripts/sft-demo.py --model_path=tiny-base --dataset_path=app/presets/data/sft-demo.jsonl \
        --output_dir=sft-out --max_steps=150 --batch_size=32 --learning_rate=0.01 --lora_rank=16

A real model on a GPU needs no more than `--model_path`, `--dataset_path` and `--output_dir`: numbers in bfloat16, flash
attention where it is installed (else SDPA), short rows packed into one sequence, a fused optimizer, gradient
checkpointing when the memory asks for it. Every one of these choices is a parameter.

A row is a conversation (`messages`, or ShareGPT's `conversations`), `prompt` and `completion`, `instruction`, `input`
and `output`, `question` and `answer`, plain `text`, or the columns named by `input_train_name` and
`output_train_name`.
A folder may hold `heldout.jsonl` beside the data: the model is scored on it, else on a part of the rows put aside.

`output_dir` holds the adapter and the tokenizer at the end, and `checkpoint-<step>` folders on the way: a run that was
interrupted goes on from the newest complete one. SIGTERM writes a checkpoint and ends with code 143.
"""

import argparse
import importlib.util
import json
import os
import random
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "helpers"))
import deepe

HELD_OUT = "heldout.jsonl"
TINY_BYTES = 64 * 2**20  # threads of a smaller model wait for each other longer than they work
SHARE_OF_MEMORY = 0.6  # of the free GPU memory; above it activations are recomputed instead of kept
PLAIN_TEMPLATE = (  # for a base model that was never taught a chat format
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' + message['content'] }}"
    "{{ eos_token + '\\n' if message['role'] == 'assistant' else '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)

Row = dict[str, Any]


class Refused(Exception):
    """What the user can put right: one sentence, no traceback."""


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    prepare_environment(args)
    try:
        run(args)
    except (Refused, UnicodeDecodeError) as error:
        log("TrainingFailed", str(error), args, level="ERROR")
        sys.exit(f"sft-demo.py: {error}")
    except Exception as error:
        log("TrainingFailed", f"{type(error).__name__}: {error}", args, level="ERROR")
        raise


def str2bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off", ""):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune a causal language model with LoRA.", allow_abbrev=False)

    job = parser.add_argument_group("what the platform fills in")
    job.add_argument("--train_id", default="manual", help="id of the job, for the log")
    job.add_argument("--seq", type=int, default=1, help="number of the step in the job, for the log")
    job.add_argument("--model_name", default="sft-demo", help="name of the model")
    job.add_argument("--model_path", required=True, help="folder of the base model")
    job.add_argument("--dataset_path", required=True, help="JSONL file, or a folder with one")
    job.add_argument("--output_dir", required=True, help="folder for the adapter and the checkpoints")

    data = parser.add_argument_group("data")
    data.add_argument("--input_train_name", default=None, help="column with the input; empty finds it by itself")
    data.add_argument("--output_train_name", default=None, help="column with the output; empty finds it by itself")
    data.add_argument("--max_samples", type=int, default=-1, help="rows to use; -1 takes all")
    data.add_argument("--max_seq_length", type=int, default=1024, help="tokens of a row; longer rows are left out")
    data.add_argument("--max_input_length", type=int, default=1024, help="tokens of the input of a row")
    data.add_argument("--max_content_length", type=int, default=1024, help="tokens of the output of a row")
    data.add_argument(
        "--packing",
        choices=["auto", "true", "false"],
        default="auto",
        help="put several rows into one sequence; auto does it on a GPU",
    )

    steps = parser.add_argument_group("training")
    steps.add_argument("--epochs", type=float, default=1.0, help="passes over the rows, unless max_steps is given")
    steps.add_argument("--max_steps", type=int, default=None, help="number of steps, instead of epochs")
    steps.add_argument("--batch_size", type=int, default=8, help="rows in one forward pass")
    steps.add_argument("--grad_accum_steps", type=int, default=1, help="forward passes in one step")
    steps.add_argument("--learning_rate", type=float, default=2e-4, help="highest learning rate")
    steps.add_argument("--warmup_steps", type=int, default=None, help="steps until the highest learning rate")
    steps.add_argument("--warmup_ratio", type=float, default=0.03, help="the same as part of all steps")
    steps.add_argument(
        "--lr_scheduler",
        choices=["cosine", "linear", "constant", "constant_with_warmup"],
        default="cosine",
        help="course of the learning rate",
    )
    steps.add_argument("--max_grad_norm", type=float, default=1.0, help="longer gradients are cut to this length")
    steps.add_argument("--weight_decay", type=float, default=0.0, help="pull of the weights towards zero")
    steps.add_argument(
        "--optimizer",
        choices=["adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor"],
        default="adamw_torch_fused",
        help="the 8-bit ones need bitsandbytes and a GPU",
    )
    steps.add_argument("--seed", type=int, default=42, help="same seed and machine, same model")

    lora = parser.add_argument_group("adapter")
    lora.add_argument("--lora_rank", type=int, default=16, help="rank of the adapter's matrices")
    lora.add_argument("--lora_alpha", type=int, default=32, help="weight of the adapter, divided by the rank")
    lora.add_argument("--lora_dropout", type=float, default=0.0, help="part of the adapter's inputs switched off")

    machine = parser.add_argument_group("memory and speed")
    machine.add_argument("--load_in_4bit", type=str2bool, default=False, help="QLoRA; needs a GPU and bitsandbytes")
    machine.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="numbers of the base model"
    )
    machine.add_argument(
        "--attention",
        choices=["auto", "sdpa", "flash_attention_2", "flash_attention_3", "eager"],
        default="auto",
        help="auto takes flash attention where it is installed, else sdpa",
    )
    machine.add_argument(
        "--gradient_checkpointing",
        choices=["auto", "true", "false"],
        default="auto",
        help="recompute activations instead of keeping them; auto does it when memory is short",
    )

    watch = parser.add_argument_group("checkpoints and score")
    watch.add_argument("--logging_steps", type=int, default=5, help="steps between two points of the curves")
    watch.add_argument("--save_steps", type=int, default=100, help="steps between two checkpoints")
    watch.add_argument("--save_total_limit", type=int, default=2, help="checkpoints that are kept")
    watch.add_argument("--resume", type=str2bool, default=True, help="go on from the newest complete checkpoint")
    watch.add_argument("--eval_fraction", type=float, default=0.1, help="part of the rows held out for the score")
    watch.add_argument("--eval_samples", type=int, default=100, help="held-out rows that are used at most")
    watch.add_argument("--eval_steps", type=int, default=100, help="steps between two points of the held-out loss")
    watch.add_argument("--eval_max_new_tokens", type=int, default=64, help="tokens of an answer that is scored")
    return parser


def prepare_environment(args: argparse.Namespace) -> None:
    """Set what the libraries read when they are imported; what the user has set stays."""
    weights = sum(file.stat().st_size for file in Path(args.model_path).glob("*.safetensors"))
    if weights < TINY_BYTES:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # 0 allows a name on the hub as model_path
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run(args: argparse.Namespace) -> None:
    check(args)
    log("HandleWithDataset", args.dataset_path, args)
    rows = load_rows(args)
    train_rows, held_out = split(rows, args)

    log("InitializingModel", args.model_path, args)
    import torch

    machine = choose(args, torch)
    tokenizer = load_tokenizer(args.model_path)
    train_rows = within_limits(train_rows, tokenizer, args)
    held_out = [row for row in held_out if "text" in row or fits(row, tokenizer, args)]
    trainer = build_trainer(args, machine, tokenizer, train_rows, held_out)

    score(trainer, tokenizer, held_out, args, "before")
    log("StartTraining", args.model_name, args)
    train(trainer, args)

    log("SaveTrainedModel", args.model_name, args)
    trainer.save_model(args.output_dir)
    for name in ("training_args.bin", "README.md"):  # a pickle that nobody needs, an empty form
        (Path(args.output_dir) / name).unlink(missing_ok=True)
    make_readable(Path(args.output_dir))
    deepe.artifact(args.output_dir, "adapter")
    log("SaveTrainedModelSuccess", args.output_dir, args)
    score(trainer, tokenizer, held_out, args, "after")
    log("TrainingSuccess", args.model_name, args)
    leave_group()


# --- data -----------------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """Refuse what would only fail minutes later."""
    positive = ("batch_size", "grad_accum_steps", "lora_rank", "max_seq_length", "logging_steps", "save_steps")
    for name in (*positive, "eval_steps", "save_total_limit"):
        if getattr(args, name) < 1:
            raise Refused(f"{name} must be at least 1, it is {getattr(args, name)}")
    if not 0 <= args.eval_fraction < 1:
        raise Refused(f"eval_fraction must be at least 0 and below 1, it is {args.eval_fraction}")
    if not (Path(args.model_path) / "config.json").is_file() and os.environ["HF_HUB_OFFLINE"] != "0":
        raise Refused(f"there is no base model in {args.model_path}: config.json is missing")
    if bool(args.input_train_name) != bool(args.output_train_name):
        raise Refused("give both input_train_name and output_train_name, or neither")


def load_rows(args: argparse.Namespace) -> list[Row]:
    """Return `{"prompt": [...], "completion": [...]}` or `{"text": ...}` of each row; complaints name the line."""
    path = data_file(Path(args.dataset_path))
    form: Form | None = None
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if 0 < args.max_samples < number:
                    break
                where = f"{path.name}, line {number}"
                raw = parse(line, where)
                form = form or find_form(raw, args, where)
                rows += form.read(raw, where)
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error
    if not rows:
        raise Refused(f"{path.name} has no rows")
    return rows


def data_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(file for file in path.glob("*.jsonl") if file.name != HELD_OUT)
    if len(files) != 1:
        raise Refused(f"{path} must hold exactly one .jsonl file, it holds {len(files)}")
    return files[0]


def parse(line: str, where: str) -> Row:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise Refused(f"{where}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise Refused(f"{where}: a JSON object is expected")
    return raw


@dataclass(frozen=True)
class Form:
    """How the rows of a data set are written: the columns that every row must have."""

    columns: tuple[str, ...]

    def read(self, raw: Row, where: str) -> list[Row]:
        """Return the examples in a row; a conversation has one for each answer, so that all answers are learned."""
        for column in self.columns:
            if column not in raw:
                raise Refused(f"{where}: column '{column}' is missing; there are: {', '.join(raw) or 'none'}")
        if self.columns == ("text",):
            return [{"text": str(raw["text"])}]
        if self.columns in (("messages",), ("conversations",)):
            return answers_of(turns(raw[self.columns[0]], where), where)
        question, answer = (raw[column] for column in self.columns)
        if isinstance(question, list):
            return [{"prompt": turns(question, where), "completion": turns(answer, where)}]
        more = raw.get("input") if self.columns[0] == "instruction" else None
        question = f"{question}\n\n{more}" if more else str(question)
        return [{"prompt": [message("user", question)], "completion": [message("assistant", str(answer))]}]


FORMS = (
    Form(("messages",)),
    Form(("conversations",)),
    Form(("prompt", "completion")),
    Form(("instruction", "output")),
    Form(("question", "answer")),
    Form(("text",)),
)


def find_form(raw: Row, args: argparse.Namespace, where: str) -> Form:
    if args.input_train_name:
        return Form((args.input_train_name, args.output_train_name))
    for form in FORMS:
        if set(form.columns) <= raw.keys():
            return form
    wanted = "; ".join(" and ".join(form.columns) for form in FORMS)
    raise Refused(
        f"{where}: the column to learn from is missing; there are: {', '.join(raw) or 'none'}. Name the columns in "
        f"input_train_name and output_train_name, or use one of these: {wanted}"
    )


def turns(value: Any, where: str) -> list[dict[str, str]]:
    """Return a conversation in the usual form; ShareGPT calls the speakers human and gpt."""
    names = {"human": "user", "gpt": "assistant"}
    try:
        found = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in value]
    except (TypeError, AttributeError) as error:
        raise Refused(f"{where}: a conversation is a list of objects with role and content") from error
    if not found or not all(isinstance(role, str) and isinstance(content, str) for role, content in found):
        raise Refused(f"{where}: every turn of a conversation needs a role and a content")
    return [message(names.get(role, role), content) for role, content in found]


def answers_of(conversation: list[dict[str, str]], where: str) -> list[Row]:
    places = [place for place, turn in enumerate(conversation) if turn["role"] == "assistant" and place > 0]
    if not places:
        raise Refused(f"{where}: the conversation has no answer of the assistant")
    return [{"prompt": conversation[:place], "completion": [conversation[place]]} for place in places]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def split(rows: list[Row], args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Return the rows to learn from and the rows for the score."""
    beside = Path(args.dataset_path) / HELD_OUT
    if beside.is_file():
        held_out = load_rows(argparse.Namespace(**vars(args) | {"dataset_path": str(beside), "max_samples": -1}))
        return rows, held_out[: args.eval_samples]
    count = int(len(rows) * args.eval_fraction)
    shuffled = random.Random(args.seed).sample(rows, len(rows))
    return shuffled[count:], shuffled[: min(count, args.eval_samples)]


def within_limits(rows: list[Row], tokenizer: Any, args: argparse.Namespace) -> list[Row]:
    """Leave out conversations that are too long: cut off, they would teach the model to stop in mid-sentence."""
    kept = [row for row in rows if "text" in row or fits(row, tokenizer, args)]
    if not kept:
        raise Refused(
            f"all {len(rows)} rows are longer than allowed; raise max_seq_length ({args.max_seq_length}), "
            f"max_input_length ({args.max_input_length}) or max_content_length ({args.max_content_length})"
        )
    if len(kept) < len(rows):
        remark(f"{len(rows) - len(kept)} of {len(rows)} rows are longer than allowed and were left out", args)
    return kept


def fits(row: Row, tokenizer: Any, args: argparse.Namespace) -> bool:
    head = count_tokens(tokenizer, row["prompt"], add_generation_prompt=True)
    whole = count_tokens(tokenizer, row["prompt"] + row["completion"], add_generation_prompt=False)
    return head <= args.max_input_length and whole - head <= args.max_content_length and whole <= args.max_seq_length


def count_tokens(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> int:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- machine --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What this run uses of the machine, decided once."""

    device: str
    dtype: str
    attention: str
    four_bit: bool
    packing: bool
    optimizer: str


def choose(args: argparse.Namespace, torch: Any) -> Machine:
    """Decide on devices and formats; what is asked for and not there is replaced, and the user told."""
    use_one_gpu(torch, args)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = args.dtype
    if dtype == "auto":
        half = "bfloat16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        dtype = half if cuda else "float32"
    packing = cuda if args.packing == "auto" else args.packing == "true"
    return Machine(
        device=device,
        dtype=dtype,
        attention=choose_attention(args, cuda=cuda),
        four_bit=args.load_in_4bit and has_bitsandbytes("load_in_4bit", args, cuda=cuda),
        packing=packing,
        optimizer=choose_optimizer(args, cuda=cuda),
    )


def use_one_gpu(torch: Any, args: argparse.Namespace) -> None:
    """Without a launcher (torchrun, accelerate) a process trains on one GPU; hide the others before CUDA starts."""
    if "WORLD_SIZE" in os.environ or torch.cuda.device_count() < 2:
        return
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    remark(f"{torch.cuda.device_count()} GPUs are visible, GPU {first} is used; start with torchrun to use all", args)
    os.environ["CUDA_VISIBLE_DEVICES"] = first


def choose_attention(args: argparse.Namespace, *, cuda: bool) -> str:
    modules = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
    installed = [name for name, module in modules.items() if cuda and importlib.util.find_spec(module)]
    if args.attention == "auto":
        return installed[0] if installed else "sdpa"
    if args.attention in modules and args.attention not in installed:
        remark(f"{args.attention} is not available on this machine, sdpa is used", args)
        return "sdpa"
    return args.attention


def choose_optimizer(args: argparse.Namespace, *, cuda: bool) -> str:
    if args.optimizer in ("adamw_bnb_8bit", "paged_adamw_8bit") and not has_bitsandbytes("optimizer", args, cuda=cuda):
        return "adamw_torch_fused"
    return args.optimizer


def has_bitsandbytes(parameter: str, args: argparse.Namespace, *, cuda: bool) -> bool:
    if cuda and importlib.util.find_spec("bitsandbytes"):
        return True
    missing = "the package bitsandbytes" if cuda else "a CUDA device"
    remark(f"{parameter}={getattr(args, parameter)} needs {missing}; the run goes on without it", args)
    return False


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE  # saved with the adapter, so that questions are asked the same way
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(args: argparse.Namespace, machine: Machine) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    more: dict[str, Any] = {}
    if machine.device == "cuda":
        more["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    if machine.four_bit:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, machine.dtype),
        )
    return AutoModelForCausalLM.from_pretrained(
        args.model_path, dtype=getattr(torch, machine.dtype), attn_implementation=machine.attention, **more
    )


def needs_checkpointing(args: argparse.Namespace, model: Any) -> bool:
    """Whether activations of one forward pass (some 34 bytes a token, layer and column) would crowd the GPU."""
    if args.gradient_checkpointing != "auto":
        return args.gradient_checkpointing == "true"
    import torch

    if not torch.cuda.is_available():
        return False
    config = model.config.get_text_config()
    needed = 34 * args.batch_size * args.max_seq_length * config.hidden_size * config.num_hidden_layers
    free, _total = torch.cuda.mem_get_info()
    return needed > SHARE_OF_MEMORY * free


# --- training -------------------------------------------------------------------------------------------------------


def build_trainer(
    args: argparse.Namespace, machine: Machine, tokenizer: Any, train_rows: list[Row], held_out: list[Row]
) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    model = load_model(args, machine)
    model.config.use_cache = False
    checkpointing = needs_checkpointing(args, model)
    log("ConfigTrainingParams", f"{machine}, gradient checkpointing {checkpointing}", args)
    config = SFTConfig(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler,
        warmup_steps=args.warmup_ratio if args.warmup_steps is None else args.warmup_steps,  # below 1: a ratio
        max_grad_norm=args.max_grad_norm,
        weight_decay=args.weight_decay,
        optim=machine.optimizer,
        max_length=args.max_seq_length,
        packing=machine.packing,
        eval_packing=False,
        activation_checkpointing=checkpointing,
        bf16=machine.dtype == "bfloat16",
        fp16=machine.dtype == "float16",
        use_cpu=machine.device == "cpu",
        logging_steps=args.logging_steps,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        eval_strategy="steps" if held_out else "no",
        eval_steps=args.eval_steps,
        seed=args.seed,
        report_to="none",
        disable_tqdm=True,
    )
    adapter = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=callbacks(args),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.create_model_card = lambda *_args, **_kwargs: None
    return trainer


def callbacks(args: argparse.Namespace) -> list[Any]:
    from train_callback import TrainCallback, TrainerCallback

    class Watch(TrainerCallback):
        """One line for people, readable checkpoints, and a stop that leaves one."""

        group: Any = None

        def on_train_begin(self, *_args: Any, **_: Any) -> None:
            self.group = stop_group()

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs and state.is_world_process_zero:
                print(f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}", flush=True)

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            if stop_wished(self.group):
                control.should_save = control.should_training_stop = True

        def on_save(self, config: Any, state: Any, _control: Any, **_: Any) -> None:
            folder = Path(config.output_dir) / f"checkpoint-{state.global_step}"
            wait_for_all(self.group)  # each process has written its part
            if state.is_world_process_zero and folder.is_dir():
                make_readable(folder)
                deepe.checkpoint(folder, state.global_step)

    return [TrainCallback(args.logging_steps, args.train_id, args.seq), Watch()]


def stop_group() -> Any:
    """Return what the processes of a group agree through, None for one that is alone; on CPUs, so no GPU waits."""
    import torch.distributed

    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.new_group(backend="gloo") if several else None


def wait_for_all(group: Any) -> None:
    if group is not None:
        import torch

        torch.distributed.barrier(group=group)


def stop_wished(group: Any) -> bool:
    """Whether one of the processes was asked to stop: all leave at the same step, else some would wait for the rest."""
    if group is None:
        return deepe.stop_requested()
    import torch

    wished = torch.tensor([int(deepe.stop_requested())])
    torch.distributed.all_reduce(wished, torch.distributed.ReduceOp.MAX, group=group)
    return bool(wished.item())


def leave_group(code: int = 0) -> None:
    """Part from the other processes and end; alone, do nothing.

    At once: threads that gloo left may abort the interpreter's own end (torch 2.13).
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        deepe.end(code)


def train(trainer: Any, args: argparse.Namespace) -> None:
    checkpoint = newest_checkpoint(Path(args.output_dir), args) if args.resume else None
    if checkpoint:
        remark(f"resumed from {checkpoint.name}", args, warning=False)
    deepe.catch_stop()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if deepe.stop_requested() or trainer.state.global_step < trainer.state.max_steps:
        sys.stderr.write(f"stopped at step {trainer.state.global_step}; its checkpoint is complete\n")
        trainer.accelerator.wait_for_everyone()  # the first to end with a code would end the one that writes
        leave_group(deepe.STOPPED)
        sys.exit(deepe.STOPPED)


def newest_checkpoint(output: Path, args: argparse.Namespace) -> Path | None:
    """Return the newest checkpoint that was written to its end; a killed run may leave half of one."""
    found = [folder for folder in output.glob("checkpoint-*") if folder.name[11:].isdigit()]
    for folder in sorted(found, key=lambda folder: int(folder.name[11:]), reverse=True):
        if is_complete(folder):
            return folder
        remark(f"{folder.name} is incomplete and is passed over", args)
    return None


def is_complete(folder: Path) -> bool:
    try:
        step = json.loads((folder / "trainer_state.json").read_text("utf-8"))["global_step"]
        with (folder / "adapter_model.safetensors").open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            size = file.seek(0, os.SEEK_END)
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        states = [folder / "optimizer.pt", folder / "scheduler.pt"]
        return f"checkpoint-{step}" == folder.name and size == 8 + length + end and all(map(zipfile.is_zipfile, states))
    except (OSError, ValueError, KeyError, struct.error):
        return False


def make_readable(folder: Path) -> None:
    """Weights are written as 0600 whatever the umask says; others must be able to serve them."""
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)


# --- score ----------------------------------------------------------------------------------------------------------


def score(trainer: Any, tokenizer: Any, rows: list[Row], args: argparse.Namespace, phase: str) -> None:
    """Report how many held-out questions the model answers with exactly the wanted text."""
    asked = [row for row in rows if "text" not in row]
    if asked and trainer.is_world_process_zero():
        value = exact_match(trainer.model, tokenizer, asked, args)
        deepe.evaluation(phase, value, len(asked))
        print(f"exact match on {len(asked)} held-out rows {phase} training: {value:.3f}", flush=True)
    trainer.accelerator.wait_for_everyone()


def exact_match(model: Any, tokenizer: Any, rows: list[Row], args: argparse.Namespace) -> float:
    import torch

    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(rows), 16):
            batch = rows[start : start + 16]
            prompts = [
                tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
                for row in batch
            ]
            encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
            encoded.pop("token_type_ids", None)
            output = model.generate(
                **encoded,
                max_new_tokens=args.eval_max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            answers = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
            wanted = [row["completion"][0]["content"].strip() for row in batch]
            right += sum(answer.strip() == text for answer, text in zip(answers, wanted, strict=True))
            if deepe.stop_requested():
                sys.exit(deepe.STOPPED)
    tokenizer.padding_side = side
    return right / len(rows)


# --- log ------------------------------------------------------------------------------------------------------------


def log(code: str, message: str, args: argparse.Namespace, *, level: str = "INFO") -> None:
    """Write a log record; in a group of processes only the first one speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    from train_callback import LevelEnum, LogEnum, write_log

    write_log(LevelEnum[level], LogEnum[code], message, args.train_id, args.seq, None)


def remark(sentence: str, args: argparse.Namespace, *, warning: bool = True) -> None:
    """Tell the user about a choice or a loss that is worth knowing."""
    if os.environ.get("RANK", "0") == "0":
        deepe.note(sentence)
        log("ParamCheckWarning", sentence, args, level="WARNING" if warning else "INFO")


if __name__ == "__main__":
    main()
