"""Read the results of a run from its events: scores on held-out rows before and after, last value of each curve."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from app.executor.runs.events import EvaluationEvent, MetricsEvent, RunEvents, SampleEvent, Source, StatusEvent
from app.executor.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Evaluation:
    """A score on held-out rows; None where the script has not measured (yet)."""

    name: str
    before: float | None
    after: float | None
    samples: int | None


@dataclass(frozen=True)
class Sample:
    """What a held-out prompt is answered with; None where it was not asked (yet)."""

    prompt: str
    wanted: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Reached:
    """The results of an attempt: its scores, the last value of every curve, the last status that it set for a task."""

    evaluations: tuple[Evaluation, ...]
    metrics: dict[str, float]
    statuses: dict[str, int] = field(default_factory=dict)


def reached(folder: RunFolder) -> Reached:
    """Read the events of an attempt that has ended; blocks."""
    evaluations: list[EvaluationEvent] = []
    metrics: dict[str, float] = {}
    statuses: dict[str, int] = {}
    source = Source.NOTHING
    events = RunEvents(folder)
    for event in events.read():
        match event:
            case EvaluationEvent():
                evaluations.append(event)
            case MetricsEvent():
                if events.metrics_source > source:  # a better one says all of it again
                    source = events.metrics_source
                    metrics = {}
                metrics |= {name: value for name, value in event.values.items() if value is not None}
            case StatusEvent():
                statuses[event.task] = event.status
            case _:
                pass
    return Reached(evaluations=paired_evaluations(evaluations), metrics=metrics, statuses=statuses)


def paired_evaluations(events: Iterable[EvaluationEvent]) -> tuple[Evaluation, ...]:
    """Join the `before` and `after` of each score, in the order in which they were first reported."""
    found: dict[str, dict[str, EvaluationEvent]] = {}
    for event in events:
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


def paired_samples(events: Iterable[SampleEvent]) -> tuple[Sample, ...]:
    """Join the answers to each prompt, by its number; a prompt that differs from an earlier attempt's replaces it."""
    found: dict[int, dict[str, SampleEvent]] = {}
    for event in events:
        phases = found.setdefault(event.number, {})
        if any((event.prompt, event.wanted) != (other.prompt, other.wanted) for other in phases.values()):
            phases.clear()
        phases[event.phase] = event
    return tuple(
        Sample(
            prompt=one.prompt,
            wanted=one.wanted,
            before=phases["before"].answer if "before" in phases else None,
            after=phases["after"].answer if "after" in phases else None,
        )
        for _number, phases in sorted(found.items())
        for one in [next(iter(phases.values()))]
    )
