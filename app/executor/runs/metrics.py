"""Curves of a job: the metrics of its attempts, one series per name, and their reduction for a chart."""

from collections.abc import Sequence
from typing import NamedTuple

from app.executor.runs.events import MetricsEvent, RunEvents, Source
from app.executor.runs.run_folder import RunFolder


class Point(NamedTuple):
    """A metric at a step. `value` is `None` for NaN, infinity and null."""

    step: int
    time: float
    value: float | None


class MetricSeries:
    """The curves of a job over its attempts, read incrementally: `refresh` costs what is new.

    A step that comes again replaces the earlier value. When a later attempt goes on at step s, whatever earlier
    attempts reported from s on is dropped: the training went back to that point. Step 0 does not say so: many a script
    measures before it loads a checkpoint.
    """

    def __init__(self, folders: Sequence[RunFolder] = ()) -> None:
        self._sources: list[RunEvents] = []
        self._speaking = -1
        self._first_step = 0
        self._source = Source.NOTHING
        self._curves: dict[str, dict[int, Point]] = {}
        self._sorted: dict[str, tuple[Point, ...]] = {}
        self._before: dict[str, dict[int, Point]] = {}
        for folder in folders:
            self.add_attempt(folder)

    def add_attempt(self, folder: RunFolder) -> None:
        """Add the next attempt's run folder, in the order in which they ran."""
        self._sources.append(RunEvents(folder))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the series, in the order in which they appeared."""
        return tuple(name for name, curve in self._curves.items() if curve)

    @property
    def latest(self) -> dict[str, Point]:
        """Return the last point of each series."""
        return {name: self.series(name)[-1] for name in self.names}

    def refresh(self) -> int:
        """Read what is new and return how many values it brought."""
        count = 0
        for index, source in enumerate(self._sources):
            events = [event for event in source.read() if isinstance(event, MetricsEvent)]
            if not events:
                continue
            first = next((event.step for event in events if event.step > 0 or self._speaking < 0), None)
            if first is not None:
                self._enter(index, first, source=source.metrics_source)
            for event in events:
                # the last words of an earlier attempt may be found in its output when the next one speaks already
                if index >= self._speaking or event.step < self._first_step:
                    count += self._add(event)
        return count

    def series(self, name: str, limit: int | None = None) -> tuple[Point, ...]:
        """Return the curve `name` by step, reduced to at most `limit` points; empty for an unknown name."""
        points = self._sorted.get(name)
        if points is None:
            points = tuple(sorted(self._curves.get(name, {}).values()))
            self._sorted[name] = points
        return points if limit is None else downsample(points, limit)

    def _enter(self, index: int, step: int, *, source: Source) -> None:
        """Prepare for metrics of attempt `index` whose first one is at `step`."""
        if index > self._speaking:
            self._before = self._curves
        elif index < self._speaking or source <= self._source:
            return
        # what was found in one place first comes again in a better one, which may begin at another step: steps of a
        # report without one are counted
        self._curves = {
            name: {at: point for at, point in curve.items() if at < step} for name, curve in self._before.items()
        }
        self._sorted.clear()
        self._speaking, self._first_step, self._source = index, step, source

    def _add(self, event: MetricsEvent) -> int:
        for name, value in event.values.items():
            self._curves.setdefault(name, {})[event.step] = Point(event.step, event.time, value)
            self._sorted.pop(name, None)
        return len(event.values)


def downsample(points: Sequence[Point], limit: int) -> tuple[Point, ...]:
    """Reduce a curve to at most `limit` of its own points that look the same in a chart.

    The first and the last point are kept, and of each of the equal buckets between them the smallest and the largest
    value, so no spike is lost. A bucket of holes stays a hole.
    """
    count = len(points)
    if count <= limit:
        return tuple(points)
    if limit <= 0:
        return ()
    if limit == 1:
        return (points[-1],)
    buckets = (limit - 2) // 2
    inner = count - 2
    kept = [points[0]]
    lows = [_INFINITY if point.value is None else point.value for point in points]
    highs = [-_INFINITY if point.value is None else point.value for point in points]
    for bucket in range(buckets):
        begin = 1 + inner * bucket // buckets
        end = 1 + inner * (bucket + 1) // buckets
        lowest = begin + _index_of(lows[begin:end], smallest=True)
        highest = begin + _index_of(highs[begin:end], smallest=False)
        kept += [points[index] for index in sorted({lowest, highest})]
    kept.append(points[-1])
    return tuple(kept)


_INFINITY = float("inf")


def _index_of(values: list[float], *, smallest: bool) -> int:
    return values.index(min(values) if smallest else max(values))
