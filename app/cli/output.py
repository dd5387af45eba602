"""What the commands print: consoles, JSON, tables, times, curves. Everything for machines goes to stdout."""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from app.domain.plain_text import printable

MIB = 1024 * 1024
FILE_WIDTH = 1000
# columns to be copied, or of short words: the others are folded before these
WHOLE_COLUMNS = frozenset({"id", "stage", "status", "state", "type", "version", "code"})
STATUS_STYLES = {
    "queued": "dim",
    "launching": "cyan",
    "running": "cyan",
    "stopping": "yellow",
    "succeeded": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "ok": "green",
    "warn": "yellow",
    "fail": "bold red",
    "ready": "green",
    "free": "green",
    "leased": "cyan",
    "draining": "yellow",
    "drained": "yellow",
    "refusing": "yellow",
    "occupied": "yellow",
    "quarantined": "bold red",
    "missing": "bold red",
    "unknown": "bold red",
    "dead": "bold red",
}
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_BLANK = " "


class PrintableConsole(Console):
    """Shows the control characters of texts by their codes; its own colours and movements stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def console() -> Console:
    """Return a console on the present stdout; lines are folded for people's terminals only, not for `grep`."""
    wide = not is_terminal() and "COLUMNS" not in os.environ
    return PrintableConsole(highlight=False, width=FILE_WIDTH if wide else None)


def errors() -> Console:
    """Return a console on the present stderr."""
    return PrintableConsole(stderr=True, highlight=False)


def is_terminal() -> bool:
    """Say whether a person watches stdout."""
    return sys.stdout.isatty()


def print_json(document: Any) -> None:
    """Print one document, indented for people when they watch."""
    text = json.dumps(document, ensure_ascii=False, indent=2 if is_terminal() else None)
    write(text + "\n")


def print_json_line(document: Any) -> None:
    """Print one line of a stream at once."""
    write(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")


def write(text: str) -> None:
    """Write to stdout: as it is to a file, without control characters to a terminal.

    A carriage return stays: progress bars use it. Characters that the encoding lacks do not end the program.
    """
    if is_terminal():
        text = printable(text, keep="\n\t\r")
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def styled(status: str) -> "Markup":
    """Return `status` in its colour, as Rich markup."""
    style = STATUS_STYLES.get(status)
    return Markup(f"[{style}]{status}[/]" if style else status)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a plain table; cells are Rich markup only where they come from `styled`."""
    drawn = Table(*columns, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for column in drawn.columns:
        column.overflow = "fold"
        column.no_wrap = column.header in WHOLE_COLUMNS
    for row in rows:
        drawn.add_row(*(_cell(value) for value in row))
    return drawn


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, nothing: str) -> None:
    """Print a table, or the sentence `nothing` when it would be empty."""
    console().print(table(columns, rows) if rows else nothing)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one thing: a name and a value on each line, values that are empty left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in fields.items():
        if value not in (None, "", [], {}):
            grid.add_row(name, _cell(value))
    console().print(grid)


def print_entries(kind: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """Print what is wrong or unusual to stderr, each with its place in the request if it has one."""
    for entry in entries:
        place = f"{entry['pointer']}: " if entry["pointer"] else ""
        print(printable(f"{kind}: {place}{entry['detail']}"), file=sys.stderr)


def ago(moment: str | None, *, now: datetime | None = None) -> str:
    """Return how long ago an API time was, in the largest unit that is not zero."""
    if not moment:
        return ""
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(moment)).total_seconds()
    if seconds < 5:
        return "now"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit} ago"
    return f"{int(seconds)} s ago"


def duration(seconds: float | None) -> str:
    """Return `1:02:03`, `2:03` or `4.5 s`."""
    if seconds is None or seconds < 0:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Return `4.2 MiB`, or `0.5 KiB` for little."""
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"


def run_seconds(job: Mapping[str, Any]) -> float | None:
    """Return how long a job ran, None if it did not."""
    started, finished = job.get("started_at"), job.get("finished_at")
    if not started or not finished:
        return None
    return (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds()


class Markup(str):
    """A cell that may carry Rich markup."""

    __slots__ = ()


def _cell(value: object) -> str:
    if isinstance(value, Markup):
        return value
    if value is None:
        return ""
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    return escape(printable(str(value)))  # here too: the width of a column is measured before it is rendered


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
