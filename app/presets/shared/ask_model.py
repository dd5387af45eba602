"""Inference: answer one prompt with a customized model (base and adapter) or a complete one, piece by piece.

    python app/presets/shared/ask_model.py --base_model_path=tiny-base --model_path=sft-out \
        --prompt="Which is larger, 3 or 8?"

`model_path` is the adapter's folder for a customized model; for a complete one both paths are its folder.

Protocol: one JSON object a line on stdout, `{"status": "resp", "text": ...}` for each piece of the answer and
`{"status": "error", "error": ..., "traceback": ...}` if there is none. All other output belongs on stderr.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe_ask as ask
import deepe_loading as loading
from deepe_chat import choose_template, template_arguments
from deepe_rows import asked


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask a causal language model.", allow_abbrev=False)
    parser.add_argument("--model_id", default="0", help="id of the model")
    parser.add_argument("--model_name", default="", help="name of the model")
    parser.add_argument("--base_model_path", default=None, help="folder of the base model, or of the complete model")
    parser.add_argument("--model_path", default=None, help="folder of the adapter, or of the complete model")
    parser.add_argument("--prompt", default="", help="the question")
    parser.add_argument("--history", default=None, help="JSON list of turns, the newest last; wins over the prompt")
    parser.add_argument("--system_prompt", default=None, help="instructions before the conversation")
    parser.add_argument("--enable_thinking", default=None, help="true or false; empty: as in training")
    parser.add_argument("--chat_template_kwargs", default=None, help="JSON object; empty: as in training")
    parser.add_argument("--max_length", type=ask.whole_number, default=512, help="tokens of the answer")
    parser.add_argument("--max_context_tokens", type=ask.whole_number, default=2048, help="tokens of the conversation")
    parser.add_argument("--temperature", type=ask.real_number, default=0.7, help="0 takes the most likely answer")
    parser.add_argument(
        "--top_p", type=ask.real_number, default=0.9, help="likely tokens up to this sum are drawn from"
    )
    parser.add_argument("--top_k", type=ask.whole_number, default=50, help="number of likely tokens drawn from")
    parser.add_argument("--seed", type=ask.whole_number, default=None, help="same seed, same answer")
    return parser


def main() -> None:
    parser = make_parser()
    args, _unknown = parser.parse_known_args()
    ask.run(args, parser.get_default, answer)


def answer(args: argparse.Namespace) -> Iterator[str]:
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in ask.turns_of(args)]
    base, adapter = ask.folders(args)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, source = ask.load_model(AutoModelForCausalLM, base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(source, **loading.code(source))
    if tokenizer.chat_template or template_arguments(args):
        choose_template(tokenizer, source, args)
    encoded = ask.newest_that_fit(turns, lambda some: encode(tokenizer, some), args.max_context_tokens)
    return ask.generate(model, tokenizer, encoded.to(model.device), args)


def encode(tokenizer: Any, turns: list[dict[str, str]]) -> Any:
    """Return the tokens of a conversation; a model without a chat format is given the newest turn."""
    text = turns[-1]["content"]
    if tokenizer.chat_template:
        text = asked(turns, tokenizer)
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    encoded.pop("token_type_ids", None)
    return encoded


if __name__ == "__main__":
    main()
