"""Draw a watched job in a terminal: progress bar, loss, last lines of output; one summary line when it has ended."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from app.cli.charts import sparkline
from app.cli.output import duration, run_seconds, styled
from app.cli.sse import StreamEvent
from app.cli.watch import ending_lines
from app.cli.watching import WatchedJob, describe_evaluation, describe_progress

BAR_WIDTH = 32


class LiveScreen:
    """A `Screen` for terminals; a context manager, because it owns the cursor while it draws."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin(self, job: WatchedJob) -> None:
        self._live.update(draw(job))

    def show(self, job: WatchedJob, event: StreamEvent, lines: list[str]) -> None:
        self._live.update(draw(job))

    def finish(self, job: WatchedJob, document: dict[str, Any]) -> None:
        self._live.update(Text(""), refresh=True)
        self._console.print(summary(job, document))
        for line in ending_lines(document):
            self._console.print(line, markup=False)


def draw(job: WatchedJob) -> RenderableType:
    """Return the picture of a job that runs."""
    percent = job.percent
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text.from_markup(f"[bold]{escape(job.stage)}[/] {styled(job.status)}"),
        ProgressBar(total=100, completed=percent or 0.0, width=BAR_WIDTH, pulse=percent is None),
        Text(describe_progress(job.progress)),
    )
    parts: list[RenderableType] = [head]
    curve = job.curve
    if curve is not None:
        name, points = curve
        latest = job.latest.get(name)
        value = "" if latest is None else f"{latest:.4g}"
        parts.append(Text(f"  {name} {sparkline([value for _, value in points], width=48)} {value}", style="cyan"))
    parts += [Text(f"  {describe_evaluation(name, scores)}") for name, scores in job.evaluations.items()]
    parts += [Text(f"  │ {line}", style="dim", no_wrap=True, overflow="ellipsis") for line in job.log_lines()]
    return Group(*parts)


def summary(job: WatchedJob, document: dict[str, Any]) -> RenderableType:
    """Return what stays on the screen of a job that has ended."""
    parts = [f"[bold]{escape(job.stage)}[/] {styled(document['status'])}", duration(run_seconds(document))]
    curve = job.curve
    if curve is not None:
        name, points = curve
        parts.append(f"{escape(name)} {sparkline([value for _, value in points], width=24)} {job.latest.get(name):.4g}")
    parts += [escape(describe_evaluation(name, scores)) for name, scores in job.evaluations.items()]
    return Text.from_markup("  ".join(part for part in parts if part))
