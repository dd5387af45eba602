"""Print what differs between jobs."""

from typing import Any

from app.cli.charts import sparkline
from app.cli.output import duration, print_table, styled
from app.cli.watching import describe_evaluation

CURVE_WIDTH = 24


def print_comparison(document: dict[str, Any]) -> None:
    """Print the jobs beside each other: how they ended, the parameters that differ, scores and curves."""
    jobs = document["jobs"]
    rows: list[tuple[object, ...]] = [
        ("id", *(job["id"] for job in jobs)),
        ("status", *(styled(job["status"]) for job in jobs)),
        ("time", *(duration(job["seconds"]) for job in jobs)),
        *((row["name"], *row["values"]) for row in document["differences"]),
        ("scores", *(_scores(job) for job in jobs)),
        *((curve["name"], *(_curve(curve, job["id"]) for job in jobs)) for curve in document["curves"]),
    ]
    print_table(("", *(job["name"] for job in jobs)), rows, nothing="")


def _scores(job: dict[str, Any]) -> str:
    return "\n".join(describe_evaluation(entry["name"], entry) for entry in job["evaluations"])


def _curve(curve: dict[str, Any], job: str) -> str:
    values = [value for series in curve["series"] if series["job"] == job for _, value in series["points"]]
    if not values:
        return ""
    last = "" if values[-1] is None else f" {values[-1]:.4g}"
    return sparkline(values, width=CURVE_WIDTH) + last
