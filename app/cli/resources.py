"""What jobs work with: `deepe datasets`, `environments`, `presets`."""

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.client import Api, segment
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, ExitCode, Limit, Url, mix_part, typed
from app.cli.output import print_fields, print_json, print_table, size, write
from app.cli.row_preview import PREVIEW_SECONDS, lengths_line, preview_dataset
from app.cli.service import load
from app.cli.watch import watch_to_end
from app.settings import Settings

datasets = typer.Typer(no_args_is_help=True, help="Data sets: what models are trained with.")
environments = typer.Typer(no_args_is_help=True, help="Conda environments that stages run in.")
presets = typer.Typer(no_args_is_help=True, help="Methods that the product ships.")
datasets.command("preview")(preview_dataset)

Text = Annotated[str | None, typer.Option("--text", "-q", help="Only those with this text in their name.")]
EnvironmentName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the environment.")]
PresetName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the preset.")]
OnNode = Annotated[str | None, typer.Option("--node", help="On this node; id or name. Default: one that fits.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Watch to the end.")]
Description = Annotated[str, typer.Option("--description", help="A sentence for people.")]


@datasets.command("list")
def list_datasets(text: Text = None, limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the data sets."""
    with Api(url) as api:
        found = list(api.items("/datasets", {"q": text}, limit=limit))
    if as_json:
        print_json({"items": found})
        return
    rows = [(entry["name"], entry["rows"], ", ".join(entry["columns"]), size(entry["size_bytes"])) for entry in found]
    print_table(
        ("name", "rows", "columns", "size"), rows, nothing=f"No data sets. Add one: {typed('datasets add FILE')}"
    )


@datasets.command("add")
def add_dataset(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="JSONL, JSON, CSV, .xlsx, Parquet; also .gz or .zip, with pictures.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="What it is called. Default: the file's name.")] = None,
    in_home: Annotated[
        bool, typer.Option("--in-home", help="FILE lies under datasets/ of the service's home: register it there.")
    ] = False,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="Of a text that is not UTF-8: gb18030, cp1252, ...")
    ] = None,
    delimiter: Annotated[str | None, typer.Option("--delimiter", help="comma, semicolon, tab or pipe.")] = None,
    sheet: Annotated[str | None, typer.Option("--sheet", help="Of a workbook with several.")] = None,
    description: Description = "",
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Upload a file as a new data set; every row is checked, and kept only if all are right."""
    name = name or _stem(Path(source))
    said = {"encoding": encoding, "delimiter": delimiter, "sheet": sheet}
    with Api(url) as api:
        if in_home:
            given = {option: value for option, value in said.items() if value is not None}
            made = api.post("/datasets", {"name": name, "path": source, "description": description, **given})
        else:
            made = api.put_file(f"/datasets/{segment(name)}/file", Path(source), said)
    if as_json:
        print_json(made)
        return
    write(f"{made['id']}  {made['name']}  {made['rows']} rows\n")
    if made["source"] is not None:
        write(f"read as {_how_read(made['source'])}\n")


@datasets.command("mix")
def mix_datasets(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the new data set is called.")],
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART...",
            help="DATASET[:MAX_ROWS][=WEIGHT]: faq=2 takes each row twice, faq=0.5 a random half, faq:1000 a sample.",
        ),
    ],
    seed: Annotated[int | None, typer.Option("--seed", help="Same parts and seed, same rows and order.")] = None,
    description: Description = "",
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Make a data set out of others."""
    body = {"name": name, "parts": [mix_part(part) for part in parts], "description": description}
    with Api(url) as api:
        made = api.post("/datasets:mix", body if seed is None else {**body, "seed": seed})
    if as_json:
        print_json(made)
        return
    write(f"{made['id']}  {made['name']}  {made['rows']} rows\n")
    _print_mix(made["source"]["mix"])


@datasets.command("show")
def show_dataset(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Id or name.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show a data set: how its file was read, and how many rows have a value in each column."""
    with Api(url) as api:
        found = api.get(f"/datasets/{segment(dataset)}")
    if as_json:
        print_json(found)
        return
    source = found["source"]
    print_fields(
        {
            "name": found["name"],
            "id": found["id"],
            "file": found["path"],
            "read as": "JSONL" if source is None else _how_read(source),
            "left out": ", ".join(source["left_out"]) if source else "",
            "rows": found["rows"],
            "blank lines": found["blank_lines"],
            "size": size(found["size_bytes"]),
            "digest": found["digest"],
        }
    )
    rows = [(one["name"], one["rows"], one["first_missing_line"] or "") for one in found["column_counts"]]
    print_table(("column", "rows with a value", "first line without"), rows, nothing="")
    if source and source.get("mix"):
        _print_mix(source["mix"])


def _print_mix(mix: dict[str, Any]) -> None:
    """Print how many rows a mix took of each data set."""
    rows = [
        (part["name"], part["rows"], part["max_rows"] or "", f"{part['weight']:g}", part["taken"])
        for part in mix["parts"]
    ]
    print_table(("made of", "rows", "at most", "weight", "taken"), rows, nothing="")


@datasets.command("profile")
def profile_dataset(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Id or name.")],
    method: Annotated[str | None, typer.Option("--method", "-m", help="Count tokens in its environment.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", "-b", help="Count tokens by its tokenizer.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say how the rows are written, how long they are, and what would be left out."""
    with Api(url, timeout=PREVIEW_SECONDS) as api:
        found = api.get(f"/datasets/{segment(dataset)}/profile", {"method": method, "base_model": base_model})
    if as_json:
        print_json(found)
        return

    def counted(name: str) -> str:
        return ", ".join(f"{key} {value}" for key, value in (found[name] or {}).items())

    fields = {name: counted(name) for name in ("forms", "kinds", "roles", "features", "turns", "scripts")}
    tokens = {"tokens, roughly": counted("estimated_tokens"), "duplicates": found["duplicates"]}
    if found["lengths"] is not None:
        tokens = {"measured": lengths_line(found["lengths"])} | tokens
    print_fields({"rows": found["rows"], **fields, **tokens, "unreadable rows": found["problem_count"]})
    for entry in (*found["problems"], *found["remarks"]):
        write(f"{entry['pointer']}: {entry['detail']}\n")


def _stem(file: Path) -> str:
    """Return the name of a file without its suffixes: two, if it is packed."""
    packed = file.suffix.lower() in (".gz", ".zip", ".tar", ".tgz")
    inner = Path(file.stem)
    known = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".parquet", ".tar")
    return inner.stem if packed and inner.suffix.lower() in known else file.stem


def _how_read(source: dict[str, Any]) -> str:
    names = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "pipe"}
    told = [
        source["format"],
        source["compression"] and f"in {source['compression']}",
        source["member"] and f"from {source['member']}",
        source["encoding"],
        source["delimiter"] and f"delimiter {names[source['delimiter']]}",
        source["sheet"] and f"sheet {source['sheet']}",
        source["archive"] and "unpacked from an archive",
        source.get("mix") and f"mixed, seed {source['mix']['seed']}",
    ]
    return ", ".join(word for word in told if word)


@environments.command("list")
def list_environments(text: Text = None, limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the environments and where they are ready."""
    with Api(url) as api:
        found = list(api.items("/environments", {"q": text}, limit=limit))
    if as_json:
        print_json({"items": found})
        return
    rows = [
        (entry["name"], entry["source"], ", ".join(f"{node['node']}: {node['state']}" for node in entry["nodes"]))
        for entry in found
    ]
    print_table(("name", "source", "nodes"), rows, nothing="No environments.")


@environments.command("add")
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
    with Api(url) as api:
        made = api.post("/environments", {"name": name, "spec": text})
    if as_json:
        print_json(made)
    else:
        write(f"{made['name']}\n")


@environments.command("build")
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


@environments.command("pack")
def pack_environment(
    name: EnvironmentName, node: OnNode = None, watch_it: Watch = False, url: Url = DEFAULT_URL, as_json: AsJson = False
) -> None:
    """Pack an environment into one file, from which nodes without a network build it; a job with a log."""
    _order("pack", name, node, None, watch_it=watch_it, url=url, as_json=as_json)


@environments.command("show")
def show_environment(name: EnvironmentName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show how an environment stands on every node."""
    with Api(url) as api:
        found = api.get(f"/environments/{segment(name)}")
    if as_json:
        print_json(found)
        return
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


@environments.command("lock")
def show_lock(name: EnvironmentName, node: OnNode = None, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show exactly which packages are installed."""
    with Api(url) as api:
        query = "" if node is None else f"?node={segment(node)}"
        lock = api.get(f"/environments/{segment(name)}/lock{query}")
    if as_json:
        print_json(lock)
        return
    rows = [("conda", one["name"], one["version"], one["sha256"] or one["md5"] or "") for one in lock["conda"]]
    rows += [("pip", one["name"], one["version"], one["sha256"] or one["url"] or "") for one in lock["pip"]]
    rows += [("bundled", *one.partition("==")[::2], "") for one in lock["bundled"]]
    print_table(("by", "package", "version", "sha256"), rows, nothing="Nothing is installed.")


@environments.command("clean")
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


@presets.command("list")
def list_presets(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the shipped methods and what became of them here."""
    with Api(url) as api:
        found = list(api.items("/presets"))
    if as_json:
        print_json({"items": found})
        return
    rows = [
        (entry["name"], ", ".join(entry["platforms"]), _preset_state(entry), entry["description"]) for entry in found
    ]
    print_table(("name", "platforms", "", "description"), rows, nothing="No presets.")


@presets.command("show")
def show_preset(name: PresetName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show a shipped method and what comes with it to try it."""
    with Api(url) as api:
        found = api.get(f"/presets/{segment(name)}")
    if as_json:
        print_json(found)
        return
    samples = found["samples"]
    given = [f"-p {parameter}={json.dumps(value)}" for parameter, value in samples["parameters"].items()]
    chosen = f"-b {samples['base_model']} -d {samples['dataset']} --through {samples['through']}"
    ready = found["installed"] and samples["base_model"] and samples["dataset"]
    print_fields(
        {
            "Name": found["name"],
            "State": _preset_state(found),
            "Platforms": ", ".join(found["platforms"]),
            "Description": found["description"],
            "Samples": samples["detail"],
            "Data set": samples["dataset"],
            "Base model": samples["base_model"],
            "Try it": typed(" ".join(["jobs submit", found["name"], chosen, *given, "-w"])) if ready else None,
            "Then ask": "\n".join(samples["questions"]),
        }
    )


@presets.command("install")
def install_preset(name: PresetName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Install a shipped method with its samples, also what was deleted."""
    with Api(url) as api:
        made = api.post(f"/presets/{segment(name)}:install")
    if as_json:
        print_json(made)
    else:
        write(f"{made['id']}  {made['name']}\n")


def _preset_state(preset: dict[str, object]) -> str:
    if preset["removed"]:
        return "deleted here"
    if not preset["installed"]:
        return "not installed"
    return f"version {preset['installed_version']}"


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
    database = Database(settings.database_url)
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
