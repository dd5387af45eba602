"""Compare jobs: the parameters in which they differ, how they ended, their scores and curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.executor.jobs.job_views import JobDetails
from app.executor.runs.metrics import Point


@dataclass(frozen=True)
class Difference:
    """A parameter that is not the same in all jobs; `values` in the order of the jobs, None where one has none."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Comparison:
    """Jobs side by side. `curves`: name of the metric → id of the job → points; jobs without it are left out."""

    jobs: tuple[JobDetails, ...]
    differences: tuple[Difference, ...]
    curves: Mapping[str, Mapping[str, Sequence[Point]]]


def differences(parameters: Sequence[Mapping[str, Any]]) -> tuple[Difference, ...]:
    """Return the names whose values differ, in the order in which they first appear."""
    names = dict.fromkeys(name for given in parameters for name in given)
    rows = (Difference(name, tuple(given.get(name) for given in parameters)) for name in names)
    return tuple(row for row in rows if any(not _same(value, row.values[0]) for value in row.values[1:]))


def parameters_of(details: JobDetails) -> dict[str, Any]:
    """Return the values that a job ran with: the caller's and the platform's."""
    return dict(details.view.spec.effective)


def by_metric(curves: Mapping[str, Mapping[str, Sequence[Point]]]) -> dict[str, dict[str, Sequence[Point]]]:
    """Turn job → metric → points around."""
    turned: dict[str, dict[str, Sequence[Point]]] = {}
    for job_id, metrics in curves.items():
        for name, points in metrics.items():
            if points:
                turned.setdefault(name, {})[job_id] = points
    return turned


def _same(one: Any, other: Any) -> bool:
    # True == 1 in Python, but they are different values of a parameter
    return one == other and isinstance(one, bool) == isinstance(other, bool)
