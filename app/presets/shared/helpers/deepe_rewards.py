"""Rewards for answers: the right result, the wanted form, a fitting length, and functions of a user's own file.

A function of such a file gets the answers as texts and returns one number for each, or None where it has no opinion:

    def polite_reward(completions, **columns):
        return [1.0 if "please" in text.lower() else 0.0 for text in completions]

`columns` holds `prompts` (lists of turns), `completion_turns` (the answers as lists of turns, with calls of functions
and their results), `answer` (the results of the data set) and every other column of the data set by its name;
`environments` where answers are given in some (`deepe_rollouts`). The function's name must end with `_reward`.
Standard library only.
"""

import argparse
import importlib.util
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from deepe_recipes import EXAMPLE, Recipe, Row, read_value, written_value
from deepe_rows import Question, Refused, Rendered, Turn, message

Function = Callable[..., list[float | None]]
Columns = Mapping[str, list[Any]]

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(/\d+)?")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
FRACTION = re.compile(r"\\?[dt]?frac\{(\d+)\}\{(\d+)\}")


@dataclass(frozen=True)
class Judge:
    """The rewards of a run, each with its weight."""

    functions: tuple[Function, ...]
    weights: tuple[float, ...]
    pattern: re.Pattern[str]

    needs_answers: bool = False
    """Whether one of the rewards compares with the right result."""

    def with_model(self, model: Any, weight: float) -> "Judge":
        """Return the rewards with those of a reward model (`deepe_reward_model.RewardModel`)."""

        def model_reward(completions: list[str], prompts: list[list[Turn]], **_: Any) -> list[float | None]:
            pairs = zip(prompts, completions, strict=True)
            return list(model.rewards([[*turns, message("assistant", text)] for turns, text in pairs]))

        return replace(self, functions=(*self.functions, model_reward), weights=(*self.weights, weight))

    def told(self) -> str:
        """Return the rewards with their weights, for people."""
        pairs = zip(self.functions, self.weights, strict=True)
        return "rewards: " + ", ".join(f"{weight:g} x {function.__name__}" for function, weight in pairs)

    def totals(self, completions: list[str], prompts: list[list[Turn]], columns: Columns) -> list[float]:
        """Return the weighted sum of all rewards for each answer; `columns` has `answer` and those of the data set."""
        turns = [[message("assistant", text)] for text in completions]
        given = [
            function(completions, prompts=prompts, completion_turns=turns, **columns) for function in self.functions
        ]
        return [
            sum(weight * (value or 0.0) for weight, value in zip(self.weights, values, strict=True))
            for values in zip(*given, strict=True)
        ]

    def right(self, completions: Sequence[str], answers: Sequence[str]) -> float:
        """Return the share of answers that give the right result in the wanted form."""
        pairs = zip(completions, answers, strict=True)
        return sum(is_right(text, answer, self.pattern) for text, answer in pairs) / len(completions)

    def check(self, row: Question) -> None:
        """Raise `Refused` for a row that cannot be judged."""
        if row.reference is None and self.needs_answers:
            raise Refused(
                f"{row.place}: there is no answer to compare with; add one (answer), or set answer_weight to 0"
            )

    def recipe(self, system_prompt: str, tools: Sequence[Any] = ()) -> Recipe:
        """Return what is made of a row: its task, with the functions that the model may call."""
        tasks = partial(tasks_of, pattern=self.pattern, system_prompt=system_prompt, tools=list(tools) or None)
        return Recipe(EXAMPLE, kept_question, questions_of, tasks)


def tasks_of(
    row: Question, *, pattern: re.Pattern[str], system_prompt: str, tools: list[Any] | None = None
) -> tuple[Question, ...]:
    """Return a row's question, with the instruction before it, and the right result out of its answer."""
    told = row.reference or ""
    reference = result_of(told, pattern) or told.strip()
    return (replace(with_instruction(row, system_prompt), reference=reference, tools=tools),)


def questions_of(_row: Question, found: Sequence[Rendered]) -> list[Any]:
    """Return the question with its turns as the template takes them."""
    return [one.example for one in found]


def kept_question(row: Question, found: Sequence[Rendered]) -> Iterator[Row]:
    for one in questions_of(row, found):
        yield {"example": written_value(one)}


def with_instruction(row: Question, system_prompt: str) -> Question:
    """Return the question with the instruction before it, unless it brings its own."""
    if not system_prompt or row.prompt[0]["role"] == "system":
        return row
    return replace(row, prompt=[message("system", system_prompt), *row.prompt])


def judge_of(args: argparse.Namespace, *, by_environment: bool = False) -> Judge:
    """Return the rewards that the arguments ask for, but for those of a reward model, which has to be loaded.

    `by_environment`: an environment gives rewards as well, so that there may be no others.
    """
    try:
        pattern = re.compile(args.answer_pattern)
    except re.error as error:
        raise Refused(f"answer_pattern is not a regular expression: {error}") from error
    if pattern.groups != 1:
        raise Refused(f"answer_pattern must have one group, around the result; it has {pattern.groups}")
    if args.target_length < 1:
        raise Refused(f"target_length must be at least 1, it is {args.target_length}")

    def answer_reward(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return [float(is_right(text, right, pattern)) for text, right in zip(completions, answer, strict=True)]

    def format_reward(completions: list[str], **_: Any) -> list[float | None]:
        return [float(result_of(text, pattern) is not None) for text in completions]

    def length_reward(completions: list[str], **_: Any) -> list[float | None]:
        return [max(0.0, min(1.0, 2.0 - len(text) / args.target_length)) for text in completions]

    built_in = {
        answer_reward: args.answer_weight,
        format_reward: args.format_weight,
        length_reward: args.length_weight,
    }
    by_model = getattr(args, "reward_model_path", None) or getattr(args, "reward", "rule") == "model"
    chosen = {function: weight for function, weight in built_in.items() if weight}
    if getattr(args, "reward", "rule") == "model":  # of PPO-Demo: nothing else judges
        chosen = {}
    elif args.reward_file:
        chosen |= dict.fromkeys(functions_of(Path(args.reward_file)), args.reward_file_weight)
    if not chosen and not by_model and not by_environment:
        raise Refused(
            "there is no reward: give one of the weights a value other than 0, a reward_file or a reward_model_path"
        )
    return Judge(
        functions=tuple(chosen),
        weights=tuple(chosen.values()),
        pattern=pattern,
        needs_answers=answer_reward in chosen,
    )


def functions_of(path: Path) -> list[Function]:
    """Return the checked reward functions of a user's file."""
    module = module_of(path, "reward_file")
    found = [value for name, value in vars(module).items() if name.endswith("_reward") and callable(value)]
    if not found:
        raise Refused(f"reward_file {path} has no function whose name ends with _reward")
    return [_checked(function) for function in found]


def module_of(path: Path, parameter: str) -> ModuleType:
    """Return a user's file as a module; `parameter` names it. Raises `Refused`."""
    spec = importlib.util.spec_from_file_location(f"deepe_{parameter}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise Refused(f"{parameter} {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Refused(f"{parameter} {path} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def for_trl(function: Function) -> Function:
    """Return the function in TRL's form: an answer to a conversation comes as a list of turns."""

    def reward(completions: list[Any], more: list[str], **columns: Any) -> list[float | None]:
        texts = [answer_of(completion) for completion in completions]
        return function(texts, completion_turns=completions, **columns, **joined([json.loads(row) for row in more]))

    reward.__name__ = function.__name__
    return reward


def answer_of(completion: Any) -> str:
    """Return the text of an answer: of several turns, that of the last one, if the model has said it."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {"role": ""}
    return (last.get("content") or "") if last["role"] == "assistant" else ""


def columns_of(tasks: Sequence[Question]) -> dict[str, list[Any]]:
    """Return what functions are given of the rows: `answer`, and the columns that no form of rows knows."""
    return {"answer": [task.reference for task in tasks], **joined([task.more for task in tasks])}


def rows_for_trl(batch: Mapping[str, list[str]]) -> dict[str, list[Any]]:
    """Return rows of a data set for TRL; other columns go as JSON, because a table would add keys to their objects."""
    tasks = [read_value(text) for text in batch["example"]]
    return {
        "prompt": [task.prompt for task in tasks],
        "answer": [task.reference for task in tasks],
        "more": [json.dumps(task.more) for task in tasks],
    }


def joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def result_of(text: str, pattern: re.Pattern[str]) -> str | None:
    """Return the result that a text gives in the wanted form; the last one counts."""
    found = pattern.findall(text)
    return found[-1].strip() if found else None


def is_right(text: str, right: str, pattern: re.Pattern[str]) -> bool:
    given = result_of(text, pattern)
    return given is not None and _plain(given) == _plain(right)


def _plain(result: str) -> Fraction | str:
    """Return a number where it is one: 1,000 and 1000.0 are the same result, and so are 1/2, \\frac{1}{2} and 0.5."""
    bare = FRACTION.sub(r"\1/\2", result.strip().rstrip(".")).replace("$", "").replace(" ", "")
    if THOUSANDS.fullmatch(bare):
        bare = bare.replace(",", "")
    bare = bare.replace(",", ".", 1)  # of other languages
    try:
        return Fraction(bare) if NUMBER.fullmatch(bare) else result.strip().casefold()
    except (ValueError, ZeroDivisionError):
        return result.strip().casefold()


def _checked(function: Function) -> Function:
    name = function.__name__
    takes = inspect.signature(function).parameters
    is_open = any(one.kind is one.VAR_KEYWORD for one in takes.values())

    def checked(completions: list[str], **columns: Any) -> list[float | None]:
        if not is_open and "completion_turns" not in takes:  # functions of PPO-Demo may name all that they were given
            columns.pop("completion_turns", None)
        values = function(completions, **columns)
        if not isinstance(values, list) or len(values) != len(completions):
            raise Refused(f"{name} must return a list with one number for each of the {len(completions)} answers")
        for value in values:
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                raise Refused(f"{name} returned {value!r}: a reward is a finite number, or None")
        return values

    checked.__name__ = name
    return checked
