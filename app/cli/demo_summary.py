"""What `deepe demo --all` says at its end: what came of each method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.cli.client import Api
from app.cli.output import duration, print_table
from app.cli.watching import describe_evaluation


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
