"""Examples out of JSONL files: read once, problems with their lines, and a held-out part that training never sees."""

import argparse
import json
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .problems import SENTENCES, Refused, RowProblem
from .reading import Reader
from .telling import Count, Report, Wanted
from .values import Caption, Conversation, Example, Graded, Pair, Text

HELD_OUT = "heldout.jsonl"
"""A file of this name beside the data holds the rows for the score."""

SHOWN_PROBLEMS = 3
One = TypeVar("One")


@dataclass
class Parts:
    """The examples to learn from, those for the score, and what the user should know of both."""

    train: list[Any]
    held_out: list[Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Stored:
    """An example that is kept in a file of its own: where it stands there, and what `keys_of` says of it."""

    offset: int
    length: int
    keys: Sequence[Hashable]


Keep = Callable[[Example], Any]


def load(args: argparse.Namespace, wanted: Wanted, keep: Keep | None = None) -> Parts:
    """Read the data set of a training; raise `Refused` with the first lines that are wrong.

    `keep` returns what stands for an example in the parts, such as a `Stored`; without it that is the example itself.

    `args` has dataset_path, max_samples, eval_fraction, eval_samples, seed and where the script takes them
    validation_path, data_form, input_train_name, output_train_name.
    """
    wanted = with_choices(wanted, args)
    path = data_file(Path(args.dataset_path))
    rows, report = read_file(path, wanted, args.max_samples, keep)
    notes = notes_of(report, path.name)
    own = getattr(args, "validation_path", None)
    beside = Path(own) if own else Path(args.dataset_path) / HELD_OUT
    if own or beside.is_file():
        beside = data_file(beside)
        held_out, beside_report = read_file(beside, wanted, -1, keep)
        notes += notes_of(beside_report, beside.name)
        if len(held_out) > args.eval_samples:
            notes.append(f"{args.eval_samples} of the {len(held_out)} rows of {beside.name} are used (eval_samples)")
            held_out = held_out[: args.eval_samples]
        learned = {key for row in rows for key in keys_of(row)}
        if both := sum(any(key in learned for key in keys_of(row)) for row in held_out):
            notes.append(f"{both} of the {len(held_out)} rows of {beside.name} are in the training data as well")
        return Parts(rows, held_out, notes)
    train, held_out = split(rows, args.eval_fraction, args.eval_samples, args.seed)
    if len(held_out) < (asked := number_held_out(len(rows), args.eval_fraction, args.eval_samples)):
        notes.append(f"{len(held_out)} instead of {asked} rows are held out: rows with equal prompts stay together")
    return Parts(train, held_out, notes)


def with_choices(wanted: Wanted, args: argparse.Namespace) -> Wanted:
    """Return what is wanted with what the user says about the columns."""
    names = getattr(args, "input_train_name", None), getattr(args, "output_train_name", None)
    if bool(names[0]) != bool(names[1]):
        raise Refused("give both input_train_name and output_train_name, or neither")
    form = getattr(args, "data_form", None)
    return Wanted(
        kinds=wanted.kinds,
        tools=wanted.tools,
        pictures=wanted.pictures,
        columns=(names[0], names[1]) if names[0] and names[1] else None,
        form=form if form not in (None, "", "auto") else None,
    )


def read_file(path: Path, wanted: Wanted, limit: int = -1, keep: Keep | None = None) -> tuple[list[Any], Report]:
    """Return the examples of a file, of its first `limit` rows if that is positive; see `load` for `keep`."""
    reader = Reader(wanted, path.name)
    found: list[Any] = []
    wrong: list[str] = []
    count = 0
    for number, raw in enumerated_rows(path):
        if 0 < limit <= reader.report.rows:
            break
        try:
            example = reader.read(raw, number)
        except RowProblem as problem:
            count += 1
            if len(wrong) < SHOWN_PROBLEMS:
                wrong.append(f"{path.name}, line {number}: {problem.sentence()}")
            continue
        if example is not None:
            found.append(example if keep is None else keep(example))
    try:
        reader.close()
    except RowProblem as problem:
        raise Refused(f"{path.name}: {problem.sentence()}") from problem
    if count:
        more = f"; {count - len(wrong)} more rows are wrong" if count > len(wrong) else ""
        raise Refused("; ".join(wrong) + more)
    if not found:
        reasons = ", ".join(SENTENCES[code] for code in reader.report.left_out)
        raise Refused(f"{path.name} has no rows to learn from" + (f": {reasons}" if reasons else ""))
    return found, reader.report


def enumerated_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line; blank lines are passed over."""
    for number, line in enumerated_lines(path):
        yield number, parsed_line(path, number, line)


def enumerated_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line; blank lines are passed over."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, line
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path.name} is not written in UTF-8") from error


def parsed_line(path: Path, number: int, line: str) -> Any:
    """Return the value of a line."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise Refused(f"{path.name}, line {number}: not valid JSON ({error})") from error


def data_file(path: Path) -> Path:
    """Return the JSONL file that is meant: the path itself, or the one in a folder."""
    if not path.is_dir():
        return path
    files = sorted(file for file in path.glob("*.jsonl") if file.name != HELD_OUT)
    if len(files) != 1:
        raise Refused(f"{path} must hold exactly one .jsonl file, it holds {len(files)}")
    return files[0]


def notes_of(report: Report, name: str) -> list[str]:
    """Return one sentence for everything that the user should know about the rows of a file."""
    found = [
        f"{name}: rows are left out: {SENTENCES[code]} ({_rows(count, report)})"
        for code, count in report.left_out.items()
    ]
    for (code, about), count in report.said.items():
        found.append(f"{name}: {SENTENCES[code].format(column=about, key=about)} ({_rows(count, report)})")
    return found


def _rows(count: Count, report: Report) -> str:
    more = ", ..." if count.rows > len(count.lines) else ""
    lines = f"line{'s' if count.rows > 1 else ''} {', '.join(map(str, count.lines))}{more}"
    return f"{count.rows} of {report.rows} rows; {lines}"


# ---- held-out rows ---------------------------------------------------------------------------------------------------


def number_held_out(rows: int, fraction: float, most: int) -> int:
    return min(int(rows * fraction), most)


def split(rows: Sequence[One], fraction: float, most: int, seed: int) -> tuple[list[One], list[One]]:
    """Return the rows to learn from, shuffled, and `min(fraction of them, most)` for the score.

    Rows that share a prompt (see `keys_of`) stay on one side. Without room for a whole group fewer
    rows are held out.
    """
    wanted = number_held_out(len(rows), fraction, most)
    shuffled = random.Random(seed).sample(range(len(rows)), len(rows))
    if not wanted:
        return [rows[place] for place in shuffled], []
    groups: dict[int, list[int]] = {}
    for place, group in enumerate(_groups(rows)):
        groups.setdefault(group, []).append(place)
    held_out: set[int] = set()
    passed = set()
    group_of = {place: group for group, places in groups.items() for place in places}
    for place in shuffled:
        group = group_of[place]
        if group in passed:
            continue
        passed.add(group)
        if len(held_out) + len(groups[group]) <= wanted and len(groups) > 1:
            held_out.update(groups[group])
        if len(held_out) == wanted:
            break
    train = [rows[place] for place in shuffled if place not in held_out]
    return train, [rows[place] for place in shuffled if place in held_out]


def _groups(rows: Sequence[Any]) -> Iterable[int]:
    """Return for every row the number of its group: rows that share a key, directly or through others."""
    parent = list(range(len(rows)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[Hashable, int] = {}
    for place, row in enumerate(rows):
        for key in keys_of(row):
            other = first.setdefault(key, place)
            if other != place:
                parent[root(place)] = root(other)
    return map(root, range(len(rows)))


def keys_of(row: Any) -> Sequence[Hashable]:
    """Return what no two rows on different sides may share: the turns before the first answer, the text, the picture.

    Of a pair it is the query, and both texts in any order, of a graded document the query; a document that several
    queries want may be on both sides.
    """
    if isinstance(row, Stored):
        return row.keys
    if isinstance(row, Text):
        return (hash(row.text),)
    if isinstance(row, Pair):
        return (hash(row.anchor), hash(frozenset((row.anchor, row.positive))))
    if isinstance(row, Graded):
        return (hash(row.query),)
    if isinstance(row, Caption):
        return (row.picture,)
    if isinstance(row, Conversation):
        end = next(place for place, turn in enumerate(row.turns) if turn["role"] == "assistant" and place > 0)
        turns: Any = row.turns[:end]
    else:
        turns = row.prompt
    written = json.dumps([turns, list(getattr(row, "pictures", ()))], sort_keys=True, ensure_ascii=False)
    return (hash(written),)
