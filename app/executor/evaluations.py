"""What a run reached, from its events: scores on held-out rows before and after, and the last value of each curve."""

from collections.abc import Iterable
from dataclasses import dataclass

from app.executor.stage_events import EvaluationEvent, MetricsEvent, StageEvent


@dataclass(frozen=True)
class Evaluation:
    """A score on held-out rows; None where the script has not measured (yet)."""

    name: str
    before: float | None
    after: float | None
    samples: int | None


def paired_evaluations(events: Iterable[StageEvent]) -> tuple[Evaluation, ...]:
    """Join the `before` and `after` of each score, in the order in which they were first reported."""
    found: dict[str, dict[str, EvaluationEvent]] = {}
    for event in events:
        if isinstance(event, EvaluationEvent):
            found.setdefault(event.name, {})[event.phase] = event
    return tuple(
        Evaluation(
            name=name,
            before=phases["before"].value if "before" in phases else None,
            after=phases["after"].value if "after" in phases else None,
            samples=next(iter(reversed(phases.values()))).samples,
        )
        for name, phases in found.items()
    )


def final_metrics(events: Iterable[StageEvent]) -> dict[str, float]:
    """Return the last number of every curve."""
    last: dict[str, float] = {}
    for event in events:
        if isinstance(event, MetricsEvent):
            last |= {name: value for name, value in event.values.items() if value is not None}
    return last
