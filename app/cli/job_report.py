"""How jobs are shown: their table, one of them in full, several beside each other."""

from typing import Any

from app.cli.command import typed
from app.cli.output import (
    Markup,
    ago,
    duration,
    print_entries,
    print_fields,
    print_table,
    sparkline,
    styled,
)
from app.cli.watch import describe_evaluation

CURVE_WIDTH = 24


def print_jobs(jobs: list[dict[str, Any]]) -> None:
    """Print a row for each job."""
    rows = [
        (
            job["id"],
            job["name"],
            job["stage"],
            styled(job["status"]),
            job["reason"] if job["status"] == "failed" else "",
            _place_cell(job),
            job["user"],
            ago(job["created_at"]),
        )
        for job in jobs
    ]
    print_table(("id", "name", "stage", "status", "", "where", "user", "when"), rows, nothing="No jobs.")


def print_job(job: dict[str, Any]) -> None:
    """Print all there is to say of one job."""
    chain = [f"{link['stage']} {styled(link['status'])}" for link in job["chain"]]
    print_fields(
        {
            "id": job["id"],
            "name": job["name"],
            "stage": job["stage"],
            "status": styled(job["status"]),
            "progress": _progress_cell(job),
            "reason": job["reason"],
            "": job["reason_detail"],
            "silent node": job["node_silent"],
            "fix": _fix_cell(job),
            "attempts": _attempts_cell(job),
            "method": _method_cell(job),
            "base model": (job["base_model"] or {}).get("name"),
            "data set": (job["dataset"] or {}).get("name"),
            "validation": (job.get("validation_dataset") or {}).get("name"),
            "model": job["model"],
            "reward model": (job.get("reward_model") or {}).get("name"),
            "result": job["result_model"],
            "parameters": job["parameters"],
            "metrics": job["metrics"],
            "evaluations": "; ".join(describe_evaluation(entry["name"], entry) for entry in job["evaluations"]),
            "chain": Markup(" → ".join(chain)),
            "waits": _waiting_cell(job),
            "waiting for": job["waiting_for"],
            "queue": job["queue"],
            "priority": job["priority"] or None,
            "user": job["user"],
            "resources": {name: value for name, value in job["resources"].items() if value not in (None, {})},
            "node": job["node"],
            "accelerators": ", ".join(job["accelerators"]),
            "submitted": job["created_at"],
            "started": job["started_at"],
            "finished": job["finished_at"],
            "last output": "\n".join(job["log_tail"]) if job["status"] == "failed" else None,
        }
    )
    print_entries("warning", job.get("warnings", ()))


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


def _progress_cell(job: dict[str, Any]) -> str:
    progress = job.get("progress") or {}
    if job["status"] == "failed":
        return str(job.get("reason") or "")
    percent = progress.get("percent")
    return "" if percent is None or job["status"] == "succeeded" else f"{percent:.0f} %"


def _fix_cell(job: dict[str, Any]) -> str | None:
    fix = job["fix"]
    return f"{fix['detail']} {typed('jobs retry')} {job['id']} --fix" if fix else None


def _attempts_cell(job: dict[str, Any]) -> str | None:
    """Tell of each attempt why it ended and where it began; one that is alone has nothing to tell."""
    if len(job["history"]) < 2:
        return None
    lines = []
    for attempt in job["history"]:
        begun = attempt["resumed_from"]
        words = [f"{attempt['number']} on {attempt['node']}", attempt["reason"] or "live"]
        lines.append(", ".join([*words, *([f"from step {begun['step']}"] if begun else [])]))
    return "\n".join(lines)


def _place_cell(job: dict[str, Any]) -> str:
    """Return where a job runs or ran, or its place in the queue."""
    waiting = job.get("waiting")
    if waiting is None:
        held = len(job["accelerators"])
        return f"{job['node']} ({held})" if held else job["node"] or ""
    return "" if waiting["position"] is None else f"place {waiting['position']}"


def _waiting_cell(job: dict[str, Any]) -> str | None:
    waiting = job["waiting"]
    if waiting is None:
        return None
    place = "" if waiting["position"] is None else f"place {waiting['position']}: "
    start = "" if waiting["estimated_start"] is None else f" Expected to start at {waiting['estimated_start']}."
    return f"{place}{waiting['detail']}{start}"


def _method_cell(job: dict[str, Any]) -> str | None:
    method = job["method"]
    return f"{method['name']} (version {method['version']})" if method else job["environment"]


def _scores(job: dict[str, Any]) -> str:
    return "\n".join(describe_evaluation(entry["name"], entry) for entry in job["evaluations"])


def _curve(curve: dict[str, Any], job: str) -> str:
    values = [value for series in curve["series"] if series["job"] == job for _, value in series["points"]]
    if not values:
        return ""
    last = "" if values[-1] is None else f" {values[-1]:.4g}"
    return sparkline(values, width=CURVE_WIDTH) + last
