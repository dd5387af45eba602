"""The examples of a training run: read, written as tokens, kept within the limits, and what became of each told.

Standard library only; the tokenizer comes from the caller.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from deepe_log import remark
from deepe_rows import (
    SENTENCES,
    Answer,
    Conversation,
    Labelled,
    Parts,
    Preference,
    Question,
    Refused,
    Rendered,
    RowProblem,
    Text,
    Wanted,
    chunks,
    load,
    render,
    render_answer,
    render_question,
    render_text,
)
from deepe_rows.lengths import LIMITS

SHOWN_PLACES = 3
One = TypeVar("One", bound=Any)
Judged = TypeVar("Judged", bound=Preference | Labelled)
Learned = Conversation | Text | Preference | Labelled | Question


class Fitting(list[One]):
    """Rows that fit into the limits. `longest` is the number of tokens of their longest sequence."""

    def __init__(self, kept: Sequence[tuple[Any, list[Rendered]]], rows: Sequence[One]) -> None:
        super().__init__(rows)
        self.longest = max((len(one.tokens) for _row, found in kept for one in found), default=0)


def load_examples(args: argparse.Namespace, wanted: Wanted) -> Parts:
    """Return the examples of the data set, held-out ones apart; tell what was left out of it or is unusual."""
    parts = load(args, wanted)
    for note in parts.notes:
        remark(note, args)
    return parts


def encode(
    rows: Sequence[Conversation | Text], tokenizer: Any, args: argparse.Namespace, *, held_out: bool = False
) -> list[Rendered]:
    """Return the sequences of rows: one for each answer of a conversation, and texts, long ones in several pieces."""
    kept = keep_fitting(rows, lambda row: sequences_of(row, tokenizer, args), args, held_out=held_out)
    return [one for _row, found in kept for one in found]


def fitting_pairs(
    rows: Sequence[Judged], tokenizer: Any, args: argparse.Namespace, *, held_out: bool = False
) -> Fitting[Judged]:
    """Return the rows whose answers all fit, with their prompts, into the limits; turns as the template takes them."""
    kept = keep_fitting(rows, lambda row: sequences_of(row, tokenizer, args), args, held_out=held_out, whole=True)
    return Fitting(kept, [replace(row, prompt=found[0].example.prompt) for row, found in kept])


def fitting_questions(
    rows: Sequence[Question], tokenizer: Any, args: argparse.Namespace, *, held_out: bool = False
) -> Fitting[Question]:
    """Return the rows whose prompts fit; turns as the template takes them."""
    kept = keep_fitting(rows, lambda row: sequences_of(row, tokenizer, args), args, held_out=held_out)
    return Fitting(kept, [found.example for _row, (found,) in kept])


def sequences_of(row: Learned, tokenizer: Any, args: argparse.Namespace) -> list[Rendered]:
    """Return the sequences of a row, whether they fit or not. Raises `RowProblem`."""
    match row:
        case Text():
            return list(chunks(render_text(row, tokenizer), longest_of(args)))
        case Conversation():
            return render(row, tokenizer)
        case Question():
            return [render_question(row, tokenizer)]
        case _:
            return [render_answer(answer, tokenizer) for answer in answers_of(row)]


def answers_of(row: Preference | Labelled) -> list[Answer]:
    """Return each answer of a row with the prompt before it."""
    completions = [row.chosen, row.rejected] if isinstance(row, Preference) else [row.completion]
    return [Answer(row.prompt, completion, row.tools, place=row.place) for completion in completions]


def keep_fitting(
    rows: Sequence[One],
    sequences: Callable[[One], list[Rendered]],
    args: argparse.Namespace,
    *,
    held_out: bool = False,
    whole: bool = False,
    advice: str = "",
) -> list[tuple[One, list[Rendered]]]:
    """Return the rows with those of their sequences that fit; with `whole`, only rows all of whose sequences do.

    What is left out or unusual is told with the first places. A row that the template refuses ends the run, and so
    do rows to learn from that are all too long; `advice` says what else can be done about that.
    """
    kept: list[tuple[One, list[Rendered]]] = []
    told: dict[str, list[str]] = {}
    wrong: list[str] = []
    for row in rows:
        try:
            found = sequences(row)
        except RowProblem as problem:
            wrong.append(f"{row.place}: {problem.sentence()}")
            continue
        codes = {code for one in found for code in one.notes}
        fitting = [one for one in found if isinstance(row, Text) or not exceeded_limits(one, args)]
        if isinstance(row, Text) and len(found) > 1:
            codes.add("text_split")
        if len(fitting) < len(found):
            codes.add("answer_too_long" if fitting and not whole else "row_too_long")
        if fitting and (len(fitting) == len(found) or not whole):
            kept.append((row, fitting))
        for code in codes:
            told.setdefault(code, []).append(row.place)
    if wrong:
        raise Refused(_listed(wrong))
    if rows and not kept and not held_out:
        named = " or ".join(f"{name} ({getattr(args, name)})" for name in LIMITS if name in args)
        raise Refused(f"all {len(rows)} rows are longer than allowed; raise {named}{advice}")
    for code, places in told.items():
        share = f"{len(places)} of {len(rows)}{' held-out' if held_out else ''} rows"
        remark(f"{SENTENCES[code]} ({share}: {_listed(places)})", args)
    return kept


def longest_of(args: argparse.Namespace) -> int:
    """Return how many tokens a sequence may have at most."""
    return args.max_seq_length if "max_seq_length" in args else args.max_input_length + args.max_content_length


def exceeded_limits(one: Rendered, args: argparse.Namespace) -> list[str]:
    """Return which limits of the script a sequence is over: of the question, of the answer, of both together."""
    lengths = (one.start, len(one.tokens) - one.start, len(one.tokens))
    return [name for name, length in zip(LIMITS, lengths, strict=True) if length > getattr(args, name, sys.maxsize)]


def _listed(sentences: list[str]) -> str:
    more = f"; and {len(sentences) - SHOWN_PLACES} more" if len(sentences) > SHOWN_PLACES else ""
    return "; ".join(sentences[:SHOWN_PLACES]) + more
