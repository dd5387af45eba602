"""What a method makes of a row, how that is kept in an Arrow file, and how it is read there.

`deepe_preparation` makes the file.
"""

import argparse
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from deepe_examples import sequences_of
from deepe_rows import Answer, Labelled, Pair, Preference, Question, Rendered, Text

VALUES = {one.__name__: one for one in (Answer, Labelled, Pair, Preference, Question, Rendered, Text)}
TUPLES = ("notes", "negatives")  # fields that JSON has no type for
EXAMPLE = {"example": "text"}  # the columns of a table that keeps values as they are
READ_AT_ONCE = 1000
Row = Mapping[str, Any]


# ---- what is made of a row -------------------------------------------------------------------------------------------


def _itself(row: Any) -> Sequence[Any]:
    return (row,)


def _tokens_and_labels(_row: Any, found: Sequence[Rendered]) -> Iterator[Row]:
    for one in found:
        yield {"input_ids": one.tokens, "labels": one.labels}


def _sequences(_row: Any, found: Sequence[Rendered]) -> Sequence[Any]:
    return found


@dataclass(frozen=True)
class Recipe:
    """What a method makes of a row; left as it is, tokens and which of them are learned (-100 for the others).

    Functions of modules or `partial` of them: where workers are not forked, they are sent them.
    """

    columns: Mapping[str, str] = field(default_factory=lambda: {"input_ids": "tokens", "labels": "tokens"})
    """What is kept of each: `tokens`, `text` or `flag`."""
    table: Callable[[Any, list[Rendered]], Iterable[Row]] = _tokens_and_labels
    """Returns what is kept of a row that fits."""
    held_out: Callable[[Any, list[Rendered]], Sequence[Any]] = _sequences
    """Returns what a score needs of a held-out row: `Rendered`, or values of `deepe_rows`."""
    split: Callable[[Any], Sequence[Any]] = _itself
    """Returns the parts of a row that have to fit each by itself."""
    sequences: Callable[[Any, Any, argparse.Namespace], list[Rendered]] = sequences_of
    whole: bool = False
    """Leave a row out if one of its sequences does not fit."""
    unlearned: bool = True
    """Keep sequences of which nothing is learned. TRL leaves them out."""
    advice: str = ""
    """What else can be done about rows that are all too long."""


TEXTS = Recipe(unlearned=False)


@dataclass(frozen=True)
class Learned:
    """What there is to learn from."""

    path: Path
    count: int
    tokens: int
    longest: int
    """Tokens of the longest sequence."""

    def __len__(self) -> int:
        return self.count

    def dataset(self, transform: Callable[[Mapping[str, list[Any]]], Mapping[str, list[Any]]] | None = None) -> Any:
        """Return it as a trainer takes it, or what `transform` makes of rows when they are read."""
        from datasets import Dataset

        found = Dataset.from_file(str(self.path))
        return found if transform is None else found.with_transform(transform)

    def rows(self) -> "Rows":
        """Return it for a loop of one's own."""
        return Rows(self.dataset())


class Rows(Sequence[Any]):
    """The kept values, or sequences, one read after the other from the file."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._dataset.iter(READ_AT_ONCE):
            names = list(batch)
            yield from (
                self._read(dict(zip(names, values, strict=True))) for values in zip(*batch.values(), strict=True)
            )

    def __getitem__(self, place: Any) -> Any:
        return self._read(self._dataset[place])

    @staticmethod
    def _read(row: Row) -> Any:
        if "example" in row:
            return read_value(row["example"])
        labels = row["labels"]
        return Rendered(row["input_ids"], next((at for at, one in enumerate(labels) if one != -100), len(labels)))


# ---- a table in a file -----------------------------------------------------------------------------------------------


class Column:
    """The values of a column: numbers of all rows one after the other with where each row ends, or texts, or flags."""

    def __init__(self, kind: str) -> None:
        self._numbers = array("i")
        self._ends = array("i", [0]) if kind == "tokens" else None
        self._values: list[Any] = []

    def add(self, value: Any) -> None:
        if self._ends is None:
            self._values.append(value)
        else:
            self._numbers.extend(value)
            self._ends.append(len(self._numbers))

    def array(self, kind: Any) -> Any:
        import pyarrow

        if self._ends is None:
            return pyarrow.array(self._values, kind)
        ends, numbers = (
            pyarrow.Array.from_buffers(pyarrow.int32(), len(one), [None, pyarrow.py_buffer(one)])
            for one in (self._ends, self._numbers)
        )
        return pyarrow.ListArray.from_arrays(ends, numbers)


def schema_of(columns: Mapping[str, str]) -> Any:
    import pyarrow

    types = {"tokens": pyarrow.list_(pyarrow.int32()), "text": pyarrow.string(), "flag": pyarrow.bool_()}
    return pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])


# ---- values in JSON --------------------------------------------------------------------------------------------------


def written_value(value: Any) -> str:
    """Return a value of `deepe_rows` as JSON that `read_value` makes the same of."""
    return json.dumps(value, default=_named_fields)


def _named_fields(value: Any) -> dict[str, Any]:
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} is no value of a row")
    return {"is": type(value).__name__, **{one.name: getattr(value, one.name) for one in fields(value)}}


def read_value(text: str) -> Any:
    """Return the value that was written."""
    return _restored(json.loads(text))


def _restored(found: Any) -> Any:
    if not isinstance(found, dict) or found.get("is") not in VALUES:
        return found
    named = {name: tuple(one) if name in TUPLES else one for name, one in found.items() if name != "is"}
    if "example" in named:
        named["example"] = _restored(named["example"])
    return VALUES[found["is"]](**named)
