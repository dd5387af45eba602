"""What is known of a job that is watched: a value that events change, and lines that say what changed.

Pure: events in, lines out. The screen is drawn from it by `app.cli.watch_screen`, the connection is kept by
`app.cli.watch`.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from app.cli.output import duration
from app.cli.sse import StreamEvent

TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
LOG_LINES: Final = 6
PROGRESS_STEP_PERCENT: Final = 10.0
_RECORD: Final = "[log_data]: "  # a record of the platform in the output; its facts arrive as events
_SIGNS_OF_LIFE: Final = frozenset({"progress", "metrics", "evaluation"})
_CURVES: Final = ("loss", "train_loss", "reward")
"""Metrics worth a curve, best first."""


@dataclass
class WatchedJob:
    """One job of the chain as far as its stream has told."""

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
    """Return `40 %, step 40 of 100, 12.3 s left`."""
    parts = []
    if progress.get("percent") is not None:
        parts.append(f"{progress['percent']:.0f} %")
    if progress.get("step") is not None and progress.get("total"):
        parts.append(f"step {progress['step']} of {progress['total']}")
    if (progress.get("eta_seconds") or 0) >= 1:
        parts.append(f"{duration(progress['eta_seconds'])} left")
    if progress.get("message"):
        parts.append(str(progress["message"]))
    return ", ".join(parts)


def describe_evaluation(name: str, scores: Mapping[str, Any]) -> str:
    """Return `exact_match 0.05 → 0.98 (held-out samples: 40)`; before the end, only what it was before."""
    known = [f"{scores[phase]:.3g}" for phase in ("before", "after") if scores.get(phase) is not None]
    samples = f" (held-out samples: {scores['samples']})" if scores.get("samples") else ""
    when = " before" if scores.get("before") is not None and scores.get("after") is None else ""
    return f"{name}{when} {' → '.join(known) or 'unknown'}{samples}"
