"""Inference for models that draw: pictures of what a prompt says, from a base model with LoRA or a complete model.

    python app/presets/sd-demo/ask_image.py --model_path tiny-diffusion --lora_path sd-out \
        --prompt "a neon sign of a red circle" --output red.png

`--output` is the file to write; for several pictures (`--batch_size 3`) they are `red_001.png`, `red_002.png` and so
on. `--lora_path` is the folder that the training wrote (or the file with the weights), empty for a complete model.
The longer side is what the model was made for, the other follows from `--aspect_ratio`, both multiples of 8 or 16.
Each file is named on stdout, `{"status": "resp", "text": "<path>  <size>, seed <n>"}`; a failure is `{"status":
"error", "error": ...}` with exit code 1. All other output belongs on stderr.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe_diffusion as diffusion
from deepe_rows import Refused


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask a model for pictures.", allow_abbrev=False)
    parser.add_argument("--model_path", default="", help="folder of the base model, or of the complete model")
    parser.add_argument("--lora_path", default="", help="folder or file of the LoRA weights; empty for none")
    parser.add_argument("--prompt", default="", help="what to draw")
    parser.add_argument("--negative_prompt", default="", help="what the picture shall not show")
    parser.add_argument("--output", default="picture.png", help="file to write")
    parser.add_argument("--batch_size", default="1", help="number of pictures")
    parser.add_argument("--aspect_ratio", default="1:1", help="width and height, such as 16:9")
    parser.add_argument("--steps", type=int, default=diffusion.STEPS, help="steps of removing noise")
    parser.add_argument("--guidance", type=float, default=diffusion.GUIDANCE, help="how closely to keep to the prompt")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="how much of what was learned is used")
    parser.add_argument("--seed", type=int, default=None, help="same seed, same picture; empty draws another each time")
    return parser


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1" if diffusion.is_tiny(Path(args.model_path)) else str(os.cpu_count() or 1)
    )
    try:
        for line in answer(args):
            say(status="resp", text=line)
    except Exception as error:
        say(status="error", error=f"cannot draw: {error}" if isinstance(error, Refused) else f"cannot draw: {error!r}")
        sys.exit(1)


def say(**message: str) -> None:
    print(json.dumps(message), flush=True)


def answer(args: argparse.Namespace) -> list[str]:
    """Draw, write the files, and return what is to be said of each."""
    if not args.prompt.strip():
        raise Refused("the prompt is empty; say what to draw")
    count = whole_number(args.batch_size)
    targets = files_of(Path(args.output), count)
    machine = diffusion.choose_machine(Path(args.model_path))
    lora = Path(args.lora_path) if args.lora_path.strip() not in ("", "None") else None
    pipeline = diffusion.load_pipeline(Path(args.model_path), machine, lora, args.lora_scale)
    size = size_of(diffusion.side_of(pipeline), args.aspect_ratio, diffusion.grain_of(pipeline))
    seed = random.randrange(2**31) if args.seed is None else args.seed
    how: dict[str, Any] = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    told = ""
    if args.negative_prompt.strip() not in ("", "None"):
        if diffusion.takes_negative(pipeline):
            how["negative_prompt"] = args.negative_prompt
        else:
            told = f"; negative_prompt has no effect on a {type(pipeline).__name__}"
    pictures = diffusion.draw(pipeline, [args.prompt] * count, seed=seed, size=size, **how)
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    for picture, target in zip(pictures, targets, strict=True):
        draft = target.with_name(f".{target.stem}.part.png")
        picture.save(draft)
        os.replace(draft, target)  # a reader sees the whole picture or none
    what = f"{size[0]} x {size[1]} pixels, seed"
    return [f"{target}  {what} {seed + place}{told}\n" for place, target in enumerate(targets)]


def whole_number(text: str) -> int:
    count = int(float(text)) if text.replace(".", "", 1).isdigit() else 0
    if not 1 <= count <= 64:
        raise Refused(f"batch_size must be a number from 1 to 64, it is '{text}'")
    return count


def files_of(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}_{number:03d}{output.suffix}") for number in range(1, count + 1)]


def size_of(side: int, ratio: str, grain: int) -> tuple[int, int]:
    """Return width and height, multiples of `grain`, the longer one as the model was made for."""
    width, _, height = ratio.partition(":")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise Refused(f"aspect_ratio must look like 16:9, it is '{ratio}'")
    longer = max(int(width), int(height))
    return tuple(max(grain, round(side * int(part) / longer / grain) * grain) for part in (width, height))


if __name__ == "__main__":
    main()
