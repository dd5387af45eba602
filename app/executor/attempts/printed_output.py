"""Follow what a training prints: which bar is the training's, and at which step each printed report was made.

Trainers print what they measured without the step. It is known from the line itself, from the bar that is drawn anew
right behind the report (transformers), or from the last state of the bar. Where nothing names it, epochs or reports
are counted instead, and a note says so: a step that only looks true is never made up.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from app.executor.attempts.printed_forms import (
    MAX_LINE_BYTES,
    WORTH_READING,
    Bar,
    Form,
    Total,
    Values,
    measures,
    printed_forms,
)
from app.executor.runs.events import MetricsEvent, NoteEvent, ProgressEvent, Source, clean_text

# a bar is taken away by spaces
TAKEN_AWAY = b" \r"
# from a report to the bar that is drawn anew behind it; between them stands a line of spaces, as wide as a terminal
NEAR_BYTES = 400
_NOTES = {
    "epochs": "The output names no steps: the curves count epochs.",
    "reports": "The output names no steps: the curves count the reports that were printed (1, 2, 3, ...).",
}
_OF_EVALUATION = re.compile(r"(?:eval|val|valid|validation|test)(?:[_/ .-]|$)|train_runtime$|train_loss$")
_COMPARED = ("loss", "learning_rate", "grad_norm", "reward", "epoch")
_OF_TRAINER = {"epoch", "learning_rate"}
_REMEMBERED = 50  # names of values
_SAME = 1e-3  # four digits are printed

PrintedEvent = MetricsEvent | ProgressEvent | NoteEvent


@dataclass
class State:
    """What must be remembered of the output so far.

    `step` and `total` are those of the training's bar. `passed`: steps of bars that the present one follows. `named`:
    the last step that a line named, `named_passed` those of the epochs before. `reports`: how many were counted.
    `planned`: steps that were announced. `note`: the one that was given. `reported`: names of reported values. `last`:
    the newest report's values. `recorded`: the step of the newest log record while records lag behind the reports.
    """

    step: int = 0
    total: int = 0
    passed: int = 0
    epoch: int | None = None
    first_epoch: int | None = None
    epochs: int | None = None
    has_metrics: bool = False
    named: int = 0
    named_passed: int = 0
    named_epoch: int = 0
    reports: int = 0
    planned: int | None = None
    note: str = ""
    reported: list[str] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)
    counted: bool = False
    has_records: bool = False
    recorded: int | None = None

    @classmethod
    def of(cls, document: object) -> "State":
        """Return the state that `document` gave."""
        known = {one.name for one in fields(cls)}
        given = document if isinstance(document, Mapping) else {}
        return cls(**{name: value for name, value in given.items() if name in known})

    def copy(self) -> "State":
        """Return the state as it is now."""
        state = State.__new__(State)
        vars(state).update(vars(self))
        return state

    def document(self) -> dict[str, Any]:
        """Return what differs from the beginning."""
        return {name: value for name, value in vars(self).items() if value != _BEGINNING[name]}


_BEGINNING = vars(State())


@dataclass(frozen=True)
class Line:
    """A line, or one state of a line that is drawn anew, and the forms in it.

    `in_bar`: it stands where a bar was taken away, which is drawn anew behind it.
    """

    start: int
    end: int
    forms: Sequence[Form]
    in_bar: bool = False


def printed_lines(data: bytes, *, final: bool) -> list[Line]:
    """Return the lines of `data` that say something of a training.

    A line whose end is not there yet waits for it, unless `final`; but a bar stays open until it is drawn anew.
    """
    found: list[Line] = []
    behind = 0
    for match in WORTH_READING.finditer(data):
        if match.start() < behind:
            continue
        floor = max(behind, match.start() - MAX_LINE_BYTES)
        mark = max(data.rfind(b"\n", floor, match.start()), data.rfind(b"\r", floor, match.start()))
        start = mark + 1 if mark >= 0 else floor
        ceiling = start + MAX_LINE_BYTES
        ends = [end for end in (data.find(b"\n", start, ceiling), data.find(b"\r", start, ceiling)) if end >= 0]
        end = min(ends, default=len(data))
        behind = max(end, match.end())
        if end > ceiling or (mark < 0 and floor > 0):
            continue  # a longer line, of which only a part would be read
        forms = printed_forms(data[start:end])
        if forms and (ends or final or all(isinstance(form, Bar) for form in forms)):
            found.append(Line(start, end, forms, in_bar=data.endswith(TAKEN_AWAY, 0, start)))
    return found


class PrintedOutput:
    """Turns the lines into events, in the order in which they were printed."""

    def __init__(self, state: State) -> None:
        self.state = state

    def events(self, lines: Sequence[Line], index: int, *, now: float) -> Iterator[PrintedEvent]:
        """Yield what the line says; those behind it may show its step. Bars only move `state`: see `progress`."""
        for form in lines[index].forms:
            match form:
                case Total(steps):
                    self.state.planned = steps
                case Bar() as bar:
                    yield from self._bar_events(bar, now=now)
                case Values() as values:
                    yield from self._report_events(values, _bar_behind(lines, index), now=now)

    def needs_more(self, lines: Sequence[Line], index: int) -> bool:
        """Say whether the bar that would tell the line's step may still be printed behind it."""
        form = lines[index].forms[-1]
        return (
            lines[index].in_bar and isinstance(form, Values) and form.step is None and _bar_behind(lines, index) is None
        )

    @property
    def progress(self) -> tuple[int, int | None] | None:
        """Return the training's step and how many there will be, as far as known; None before the first."""
        state = self.state
        if state.total:
            total = state.epochs * state.total if state.epochs else None
            return self._step, total if state.epoch is not None or state.passed else state.total
        return (state.named_passed + state.named, state.planned) if state.named else None

    def take_record(self, record: MetricsEvent) -> MetricsEvent | None:
        """Return the metrics of a log record as they count; None if they were printed before it.

        DeepExtension's callback writes a record at the end of each step, with what the newest report said: that of an
        earlier step, or of an evaluation, of which it keeps nothing but the epoch. The report is put at its own step.
        """
        state = self.state
        # a loop of one's own may print first and write the record of the same step then
        is_echo = state.last.keys() >= _OF_TRAINER and _same(state.last, record.values)
        if is_echo or state.recorded is not None:
            is_first = state.recorded is None and state.counted
            state.recorded = record.step
            # the report's step was not known: it was made at the end of the step before
            return replace(record, step=max(record.step - 1, 0)) if is_first else None
        says_nothing = not any(measures(name) for name in record.values)
        return None if says_nothing and state.reported else record

    def _bar_events(self, bar: Bar, *, now: float) -> Iterator[MetricsEvent]:
        before = self._step
        if not self._take(bar) or self._step == before:
            return
        # digits are few in a bar: what is reported as well counts once
        values = {name: value for name, value in bar.values.items() if name not in self.state.reported}
        if any("loss" in name for name in values):
            self.state.has_metrics = True
            yield MetricsEvent(now, self._step, _named(values), Source.FOUND)

    @property
    def _step(self) -> int:
        return self.state.passed + self.state.step

    def _take(self, bar: Bar, *, of_report: bool = False) -> bool:
        """Follow a bar if it is the training's."""
        state = self.state
        if bar.epoch is not None:
            state.first_epoch = bar.epoch if state.first_epoch is None else state.first_epoch
            state.passed = max(bar.epoch - state.first_epoch, 0) * bar.total
            if bar.epochs and state.first_epoch in (0, 1):
                state.epochs = bar.epochs + 1 - state.first_epoch  # counted from 0, the last one is named
            state.epoch = bar.epoch
        elif state.epoch is not None:
            return False
        elif state.total not in (0, bar.total):
            if state.step < state.total or (state.has_metrics and not of_report):
                return False  # a bar of an evaluation, within the training or behind it
            state.passed += state.total if state.has_metrics else 0
        elif bar.step < state.step and state.step >= state.total > 0 and state.has_metrics:
            state.passed += state.total  # another epoch
        state.step, state.total = bar.step, bar.total
        return True

    def _report_events(self, form: Values, bar: Bar | None, *, now: float) -> Iterator[PrintedEvent]:
        state = self.state
        is_evaluation = any(_OF_EVALUATION.match(name) for name in form.values) and "loss" not in form.values
        step, source = self._step_of(form, bar, is_evaluation=is_evaluation)
        if step is None:
            return
        state.has_metrics = state.has_metrics or source is not Source.COUNTED
        state.counted = source is Source.COUNTED
        new = [name for name in form.values if name not in state.reported]
        state.reported = [*state.reported, *new][:_REMEMBERED]
        if not is_evaluation:
            state.last = {name: value for name in _COMPARED if (value := form.values.get(name)) is not None}
        if state.counted:
            counted = "epochs" if form.epoch is not None else "reports"
            # records may still tell the steps
            if state.note != counted and (state.reports != 1 or not state.has_records):
                state.note = counted
                yield NoteEvent(now, _NOTES[counted])
        yield MetricsEvent(now, step, _named(form.values), source)

    def _step_of(self, form: Values, bar: Bar | None, *, is_evaluation: bool) -> tuple[int | None, Source]:
        state = self.state
        if form.step is not None:
            return self._named_step(form), Source.FOUND
        if bar is not None and self._take(bar, of_report=not is_evaluation):
            return self._step, Source.FOUND
        if state.recorded is not None:
            return state.recorded, Source.RECORD
        # a bar that was full before the first report is not the training's
        if state.total and (state.has_metrics or state.step < state.total):
            return self._step, Source.FOUND
        if state.named and form.epoch is None:
            return state.named_passed + state.named, Source.FOUND
        if form.epoch is not None:
            state.reports = form.epoch
            return form.epoch, Source.COUNTED
        if not form.is_dictionary:
            return None, Source.COUNTED
        if not is_evaluation and not ("epoch" in form.values and _same(state.last, form.values)):
            state.reports += 1
        return state.reports, Source.COUNTED

    def _named_step(self, form: Values) -> int:
        state = self.state
        assert form.step is not None
        if form.epoch is not None and form.epoch > state.named_epoch and form.step <= state.named:
            state.named_passed += form.total or state.named  # the steps of an epoch begin anew
        if form.epoch is not None:
            state.named_epoch = form.epoch
        state.named = form.step
        if form.total and form.epoch is None:
            state.planned = form.total
        return state.named_passed + form.step


def _bar_behind(lines: Sequence[Line], index: int) -> Bar | None:
    """Return the bar that was drawn anew right behind a report."""
    if lines[index].in_bar and index + 1 < len(lines):
        following = lines[index + 1]
        form = following.forms[0]
        if isinstance(form, Bar) and following.start - lines[index].end <= NEAR_BYTES:
            return form
    return None


def _same(last: Mapping[str, float], values: Mapping[str, float | None]) -> bool:
    """Say whether two reports agree in all that both have, the loss or reward among it, and in two values at least."""
    pairs = [(last[name], value) for name in _COMPARED if name in last and (value := values.get(name)) is not None]
    measured = any(name in last and values.get(name) is not None for name in ("loss", "reward"))
    return measured and len(pairs) > 1 and all(abs(one - two) <= _SAME * max(abs(one), abs(two)) for one, two in pairs)


def _named(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {clean_text(name, 200): value for name, value in values.items()}
