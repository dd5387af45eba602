"""`deepe environments`: list, add, build, pack, show, lock and clean conda environments."""

import asyncio
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.client import Api, call_service, list_items, segment
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, ExitCode, Limit, Text, Url
from app.cli.nodes import allowed_text
from app.cli.output import print_fields, print_json, print_table, size, write
from app.cli.service import load
from app.cli.watch import watch_to_end
from app.domain.projects import EVERY_PROJECT
from app.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Conda environments that stages run in.")

EnvironmentName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the environment.")]
OnNode = Annotated[str | None, typer.Option("--node", help="On this node; id or name. Default: one that fits.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Watch to the end.")]


@app.command("list")
def list_environments(text: Text = None, limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the environments and where they are ready."""
    found = list_items(url, "/environments", {"q": text}, limit=limit, as_json=as_json)
    rows = [
        (entry["name"], entry["source"], ", ".join(f"{node['node']}: {node['state']}" for node in entry["nodes"]))
        for entry in found
    ]
    print_table(("name", "source", "nodes"), rows, nothing="No environments.")


@app.command("add")
def add_environment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As conda knows it.")],
    spec: Annotated[Path | None, typer.Option("--spec", help="An environment.yml to build it from.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Register an environment by name."""
    try:
        text = None if spec is None else spec.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CliFailure(f"{spec} cannot be read: {error}") from None
    made = call_service(url, lambda api: api.post("/environments", {"name": name, "spec": text}), as_json=as_json)
    write(f"{made['name']}\n")


@app.command("allow")
def allow_in_environment(
    name: EnvironmentName,
    method: Annotated[list[str] | None, typer.Option("--method", help="Only these methods; name or id.")] = None,
    project: Annotated[list[str] | None, typer.Option("--project", help="Only jobs of these projects.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Let only some methods and projects use an environment; without an option everything."""
    wanted = {"methods": method or [], "projects": project or []}
    address = f"/environments/{segment(name)}/allowed"
    allowed = call_service(url, lambda api: api.put(address, wanted), as_json=as_json)
    write(f"{name}  {allowed_text(allowed)}\n")


@app.command("build")
def build_environment(
    name: EnvironmentName,
    node: OnNode = None,
    locked: Annotated[
        bool, typer.Option("--locked", help="Install exactly what another node installed for this specification.")
    ] = False,
    lock_of: Annotated[
        str | None, typer.Option("--lock-of", metavar="NODE", help="That of this node; implies --locked.")
    ] = None,
    watch_it: Watch = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Build an environment; it is a job with a log."""
    _order("build", name, node, {"locked": locked, "lock_of": lock_of}, watch_it=watch_it, url=url, as_json=as_json)


@app.command("pack")
def pack_environment(
    name: EnvironmentName, node: OnNode = None, watch_it: Watch = False, url: Url = DEFAULT_URL, as_json: AsJson = False
) -> None:
    """Pack an environment into one file, from which nodes without a network build it; a job with a log."""
    _order("pack", name, node, None, watch_it=watch_it, url=url, as_json=as_json)


@app.command("show")
def show_environment(name: EnvironmentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show how an environment stands on every node."""
    found = call_service(url, lambda api: api.get(f"/environments/{segment(name)}"), as_json=as_json)
    print_fields({"name": found["name"], "source": found["source"], "spec": found["spec_hash"]})
    rows = [
        (
            one["node"],
            one["state"],
            one["python"] or "",
            one["builder"] or one["source"] or "",
            "" if one["size_bytes"] is None else size(one["size_bytes"]),
            (one["lock"] or "")[:12],
            one["prefix"] or (one["trouble"] or {}).get("detail", ""),
        )
        for one in found["nodes"]
    ]
    print_table(
        ("node", "state", "python", "builder", "size", "lock", "where, or what is in the way"), rows, nothing=""
    )


@app.command("lock")
def show_lock(name: EnvironmentName, node: OnNode = None, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show exactly which packages are installed."""
    query = "" if node is None else f"?node={segment(node)}"
    lock = call_service(url, lambda api: api.get(f"/environments/{segment(name)}/lock{query}"), as_json=as_json)
    rows = [("conda", one["name"], one["version"], one["sha256"] or one["md5"] or "") for one in lock["conda"]]
    rows += [("pip", one["name"], one["version"], one["sha256"] or one["url"] or "") for one in lock["pip"]]
    rows += [("bundled", *one.partition("==")[::2], "") for one in lock["bundled"]]
    print_table(("by", "package", "version", "sha256"), rows, nothing="Nothing is installed.")


@app.command("clean")
def clean_environments(
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove unused environments of this machine. Its worker does it every few minutes.

    Run it on the node, with the worker's DEEPE_* variables.
    """
    settings = load()
    found = asyncio.run(_planned(settings))
    if not dry_run:
        _ask_worker(settings)
    if as_json:
        print_json({"items": found, "dry_run": dry_run})
        return
    rows = [(one["environment"], one["why"], size(one["size_bytes"]), one["prefix"]) for one in found]
    print_table(("environment", "why", "size", "where"), rows, nothing="Nothing to remove.")
    if found and not dry_run:
        write("The worker of this node removes them between two jobs.\n")


def _order(
    action: str,
    name: str,
    node: str | None,
    body: dict[str, object] | None,
    *,
    watch_it: bool,
    url: str,
    as_json: bool,
) -> None:
    """Order a job on an environment, and watch it if wanted."""
    with Api(url) as api:
        query = "" if node is None else f"?node={segment(node)}"
        job = api.post(f"/environments/{segment(name)}:{action}{query}", body)
        if as_json and not watch_it:
            print_json(job)
        elif not as_json:
            write(f"{job['id']}  {job['status']}\n")
        if watch_it and any(ended["status"] != "succeeded" for ended in watch_to_end(api, job["id"], as_json=as_json)):
            raise typer.Exit(ExitCode.FAILED)


def _ask_worker(settings: Settings) -> None:
    """Let the worker of this node clean up at its next look."""
    from app.executor.environments.environment_cleaning import CLEANUP_REQUEST

    (settings.node_home / CLEANUP_REQUEST).touch()


async def _planned(settings: Settings) -> list[dict[str, Any]]:
    """Return what would go, and why, as the worker sees it; no other command here needs what the worker imports."""
    from app.executor.environments.builders import BuildRules
    from app.executor.environments.conda import CondaSearch
    from app.executor.environments.environment_cleaning import Why, unfinished
    from app.executor.environments.environments import size_of
    from app.executor.environments.local_environments import LocalEnvironments
    from app.store.environments import all_environments
    from app.store.home import NodeHome
    from app.store.nodes import NodeNotFound, get_node
    from app.store.session import Database
    from app.worker import environment_cleaning

    envs_dir = NodeHome(settings.node_home).environments
    database = Database(settings.database_url, scope=EVERY_PROJECT)
    try:
        async with database.reading() as session:
            specs = {row.name: row.spec for row in await all_environments(session)}
            node = await get_node(session, settings.node_name)
        search = CondaSearch.of(os.environ, root=settings.conda_root)
        seen = LocalEnvironments(envs_dir=envs_dir, search=search, rules=BuildRules()).look(specs)
        chosen = await environment_cleaning(settings, database).plan(node.id, seen)
    except NodeNotFound as error:
        raise CliFailure(error.detail(), notes=("Run this on a node, with the variables of its worker.",)) from None
    finally:
        await database.close()
    found: list[dict[str, Any]] = [
        {"environment": one.name, "prefix": str(one.prefix), "why": why.value, "size_bytes": one.size_bytes}
        for one, why in chosen
    ]
    for prefix in unfinished(envs_dir):
        left = {"environment": "", "prefix": str(prefix), "why": Why.UNFINISHED.value, "size_bytes": size_of(prefix)}
        found.append(left)
    return found
