"""What the commands print: consoles, JSON, tables, times. Everything for machines goes to stdout, talk to stderr."""

import functools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from app.domain.plain_text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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


def console() -> "Console":
    """Return a console on the present stdout; lines are folded for people's terminals only, not for `grep`."""
    wide = not is_terminal() and "COLUMNS" not in os.environ
    return _console_class()(highlight=False, width=FILE_WIDTH if wide else None)


def errors() -> "Console":
    """Return a console on the present stderr."""
    return _console_class()(stderr=True, highlight=False)


@functools.cache
def _console_class() -> "type[Console]":
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PrintableConsole(Console):
        """Shows the control characters of texts by their codes; its own colours and movements stay."""

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return PrintableConsole


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


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> "Table":
    """Return a plain table; cells are Rich markup only where they come from `styled`."""
    from rich import box
    from rich.table import Table

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
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in fields.items():
        if value not in (None, "", [], {}):
            grid.add_row(name, _cell(value))
    console().print(grid)


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
    from rich.markup import escape

    if isinstance(value, Markup):
        return value
    if value is None:
        return ""
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    return escape(printable(str(value)))  # here too: the width of a column is measured before it is rendered
