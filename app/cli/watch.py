"""Follow jobs to their end: one stream after the other along the chain, resumed when a connection breaks.

What is known of a job is a value that events change (`WatchedJob`); a screen shows it: a picture in a terminal, lines
elsewhere, JSON for programs.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from app.cli.client import Api, ConnectionLost, ServiceFailed, StreamEvent, Unreachable, segment
from app.cli.command import CliFailure, typed
from app.cli.output import console, duration, is_terminal, print_json_line, run_seconds, sparkline, styled, write

TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
LOG_LINES: Final = 6
PROGRESS_STEP_PERCENT: Final = 10.0
_RECORD: Final = "[log_data]: "  # a record of the platform in the output; its facts arrive as events
_SIGNS_OF_LIFE: Final = frozenset({"progress", "metrics", "evaluation"})
_CURVES: Final = ("loss", "train_loss", "reward")
"""Metrics worth a curve, best first."""
PATIENCE_SECONDS: Final = 60.0
"""How long a service may be away before watching gives up."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0
_QUEUE_SECONDS = 0.2
_PASSING = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})
BAR_WIDTH = 32


@dataclass
class WatchedJob:
    """One job of the chain, as far as its stream has been read."""

    id: str
    stage: str
    name: str = ""
    status: str = "queued"
    reason: str | None = None
    reason_detail: str | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 0
    curves: dict[str, dict[float, float | None]] = field(default_factory=dict)
    latest: dict[str, float | None] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    log: deque[str] = field(default_factory=lambda: deque([""], maxlen=4 * LOG_LINES))
    ended: bool = False
    _told_percent: float = -PROGRESS_STEP_PERCENT

    @property
    def percent(self) -> float | None:
        """How far it is, None while that is not known."""
        if self.status == "succeeded":
            return 100.0
        value = self.progress.get("percent")
        return None if value is None else float(value)

    @property
    def curve(self) -> tuple[str, list[tuple[float, float | None]]] | None:
        """The metric that is worth watching, with its points."""
        return next(((name, sorted(self.curves[name].items())) for name in _CURVES if name in self.curves), None)

    def apply(self, event: StreamEvent) -> Iterator[str]:
        """Take one event in; yield the lines that a reader without a screen should see."""
        if event.event in _SIGNS_OF_LIFE and self.status == "launching":
            # the file of events is read more often than the database that says so
            self.status = "running"
            yield f"{self.stage}: running"
        match event.event:
            case "state":
                yield from self._state(event.data)
            case "progress":
                yield from self._progress(event.data)
            case "metrics":
                self._metrics(event.data)
            case "evaluation":
                yield from self._evaluation(event.data)
            case "log":
                self._log(str(event.data.get("text", "")))
            case "note":
                yield f"{self.stage}: {event.data['message']}"
            case "end":
                self.status, self.ended = str(event.data["status"]), True

    def log_lines(self) -> list[str]:
        """Return the last lines of the output that are meant for people."""
        return [line for line in self.log if line.strip() and not line.startswith(_RECORD)][-LOG_LINES:]

    def _state(self, data: Mapping[str, Any]) -> Iterator[str]:
        if data.get("job") not in (None, self.id):
            return
        if data.get("attempt") not in (None, self.attempt):
            self._begin_attempt(data["attempt"])
        before, self.status = self.status, str(data["status"])
        self.reason, self.reason_detail = data.get("reason"), data.get("reason_detail")
        if self.status != before:
            yield f"{self.stage}: {self.status}"

    def _begin_attempt(self, attempt: int) -> None:
        """Forget what an earlier attempt had reached: a new one begins at step 1."""
        self.attempt = attempt
        self.progress, self._told_percent = {}, -PROGRESS_STEP_PERCENT
        for known in (self.curves, self.latest, self.evaluations):
            known.clear()

    def _progress(self, data: Mapping[str, Any]) -> Iterator[str]:
        self.progress = data
        percent = self.percent
        if percent is None or (percent < self._told_percent + PROGRESS_STEP_PERCENT and percent < 100.0):
            return
        if percent == self._told_percent:
            return
        self._told_percent = percent
        yield f"{self.stage}: {describe_progress(data)}{self._latest_text()}"

    def _metrics(self, data: Mapping[str, Any]) -> None:
        for name, value in data["values"].items():
            # by step: points that were on their way when a connection broke come again
            self.curves.setdefault(name, {})[data["step"]] = value
            if value is not None:
                self.latest[name] = value

    def _evaluation(self, data: Mapping[str, Any]) -> Iterator[str]:
        known = self.evaluations.setdefault(str(data["name"]), {"before": None, "after": None, "samples": None})
        if "phase" in data:
            known[data["phase"]] = data["value"]
            known["samples"] = data.get("samples")
        else:
            known.update({key: data[key] for key in ("before", "after", "samples") if data.get(key) is not None})
        yield f"{self.stage}: {describe_evaluation(str(data['name']), known)}"

    def _log(self, text: str) -> None:
        first, *rest = text.split("\n")
        # a progress bar that the script rewrites: the open line is replaced
        self.log[-1] = first.removeprefix("\r") if first.startswith("\r") else self.log[-1] + first
        self.log.extend(rest)

    def _latest_text(self) -> str:
        curve = self.curve
        if curve is None:
            return ""
        value = self.latest.get(curve[0])
        return "" if value is None else f", {curve[0]} {value:.4g}"


def describe_progress(progress: Mapping[str, Any]) -> str:
    """Return `40 %, step 40 of 100, 12.3 s left`; of a download `40 %, 0.6 of 1.6 GB, 12.3 s left`."""
    parts = []
    if progress.get("percent") is not None:
        parts.append(f"{progress['percent']:.0f} %")
    if progress.get("bytes_done") is not None:
        parts.append(_described_bytes(progress["bytes_done"], progress.get("bytes_total")))
    elif progress.get("step") is not None and progress.get("total"):
        parts.append(f"step {progress['step']} of {progress['total']}")
    if (progress.get("eta_seconds") or 0) >= 1:
        parts.append(f"{duration(progress['eta_seconds'])} left")
    if progress.get("message"):
        parts.append(str(progress["message"]))
    return ", ".join(parts)


def _described_bytes(done: int, total: int | None) -> str:
    unit, size = ("GB", 1e9) if max(done, total or 0) >= 1e9 else ("MB", 1e6)
    return f"{done / size:.1f} {unit}" if total is None else f"{done / size:.1f} of {total / size:.1f} {unit}"


def describe_evaluation(name: str, scores: Mapping[str, Any]) -> str:
    """Return `exact_match 0.05 → 0.98 (held-out samples: 40)`; before the end, only what it was before."""
    known = [f"{scores[phase]:.3g}" for phase in ("before", "after") if scores.get(phase) is not None]
    samples = f" (held-out samples: {scores['samples']})" if scores.get("samples") else ""
    when = " before" if scores.get("before") is not None and scores.get("after") is None else ""
    return f"{name}{when} {' → '.join(known) or 'unknown'}{samples}"


Clock = Callable[[], float]


class Screen(Protocol):
    """Shows what happens. `lines` are for readers without a terminal; others draw the job itself."""

    def begin(self, job: WatchedJob) -> None: ...
    def show(self, job: WatchedJob, event: StreamEvent, lines: list[str]) -> None: ...
    def finish(self, job: WatchedJob, document: dict[str, Any]) -> None: ...


class PlainScreen:
    """One line for each state, progress step and evaluation."""

    def __init__(self, *, indent: str = "") -> None:
        self._indent = indent

    def begin(self, job: WatchedJob) -> None:
        if job.status == "queued":
            self._write([f"{job.stage}: queued"])

    def show(self, job: WatchedJob, event: StreamEvent, lines: list[str]) -> None:
        self._write(lines)

    def finish(self, job: WatchedJob, document: dict[str, Any]) -> None:
        self._write(ending_lines(document))

    def _write(self, lines: list[str]) -> None:
        write("".join(f"{self._indent}{line}\n" for line in lines))


class JsonScreen:
    """One JSON object a line: every event as it came, at last the job."""

    def begin(self, job: WatchedJob) -> None:
        pass

    def show(self, job: WatchedJob, event: StreamEvent, lines: list[str]) -> None:
        print_json_line({"job": job.id, "event": event.event, "id": event.id, "data": event.data})

    def finish(self, job: WatchedJob, document: dict[str, Any]) -> None:
        print_json_line({"job": job.id, "event": "job", "data": document})


def watch_to_end(api: Api, job_id: str, *, as_json: bool) -> list[dict[str, Any]]:
    """Watch a chain on whatever screen there is and return the jobs as they ended."""
    if as_json:
        return watch_chain(api, job_id, JsonScreen())
    if not is_terminal():
        return watch_chain(api, job_id, PlainScreen())
    with LiveScreen(console()) as screen:
        return watch_chain(api, job_id, screen)


def watch_chain(api: Api, job_id: str, screen: Screen) -> list[dict[str, Any]]:
    """Watch a job and those that follow it in its chain; return how each ended. The first failure is the last seen."""
    first = api.get(f"/jobs/{segment(job_id)}")
    ids = [link["id"] for link in first["chain"]]
    ids = ids[ids.index(first["id"]) :] if first["id"] in ids else [first["id"]]
    ended = []
    for identity in ids:
        ended.append(watch_one(api, identity, screen))
        if ended[-1]["status"] != "succeeded":
            break
    return ended


def watch_one(api: Api, job_id: str, screen: Screen) -> dict[str, Any]:
    """Watch one job to its end and return it as it is then; the building of an environment it waits for comes first."""
    document = api.get(f"/jobs/{segment(job_id)}")
    job = WatchedJob(id=document["id"], stage=document["stage"], name=document["name"], status=document["status"])
    screen.begin(job)
    _watch_builds(api, document, screen)
    for event in follow(api, f"/jobs/{job.id}/events"):
        lines = list(job.apply(event))
        screen.show(job, event, lines)
    document = _patiently(lambda: _ended(api, job.id))
    job.status, job.reason, job.reason_detail = document["status"], document["reason"], document["reason_detail"]
    screen.finish(job, document)
    return document


def follow(
    api: Api, path: str, *, clock: Clock = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[StreamEvent]:
    """Yield a stream's events up to its `end`, resuming behind the last one when the connection breaks."""
    last_id: str | None = None
    pause, last_heard = _FIRST_PAUSE, clock()
    while True:
        try:
            for event in api.stream("GET", path, last_event_id=last_id):
                pause, last_heard = _FIRST_PAUSE, clock()
                if event.event == "problem":
                    break
                last_id = event.id or last_id
                yield event
                if event.event == "end":
                    return
        except (ConnectionLost, ServiceFailed) as failure:
            if _is_lasting(failure) or clock() - last_heard > PATIENCE_SECONDS:
                raise
        if clock() - last_heard > PATIENCE_SECONDS:
            raise ConnectionLost(f"The stream of {path} does not go on.")
        sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def ending_lines(document: dict[str, Any]) -> list[str]:
    """Return what a person should know of a job that has ended: nothing more after a success."""
    if document["status"] == "succeeded":
        return []
    lines = [f"{document['stage']}: {document['status']} ({document['reason']})"]
    if document.get("reason_detail"):
        lines.append(str(document["reason_detail"]))
    tail = [line for line in document.get("log_tail") or [] if line.strip()]
    if tail:
        lines += ["Last lines of its output:", *(f"  {line}" for line in tail)]
    lines.append(f"The whole output: {typed('jobs logs')} {document['id']}")
    return lines


def _watch_builds(api: Api, document: dict[str, Any], screen: Screen) -> None:
    """Wait until a job leaves the queue; its stream does not tell that an environment is built for it meanwhile."""
    job_id, watched = document["id"], set[str]()
    while document["status"] == "queued":
        build = document["waiting_for"]
        if build is not None and build not in watched:
            watched.add(build)
            watch_one(api, build, screen)
        else:
            time.sleep(_QUEUE_SECONDS)
        document = _patiently(lambda: api.get(f"/jobs/{job_id}"))


def _is_lasting(failure: CliFailure) -> bool:
    """Say whether waiting is useless: a defect stays, a service or database that is away comes back."""
    return isinstance(failure, ServiceFailed) and failure.status not in _PASSING


def _ended(api: Api, job_id: str) -> dict[str, Any] | None:
    document: dict[str, Any] = api.get(f"/jobs/{job_id}")
    return document if document["status"] in TERMINAL else None


def _patiently(read: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """Return what `read` says once it says something; a service that is away meanwhile is waited for."""
    deadline, pause = time.monotonic() + PATIENCE_SECONDS, _FIRST_PAUSE
    while True:
        try:
            document = read()
            if document is not None:
                return document
        except (Unreachable, ServiceFailed) as failure:
            if _is_lasting(failure) or time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise ConnectionLost("The job's end was announced, but the service does not show it.")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


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
