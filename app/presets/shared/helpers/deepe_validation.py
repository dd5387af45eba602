"""Validation pictures: what a model draws for given prompts before, during and after its training.

They lie in `samples` beside the weights, `validation-<when>-<number of the prompt>.png`, with `when` before, after or
the number of a step, and the platform shows the first and the last with the job. Standard library only, but for
drawing.
"""

import argparse
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepe
from deepe_diffusion import draw, takes_negative
from deepe_rows import Refused

SAMPLES = "samples"
_OF_SIMPLETUNER = re.compile(r"step_(\d+)_p(\d+)_")  # step_20_p1_0_512x512.png


@dataclass(frozen=True)
class Validation:
    """What is drawn, how, and how often."""

    prompts: tuple[str, ...]
    every: int
    size: tuple[int, int]
    steps: int
    guidance: float
    seed: int
    negative: str = ""

    def draw(self, pipeline: Any, output: Path, when: str) -> None:
        """Draw a picture for each prompt, and report it."""
        how: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        if self.negative and takes_negative(pipeline):
            how["negative_prompt"] = self.negative
        elif self.negative and when == "before":
            deepe.note(f"validation_negative_prompt has no effect on a {type(pipeline).__name__}")
        for number, prompt in enumerate(self.prompts, start=1):
            (picture,) = draw(pipeline, [prompt], seed=self.seed, size=self.size, **how)
            target = self._target(output, when, number)
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
            self._report(target, when, number)

    def take(self, folder: Path, output: Path) -> None:
        """Move what SimpleTuner has drawn since the last time to the other pictures."""
        for picture in sorted(folder.glob("step_*.png")):
            found = _OF_SIMPLETUNER.match(picture.name)
            if found is None or not 1 <= int(found[2]) <= len(self.prompts):
                continue
            target = self._target(output, str(int(found[1])), int(found[2]))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(picture, target)
            self._report(target, str(int(found[1])), int(found[2]))

    def library(self) -> dict[str, str]:
        """Return the prompts by the names that SimpleTuner's pictures get."""
        return {f"p{number}": prompt for number, prompt in enumerate(self.prompts, start=1)}

    def _target(self, output: Path, when: str, number: int) -> Path:
        return output / SAMPLES / f"validation-{when}-{number}.png"

    def _report(self, picture: Path, when: str, number: int) -> None:
        deepe.artifact(picture, "picture")
        if when in ("before", "after"):
            deepe.sample(when, number, self.prompts[number - 1], "", f"{SAMPLES}/{picture.name}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is drawn while a model learns."""
    group = parser.add_argument_group("validation pictures")
    group.add_argument("--validation_prompts", default="", help="what is drawn; one prompt a line, or a JSON list")
    group.add_argument(
        "--validation_steps", type=int, default=None, help="steps between two rounds; empty takes save_steps"
    )
    group.add_argument(
        "--validation_resolution", default="", help="side in pixels, or width x height; empty takes resolution"
    )
    group.add_argument("--validation_inference_steps", type=int, default=28, help="steps of removing noise")
    group.add_argument("--validation_guidance", type=float, default=5.0, help="how closely to keep to the prompt")
    group.add_argument("--validation_seed", type=int, default=None, help="seed of each picture; empty takes seed")
    group.add_argument("--validation_negative_prompt", default="", help="what the pictures shall not show")


def validation_of(args: argparse.Namespace) -> Validation | None:
    """Return what is to be drawn, None without prompts. Raises `Refused`."""
    prompts = _prompts(args.validation_prompts)
    if not prompts:
        given = ("validation_steps", "validation_resolution", "validation_seed", "validation_negative_prompt")
        if idle := [name for name in given if getattr(args, name) not in (None, "")]:
            raise Refused(f"{idle[0]} has no effect without validation_prompts; leave it out, or name prompts")
        return None
    every = args.save_steps if args.validation_steps is None else args.validation_steps
    for name, value in (("validation_steps", every), ("validation_inference_steps", args.validation_inference_steps)):
        if value < 1:
            raise Refused(f"{name} must be at least 1, it is {value}")
    return Validation(
        prompts=prompts,
        every=every,
        size=_size(args.validation_resolution or str(args.resolution)),
        steps=args.validation_inference_steps,
        guidance=args.validation_guidance,
        seed=args.seed if args.validation_seed is None else args.validation_seed,
        negative=args.validation_negative_prompt.strip(),
    )


def _prompts(text: str) -> tuple[str, ...]:
    """Return the prompts of a text, one a line, or of a JSON list of texts."""
    lines: Any = text.splitlines()
    if text.lstrip().startswith("["):
        try:
            lines = json.loads(text)
        except ValueError as error:
            raise Refused(f"validation_prompts is not valid JSON: {error}") from error
        if not (isinstance(lines, list) and all(isinstance(line, str) for line in lines)):
            raise Refused('validation_prompts must be a list of texts, such as ["a red circle", "a blue star"]')
    return tuple(line.strip() for line in lines if line.strip())


def _size(text: str) -> tuple[int, int]:
    """Return width and height of `512` or `512x768`."""
    parts = text.lower().replace(" ", "").split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) >= 32 and not int(part) % 8 for part in parts):
        raise Refused(
            f"validation_resolution must be a multiple of 8, at least 32, or two of them as in 512x768, it is '{text}'"
        )
    return int(parts[0]), int(parts[-1])
