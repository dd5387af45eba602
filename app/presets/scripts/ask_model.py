"""Inference: answer one prompt with a customized model (base and adapter) or a complete one, piece by piece.

    python app/presets/scripts/ask_model.py --base_model_path=tiny-base --model_path=sft-out \
        --prompt="Which is larger, 3 or 8?"

`model_path` is the adapter's folder for a customized model; for a complete one both paths are its folder.

Protocol: one JSON object a line on stdout, `{"status": "resp", "text": ...}` for each piece of the answer and
`{"status": "error", "error": ..., "traceback": ...}` if there is none. All other output belongs on stderr.
"""

import argparse
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

DEEPE_WARM = "warm_trl"  # may be started where that helper has done the imports
TINY_BYTES = 64 * 2**20  # threads of a smaller model wait for each other longer than they work


class Refused(Exception):
    """What the caller can put right: one sentence, no traceback."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask a causal language model.", allow_abbrev=False)
    parser.add_argument("--model_id", default="0", help="id of the model")
    parser.add_argument("--model_name", default="", help="name of the model")
    parser.add_argument("--base_model_path", default=None, help="folder of the base model, or of the complete model")
    parser.add_argument("--model_path", default=None, help="folder of the adapter, or of the complete model")
    parser.add_argument("--prompt", default="", help="the question")
    parser.add_argument("--history", default=None, help="JSON list of turns, the newest last; wins over the prompt")
    parser.add_argument("--system_prompt", default=None, help="instructions before the conversation")
    parser.add_argument("--max_length", type=whole_number, default=512, help="tokens of the answer")
    parser.add_argument("--max_context_tokens", type=whole_number, default=2048, help="tokens of the conversation")
    parser.add_argument("--temperature", type=real_number, default=0.7, help="0 takes the most likely answer")
    parser.add_argument("--top_p", type=real_number, default=0.9, help="likely tokens up to this sum are drawn from")
    parser.add_argument("--top_k", type=whole_number, default=50, help="number of likely tokens that are drawn from")
    parser.add_argument("--seed", type=whole_number, default=None, help="same seed, same answer")
    return parser


def whole_number(text: str) -> int | None:
    """A field that was sent as null arrives as the text None and means the default."""
    return None if text in ("", "None") else int(text)


def real_number(text: str) -> float | None:
    return None if text in ("", "None") else float(text)


def main() -> None:
    parser = make_parser()
    args, _unknown = parser.parse_known_args()
    for name, value in vars(args).items():
        if value in (None, "None"):
            setattr(args, name, parser.get_default(name))
    try:
        prepare_environment(args)
        answer(args)
    except Refused as error:
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
        if "OMP_NUM_THREADS" not in os.environ and "torch" in sys.modules:  # a warm start: the variable is too late
            sys.modules["torch"].set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
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


def answer(args: argparse.Namespace) -> None:
    conversation = conversation_of(args)
    model, tokenizer = load(*folders(args))
    encoded = encode(tokenizer, conversation, args).to(model.device)
    for piece in generate(model, tokenizer, encoded, args):
        if piece:
            say(status="resp", text=piece)


def conversation_of(args: argparse.Namespace) -> list[dict[str, str]]:
    """The history holds the newest question already; it wins over prompt and system prompt."""
    if args.history:
        try:
            turns = json.loads(args.history)
            return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]
        except (ValueError, TypeError, KeyError) as error:
            raise Refused("history must be a JSON list of objects with role and content") from error
    if not args.prompt:
        raise Refused("prompt is empty")
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    return [*system, {"role": "user", "content": args.prompt}]


def load(base: Path, adapter: Path | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = "auto" if device != "cpu" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")
    source = base
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
        source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    return model.to(device).eval(), AutoTokenizer.from_pretrained(source)


def encode(tokenizer: Any, conversation: list[dict[str, str]], args: argparse.Namespace) -> Any:
    """Tokens of the conversation; the oldest turns are left out when it is longer than allowed."""
    turns = list(conversation)
    while True:
        text = (
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            if tokenizer.chat_template
            else turns[-1]["content"]
        )
        encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        encoded.pop("token_type_ids", None)
        first = 1 if turns[0]["role"] == "system" else 0
        if encoded["input_ids"].shape[1] <= args.max_context_tokens or len(turns) - first <= 1:
            return encoded
        del turns[first]


def generate(model: Any, tokenizer: Any, encoded: Any, args: argparse.Namespace) -> Any:
    """Yield the answer as it is made; a failure in the generating thread is raised here."""
    import torch
    from transformers import TextIteratorStreamer

    if args.seed is not None:
        torch.manual_seed(args.seed)
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


if __name__ == "__main__":
    main()
