"""What the demo shows of a job besides progress, and what `deepe demo --all` says at its end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from app.cli.client import Api, StreamEvent
from app.cli.output import duration, plot, print_table, run_seconds
from app.cli.watch import Screen, WatchedJob, describe_evaluation

PLOT_WIDTH, PLOT_HEIGHT = 60, 6


class DemoScreen:
    """A `Screen` around another one."""

    def __init__(self, inner: Screen, console: Console, *, on_step: Callable[[], None]) -> None:
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


@dataclass(frozen=True)
class Outcome:
    """A method's time without what is made once per machine, its scores, and what it left."""

    method: str
    seconds: float
    scores: tuple[str, ...] = ()
    artefacts: tuple[str, ...] = ()
    failure: str = ""


def outcome_of(api: Api, method: str, jobs: Sequence[dict[str, Any]], *, seconds: float) -> Outcome:
    """Return what the jobs of a chain measured and made."""
    documents = [api.get(f"/jobs/{job['id']}") for job in jobs]
    models = [api.get(f"/models/{job['result_model']}") for job in documents if job.get("result_model")]
    return Outcome(
        method=method,
        seconds=seconds,
        scores=tuple(describe_evaluation(entry["name"], entry) for job in documents for entry in job["evaluations"]),
        artefacts=tuple(dict.fromkeys(str(model["path"]) for model in models if model["path"])),
    )


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Print one row for each method."""
    rows = [
        (
            outcome.method,
            duration(outcome.seconds),
            outcome.failure or "\n".join(outcome.scores),
            "\n".join(outcome.artefacts),
        )
        for outcome in outcomes
    ]
    print_table(("method", "time", "before → after", "made, below the home"), rows, nothing="No method is shipped.")
