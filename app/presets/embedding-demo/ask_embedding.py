"""Inference for embedding models: the vector of a text, or which of several texts are nearest to the first.

    python app/presets/embedding-demo/ask_embedding.py --base_model_path=tiny-encoder --model_path=embedding-out \
        --prompt="How do I print on the copier near my room?"

A prompt of one line is answered with its vector, a JSON list. More lines are a question and texts: they come back
ordered by similarity, each with its cosine. Protocol: one JSON object a line on stdout, `{"status": "resp", "text":
...}` or `{"status": "error", "error": ...}`. All other output belongs on stderr.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
from text_vectors import Encoder


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask an embedding model.", allow_abbrev=False)
    parser.add_argument("--base_model_path", default=None, help="folder of the base model, or of the complete model")
    parser.add_argument("--model_path", default=None, help="folder of the customized or complete model")
    parser.add_argument("--prompt", default="", help="a text; or a question and texts, one a line")
    parser.add_argument("--history", default=None, help="JSON list of turns, the newest last; wins over the prompt")
    return parser


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        lines = [line.strip() for line in question_of(args).splitlines() if line.strip()]
        if not lines:
            raise ValueError("the question is empty")
        for text in answer(load(args), lines):
            say(status="resp", text=text)
    except Exception as error:
        say(status="error", error=f"cannot answer: {error}")
        sys.exit(1)


def say(**message: str) -> None:
    print(json.dumps(message), flush=True)


def question_of(args: argparse.Namespace) -> str:
    """The newest turn of the user."""
    turns = json.loads(args.history) if args.history and args.history != "None" else []
    asked = [turn["content"] for turn in turns if turn.get("role") == "user"]
    return asked[-1] if asked else args.prompt


def load(args: argparse.Namespace) -> Encoder:
    folder = Path(args.model_path or args.base_model_path or ".")
    if (folder / "adapter_config.json").is_file():
        return Encoder.load(Path(args.base_model_path), adapter=folder)
    return Encoder.load(folder)


def answer(encoder: Encoder, lines: list[str]) -> list[str]:
    """Return the pieces of the answer."""
    import torch

    with torch.inference_mode():
        query = encoder.encode_all(lines[:1], query=True)
        if len(lines) == 1:
            return [json.dumps([round(value, 6) for value in query[0].tolist()])]
        cosines = (encoder.encode_all(lines[1:]) @ query[0]).tolist()
    ranked = sorted(zip(cosines, lines[1:], strict=True), reverse=True)
    return [f"{cosine:.3f}  {text}\n" for cosine, text in ranked]


if __name__ == "__main__":
    main()
