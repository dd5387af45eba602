"""Custom01, inference: answer one prompt, with a customized model (what the training wrote) or a complete one.

    python app/presets/custom01/ask_custom01.py --model_path=custom01-complete --prompt="Where do I leave the bicycle?"

Protocol: one JSON object a line on stdout, `{"status": "resp", "text": ...}` for each piece of the answer and
`{"status": "error", "error": ...}` if there is none. All other output belongs on stderr.
"""

import argparse
import json
import re
import struct
import sys
import zlib
from array import array
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask a Custom01 model.", allow_abbrev=False)
    parser.add_argument("--base_model_path", default=None, help="folder of the base model, or of the complete model")
    parser.add_argument("--model_path", default=None, help="folder of the customized or complete model")
    parser.add_argument("--prompt", default="", help="the question")
    parser.add_argument("--history", default=None, help="JSON list of turns, the newest last; wins over the prompt")
    return parser


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    try:
        folder = Path(args.model_path or args.base_model_path or ".")
        text = Model(folder).answer(question_of(args))
    except (OSError, ValueError, KeyError, struct.error) as error:
        say(status="error", error=f"cannot answer: {error}")
        sys.exit(1)
    for piece in re.findall(r"\s*\S+", text):
        say(status="resp", text=piece)


def say(**message: str) -> None:
    print(json.dumps(message), flush=True)


def question_of(args: argparse.Namespace) -> str:
    """The newest turn of the user."""
    turns = json.loads(args.history) if args.history and args.history != "None" else []
    asked = [turn["content"] for turn in turns if turn.get("role") == "user"]
    return asked[-1] if asked else args.prompt


class Model:
    """What custom01.py trained, read back from its files."""

    def __init__(self, folder: Path) -> None:
        if (folder / "adapter_config.json").is_file():
            config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
            self.answers, weights = config["answers"], folder / "adapter_model.safetensors"
        else:
            config = json.loads((folder / "config.json").read_text("utf-8"))
            self.answers, weights = (
                json.loads((folder / "answers.json").read_text("utf-8")),
                folder / "model.safetensors",
            )
        self.features = config["features"]
        tensors = read_safetensors(weights)
        self.weight, self.bias = tensors["weight"], tensors["bias"]

    def answer(self, question: str) -> str:
        words = re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", question.lower())
        columns = [zlib.crc32(word.encode()) % self.features for word in words]
        logits = [
            bias + sum(self.weight[row * self.features + column] for column in columns)
            for row, bias in enumerate(self.bias)
        ]
        return self.answers[logits.index(max(logits))]


def read_safetensors(path: Path) -> dict[str, array]:
    """Length of the header, the header as JSON, then the numbers, 32 bit, little endian, one after the other."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        start, end = entry["data_offsets"]
        tensors[name] = array("f")
        tensors[name].frombytes(data[8 + length + start : 8 + length + end])
    return tensors


if __name__ == "__main__":
    main()
