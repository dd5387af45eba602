"""Compute a stage's progress, speed and estimated end."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

from app.executor.runs.events import ProgressEvent

_WINDOW = 60
# an interval is a break (suspended machine, clock set forward) when it is both long and far out of line
_BREAK_SECONDS = 300.0
_BREAK_FACTOR = 30.0


@dataclass(frozen=True)
class Progress:
    """State of a stage's progress; None where it cannot be known yet. `time` is the script's, in Unix seconds."""

    step: int
    total: int | None
    percent: float | None
    steps_per_second: float | None
    eta_seconds: float | None
    message: str | None
    time: float
    bytes_done: int | None = None
    bytes_total: int | None = None


@dataclass(frozen=True)
class _Interval:
    seconds: float
    steps: int
    share: float


class ProgressEstimator:
    """Follows progress events and estimates from the recent ones.

    A step that goes back (the training resumed from a checkpoint) starts the measuring anew; an interval over which the
    clock went back, or leapt, is left out.
    """

    def __init__(self, events: Iterable[ProgressEvent] = ()) -> None:
        self._last: ProgressEvent | None = None
        self._message: str | None = None
        self._intervals: deque[_Interval] = deque(maxlen=_WINDOW)
        for event in events:
            self.add(event)

    def add(self, event: ProgressEvent) -> None:
        """Take the next event, in the order in which they were written."""
        last, self._last = self._last, event
        if event.message is not None:
            self._message = event.message
        if last is None:
            return
        if event.step < last.step or event.total != last.total:
            self._intervals.clear()
            return
        seconds, steps, share = event.time - last.time, event.step - last.step, _share(event) - _share(last)
        if seconds > 0 and (steps > 0 or share > 0):
            self._intervals.append(_Interval(seconds, steps, max(share, 0.0)))
        elif steps == 0:
            # only the message changed: the time belongs to the step that is still under way
            self._last = replace(event, time=last.time)

    @property
    def progress(self) -> Progress | None:
        """Return the present state; None before the first event."""
        if self._last is None:
            return None
        event, share = self._last, _share(self._last)
        intervals = self._steady()
        seconds = sum(interval.seconds for interval in intervals)
        steps = sum(interval.steps for interval in intervals)
        gained = sum(interval.share for interval in intervals)
        known = event.total is not None or event.percent is not None
        return Progress(
            step=event.step,
            total=event.total,
            percent=round(100 * share, 2) if known else None,
            steps_per_second=steps / seconds if steps and seconds else None,
            eta_seconds=_eta(share, gained=gained, seconds=seconds) if known else None,
            message=self._message,
            time=event.time,
            bytes_done=event.bytes_done,
            bytes_total=event.bytes_total,
        )

    def _steady(self) -> list[_Interval]:
        if not self._intervals:
            return []
        usual = median(interval.seconds for interval in self._intervals)
        longest = max(_BREAK_SECONDS, _BREAK_FACTOR * usual)
        return [interval for interval in self._intervals if interval.seconds <= longest]


def _share(event: ProgressEvent) -> float:
    """Return the part that is done, 0 to 1; a percentage says more than steps, which differ in length."""
    if event.percent is not None:
        return min(max(event.percent / 100, 0.0), 1.0)
    if event.total:
        return min(event.step / event.total, 1.0)
    return 1.0 if event.total == 0 else 0.0


def _eta(share: float, *, gained: float, seconds: float) -> float | None:
    if share >= 1.0:
        return 0.0
    return (1.0 - share) * seconds / gained if gained > 0 else None
