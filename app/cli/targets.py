"""`deepe targets`: servers that models are deployed to."""

import json
from typing import Annotated, Any

import typer

from app.cli.client import Api, call_service, list_items, segment
from app.cli.command import DEFAULT_URL, AsJson, ExitCode, Limit, Misused, Text, Url, typed
from app.cli.jobs import parameters
from app.cli.output import print_fields, print_json, print_table, write

targets = typer.Typer(no_args_is_help=True, help="Deploy targets: servers that models are deployed to.")

Target = Annotated[str, typer.Argument(metavar="TARGET", help="Id or name.")]
Port = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Of the address, if it has none.")]


@targets.command("list")
def list_targets(text: Text = None, limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the deploy targets."""
    found = list_items(url, "/deploy-targets", {"q": text}, limit=limit, as_json=as_json)
    rows = [(entry["name"], entry["kind"], entry["url"], entry["file"] or "") for entry in found]
    hint = f"No deploy targets. Add one: {typed('targets add NAME ADDRESS')}"
    print_table(("name", "kind", "address", "script"), rows, nothing=hint)


@targets.command("add")
def add_target(
    name: Annotated[str, typer.Argument(metavar="NAME", help="How methods name it.")],
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="http or https.")],
    kind: Annotated[str, typer.Option("--kind", help="ollama, or custom: a script of yours deploys to it.")] = "ollama",
    port: Port = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--setting", metavar="NAME=VALUE", help="Argument for the script; JSON or text. Repeat it."),
    ] = None,
    file: Annotated[str | None, typer.Option("--file", help="Script for methods that name none.")] = None,
    conda_env: Annotated[str | None, typer.Option("--env", help="Environment of that script.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Add a server that models are deployed to; it is not contacted: `deepe targets test` does."""
    body = {
        "name": name, "kind": kind, "url": address, "port": port, "file": file, "conda_env": conda_env,
        "settings": parameters(setting or [], option="--setting"),
    }  # fmt: skip
    made = call_service(url, lambda api: api.post("/deploy-targets", body), as_json=as_json)
    write(f"{made['id']}  {made['name']}  {made['url']}\n")


@targets.command("show")
def show_target(target: Target, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show a deploy target."""
    with Api(url) as api:
        found = api.get(f"/deploy-targets/{segment(target)}")
    _print_target(found, as_json=as_json)


@targets.command("change")
def change_target(
    target: Target,
    address: Annotated[str | None, typer.Option("--address", help="http or https.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Of the new address, else of the one that it has.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--setting", metavar="NAME=VALUE", help="JSON or text; null takes it away. Repeat it."),
    ] = None,
    file: Annotated[str | None, typer.Option("--file", help="Script; an empty text takes it away.")] = None,
    conda_env: Annotated[
        str | None, typer.Option("--env", help="Its environment; an empty text takes it away.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Change a deploy target: for deployments from now on. Versions of methods keep the script they copied."""
    changes: dict[str, Any] = {name: value for name, value in (("url", address), ("port", port)) if value is not None}
    changes |= {name: value or None for name, value in (("file", file), ("conda_env", conda_env)) if value is not None}
    if setting:
        changes["settings"] = parameters(setting, option="--setting")
    if not changes:
        raise Misused("Nothing to change: give --address, --port, --setting, --file or --env.")
    with Api(url) as api:
        changed = api.patch(f"/deploy-targets/{segment(target)}", changes)
    _print_target(changed, as_json=as_json)


@targets.command("test")
def ask_target(target: Target, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Ask the server of a deploy target whether it answers the service; ends with 1 if not."""
    with Api(url) as api:
        answer = api.post(f"/deploy-targets/{segment(target)}:test")
    if as_json:
        print_json(answer)
    else:
        write(f"{answer['detail']}\n")
    if not answer["usable"]:
        raise typer.Exit(ExitCode.FAILED)


@targets.command("delete")
def delete_target(target: Target, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Delete a deploy target that no method names."""
    with Api(url) as api:
        api.delete(f"/deploy-targets/{segment(target)}")
    if as_json:
        print_json({"deleted": target})
    else:
        write(f"{target} deleted\n")


def _print_target(target: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(target)
        return
    members = ("name", "id", "kind", "url", "file", "conda_env")
    print_fields(
        {{"url": "address", "conda_env": "environment"}.get(name, name): target[name] or "" for name in members}
    )
    rows = [(name, json.dumps(value, ensure_ascii=False)) for name, value in target["settings"].items()]
    print_table(("setting", "value"), rows, nothing="")
