"""What the rows of a file would become, without training on them: for the upload, the submit and a plan.

As a program it reads a whole file and prints what it found as JSON, so that a service can let another process do it:

    python -m deepe_rows.survey rows.jsonl '{"kinds": ["conversation"], "limit": -1}'
"""

import json
import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from .files import enumerated_rows
from .problems import Refused, RowProblem
from .reading import Reader
from .telling import Count, Wanted
from .values import Caption, Conversation, Example, Graded, Labelled, Pair, Preference, Question, Text

LISTED_PROBLEMS = 20
SAMPLED_ROWS = 2000
ASCII_PER_TOKEN, OTHERS_PER_TOKEN = 4.0, 1.5
"""Characters of a token, roughly: of Latin text four, of Chinese one or two."""


class Survey:
    """Reads rows and keeps what is to be said about them; memory does not grow with the rows."""

    def __init__(self, wanted: Wanted) -> None:
        self._reader = Reader(wanted)
        self._sequences = 0
        self._roles: dict[str, int] = {}
        self._problems: list[dict[str, Any]] = []
        self._problem_count = 0
        self._sampled_sequences = 0
        self._sampled_tokens = 0.0

    def see(self, raw: Any, line: int) -> Example | None:
        """Read a row; return its example, None if there is none."""
        try:
            example = self._reader.read(raw, line)
        except RowProblem as problem:
            self._keep(problem, line)
            return None
        if example is None:
            return None
        sequences = len(example.learned) if isinstance(example, Conversation) else 1
        self._sequences += sequences
        if self._reader.report.rows <= SAMPLED_ROWS:
            self._sampled_sequences += sequences
            self._sampled_tokens += sum(map(estimated_tokens, texts_of(example)))
            for turn in getattr(example, "turns", ()):
                self._roles[turn["role"]] = self._roles.get(turn["role"], 0) + 1
        return example

    def _keep(self, problem: RowProblem, line: int) -> None:
        self._problem_count += 1
        if len(self._problems) < LISTED_PROBLEMS:
            self._problems.append(
                {"line": line, "code": problem.code, "pointer": problem.pointer, "params": problem.params}
            )

    def document(self) -> dict[str, Any]:
        """Return what was found, as JSON can say it."""
        report = self._reader.report
        try:
            self._reader.close()
        except RowProblem as problem:
            self._keep(problem, 1)
        return {
            "rows": report.rows,
            "sequences": self._sequences,
            "forms": dict(report.forms),
            "kinds": dict(report.kinds),
            "roles": self._roles,
            "features": {name: count.rows for name, count in report.features.items()},
            "left_out": [_counted(code, "", count) for code, count in report.left_out.items()],
            "said": [_counted(code, about, count) for (code, about), count in report.said.items()],
            "problems": self._problems,
            "problem_count": self._problem_count,
            "tokens_per_sequence": round(self._sampled_tokens / self._sampled_sequences, 1)
            if self._sampled_sequences
            else None,
        }


def survey(path: Path, wanted: Wanted, limit: int = -1) -> dict[str, Any]:
    """Return what became of the rows of a file, of the first `limit` if that is positive. Raises `Refused`."""
    found = Survey(wanted)
    rows: Iterable[tuple[int, Any]] = enumerated_rows(path)
    for number, raw in islice(rows, limit) if limit > 0 else rows:
        found.see(raw, number)
    return found.document()


def wanted_of(document: Mapping[str, Any]) -> Wanted:
    """Return what is wanted, as JSON says it."""
    columns = document.get("columns")
    return Wanted(
        kinds=frozenset(document["kinds"]),
        tools=document.get("tools", True),
        pictures=document.get("pictures", False),
        columns=tuple(columns) if columns else None,
        form=document.get("form"),
    )


def _counted(code: str, about: str, count: Count) -> dict[str, Any]:
    return {"code": code, "about": about, "rows": count.rows, "lines": count.lines}


def texts_of(example: Example) -> Iterable[str]:
    """Yield every text of an example, as often as it is given or learned."""
    match example:
        case Conversation():
            # every answer is a sequence of its own, with all that comes before it
            for place in example.learned:
                yield from (turn["content"] for turn in example.turns[: place + 1])
        case Text():
            yield example.text
        case Preference():
            yield from (
                turn["content"] for turn in [*example.prompt, example.chosen, *example.prompt, example.rejected]
            )
        case Labelled():
            yield from (turn["content"] for turn in [*example.prompt, example.completion])
        case Question():
            yield from (turn["content"] for turn in example.prompt)
        case Caption():
            yield example.text
        case Graded():
            yield from (example.query, example.document)
        case Pair():
            yield from (example.anchor, example.positive, *example.negatives)


def estimated_tokens(text: str) -> float:
    """Return roughly how many tokens a text has, without a tokenizer."""
    plain = len(text) if text.isascii() else sum(character.isascii() for character in text)
    return plain / ASCII_PER_TOKEN + (len(text) - plain) / OTHERS_PER_TOKEN


def main() -> None:
    wanted = json.loads(sys.argv[2])
    try:
        found = survey(Path(sys.argv[1]), wanted_of(wanted), wanted.get("limit", -1))
    except Refused as error:
        found = {"refused": str(error)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
