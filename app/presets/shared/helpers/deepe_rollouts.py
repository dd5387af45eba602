"""What a model may do while it answers in GRPO, and what is kept of its answers.

A file of the user holds functions that the model may call, or one class that is an environment:

    def multiply(a: int, b: int) -> int:
        '''Multiply two numbers.

        Args:
            a: The first number.
            b: The second number.
        '''
        return a * b

    class Guessing:
        def reset(self, **row):  # begins an answer; a text is put behind the question
            self.right = int(row["answer"])

        def guess(self, number: int) -> str:
            '''Guess the number.

            Args:
                number: The guess.
            '''
            self.found = number == self.right
            return "right" if self.found else "higher" if number < self.right else "lower"

        def get_reward(self) -> float:  # may be left out
            return float(self.found)

Names, type hints and docstrings are what the model is told of them. Methods of an environment are its functions, but
for `reset`, `get_reward` and those that begin with an underscore. Each answer has an environment of its own, and the
model goes on answering until it calls nothing more, or `max_tool_calling_iterations` times.
torch and its relatives are imported inside functions.
"""

import argparse
import functools
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepe
from deepe_distributed import processes
from deepe_log import remark
from deepe_options import options_of
from deepe_recipes import written_value
from deepe_rewards import Judge, answer_of, module_of, rows_for_trl
from deepe_rows import Question, Refused
from deepe_scores import SCORED_AT_ONCE, report_samples, report_score

TOOL_OPTION = "max_tool_calling_iterations"
OF_ENVIRONMENT = ("reset", "get_reward")
COMPLETIONS = "completions.jsonl"
KEPT_BYTES = 16 * 2**20
KEPT_CHARACTERS = 10_000  # of a turn, as of other samples


# --- functions and environments -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollouts:
    """What the model may call: functions, and those of an environment. Nothing at all: it answers in one turn."""

    tools: tuple[Callable[..., Any], ...] = ()
    environment: Any = None
    schemas: tuple[Mapping[str, Any], ...] = ()
    """What the model is told of them."""

    @property
    def are_plain(self) -> bool:
        return not self.schemas

    @property
    def rewards(self) -> bool:
        """Whether the environment says how good an answer is."""
        return callable(getattr(self.environment, "get_reward", None))

    def check(self, row: Question) -> None:
        """Raise `Refused` for a row that names other functions than there are."""
        named = {tool["function"]["name"] for tool in row.tools or ()}
        there = {schema["function"]["name"] for schema in self.schemas}
        if row.tools and named != there:
            given, known = (", ".join(sorted(names)) for names in (named, there))
            raise Refused(
                f"{row.place}: its tools are {given}, and tools_file has {known}: every row is given all of them; "
                "make both the same, or leave the column out"
            )

    def arguments(self) -> dict[str, Any]:
        """Return what TRL's trainer is given."""
        found: dict[str, Any] = {"tools": list(self.tools)} if self.tools else {}
        return found | ({"environment_factory": self.environment} if self.environment is not None else {})


PLAIN = Rollouts()


def rollouts_of(args: argparse.Namespace) -> Rollouts:
    """Return what `tools_file` holds, checked. Raises `Refused`."""
    if not args.tools_file:
        if TOOL_OPTION in options_of(args).given:
            raise Refused(f"{TOOL_OPTION} has no effect without tools_file; leave it out")
        return PLAIN
    path = Path(args.tools_file)
    module = module_of(path, "tools_file")
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    tools = [value for value in own.values() if inspect.isfunction(value)]
    environments = [value for value in own.values() if inspect.isclass(value) and hasattr(value, "reset")]
    if len(environments) > 1:
        names = ", ".join(one.__name__ for one in environments)
        raise Refused(f"tools_file {path} has several environments ({names}); keep one of them in a file")
    methods = []
    environment = None
    if environments:
        environment = _environment(environments[0], args)
        methods = _methods(_made(environment, path))
    if not tools and not methods:
        raise Refused(
            f"tools_file {path} has no function that the model may call: functions, or the methods of a class with "
            "reset, whose names do not begin with an underscore"
        )
    schemas = tuple(_schema(function, path) for function in (*tools, *methods))
    names = [schema["function"]["name"] for schema in schemas]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Refused(f"tools_file {path} has {sorted(twice)[0]} twice: as a function and in the environment")
    return Rollouts(tuple(_telling(tool, args) for tool in tools), environment, schemas)


def prepare_template(tokenizer: Any, rollouts: Rollouts, args: argparse.Namespace) -> None:
    """Let answers be read for calls. Raises `Refused` for a chat template that cannot call functions.

    Of the forms that TRL knows, the one that reads what the template itself writes is that of its calls.
    """
    if rollouts.are_plain:
        return
    from trl import chat_template_utils as forms

    if not forms.supports_tool_calling(tokenizer):
        raise Refused(
            "tools_file: the chat template of the base cannot write calls of functions and their results; take a base "
            "whose template can, or give one by chat_template"
        )
    if getattr(tokenizer, "response_template", None) is None:
        known = [value for name, value in vars(forms).items() if name.endswith("_template") and isinstance(value, dict)]
        found = next((form for form in known if _reads_calls(tokenizer, form, forms.parse_response)), None)
        if found is None:
            raise Refused(
                "tools_file: calls as the chat template of the base writes them cannot be read again; give a template "
                "by chat_template that writes them as Qwen, Llama 3, GLM or gpt-oss do"
            )
        tokenizer.response_template = found
    if not forms.is_chat_template_prefix_preserving(tokenizer):
        try:
            forms.get_training_chat_template(tokenizer)
        except ValueError as error:
            raise Refused(
                "tools_file: the chat template writes a call otherwise once its result follows, so that what was "
                "answered would not be what is learned; give one by chat_template that writes turns as they were, and "
                "leave enable_thinking and chat_template_kwargs out"
            ) from error


def transcript(completion: Sequence[Mapping[str, Any]]) -> str:
    """Return an answer of several turns for people."""
    lines = []
    for turn in completion:
        name = f"{turn.get('name', 'tool')}: " if turn["role"] == "tool" else ""
        lines += [f"{name}{turn['content']}"] if turn.get("content") else []
        for call in turn.get("tool_calls") or ():
            lines.append(f"{call['function']['name']}({json.dumps(call['function']['arguments'])})")
    return "\n".join(lines)


def _made(environment: Any, path: Path) -> Any:
    try:
        return environment()
    except Exception as error:
        raise Refused(
            f"tools_file {path}: {environment.__name__}() raises {type(error).__name__}: {error}; an environment is "
            "made without arguments"
        ) from error


def _environment(given: Any, args: argparse.Namespace) -> Any:
    """Return the user's class in TRL's form: `reset` gets the columns of the row, and a failing call is told."""

    def reset(self: Any, prompt: Any, answer: Any, more: str, **_: Any) -> Any:
        return given.reset(self, **{**json.loads(more), "prompt": prompt, "answer": answer})

    methods = {name: _telling(getattr(given, name), args) for name in _method_names(given)}
    return type(given.__name__, (given,), {"reset": reset, "__doc__": given.__doc__, **methods})


def _methods(environment: Any) -> list[Callable[..., Any]]:
    return [getattr(environment, name) for name in _method_names(type(environment))]


def _method_names(environment: Any) -> list[str]:
    functions = inspect.getmembers(environment, inspect.isfunction)
    return [name for name, _ in functions if name not in OF_ENVIRONMENT and not name.startswith("_")]


def _telling(function: Callable[..., Any], args: argparse.Namespace) -> Callable[..., Any]:
    """Return the function, whose first failure is told to the user; the model is told of all."""
    told: list[str] = []

    def tell(error: Exception) -> None:
        if not told:
            told.append(function.__name__)
            remark(
                f"a call of {function.__name__} failed: {type(error).__name__}: {error}. The model is told so; "
                "the curve tools/failure_frequency counts such calls",
                args,
            )

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def waited(*given: Any, **named: Any) -> Any:
            try:
                return await function(*given, **named)
            except Exception as error:
                tell(error)
                raise

        return waited

    @functools.wraps(function)
    def called(*given: Any, **named: Any) -> Any:
        try:
            return function(*given, **named)
        except Exception as error:
            tell(error)
            raise

    return called


def _schema(function: Callable[..., Any], path: Path) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    try:
        return dict(get_json_schema(function))
    except Exception as error:
        raise Refused(
            f"tools_file {path}: {function.__name__} needs type hints, and a docstring that says what it does and, "
            f"under Args:, what each argument is ({' '.join(str(error).split())})"
        ) from error


def _reads_calls(tokenizer: Any, form: Mapping[str, Any], parse: Callable[..., Any]) -> bool:
    """Say whether a form of TRL reads a call that the chat template has written."""
    function = {"name": "look_up", "arguments": {"word": "blue sky", "count": 3}}
    properties = {"word": {"type": "string"}, "count": {"type": "integer"}}
    schema = {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look a word up.",
            "parameters": {"type": "object", "properties": properties, "required": ["word"]},
        },
    }
    question = {"role": "user", "content": "hi"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    written: Callable[..., list[int]] = functools.partial(
        tokenizer.apply_chat_template, tools=[schema], tokenize=True, return_dict=False
    )
    asked, whole = written([question], add_generation_prompt=True), written([question, call])
    if whole[: len(asked)] != asked:
        return False
    end = next((at for at, one in enumerate(whole) if at >= len(asked) and one == tokenizer.eos_token_id), len(whole))
    tokenizer.response_template = form
    try:
        read = parse(tokenizer, whole[len(asked) : end + 1], prefix=asked, tools=[schema])
    except Exception:
        return False
    finally:
        del tokenizer.response_template
    return [one["function"] for one in read.get("tool_calls") or ()] == [function]


# --- score ----------------------------------------------------------------------------------------------------------


def score_rollouts(trainer: Any, tasks: Sequence[Question], judge: Judge, args: argparse.Namespace, phase: str) -> None:
    """Report reward and right results of held-out questions that the model answers with its functions, most likely."""
    if processes() > 1:
        if phase == "before":
            remark("answers with tools are not scored in a group of processes; the curve reward says how it goes", args)
        return
    import torch

    rows = _rows(tasks)
    at_once = min(SCORED_AT_ONCE, trainer.args.generation_batch_size)
    completions: list[Any] = []
    rewards: list[float] = []
    training = trainer.model.training
    trainer.model.eval()
    with torch.random.fork_rng(), torch.no_grad(), _greedily(trainer):
        for start in range(0, len(rows), at_once):
            block = rows[start : start + at_once]
            trainer._generate_and_score_completions(block)
            completions += list(trainer._logs["completion"])[-len(block) :]
            each = [list(values)[-len(block) :] for values in trainer._logs["rewards"].values()]
            rewards += [_weighed(values, trainer.reward_weights.tolist()) for values in zip(*each, strict=True)]
            _forget(trainer)
    trainer.model.train(training)
    wanted = [task.reference or "" for task in tasks]
    report_samples([task.prompt for task in tasks], wanted, [transcript(one) for one in completions], phase)
    known = [(answer_of(one), right) for one, right in zip(completions, wanted, strict=True) if right]
    if known and judge.needs_answers:
        report_score("exact_match", phase, judge.right(*zip(*known, strict=True)), len(known))
    report_score("reward", phase, sum(rewards) / len(rewards), len(rewards))


def _rows(tasks: Sequence[Question]) -> list[dict[str, Any]]:
    columns = rows_for_trl({"example": [written_value(task) for task in tasks]})
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class _greedily:
    """Lets a trainer's answers be the most likely ones, one for each question."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __enter__(self) -> None:
        trainer = self._trainer
        self._generations = trainer.num_generations_eval
        trainer.num_generations_eval = 1
        if trainer.use_vllm:
            self._temperature = trainer.vllm_generation.temperature
            trainer.vllm_generation.temperature = 0.0
        else:
            trainer.generation_config.do_sample = trainer.generation_kwargs["do_sample"] = False

    def __exit__(self, *_: object) -> None:
        trainer = self._trainer
        trainer.num_generations_eval = self._generations
        if trainer.use_vllm:
            trainer.vllm_generation.temperature = self._temperature
        else:
            trainer.generation_config.do_sample = trainer.generation_kwargs["do_sample"] = True


def _forget(trainer: Any) -> None:
    """Leave nothing of a score in what the next step of the training logs."""
    logs = trainer._logs
    for values in (logs["prompt"], logs["completion"], logs["advantages"], logs["images"]):
        values.clear()
    for name in ("rewards", "extra"):
        logs[name].clear()
    trainer._metrics["eval"].clear()


def _weighed(values: Iterable[float], weights: Iterable[float]) -> float:
    return sum(weight * value for value, weight in zip(values, weights, strict=True) if not math.isnan(value))


# --- what is kept ---------------------------------------------------------------------------------------------------


def keep_completions(trainer: Any, args: argparse.Namespace) -> None:
    """Write the first answers of each logged step into a file beside the adapter, with rewards and advantages."""
    if not args.kept_completions:
        return
    from transformers import TrainerCallback

    kept = Completions(Path(args.output_dir) / COMPLETIONS, args.kept_completions)

    class Keep(TrainerCallback):
        def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                kept.go_on_from(state.global_step)

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            if state.is_world_process_zero and "reward" in (logs or {}):
                kept.add(state.global_step, trainer._logs)

    trainer.add_callback(Keep())


class Completions:
    """A file of answers, one JSON line for each. When it is full, every second step of it is left out."""

    def __init__(self, path: Path, count: int, *, most: int = KEPT_BYTES) -> None:
        self._path, self._count, self._most = path, count, most
        self._every = 1
        self._last = 0

    def go_on_from(self, step: int) -> None:
        """Leave out what a training that goes on does again."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._keep(lambda of: of <= step)
        self._last = step
        deepe.artifact(self._path, "completions")

    def add(self, step: int, logs: Mapping[str, Any]) -> None:
        """Keep the first answers that were logged last."""
        if step <= self._last or step % self._every:
            return
        self._last = step
        columns = [list(logs[name])[: self._count] for name in ("prompt", "completion", "advantages")]
        rewards = {name: list(values)[: self._count] for name, values in logs["rewards"].items()}
        with self._path.open("a", encoding="utf-8") as file:
            for place, (prompt, completion, advantage) in enumerate(zip(*columns, strict=True)):
                line = {
                    "step": step,
                    "prompt": _short(prompt),
                    "completion": _short(completion),
                    "rewards": {name: _finite(values[place]) for name, values in rewards.items()},
                    "advantage": _finite(advantage),
                }
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        while self._path.stat().st_size > self._most and self._every < step:
            self._every *= 2
            self._keep(lambda of: of % self._every == 0)

    def _keep(self, wanted: Callable[[int], bool]) -> None:
        if not self._path.is_file():
            return
        draft = self._path.with_name(f".{self._path.name}.part")
        with self._path.open(encoding="utf-8") as old, draft.open("w", encoding="utf-8") as new:
            new.writelines(line for line in old if line.endswith("\n") and wanted(json.loads(line)["step"]))
        os.replace(draft, self._path)


def _short(turns: Any) -> Any:
    """Return turns whose texts are cut where they are very long, which is said."""
    if isinstance(turns, str):
        turns = [{"role": "assistant", "content": turns}]
    return [
        {**turn, "content": text[:KEPT_CHARACTERS], "cut_from": len(text)}
        if isinstance(text := turn.get("content"), str) and len(text) > KEPT_CHARACTERS
        else turn
        for turn in turns
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
