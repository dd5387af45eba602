"""Inference for reward models: what an answer is worth, or which of several answers to a question is the best.

    python app/presets/reward-demo/ask_reward.py --base_model_path=tiny-styles --model_path=reward-out \
        --prompt='{"prompt": "What is 3 + 8?", "answer": "11"}'

A prompt is a question with at least one answer, in one of these forms:

- JSON, a row as trainings read it: `{"prompt": ..., "answer": ...}`, `{"messages": [...]}` whose last turn is the
  answer, `{"prompt": ..., "chosen": ..., "rejected": ...}`, or several: `{"prompt": ..., "answers": [...]}`;
- text: the question, a line `---`, an answer, and for each further answer a line `---` before it.

One answer comes back as its reward, a number. Several come back ordered by reward, each with its number. Rewards
compare answers to the same question; they have no scale of their own. Of a chat the newest message counts: a model that
judges remembers nothing. A system prompt goes before the conversation.

Protocol: one JSON object a line on stdout, `{"status": "resp", "text": ...}` or `{"status": "error", "error": ...}`.
All other output belongs on stderr.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe_ask as ask
from deepe_reward_model import check_reward_model, load_reward_model
from deepe_rows import (
    CONVERSATION,
    PREFERENCE,
    SENTENCES,
    Conversation,
    Preference,
    Reader,
    Refused,
    RowProblem,
    Turn,
    Wanted,
    message,
)

READS = Wanted(kinds=frozenset({CONVERSATION, PREFERENCE}), tools=False)
LOSSES = ("column_unused", "key_unused", "turns_after_answer")  # of a row, which a training only tells
UNKNOWN = ("row_columns_missing", "row_columns_unknown", "row_form_not_learned")
SEPARATOR = re.compile(r"^---[ \t]*$", re.MULTILINE)
WAYS = (
    'write {"prompt": ..., "answer": ...} as JSON, with "answers": [...] for several, or the question, a line ---, and '
    "the answer"
)
Judged = tuple[list[Turn], str]
"""A conversation up to its answer, and how the answer is shown."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask a reward model.", allow_abbrev=False)
    parser.add_argument("--base_model_path", default=None, help="folder of the base model, or of the complete model")
    parser.add_argument("--model_path", default=None, help="folder of the customized or complete model")
    parser.add_argument("--prompt", default="", help="a question with one answer or several")
    parser.add_argument("--history", default=None, help="JSON list of turns, the newest last; wins over the prompt")
    parser.add_argument("--system_prompt", default=None, help="instructions before the conversation")
    return parser


def main() -> None:
    parser = make_parser()
    args, _unknown = parser.parse_known_args()
    ask.run(args, parser.get_default, answer)


def answer(args: argparse.Namespace) -> Iterator[str]:
    system = [turn["content"] for turn in ask.turns_of(args) if turn["role"] == "system"]
    judged = judged_in(ask.turns_of(args)[-1]["content"], system[0] if system else "")
    base, adapter = ask.folders(args)
    folder = adapter or base
    check_reward_model(folder, "model_path")
    rewards = load_reward_model(folder, base=base).rewards([turns for turns, _ in judged])
    if len(judged) == 1:
        yield f"{rewards[0]:.6g}"
        return
    for reward, (_, text) in sorted(zip(rewards, judged, strict=True), key=lambda one: -one[0]):
        yield f"{reward:.3f}  {text}\n"


def judged_in(text: str, system: str) -> list[Judged]:
    """Return the conversations that a message holds, one for each answer. Raises `Refused` without an answer."""
    try:
        row = json.loads(text) if text.lstrip().startswith("{") else None
    except ValueError as error:
        raise Refused(f"the question begins like JSON and is none: {error}; {WAYS}") from error
    found = of_row(row) if isinstance(row, Mapping) else of_text(text)
    if system and found[0][0][0]["role"] != "system":
        found = [([message("system", system), *turns], shown) for turns, shown in found]
    return found


def of_text(text: str) -> list[Judged]:
    question, *answers = (part.strip("\n") for part in SEPARATOR.split(text))
    if not answers or not question.strip():
        raise Refused(f"a reward model judges an answer to a question, and there is none; {WAYS}")
    return [([message("user", question), message("assistant", one)], one) for one in answers]


def of_row(row: Mapping[str, Any]) -> list[Judged]:
    answers = row.get("answers")
    if answers is None:
        return of_example(row)
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        raise Refused(f"answers must be a list of answers; {WAYS}")
    rest = {name: value for name, value in row.items() if name != "answers"}
    return [one for text in answers for one in of_example({**rest, "answer": text})]


def of_example(row: Mapping[str, Any]) -> list[Judged]:
    """Return what a row says, read as the training reads it."""
    reader = Reader(READS, "the question")
    try:
        example = reader.read(dict(row), 1)
    except RowProblem as problem:
        if problem.code in UNKNOWN:  # it would list the forms of every training
            raise Refused(f"no question and answer can be read from {', '.join(row) or 'nothing'}; {WAYS}") from None
        raise
    lost = [SENTENCES[code].format(column=about, key=about) for code, about in reader.report.said if code in LOSSES]
    if lost:
        raise Refused(f"not all of the question can be judged: {'; '.join(lost)}; {WAYS}")
    if isinstance(example, Preference):
        return [([*example.prompt, one], str(one["content"])) for one in (example.chosen, example.rejected)]
    if not isinstance(example, Conversation):
        raise Refused(f"a reward model judges an answer, and there is none to learn from in this row; {WAYS}")
    return [(list(example.turns), str(example.turns[-1]["content"]))]


if __name__ == "__main__":
    main()
