"""What is wanted of rows, and what is told about them: left out, unusual, what they hold."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .forms import Form
from .pictures import COLUMNS as PICTURE_COLUMNS

REMEMBERED_LINES = 5
REMEMBERED_SHAPES = 1000  # a file whose rows all differ must not fill the memory
REMEMBERED_TELLINGS = 200


@dataclass(frozen=True)
class Wanted:
    """What a method learns from, and what the user has said about the columns."""

    kinds: frozenset[str]
    tools: bool = True
    pictures: bool = False
    columns: tuple[str, ...] | None = None
    """Names of the columns with input and output; of the one with the caption."""
    form: str | None = None
    """Name of the form, where rows fit several."""


@dataclass
class Count:
    """How many rows something concerns, and the first lines of them."""

    rows: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        self.rows += 1
        if len(self.lines) < REMEMBERED_LINES:
            self.lines.append(line)


@dataclass
class Report:
    """What became of the rows of a file."""

    rows: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, Count] = field(default_factory=dict)
    """Rows with nothing to learn, by reason."""
    said: dict[tuple[str, str], Count] = field(default_factory=dict)
    """What is worth telling about rows that are used, by code and the name of the column or key."""
    features: dict[str, Count] = field(default_factory=dict)
    """Rows with tools, tool calls, reasoning, pictures, a system turn, weights."""


class Telling:
    """What is told while rows are read, one after the other."""

    def __init__(self, wanted: Wanted, source: str) -> None:
        self.wanted = wanted
        self.report = Report()
        self.place = ""
        # file_name is a usual column of texts as well: where they came from
        self.picture_columns = PICTURE_COLUMNS if wanted.pictures else PICTURE_COLUMNS[:2]
        self._source = f"{source}, " if source else ""
        self._line = 0
        self._told: set[tuple[str, str]] = set()
        self._unused: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}

    def begin(self, line: int) -> None:
        """Go on to the row of a line."""
        self._line = line
        self.place = f"{self._source}line {line}"
        self._told.clear()
        self.report.rows += 1

    def leave_out(self, code: str) -> None:
        self.report.left_out.setdefault(code, Count()).add(self._line)

    def say(self, code: str, **names: str) -> None:
        told = (code, next(iter(names.values()), ""))
        if told not in self._told:  # once for each row
            self._told.add(told)
            if told in self.report.said or len(self.report.said) < REMEMBERED_TELLINGS:
                self.report.said.setdefault(told, Count()).add(self._line)

    def feature(self, name: str) -> None:
        if ("", name) not in self._told:
            self._told.add(("", name))
            self.report.features.setdefault(name, Count()).add(self._line)

    def rest(
        self, form: Form, raw: Mapping[str, Any], also: Collection[str] = (), *, tell: bool = True
    ) -> dict[str, Any]:
        """Return the columns that the form does not know, and tell that nothing is learned from them."""
        key = (form.name, tuple(raw))
        unused = self._unused.get(key)
        if unused is None:
            known = {*form.columns, *form.optional, *also}
            if self.wanted.pictures:
                known |= set(self.picture_columns)
            unused = tuple(name for name in raw if name not in known)
            if len(self._unused) < REMEMBERED_SHAPES:
                self._unused[key] = unused
        if not unused:
            return {}
        more = {name: raw[name] for name in unused if raw[name] not in (None, "", [])}
        if tell:
            for name in more:
                self.say("column_unused", column=name)
        return more
