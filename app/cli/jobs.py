"""`deepe jobs`: submit, list, show, watch, read the logs of, cancel, retry, copy and compare jobs."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.client import Api, call_service, list_items, segment
from app.cli.command import DEFAULT_URL, AsJson, ExitCode, Limit, Misused, Url, mix_part, typed
from app.cli.job_report import print_comparison, print_job, print_jobs
from app.cli.output import (
    print_entries,
    print_json,
    print_json_line,
    print_table,
    write,
)
from app.cli.watch import watch_to_end

app = typer.Typer(no_args_is_help=True, help="Run the stages of methods and watch them.")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
Parameter = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", metavar="NAME=VALUE", help="A parameter; VALUE is JSON or text. May be repeated."),
]
ParameterFile = Annotated[
    Path | None, typer.Option("--params", metavar="FILE", help="JSON file with parameters; --param wins.")
]
Accelerators = Annotated[
    int | None,
    typer.Option("--accelerators", min=0, help="How many on one node. Default: one per process where there are any."),
]
Memory = Annotated[
    int | None, typer.Option("--memory", metavar="MIB", min=1, help="Least memory of each accelerator, in MiB.")
]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME=VALUE", help="A label that the node must carry. May be repeated."),
]
Priority = Annotated[int | None, typer.Option("--priority", help="-100 to 100; smaller starts first.")]
Queue = Annotated[str | None, typer.Option("--queue", help="Queue whose limits apply; see deepe queues.")]
User = Annotated[str | None, typer.Option("--user", help="For whom it runs; limits per user go by this name.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Watch to the end; ends with 1 if the job fails.")]

LOG_PAGE_BYTES = 256 * 1024
_LOG_POLL_SECONDS = 0.5


@app.command()
def submit(
    method: Annotated[str, typer.Argument(help="Name or id of the method.")],
    base_model: Annotated[str | None, typer.Option("--base-model", "-b", help="What to train on.")] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            "-d",
            metavar="DATASET[:MAX_ROWS][=WEIGHT]",
            help="What to train with. Several, or with a weight (faq=2) or a limit (faq:1000), become one data set.",
        ),
    ] = None,
    validation: Annotated[
        str | None, typer.Option("--validation", metavar="DATASET", help="Rows for the score, not learned from.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="MODEL", help="Customized model that the training goes on from."),
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option("--reward-model", metavar="MODEL", help="Reward model that judges the answers.")
    ] = None,
    through: Annotated[
        str | None, typer.Option("--through", help="How far to go: customized, complete or online.")
    ] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Run this stage only, for --model.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model that --stage starts from.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="A name for the job.")] = None,
    max_retries: Annotated[
        int | None, typer.Option("--max-retries", help="How many more attempts a failure may cost.")
    ] = None,
    retry_on: Annotated[
        list[str] | None,
        typer.Option("--retry-on", metavar="REASON", help="Only after this reason. May be repeated."),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", metavar="SECONDS", help="Stop an attempt that runs longer.")
    ] = None,
    silence_limit: Annotated[
        float | None, typer.Option("--silence-limit", metavar="SECONDS", help="Stop one that writes nothing so long.")
    ] = None,
    param: Parameter = None,
    params: ParameterFile = None,
    accelerators: Accelerators = None,
    memory: Memory = None,
    label: Labels = None,
    priority: Priority = None,
    queue: Queue = None,
    user: User = None,
    wait: Annotated[bool, typer.Option("--wait", help="Submit it although no node can run it as things are.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be refused, and what would be done; submit nothing.")
    ] = False,
    watch_it: Watch = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Submit a chain of jobs (train, save, deploy), or a single stage."""
    given: dict[str, Any] = {
        "method": method,
        "base_model": base_model,
        **_datasets(dataset or []),
        "validation_dataset": validation,
        "adapter_name_or_path": adapter,
        "reward_model": reward_model,
        "through": through,
        "stage": stage,
        "model": model,
        "name": name,
        "resources": resources(accelerators, memory, label or []),
        "priority": priority,
        "queue": queue,
        "user": user,
        "wait": wait or None,
    }
    body = {key: value for key, value in given.items() if value is not None}
    body["parameters"] = parameters(param or [], params)
    conditions: dict[str, dict[str, Any]] = {
        "retry": {"max_retries": max_retries, "on": retry_on or None},
        "limits": {"seconds": time_limit, "silent_seconds": silence_limit},
    }
    for name_of, members in conditions.items():
        if chosen := {key: value for key, value in members.items() if value is not None}:
            body[name_of] = chosen
    with Api(url) as api:
        if dry_run:
            _validate(api, body, as_json=as_json)
            return
        job = api.post("/jobs", body)
        if as_json and not watch_it:
            print_json(job)
        elif not as_json:
            print_entries("warning", job.get("warnings", ()))
            stages = " → ".join(link["stage"] for link in job["chain"])
            write(f"{job['id']}  {stages}\n")
        if watch_it:
            _watch(api, job["id"], as_json=as_json)


@app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option("--status", help="Only jobs in this state.")] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Only jobs of this stage.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Only jobs of this method.")] = None,
    text: Annotated[str | None, typer.Option("--text", "-q", help="Only jobs with this text in their name.")] = None,
    limit: Limit = 20,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    filters = {"status": status, "stage": stage, "method": method, "q": text}
    print_jobs(list_items(url, "/jobs", filters, limit=limit, as_json=as_json))


@app.command()
def show(job: JobId, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show one job."""
    print_job(call_service(url, lambda api: api.get(f"/jobs/{segment(job)}"), as_json=as_json))


@app.command()
def samples(job: JobId, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show answers to held-out prompts before and after a training."""
    with Api(url) as api:
        found = api.get(f"/jobs/{segment(job)}/metrics", {"points": 2})["samples"]
    if as_json:
        print_json({"items": found})
        return
    names = ("prompt", "wanted", "before", "after")
    print_table(names, [tuple(one[name] for name in names) for one in found], nothing="The job keeps no answers.")


@app.command()
def watch(job: JobId, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Watch a job and those that follow it to the end.

    Ends with 1 if one fails. Ctrl-C ends the watching only: the job goes on.
    """
    with Api(url) as api:
        _watch(api, job, as_json=as_json)


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Print the output of a job."""
    path, offset = f"/jobs/{segment(job)}/logs", 0
    with Api(url) as api:
        while True:
            page = api.get(path, {"offset": offset, "limit": LOG_PAGE_BYTES})
            if as_json:
                print_json_line(page)
            else:
                write(page["text"])
            advanced = page["next_offset"] > offset
            offset = page["next_offset"]
            if page["end"] or not (follow or advanced):
                return
            if not advanced:
                time.sleep(_LOG_POLL_SECONDS)


@app.command()
def cancel(job: JobId, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Cancel a job: its whole process tree is ended."""
    _act(job, "cancel", url=url, as_json=as_json)


@app.command()
def retry(
    job: JobId,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Go on from its newest checkpoint. Default: when that fits."),
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Make the changes that `show` offers.")] = False,
    param: Parameter = None,
    params: ParameterFile = None,
    watch_it: Watch = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Run a job that has failed or was cancelled once more."""
    given = {"resume": resume, "fix": fix or None, "parameters": parameters(param or [], params) or None}
    body = {key: value for key, value in given.items() if value is not None}
    document = _act(job, "retry", body, url=url, as_json=as_json)
    if watch_it:
        with Api(url) as api:
            _watch(api, document["id"], as_json=as_json)


@app.command()
def copy(
    job: JobId,
    param: Parameter = None,
    params: ParameterFile = None,
    watch_it: Watch = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Submit a job like an earlier one, with some parameters changed."""
    changed = parameters(param or [], params)
    document = _act(job, "copy", {"parameters": changed} if changed else {}, url=url, as_json=as_json)
    if watch_it:
        with Api(url) as api:
            _watch(api, document["id"], as_json=as_json)


@app.command()
def compare(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB JOB...", help="Ids of two or more jobs.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Compare jobs: the parameters that differ, curves and outcome."""
    document = call_service(url, lambda api: api.get("/jobs:compare", {"ids": ",".join(jobs)}), as_json=as_json)
    print_comparison(document)


def parameters(assignments: list[str], file: Path | None = None, *, option: str = "--param") -> dict[str, Any]:
    """Return the parameters of a file, with those given one by one on top; a value that is no JSON is text."""
    merged: dict[str, Any] = {}
    if file is not None:
        try:
            merged = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise Misused(f"--params {file} cannot be read: {error}") from None
        if not isinstance(merged, dict):
            raise Misused(f"--params {file} must hold a JSON object.")
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not name:
            raise Misused(f"{option} {assignment!r} must look like NAME=VALUE.")
        try:
            merged[name] = json.loads(value)
        except ValueError:
            merged[name] = value
    return merged


def _datasets(given: list[str]) -> dict[str, Any]:
    """Return the members of a submit for one data set, or for several that become one."""
    parts = [mix_part(one) for one in given]
    if len(parts) == 1 and parts[0].keys() == {"dataset"}:
        return parts[0]
    return {"datasets": parts} if parts else {}


def resources(accelerators: int | None, memory: int | None, labels: list[str]) -> dict[str, Any] | None:
    """Return what a job asks of a node; None when it asks for nothing."""
    asked: dict[str, Any] = {"accelerators": accelerators, "accelerator_memory_mib": memory}
    for label in labels:
        name, separator, value = label.partition("=")
        if not separator or not name:
            raise Misused(f"--label {label!r} must look like NAME=VALUE.")
        asked.setdefault("labels", {})[name] = value
    return {key: value for key, value in asked.items() if value is not None} or None


def _validate(api: Api, body: dict[str, Any], *, as_json: bool) -> None:
    """Print what a submit would say and do; end with 1 if it would be refused."""
    found = api.post("/jobs:validate", body)
    if as_json:
        print_json(found)
    else:
        print_entries("refused", found["violations"])
        print_entries("warning", found["warnings"])
        if plan := found["plan"]:
            write(" → ".join(stage["stage"] for stage in plan["stages"]) + "\n")
            rows = plan["rows"]
            if rows is not None:
                held_out = "" if rows["held_out"] is None else f", {rows['held_out']} of them held out for the score"
                write(f"rows: {rows['read']} read, {rows['used']} used{held_out}; sequences: {rows['sequences']}\n")
            tokens = "tokens, roughly" if plan["lengths"] is None else "tokens, as measured"
            for name, value in (("steps", plan["steps"]), (tokens, plan["estimated_tokens"])):
                if value is not None:
                    write(f"{name}: {value:,}\n")
            if (memory := plan["memory"]) is not None:
                there = "" if memory["available_mib"] is None else f" of {memory['available_mib']:,} MiB"
                write(f"memory, {memory['basis']}: {memory['expected_mib']:,} MiB{there} ({memory['device']})\n")
    if not found["valid"]:
        raise typer.Exit(ExitCode.REFUSED)


def _watch(api: Api, job_id: str, *, as_json: bool) -> None:
    try:
        ended = watch_to_end(api, job_id, as_json=as_json)
    except KeyboardInterrupt:
        typer.echo(
            f"\nThe job goes on. Come back: {typed('jobs watch')} {job_id}; end it: {typed('jobs cancel')} {job_id}",
            err=True,
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if any(job["status"] != "succeeded" for job in ended):
        raise typer.Exit(ExitCode.FAILED)


def _act(job: str, action: str, body: Any = None, *, url: str, as_json: bool) -> dict[str, Any]:
    with Api(url) as api:
        document: dict[str, Any] = api.post(f"/jobs/{segment(job)}:{action}", body)
    if as_json:
        print_json(document)
    else:
        write(f"{document['id']}  {document['status']}\n")
    return document
