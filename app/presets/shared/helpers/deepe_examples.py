"""The examples of a training run: read, written as tokens, kept within the limits, and what became of each told.

Standard library only; the tokenizer comes from the caller.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
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
from deepe_rows.files import Keep
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


def load_examples(args: argparse.Namespace, wanted: Wanted, keep: Keep | None = None) -> Parts:
    """Return the examples of the data set, held-out ones apart; tell what was left out of it or is unusual.

    `keep` returns what stands for an example in the parts, without it that is the example itself.
    """
    parts = load(args, wanted, keep)
    tell(parts.notes, args)
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
    tally = Tally()
    kept = [(row, found) for row in rows if (found := tally.fitting(row, sequences, args, whole=whole))]
    tell(tally.notes(args, held_out=held_out, advice=advice), args)
    return kept


def tell(notes: Iterable[str], args: argparse.Namespace) -> None:
    for note in notes:
        remark(note, args)


@dataclass
class Places:
    """How many rows something concerns, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, *sentences: str, count: int = 1) -> None:
        self.count += count
        self.first = [*self.first, *sentences][:SHOWN_PLACES]

    def __str__(self) -> str:
        more = f"; and {self.count - SHOWN_PLACES} more" if self.count > SHOWN_PLACES else ""
        return "; ".join(self.first) + more


@dataclass
class Tally:
    """What became of rows that were to fit. Tallies of parts of the rows add up in their order."""

    rows: int = 0
    kept: int = 0
    told: dict[str, Places] = field(default_factory=dict)
    wrong: Places = field(default_factory=Places)

    def fitting(
        self,
        row: One,
        sequences: Callable[[One], list[Rendered]],
        args: argparse.Namespace,
        *,
        whole: bool = False,
    ) -> list[Rendered]:
        """Return the sequences of a row that fit, and count what became of it."""
        self.rows += 1
        try:
            found = sequences(row)
        except RowProblem as problem:
            self.wrong.add(f"{row.place}: {problem.sentence()}")
            return []
        codes = dict.fromkeys(code for one in found for code in one.notes)
        fitting = [one for one in found if isinstance(row, Text) or not exceeded_limits(one, args)]
        if isinstance(row, Text) and len(found) > 1:
            codes["text_split"] = None
        if len(fitting) < len(found):
            codes["answer_too_long" if fitting and not whole else "row_too_long"] = None
        for code in codes:
            self.told.setdefault(code, Places()).add(row.place)
        if whole and len(fitting) < len(found):
            return []
        self.kept += bool(fitting)
        return fitting

    def add(self, other: "Tally") -> None:
        """Count the rows that follow as well."""
        self.rows += other.rows
        self.kept += other.kept
        self.wrong.add(*other.wrong.first, count=other.wrong.count)
        for code, places in other.told.items():
            self.told.setdefault(code, Places()).add(*places.first, count=places.count)

    def notes(self, args: argparse.Namespace, *, held_out: bool = False, advice: str = "") -> list[str]:
        """Return what is told. Raises `Refused` if rows are wrong, or all that are to be learned are too long."""
        if self.wrong.count:
            raise Refused(str(self.wrong))
        if self.rows and not self.kept and not held_out:
            named = " or ".join(f"{name} ({getattr(args, name)})" for name in LIMITS if name in args)
            raise Refused(f"all {self.rows} rows are longer than allowed; raise {named}{advice}")
        return [
            f"{SENTENCES[code]} ({places.count} of {self.rows}{' held-out' if held_out else ''} rows: {places})"
            for code, places in self.told.items()
        ]


def longest_of(args: argparse.Namespace) -> int:
    """Return how many tokens a sequence may have at most."""
    return args.max_seq_length if "max_seq_length" in args else args.max_input_length + args.max_content_length


def exceeded_limits(one: Rendered, args: argparse.Namespace) -> list[str]:
    """Return which limits of the script a sequence is over: of the question, of the answer, of both together."""
    lengths = (one.start, len(one.tokens) - one.start, len(one.tokens))
    return [name for name, length in zip(LIMITS, lengths, strict=True) if length > getattr(args, name, sys.maxsize)]
