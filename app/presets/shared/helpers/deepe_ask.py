"""What inference scripts share: the protocol on stdout, the folders of a model, an answer piece by piece.

Protocol: one JSON object a line on stdout, `{"status": "resp", "text": ...}` for each piece of the answer and
`{"status": "error", "error": ..., "traceback": ...}` if there is none. All other output belongs on stderr.
"""

import argparse
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepe
import deepe_loading as loading
from deepe_chat import stop_at_turn_ends
from deepe_rows import Refused, RowProblem
from deepe_tokens import grow_for

TINY_BYTES = 64 * 2**20  # threads of a smaller model wait for each other longer than they work


def whole_number(text: str) -> int | None:
    """A field that was sent as null arrives as the text None and means the default."""
    return None if text in ("", "None") else int(text)


def real_number(text: str) -> float | None:
    return None if text in ("", "None") else float(text)


def run(
    args: argparse.Namespace,
    default_of: Callable[[str], Any],
    answer: Callable[[argparse.Namespace], Iterator[str]],
) -> None:
    """Say what `answer` yields for the arguments; what goes wrong is said in the protocol, too.

    A field that was sent as null arrives as the text None: it gets its default.
    """
    for name, value in vars(args).items():
        if value in (None, "None"):
            setattr(args, name, default_of(name))
    try:
        prepare_environment(args)
        for piece in answer(args):
            if piece:
                say(status="resp", text=piece)
    except (Refused, RowProblem) as error:
        say(status="error", error=str(error), traceback="")
        sys.exit(1)
    except Exception as error:
        say(status="error", error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        sys.exit(1)


def say(**message: str) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def prepare_environment(args: argparse.Namespace) -> None:
    """Set what the libraries read when they are imported; what the user has set stays."""
    base, _adapter = folders(args)
    if sum(file.stat().st_size for file in base.glob("*.safetensors")) < TINY_BYTES:
        deepe.use_threads(1)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def folders(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the folder of the full weights and, for a customized model, the adapter's."""
    model = Path(args.model_path or args.base_model_path or "")
    if (model / "adapter_config.json").is_file():
        adapter: Path | None = model
        base = Path(args.base_model_path or "")
        if not args.base_model_path or base == model:
            base = Path(json.loads((model / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])
    else:
        base, adapter = model, None
    if not (base / "config.json").is_file():
        raise Refused(f"there is no model in {base}: config.json is missing")
    return base, adapter


def turns_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The history holds the newest question already; it wins over prompt and system prompt."""
    if args.history:
        try:
            turns = json.loads(args.history)
            return [{**turn, "role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]
        except (ValueError, TypeError, KeyError) as error:
            raise Refused("history must be a JSON list of objects with role and content") from error
    if not args.prompt:
        raise Refused("prompt is empty")
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    return [*system, {"role": "user", "content": args.prompt}]


def load_model(auto_class: Any, base: Path, adapter: Path | None) -> tuple[Any, Path]:
    """Return the model, ready to answer, and the folder that says how it is talked to."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = "auto" if device != "cpu" else torch.float32
    safe = loading.weights(base, *([adapter] if adapter is not None else []))
    model = auto_class.from_pretrained(base, dtype=dtype, **safe)
    source = base
    if adapter is not None:
        from peft import PeftModel

        grow_for(model, adapter)
        model = PeftModel.from_pretrained(model, adapter)
        source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    return model.to(device).eval(), source


def newest_that_fit(turns: list[Any], encode: Callable[[list[Any]], Any], most: int) -> Any:
    """Return what `encode` makes of the conversation; the oldest turns are left out while it has too many tokens."""
    turns = list(turns)
    first = 1 if turns[0]["role"] == "system" else 0
    while True:
        encoded = encode(turns)
        if encoded["input_ids"].shape[1] <= most or len(turns) - first <= 1:
            return encoded
        del turns[first]


def generate(model: Any, tokenizer: Any, encoded: Any, args: argparse.Namespace, writer: Any = None) -> Iterator[str]:
    """Yield the answer as it is made, up to the end of the turn; a failure in the generating thread is raised here.

    `writer` has the chat template, if it is not the tokenizer.
    """
    import torch
    from transformers import TextIteratorStreamer

    if args.seed is not None:
        torch.manual_seed(args.seed)
    stop_at_turn_ends(model, tokenizer, writer)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(
                **encoded, streamer=streamer, max_new_tokens=args.max_length, pad_token_id=pad, **sampling(args)
            )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    if args.temperature <= 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": max(args.top_k, 0)}
