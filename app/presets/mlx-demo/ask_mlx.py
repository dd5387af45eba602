"""Inference: answer one prompt with a model of MLX-Demo, customized (base and adapter) or complete, piece by piece.

    python app/presets/mlx-demo/ask_mlx.py --base_model_path=tiny-base --model_path=mlx-out \
        --prompt="Which is larger, 3 or 8?"

`model_path` is the adapter's folder for a customized model; for a complete one both paths are its folder.

Protocol: one JSON object a line on stdout, `{"status": "resp", "text": ...}` for each piece of the answer and
`{"status": "error", "error": ..., "traceback": ...}` if there is none. All other output belongs on stderr.
"""

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe_loading as loading
import deepe_mlx as mlx_models
from deepe_chat import choose_template, template_arguments
from deepe_rows import Refused, RowProblem, asked


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask a language model with MLX.", allow_abbrev=False)
    parser.add_argument("--model_id", default="0", help="id of the model")
    parser.add_argument("--model_name", default="", help="name of the model")
    parser.add_argument("--base_model_path", default=None, help="folder of the base model, or of the complete model")
    parser.add_argument("--model_path", default=None, help="folder of the adapter, or of the complete model")
    parser.add_argument("--prompt", default="", help="the question")
    parser.add_argument("--history", default=None, help="JSON list of turns, the newest last; wins over the prompt")
    parser.add_argument("--system_prompt", default=None, help="instructions before the conversation")
    parser.add_argument("--enable_thinking", default=None, help="true or false; empty: as in training")
    parser.add_argument("--chat_template_kwargs", default=None, help="JSON object; empty: as in training")
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
    mlx_models.prepare_environment()
    try:
        answer(args)
    except (Refused, RowProblem) as error:
        say(status="error", error=str(error), traceback="")
        sys.exit(1)
    except Exception as error:
        say(status="error", error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        sys.exit(1)


def say(**message: str) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def answer(args: argparse.Namespace) -> None:
    conversation = conversation_of(args)
    model, tokenizer, config = load(*folders(args), args)
    tokens = encode(tokenizer, conversation, args)
    speaking = mlx_models.wrapped(tokenizer, config)
    for piece in mlx_models.generate(model, speaking, tokens, most=args.max_length, sampler=sampler(args)):
        say(status="resp", text=piece)


def conversation_of(args: argparse.Namespace) -> list[dict[str, str]]:
    """The history holds the newest question already; it wins over prompt and system prompt."""
    if args.history:
        try:
            turns = json.loads(args.history)
            said = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]
        except (ValueError, TypeError, KeyError) as error:
            raise Refused("history must be a JSON list of objects with role and content") from error
        if said:
            return said
    if not args.prompt:
        raise Refused("prompt is empty")
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    return [*system, {"role": "user", "content": args.prompt}]


def folders(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the folder of the full weights and, for a customized model, the adapter's."""
    model = Path(args.model_path or args.base_model_path or "")
    adapter = model if (model / "adapter_config.json").is_file() else None
    base = model
    if adapter is not None:
        base = Path(args.base_model_path or "")
        if not args.base_model_path or base == model:
            base = Path(settings_of(adapter)["model"])
    if not (base / "config.json").is_file():
        raise Refused(f"there is no model in {base}: config.json is missing")
    return base, adapter


def settings_of(adapter: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    return settings


def load(base: Path, adapter: Path | None, args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Return model, tokenizer and configuration; what was trained on 4 bits is asked on 4 bits."""
    from transformers import AutoTokenizer

    four_bit = adapter is not None and bool(settings_of(adapter).get("load_in_4bit"))
    model, config = mlx_models.load_base(base, four_bit=four_bit)
    source = base
    if adapter is not None:
        model = mlx_models.add_adapter(model, adapter)
        source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(source, **loading.code(source))
    if tokenizer.chat_template or template_arguments(args):
        choose_template(tokenizer, source, args)
    return model, tokenizer, config


def encode(tokenizer: Any, conversation: list[dict[str, str]], args: argparse.Namespace) -> list[int]:
    """Tokens of the conversation; the oldest turns are left out when it is longer than allowed."""
    turns = list(conversation)
    while True:
        templated = bool(tokenizer.chat_template)
        text = asked(turns, tokenizer) if templated else turns[-1]["content"]
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=not templated)
        first = 1 if turns[0]["role"] == "system" else 0
        if len(tokens) <= args.max_context_tokens or len(turns) - first <= 1:
            return tokens
        del turns[first]


def sampler(args: argparse.Namespace) -> Any:
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    if args.seed is not None:
        mx.random.seed(args.seed)
    return make_sampler(temp=max(args.temperature, 0.0), top_p=args.top_p, top_k=max(args.top_k, 0))


if __name__ == "__main__":
    main()
