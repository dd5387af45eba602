"""Inference: ask a vision-language model about pictures; a customized one (base and adapter) or a complete one.

    python app/presets/vl-demo/ask_vision.py --base_model_path=tiny-vl --model_path=vl-out --temperature=0 \
        --prompt="What is in the picture?" --image=vl-data/vl-demo/images/red-ring-16-15-11-28.png

`model_path` is the adapter's folder for a customized model; for a complete one both paths are its folder. Turns of the
history bring their pictures: `[{"role": "user", "content": "...", "images": [{"data": "../multimodal/a.png"}]}]`.

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
import deepe_pictures as pictures
from deepe_rows import Refused


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask a vision-language model.", allow_abbrev=False)
    parser.add_argument("--model_id", default="0", help="id of the model")
    parser.add_argument("--model_name", default="", help="name of the model")
    parser.add_argument("--base_model_path", default=None, help="folder of the base model, or of the complete model")
    parser.add_argument("--model_path", default=None, help="folder of the adapter, or of the complete model")
    parser.add_argument("--prompt", default="", help="the question")
    parser.add_argument("--image", action="append", default=[], help="a picture for the question; may be repeated")
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
    base, adapter = ask.folders(args)
    most = pictures.read_size(adapter or base)
    turns = [with_pictures(turn, most) for turn in turns_of(args)]

    from transformers import AutoModelForImageTextToText

    model, source = ask.load_model(AutoModelForImageTextToText, base, adapter)
    processor = pictures.load_processor(source, args)

    def encode(some: list[dict[str, Any]]) -> Any:
        return pictures.encode(processor, [some], [[picture for turn in some for picture in turn["pictures"]]])

    encoded = ask.newest_that_fit(turns, encode, args.max_context_tokens)
    return ask.generate(model, processor.tokenizer, encoded.to(model.device), args, processor)


def turns_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    turns = ask.turns_of(args)
    if not args.history:
        turns[-1]["images"] = [{"data": path} for path in args.image]
    return turns


def with_pictures(turn: dict[str, Any], most: int) -> dict[str, Any]:
    """Return the turn in parts, its pictures before its words, and the pictures themselves."""
    try:
        paths = [Path(image["data"]) for image in turn.get("images") or ()]
    except (TypeError, KeyError) as error:
        raise Refused('the images of a turn must be a list such as [{"data": "picture.png"}]') from error
    content = [*({"type": "image"} for _ in paths), {"type": "text", "text": turn["content"]}]
    return {
        "role": turn["role"],
        "content": content,
        "pictures": [pictures.open_picture(path, most) for path in paths],
    }


if __name__ == "__main__":
    main()
