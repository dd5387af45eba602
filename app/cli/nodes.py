"""`deepe nodes`: machines with a worker: list, show, drain, label, declare dead, remove."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from app.cli.client import Api, call_service, list_items, segment
from app.cli.command import DEFAULT_URL, AsJson, Misused, Url
from app.cli.output import console, duration, print_fields, print_json, print_table, styled, table, write

nodes = typer.Typer(no_args_is_help=True, help="Machines with a worker.")

Node = Annotated[str, typer.Argument(metavar="NODE", help="Name or id of the node.")]


@nodes.command("list")
def list_nodes(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the machines with a worker."""
    found = list_items(url, "/nodes", as_json=as_json)
    rows = [
        (
            node["name"],
            styled(node["state"]),
            node["platform"],
            _free(node["accelerators"]),
            len(node["jobs"]),
            _age(node["heartbeat_age_seconds"]),
            ", ".join(node["environments"]),
        )
        for node in found
    ]
    columns = ("name", "state", "platform", "accelerators", "jobs", "heartbeat", "environments")
    print_table(columns, rows, nothing="No node has registered yet: start a worker.")


@nodes.command("show")
def show_node(node: Node, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show a node: its machine, who has its accelerators, and what it is at."""
    found = call_service(url, lambda api: api.get(f"/nodes/{segment(node)}"), as_json=as_json)
    _print_node(found)


@nodes.command("drain")
def drain_node(node: Node, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Give a node no more jobs; those that run go on."""
    _act(node, "drain", None, url=url, as_json=as_json)


@nodes.command("undrain")
def undrain_node(node: Node, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let a node take jobs again."""
    _act(node, "undrain", None, url=url, as_json=as_json)


@nodes.command("declare-dead")
def declare_node_dead(
    node: Annotated[str, typer.Argument(metavar="NODE", help="Name of the node.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Its processes are gone; do not ask.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say that the processes of a silent node are gone: its jobs run elsewhere, or end as node_lost."""
    if not yes:
        if not sys.stdin.isatty():
            raise Misused("There is no terminal to confirm at. Add --yes if the processes of the node are really gone.")
        typer.confirm(f"Are all processes of {node} gone (machine off, or lost for good)?", abort=True, err=True)
    _act(node, "declare-dead", {"confirm": node}, url=url, as_json=as_json)


@nodes.command("label")
def label_node(
    node: Node,
    labels: Annotated[
        list[str], typer.Argument(metavar="LABEL...", help="NAME=VALUE sets a label, NAME- takes one away.")
    ],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Set labels that jobs may ask for, beside those of the node's worker."""
    changes = {"extra_labels": dict(map(_label, labels))}
    changed = call_service(url, lambda api: api.patch(f"/nodes/{segment(node)}", changes), as_json=as_json)
    write(f"{changed['name']}  {_pairs(changed['labels'])}\n")


@nodes.command("allow")
def allow_on_node(
    node: Node,
    method: Annotated[list[str] | None, typer.Option("--method", help="Only these methods; name or id.")] = None,
    project: Annotated[list[str] | None, typer.Option("--project", help="Only jobs of these projects.")] = None,
    environment: Annotated[list[str] | None, typer.Option("--environment", help="Only these environments.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Let a node run only some methods, projects and environments; without an option everything."""
    wanted = {"methods": method or [], "projects": project or [], "environments": environment or []}
    allowed = call_service(url, lambda api: api.put(f"/nodes/{segment(node)}/allowed", wanted), as_json=as_json)
    write(f"{node}  {allowed_text(allowed)}\n")


@nodes.command("remove")
def remove_node(node: Node, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Remove a node that is dead, or drained and empty."""
    with Api(url) as api:
        api.delete(f"/nodes/{segment(node)}")
    if as_json:
        print_json({"removed": node})
    else:
        write(f"{node} is removed\n")


def allowed_text(allowed: Mapping[str, Any]) -> str:
    """Return an allow-list in one line."""
    methods = [f"{one['project']}/{one['name']}" for one in allowed["methods"]]
    named = {"methods": methods, "projects": allowed["projects"], "environments": allowed["environments"]}
    return "; ".join(f"{name}: {', '.join(those)}" for name, those in named.items() if those) or "everything"


def _act(node: str, action: str, body: Mapping[str, Any] | None, *, url: str, as_json: bool) -> None:
    changed = call_service(url, lambda api: api.post(f"/nodes/{segment(node)}:{action}", body), as_json=as_json)
    write(f"{changed['name']}  {changed['state']}  {changed['state_detail']}\n")


def _print_node(node: Mapping[str, Any]) -> None:
    machine = node["inventory"]
    print_fields(
        {
            "name": node["name"],
            "id": node["id"],
            "state": styled(node["state"]),
            "meaning": node["state_detail"],
            "heartbeat": _age(node["heartbeat_age_seconds"]),
            "machine": ", ".join(filter(None, (machine["hostname"], machine["system"], machine["processor"]))),
            "CPUs": machine["cpus"],
            "memory": _gib(machine["memory_bytes"]),
            "home": _disk(machine["home"]),
            "node home": _disk(machine["node_home"]),
            "containment": _containment(machine.get("containment")),
            "labels": _pairs(node["labels"]),
            "set by people": _pairs(node["extra_labels"]),
            "environments": ", ".join(node["environments"]),
            "slots": node["slots"],
            "runs": "what its allow-list names" if node["restricted"] else "",
        }
    )
    if node["accelerators"]:
        columns = ("accelerator", "name", "memory", "state", "who")
        rows = [
            (one["id"], one["name"], _mib(one["memory_mib"]), styled(one["state"]), _holder(one))
            for one in node["accelerators"]
        ]
        console().print(table(columns, rows))
    if node["jobs"]:
        jobs = [(job["id"], job["name"], job["stage"], styled(job["status"]), job["attempt"]) for job in node["jobs"]]
        console().print(table(("job", "name", "stage", "status", "attempt"), jobs))


def _label(text: str) -> tuple[str, str | None]:
    name, equals, value = text.partition("=")
    if equals and name:
        return name, value
    if text.endswith("-") and len(text) > 1:
        return text[:-1], None
    raise Misused(f"{text!r} is no label: write NAME=VALUE to set one, NAME- to take one away.")


def _containment(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "unknown"
    return f"{found['mode']} ({found['detail'] or 'network of stages: ' + found['network']})"


def _free(accelerators: list[dict[str, Any]]) -> str:
    if not accelerators:
        return "none"
    free = sum(one["state"] == "free" for one in accelerators)
    names = ", ".join(sorted({one["name"] for one in accelerators}))
    return f"{free} of {len(accelerators)} free ({names})"


def _holder(accelerator: Mapping[str, Any]) -> str:
    if accelerator["job"]:
        return f"job {accelerator['job']}, attempt {accelerator['attempt']}"
    if accelerator["used_mib"] is None:
        return ""
    pids = ", ".join(map(str, accelerator["pids"]))
    return f"{_mib(accelerator['used_mib'])} used by others" + (f" (pid {pids})" if pids else "")


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()))


def _age(seconds: float) -> str:
    return f"{duration(seconds)} ago"


def _disk(disk: Mapping[str, Any] | None) -> str:
    return f"{_gib(disk['free_bytes'])} free of {_gib(disk['total_bytes'])} at {disk['path']}" if disk else ""


def _gib(count: int) -> str:
    return f"{count / 1024**3:.1f} GiB" if count else ""


def _mib(mib: int | None) -> str:
    return "" if mib is None else f"{mib / 1024:.1f} GiB"
