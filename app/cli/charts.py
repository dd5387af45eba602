"""Curves in text: one line (`sparkline`) or several (`plot`). Pure functions of the values."""

import math
from collections.abc import Sequence
from itertools import pairwise

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_BLANK = " "

Points = Sequence[tuple[float, float | None]]


def sparkline(values: Sequence[float | None], *, width: int = 32) -> str:
    """Return one character per bucket of values, low to high; holes and NaN are left out."""
    means = buckets(values, width)
    if not means:
        return ""
    low, high = min(means), max(means)
    span = high - low
    levels = len(_EIGHTHS) - 2
    return "".join(_EIGHTHS[1 + (round((value - low) / span * levels) if span else levels // 2)] for value in means)


def plot(points: Points, *, width: int = 60, height: int = 6) -> list[str]:
    """Return the lines of a filled curve with its highest and lowest value at the left and the steps below."""
    finite = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    if not finite:
        return []
    means = buckets([value for _, value in finite], width)
    # from zero when that is near: a loss that falls from 2.1 to 0.1 shall look like it
    low = 0.0 if 0 <= min(means) < max(means) / 3 else min(means)
    span = (max(means) - low) or 1.0
    eighths = [max(1, round((value - low) / span * height * 8)) for value in means]
    labels = [f"{max(means):.3g}", *[""] * (height - 2), f"{low:.3g}"]
    margin = max(len(label) for label in labels)
    lines = [
        f"{label:>{margin}} ┤" + "".join(_EIGHTHS[min(8, max(0, filled - row * 8))] for filled in eighths)
        for label, row in zip(labels, range(height - 1, -1, -1), strict=True)
    ]
    first, last = f"step {finite[0][0]:g}", f"{finite[-1][0]:g}"
    gap = _BLANK * max(1, len(means) - len(first) - len(last))
    return [*lines, f"{_BLANK * margin} └" + "─" * len(means), f"{_BLANK * (margin + 2)}{first}{gap}{last}"]


def buckets(values: Sequence[float | None], count: int) -> list[float]:
    """Return the means of at most `count` runs of neighbouring values."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) <= count:
        return finite
    edges = [round(index * len(finite) / count) for index in range(count + 1)]
    return [sum(finite[start:end]) / (end - start) for start, end in pairwise(edges) if end > start]
