"""What the demo shows of a job besides progress: the loss curve and the scores before and after."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console

from app.cli.charts import plot
from app.cli.output import duration, run_seconds
from app.cli.sse import StreamEvent
from app.cli.watching import WatchedJob, describe_evaluation

if TYPE_CHECKING:
    from app.cli.watch import Screen

PLOT_WIDTH, PLOT_HEIGHT = 60, 6


class DemoScreen:
    """A `Screen` around another one."""

    def __init__(self, inner: "Screen", console: Console, *, on_step: Callable[[], None]) -> None:
        self._inner = inner
        self._console = console
        self._on_step = on_step

    def begin(self, job: WatchedJob) -> None:
        self._inner.begin(job)

    def show(self, job: WatchedJob, event: StreamEvent, lines: list[str]) -> None:
        steps = event.event in {"progress", "metrics"} and (event.data.get("step") or 0) >= 1
        if steps and job.stage == "training":
            self._on_step()
        self._inner.show(job, event, lines)

    def finish(self, job: WatchedJob, document: dict[str, Any]) -> None:
        self._inner.finish(job, document)
        curve = job.curve
        if curve is not None and document["status"] == "succeeded":
            name, points = curve
            self._console.print(f"\n  {name}", style="bold", markup=False)
            for line in plot(points, width=PLOT_WIDTH, height=PLOT_HEIGHT):
                self._console.print(f"  {line}", style="cyan", markup=False)
        for name, scores in job.evaluations.items():
            self._console.print(f"  [bold green]{describe_evaluation(name, scores)}[/]")
        self._console.print(f"  {job.stage} took {duration(run_seconds(document))}", markup=False)
