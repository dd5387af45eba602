"""Read training rows of a JSONL file, whatever form people write them in. Standard library only.

`load_rows` gives `{"prompt": [turns], "completion": [one turn]}` or `{"text": ...}` for each example;
`load_preferences` gives `{"prompt", "chosen", "rejected"}` for each pair, `load_labelled` also single answers with a
`label`. What is wrong with a row is a `Refused` that names its line.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = "heldout.jsonl"
"""A file of this name beside the data holds the rows for the score."""

Row = dict[str, Any]
Turns = list[dict[str, str]]
Reader = Callable[[argparse.Namespace, Path], list[Row]]


class Refused(Exception):
    """What the user can put right: one sentence, no traceback."""


@dataclass(frozen=True)
class Form:
    """How the rows of a data set are written: the columns that every row must have."""

    columns: tuple[str, ...]

    def values(self, raw: Row, where: str) -> list[Any]:
        for column in self.columns:
            if column not in raw:
                raise Refused(f"{where}: column '{column}' is missing; there are: {', '.join(raw) or 'none'}")
        return [raw[column] for column in self.columns]


FORMS = (
    Form(("messages",)),
    Form(("conversations",)),
    Form(("prompt", "completion")),
    Form(("prompt", "answer")),
    Form(("instruction", "output")),
    Form(("question", "answer")),
    Form(("text",)),
)
QUESTION_FORMS = tuple(form for form in FORMS if form.columns != ("text",))
PREFERENCE_FORMS = (
    Form(("prompt", "chosen", "rejected")),
    Form(("question", "chosen", "rejected")),
    Form(("instruction", "chosen", "rejected")),
    Form(("chosen", "rejected")),
)
LABELLED_FORMS = (*PREFERENCE_FORMS, Form(("prompt", "completion", "label")))


def load_parts(args: argparse.Namespace, read: Reader) -> tuple[list[Row], list[Row]]:
    """Return the rows to learn from and the rows for the score: those of a file beside the data, else a part of it."""
    rows = read(args, Path(args.dataset_path))
    beside = Path(args.dataset_path) / HELD_OUT
    if beside.is_file():
        return rows, read(argparse.Namespace(**vars(args) | {"max_samples": -1}), beside)[: args.eval_samples]
    count = int(len(rows) * args.eval_fraction)
    shuffled = random.Random(args.seed).sample(rows, len(rows))
    return shuffled[count:], shuffled[: min(count, args.eval_samples)]


def load_rows(args: argparse.Namespace, path: Path, forms: tuple[Form, ...] = FORMS) -> list[Row]:
    """Return the examples of a file, or of the one file in a folder; a conversation has one for each answer."""
    form: Form | None = None
    rows: list[Row] = []
    for raw, where in lines(path, args.max_samples):
        if form is None:
            form = named_form(args) or find_form(raw, forms, where)
        rows += examples(form, raw, where)
    return rows


def load_questions(args: argparse.Namespace, path: Path) -> list[Row]:
    """Return the examples of data that has questions: plain text is refused."""
    return load_rows(args, path, QUESTION_FORMS)


def load_preferences(args: argparse.Namespace, path: Path) -> list[Row]:
    """Return pairs of a better and a worse answer to the same prompt."""
    return _judged(args, path, PREFERENCE_FORMS)


def load_labelled(args: argparse.Namespace, path: Path) -> list[Row]:
    """Return pairs, or single answers that are labelled as good or bad."""
    return _judged(args, path, LABELLED_FORMS)


def named_form(args: argparse.Namespace) -> Form | None:
    """Return the form that `input_train_name` and `output_train_name` name, if they are given."""
    if bool(args.input_train_name) != bool(args.output_train_name):
        raise Refused("give both input_train_name and output_train_name, or neither")
    return Form((args.input_train_name, args.output_train_name)) if args.input_train_name else None


def find_form(raw: Row, forms: tuple[Form, ...], where: str) -> Form:
    for form in forms:
        if set(form.columns) <= raw.keys():
            return form
    nameable = forms in (FORMS, QUESTION_FORMS)
    raise Refused(
        f"{where}: the columns to learn from are missing; there are: {', '.join(raw) or 'none'}. "
        f"{'Name the columns in input_train_name and output_train_name, or use' if nameable else 'Use'} "
        f"one of these: {'; '.join(' and '.join(form.columns) for form in forms)}"
    )


def turns(value: Any, where: str) -> Turns:
    """Return a conversation in the usual form; ShareGPT calls the speakers human and gpt."""
    names = {"human": "user", "gpt": "assistant"}
    try:
        found = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in value]
    except (TypeError, AttributeError) as error:
        raise Refused(f"{where}: a conversation is a list of objects with role and content") from error
    if not found or not all(isinstance(role, str) and isinstance(content, str) for role, content in found):
        raise Refused(f"{where}: every turn of a conversation needs a role and a content")
    return [message(names.get(role, role), content) for role, content in found]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def lines(path: Path, limit: int) -> Iterator[tuple[Row, str]]:
    """Yield the objects of a file with the place of each, at most `limit` if that is positive."""
    path = _data_file(path)
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if 0 < limit < number:
                    break
                where = f"{path.name}, line {number}"
                yield _parse(line, where), where
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path.name} is not written in UTF-8") from error
    if number == 0:
        raise Refused(f"{path.name} has no rows")


def _data_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(file for file in path.glob("*.jsonl") if file.name != HELD_OUT)
    if len(files) != 1:
        raise Refused(f"{path} must hold exactly one .jsonl file, it holds {len(files)}")
    return files[0]


def _parse(line: str, where: str) -> Row:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise Refused(f"{where}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise Refused(f"{where}: a JSON object is expected")
    return raw


def examples(form: Form, raw: Row, where: str) -> list[Row]:
    values = form.values(raw, where)
    if form.columns == ("text",):
        return [{"text": str(values[0])}]
    if len(values) == 1:
        return _answers_of(turns(values[0], where), where)
    question, answer = values
    more = raw.get("input") if form.columns[0] == "instruction" else None
    question = f"{question}\n\n{more}" if more else question
    return [{"prompt": _question(question, where), "completion": _answer(answer, where)}]


def _judged(args: argparse.Namespace, path: Path, forms: tuple[Form, ...]) -> list[Row]:
    form: Form | None = None
    rows = []
    for raw, where in lines(path, args.max_samples):
        form = form or find_form(raw, forms, where)
        rows.append(_judged_row(form, raw, where))
    return rows


def _judged_row(form: Form, raw: Row, where: str) -> Row:
    values = form.values(raw, where)
    if len(values) == 2:
        return _common_prompt(turns(values[0], where), turns(values[1], where), where)
    prompt = _question(values[0], where)
    if form.columns[-1] != "label":
        return {"prompt": prompt, "chosen": _answer(values[1], where), "rejected": _answer(values[2], where)}
    if not isinstance(values[2], bool):
        raise Refused(f"{where}: label must be true or false, it is {json.dumps(values[2])}")
    return {"prompt": prompt, "completion": _answer(values[1], where), "label": values[2]}


def _answers_of(conversation: Turns, where: str) -> list[Row]:
    places = [place for place, turn in enumerate(conversation) if turn["role"] == "assistant" and place > 0]
    if not places:
        raise Refused(f"{where}: the conversation has no answer of the assistant")
    return [{"prompt": conversation[:place], "completion": [conversation[place]]} for place in places]


def _question(value: Any, where: str) -> Turns:
    return turns(value, where) if isinstance(value, list) else [message("user", str(value))]


def _answer(value: Any, where: str) -> Turns:
    """Return the answer as one turn; of a whole conversation it is the last one."""
    return turns(value, where)[-1:] if isinstance(value, list) else [message("assistant", str(value))]


def _common_prompt(chosen: Turns, rejected: Turns, where: str) -> Row:
    """Split two conversations that differ in their last turn only."""
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise Refused(f"{where}: chosen and rejected must be the same conversation up to the last answer")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
