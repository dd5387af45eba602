"""`deepe base-models`: register, upload, download and delete what trainings start from."""

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.client import Api, call_service, segment
from app.cli.command import DEFAULT_URL, AsJson, Description, ExitCode, Limit, Text, Url, typed
from app.cli.output import print_fields, print_json, print_table, size, write
from app.cli.transfer import Continue, Target, download, upload_archive, upload_files
from app.cli.watch import watch_to_end

app = typer.Typer(no_args_is_help=True, help="Base models: what trainings start from.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Technical name or id.")]
NewName = Annotated[str | None, typer.Option("--name", help="What it is called. Default: the folder's name.")]
SIGNS = {"error": "cannot", "warning": "note"}


@app.command("list")
def list_base_models(text: Text = None, limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the base models, and folders that could be registered as such."""
    with Api(url) as api:
        found = list(api.items("/base-models", {"q": text}, limit=limit))
        unregistered = api.get("/base-models:unregistered")["items"]
    if as_json:
        print_json({"items": found, "unregistered": unregistered})
        return
    rows = [
        (entry["name"], "made on first use" if entry["made_on_first_use"] else entry["path"], entry["description"])
        for entry in found
    ]
    print_table(("name", "folder", "description"), rows, nothing="No base models.")
    for folder in unregistered:
        write(f"Not registered yet: {typed('base-models add')} {folder}\n")


@app.command("add")
def add_base_model(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Relative to models/ of the service's home.")],
    name: Annotated[str | None, typer.Option("--name", help="What it is called. Default: the folder's name.")] = None,
    description: Description = "",
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Register a folder with a model."""
    body = {"name": name or Path(folder).name, "path": folder, "description": description}
    with Api(url) as api:
        made = api.post("/base-models", body)
    _print_made(made, as_json=as_json)


@app.command()
def fetch(
    repository: Annotated[str, typer.Argument(metavar="ORGANISATION/NAME", help="Name of the model on the hub.")],
    name: Annotated[str | None, typer.Option("--name", help="What it is called. Default: its name on the hub.")] = None,
    revision: Annotated[str, typer.Option("--revision", help="Branch, tag or commit.")] = "main",
    description: Description = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Watch to the end.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Have a worker download a model from a hub (HF_ENDPOINT and HF_TOKEN of the worker) and register it."""
    body = {
        "name": name or repository.rpartition("/")[2], "repository": repository, "revision": revision,
        "description": description,
    }  # fmt: skip
    with Api(url) as api:
        job = api.post("/base-models:download", body)
        if watch:
            if any(ended["status"] != "succeeded" for ended in watch_to_end(api, job["id"], as_json=as_json)):
                raise typer.Exit(ExitCode.FAILED)
        elif as_json:
            print_json(job)
        else:
            write(f"{job['id']}\nWatch it: {typed('jobs watch')} {job['id']}\n")


@app.command()
def show(name: Name, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show what a base model is, and what follows for a training of each type."""
    document = call_service(url, lambda api: api.get(f"/base-models/{segment(name)}"), as_json=as_json)
    card = document["card"]
    print_fields(
        {
            "id": document["id"],
            "name": document["name"],
            "folder": document["path"],
            "size": size(card["size_bytes"]),
            **{key: value for key, value in card.items() if value not in (None, [], {}, False) and key != "size_bytes"},
        }
    )
    print_table(
        ("training type", "", "what follows"),
        [(kind, SIGNS[one["severity"]], one["detail"]) for kind, said in document["findings"].items() for one in said],
        nothing="Nothing is in the way of any training.",
    )


@app.command()
def upload(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A folder with a model on this machine, or a .tar, .tar.gz or .zip."),
    ],
    name: NewName = None,
    description: Description = "",
    go_on: Continue = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Upload a folder with a model file by file, or one archive; check it and register it."""
    archive = folder.is_file()
    name = name or (folder.name.partition(".tar")[0].removesuffix(".zip") if archive else folder.resolve().name)
    with Api(url) as api:
        send = upload_archive if archive else upload_files
        send(api, f"/base-models/{segment(name)}", folder, go_on=go_on)
        made = api.post("/base-models", {"name": name, "description": description})
    _print_made(made, as_json=as_json)


@app.command()
def files(name: Name, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the files of a base model, or what is uploaded of one."""
    found = call_service(url, lambda api: api.get(f"/base-models/{segment(name)}/files"), as_json=as_json)
    rows = [(one["path"], size(one["size_bytes"]), "" if one["complete"] else "not whole") for one in found["items"]]
    print_table(("file", "size", ""), rows, nothing="No files.")


@app.command("download")
def download_base_model(name: Name, target: Target = None, go_on: Continue = False, url: Url = DEFAULT_URL) -> None:
    """Download the files of a base model into a folder."""
    with Api(url) as api:
        document = api.get(f"/base-models/{segment(name)}")
        download(api, f"/base-models/{segment(name)}", target or Path(document["name"]), go_on=go_on)


@app.command()
def allow(
    name: Name,
    pickled_weights: Annotated[bool, typer.Option("--pickled-weights", help="Load weights that are pickles.")] = False,
    custom_code: Annotated[bool, typer.Option("--custom-code", help="Run Python files that it brings.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say what of its author may run when the platform's scripts load a base model; without options, nothing."""
    body = {"pickled_weights": pickled_weights, "custom_code": custom_code}
    path = f"/base-models/{segment(name)}:allow-loading"
    changed = call_service(url, lambda api: api.post(path, body), as_json=as_json)
    allowed = changed["loading_permission"] or {}
    names = [key for key, value in allowed.items() if value is True]
    write(f"{changed['name']}: {', '.join(names) or 'nothing of its author'} may run when it is loaded.\n")


@app.command()
def delete(
    name: Name,
    with_files: Annotated[bool, typer.Option("--with-files", help="Remove its folder as well.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete the entry of a base model; its folder stays unless you say otherwise."""
    with Api(url) as api:
        api.delete(f"/base-models/{segment(name)}", {"with_files": with_files})


def _print_made(made: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    write(f"{made['id']}  {made['name']}\n")
    for sentence in sorted({one["detail"] for one in made["findings"]["chat"] if one["severity"] == "warning"}):
        write(f"Note: {sentence}\n")
