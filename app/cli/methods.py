"""`deepe methods`: list, show, create, validate, delete, copy, reset and restore methods; their files, parameters."""

import json
import shlex
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape

from app.cli.client import Api, ServiceRefused, call_service, list_items, segment
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, ExitCode, Limit, Misused, Url
from app.cli.output import Markup, console, errors, print_fields, print_json, print_table, write
from app.cli.suggestions import suggest

app = typer.Typer(no_args_is_help=True, help="Training methods: recipes of how models are made.")

Method = Annotated[str, typer.Argument(metavar="METHOD", help="Name or id of the method.")]
DefinitionFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="The method as JSON, TOML or YAML; - reads JSON from stdin.")
]
Scripts = Annotated[
    list[Path] | None,
    typer.Option("--script", "-s", help="Python file to upload to the script root first. May be repeated."),
]
STDIN = Path("-")


app.command(context_settings={"ignore_unknown_options": True})(suggest)


@app.command("list")
def list_methods(
    training_type: Annotated[str | None, typer.Option("--type", help="Only methods of this training type.")] = None,
    technique: Annotated[str | None, typer.Option("--technique", help="Only methods with this label.")] = None,
    text: Annotated[str | None, typer.Option("--text", "-q", help="Only methods that mention this.")] = None,
    limit: Limit = 100,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List the methods."""
    filters = {"training_type": training_type, "technique": technique, "q": text}
    methods = list_items(url, "/methods", filters, limit=limit, as_json=as_json)
    rows = [
        (
            method["name"],
            method["training_type"],
            method["technique"],
            " → ".join(method["lifecycle"]),
            method["version"],
            "example" if method["read_only"] else "",
        )
        for method in methods
    ]
    print_table(("name", "type", "technique", "lifecycle", "version", ""), rows, nothing="No methods.")


@app.command()
def show(method: Method, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show a method and whether it could run now."""
    with Api(url) as api:
        document = api.get(f"/methods/{segment(method)}")
        readiness = api.get(f"/methods/{segment(method)}/readiness")
    if as_json:
        print_json({**document, "readiness": readiness})
        return
    stages = {name: _stage_cell(stage) for name, stage in document["stages"].items()}
    changed = [file["file"] for file in document["files"] if file["state"] != "unchanged"]
    print_fields(
        {
            "name": document["name"],
            "id": document["id"],
            "version": f"{document['version']} ({document['source']})",
            "description": document["description"],
            "type": document["training_type"],
            "technique": document["technique"],
            "lifecycle": " → ".join(document["lifecycle"]),
            **stages,
            "deployment": _deployment_cell(document["deployment"]),
            "edited on disk": ", ".join(changed),
            "read-only": "an example: copy it to change it" if document["read_only"] else None,
            "ready": "yes" if readiness["ready"] else "no",
        }
    )
    _print_unready(readiness)


@app.command()
def create(
    file: DefinitionFile,
    script: Scripts = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace scripts that are there and differ.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Add a method (commercial licence). Everything that is wrong with it is said at once."""
    definition = read_document(file)
    with Api(url) as api:
        for path in script or ():
            upload_script(api, path, replace=replace)
        method = api.post("/methods", definition)
    if as_json:
        print_json(method)
    else:
        write(f"{method['id']}  {method['name']}\n")


@app.command()
def validate(
    file: DefinitionFile,
    method: Annotated[str | None, typer.Option("--method", help="The method that this would replace.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say everything that creating the method would say; ends with 1 if it would be refused."""
    query = "" if method is None else f"?method={segment(method)}"
    with Api(url) as api:
        answer = api.post(f"/methods:validate{query}", read_document(file))
    if as_json:
        print_json(answer)
    elif answer["valid"]:
        console().print("valid", style="green")
        _print_unready(answer["readiness"])
    else:
        rows = [(entry["pointer"], entry["code"], entry["detail"]) for entry in answer["violations"]]
        print_table(("where", "code", "what to do"), rows, nothing="")
    if not answer["valid"]:
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def command(
    method: Method,
    stage: Annotated[str, typer.Option("--stage", help="training, saving, inference-customized, ...")] = "training",
    base_model: Annotated[str | None, typer.Option("--base-model", "-b", help="Name or id.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Name or id.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model that a later stage works on.")] = None,
    param: Annotated[list[str] | None, typer.Option("--param", "-p", help="NAME=VALUE. May be repeated.")] = None,
    accelerators: Annotated[
        int | None, typer.Option("--accelerators", min=0, help="How many the job asks for.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show exactly what a job would run, before anything runs: command, variables, files, and why."""
    from app.cli.jobs import parameters as assigned  # loads the group

    wanted = {"stage": stage, "base_model": base_model, "dataset": dataset, "model": model}
    given = json.dumps(assigned(param or [], None)) if param else None
    query = {**wanted, "parameters": given, "accelerators": accelerators}
    found = call_service(url, lambda api: api.get(f"/methods/{segment(method)}/command", query), as_json=as_json)
    write(f"cd {shlex.quote(found['working_directory'])}\n")
    for name, value in found["environment"].items():
        write(f"export {name}={shlex.quote(value)}\n")
    for file in found["files"]:
        write(f"cat > {shlex.quote(file['path'])} <<'EOF'\n{file['content'].rstrip()}\nEOF\n")
    write(f"{shlex.join(found['command'])}\n")
    for note in found["notes"]:
        errors().print(note["detail"], markup=False, style="yellow")


@app.command()
def delete(
    method: Method,
    jobs: Annotated[
        str | None, typer.Option("--jobs", help="What becomes of its queued and running jobs: cancel or keep.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Delete a method (commercial licence). Its jobs and models stay."""
    with Api(url) as api:
        api.delete(f"/methods/{segment(method)}", {"jobs": jobs})
    if as_json:
        print_json({"deleted": method})
    else:
        write(f"{method} is deleted\n")


@app.command()
def copy(
    method: Method,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the copy is called.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Copy a method with its scripts (commercial licence)."""
    made = call_service(url, lambda api: api.post(f"/methods/{segment(method)}:copy", {"name": name}), as_json=as_json)
    write(f"{made['id']}  {made['name']}\n")


@app.command()
def upload(
    method: Method,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="training, saving, inference-customized, ...")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The Python file.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Replace the file of a stage; makes a new version of the method."""
    content = _read(file)
    path = f"/methods/{segment(method)}/files/{segment(stage)}"
    changed = call_service(url, lambda api: api.put_bytes(path, content, etag=api.etag(path)), as_json=as_json)
    write(f"{changed['name']} is now version {changed['version']}\n")


@app.command()
def reset(method: Method, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Put a shipped template (Custom01, Custom02) back to what was shipped; what was adapted stays a version."""
    _changed(method, "reset", url=url, as_json=as_json)


@app.command()
def restore(
    method: Method,
    version: Annotated[
        int | None, typer.Option("--version", min=1, help="The version to go back to. Default: the newest.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Bring a version of a method and its files back; what was edited on disk becomes a version before."""
    _changed(method, "restore" if version is None else f"restore?version={version}", url=url, as_json=as_json)


@app.command()
def parameters(
    method: Method,
    advanced: Annotated[bool, typer.Option("--advanced", help="The libraries' own options too.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show the parameters that a method takes, as its scripts declare them."""
    document = call_service(url, lambda api: api.get(f"/methods/{segment(method)}/parameters"), as_json=as_json)
    print_parameters(document, advanced=advanced)


@app.command()
def readiness(
    method: Annotated[str | None, typer.Argument(metavar="METHOD", help="Id or name. Default: all methods.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show which stage could run on which node, and what to do where it could not."""
    with Api(url) as api:
        rows = readiness_rows(api, method)
    if as_json:
        print_json(rows[0] if method is not None else {"items": rows})
    else:
        print_matrix(rows)


def readiness_rows(api: Api, method: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of the readiness matrix: of one method, or of all."""
    if method is None:
        return list(api.items("/readiness"))
    found = api.get(f"/methods/{segment(method)}/readiness")
    return [{"method": method, **found}]


def print_matrix(rows: list[dict[str, Any]]) -> None:
    """Print the matrix as a table, a line a stage, a column a node, and below it what is to be done."""
    nodes = sorted({cell["node"] for row in rows for stage in row["stages"] for cell in stage["cells"]})
    lines = []
    advice: dict[str, str] = {}
    for row in rows:
        for stage in row["stages"]:
            cells = {cell["node"]: cell for cell in stage["cells"]}
            shown = [cells[node]["verdict"] if node in cells else "" for node in nodes]
            lines.append((row["method"], stage["stage"], stage["environment"] or "", *shown))
            found = [finding for cell in stage["cells"] for finding in cell["findings"]]
            advice |= {one["detail"]: one["verdict"] for one in [*found, *stage["problems"]] if "verdict" in one}
            advice |= {one["detail"]: "never" for one in stage["problems"] if not stage["cells"]}
    print_table(("method", "stage", "environment", *nodes), lines, nothing="No methods.")
    if advice:
        print_table(("", "what to do"), [(verdict, detail) for detail, verdict in advice.items()], nothing="")


def upload_script(api: Api, path: Path, *, replace: bool) -> None:
    """Put a file into the script root; the same bytes there already are fine, others only with `replace`."""
    content, target = _read(path), f"/scripts/{segment(path.name)}"
    there = api.bytes_or_none(target)
    if there is not None and there[0] == content:
        return
    if there is not None and not replace:
        raise CliFailure(
            f"The script root already has another {path.name}.",
            notes=("Replace it with --replace, or give the file another name.",),
        )
    try:
        api.put_bytes(target, content, etag=there[1] if there else None)
    except ServiceRefused as refused:
        refused.notes = (f"while uploading {path}", *refused.notes)
        raise


def _changed(method: str, action: str, *, url: str, as_json: bool) -> None:
    """Change a method as a whole, and say which version is its newest now."""
    changed = call_service(url, lambda api: api.post(f"/methods/{segment(method)}:{action}"), as_json=as_json)
    write(f"{changed['name']} is now version {changed['version']}\n")


def _stage_cell(stage: dict[str, Any]) -> str:
    """Return what a stage runs; how it is started only when that is a group of processes."""
    launcher = stage.get("launcher") or {"kind": "python"}
    runs = stage.get("file") or f"-m {stage.get('module')}"
    if launcher["kind"] == "python":
        return f"{runs}  in {stage['conda_env']}"
    count = launcher.get("processes")
    processes = f"{count} processes" if count else "a process for each accelerator"
    return f"{runs}  in {stage['conda_env']}  by {launcher['kind']}, {processes}"


def _deployment_cell(deployment: dict[str, Any] | None) -> str | None:
    if deployment is None:
        return None
    return _stage_cell(deployment) if deployment["target"] == "custom" else f"to {deployment['target']}"


def _print_unready(readiness: dict[str, Any]) -> None:
    rows = [
        (stage["stage"], stage["environment"], problem["detail"])
        for stage in readiness["stages"]
        for problem in stage["problems"]
    ]
    if rows:
        print_table(("stage", "environment", "not ready because"), rows, nothing="")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CliFailure(f"{path}: {error.strerror}") from None


def read_document(file: Path) -> dict[str, Any]:
    """Return the object in `file` (`-`: JSON on stdin), by its suffix."""
    try:
        text = sys.stdin.read() if file == STDIN else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Misused(f"{file} cannot be read: {error}") from None
    try:
        document = _parse(text, file.suffix.lower())
    except ValueError as error:
        raise Misused(f"{file} cannot be parsed: {error}") from None
    if not isinstance(document, dict):
        raise Misused(f"{file} must hold one object.")
    return document


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".toml":
        return tomllib.loads(text)
    if suffix in {".yaml", ".yml"}:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    return json.loads(text)


def print_parameters(document: dict[str, Any], *, advanced: bool = False) -> None:
    """Print one table for each stage, and what could not be read; `advanced` adds one for each class of options."""
    for stage in document["stages"]:
        console().print(f"\n[bold]{stage['stage']}[/]  {escape(stage['file'] or stage['module'])}")
        schema = stage["schema"]
        required = set(schema.get("required", ()))
        settable = {name: entry for name, entry in schema["properties"].items() if not entry.get("x-platform")}
        own = {name: entry for name, entry in settable.items() if not entry.get("x-classes")}
        _print_entries(own, required, "parameter (bold: required)")
        for one in stage["option_classes"]:
            options = {name: entry for name, entry in settable.items() if one["path"] in entry.get("x-classes", ())}
            if one["version"] is not None:
                _print_options(one, options, shown=advanced)
        for remark in stage["remarks"]:
            console().print(f"  {remark['detail']}", markup=False, style="yellow")


def _print_entries(entries: dict[str, Any], required: Collection[str], heading: str) -> None:
    rows = [
        (_name(name, required=name in required), _type(entry), _default(entry), _meaning(entry))
        for name, entry in entries.items()
    ]
    print_table((heading, "type", "default", "meaning"), rows, nothing="takes none")


def _print_options(one: dict[str, Any], options: dict[str, Any], *, shown: bool) -> None:
    when = " and ".join(f"{name}={'|'.join(map(str, values))}" for name, values in one["when"].items())
    of = f"{one['path']} ({one['library']} {one['version']})" + (f", with {when}" if when else "")
    if shown:
        console().print(f"\n  options of {of}", markup=False)
        _print_entries(options, (), "option")
    else:
        console().print(f"  and {len(options)} options of {of}: see them with --advanced", markup=False)


def _name(name: str, *, required: bool) -> str:
    return Markup(f"[bold]{escape(name)}[/]") if required else name


def _type(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return " | ".join(str(choice) for choice in entry["enum"])
    kind = entry.get("type", "any")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _default(entry: dict[str, Any]) -> str:
    return str(entry.get("x-default-text", "")) if entry.get("default") is None else str(entry["default"])


def _meaning(entry: dict[str, Any]) -> str:
    low, high = entry.get("x-typical-minimum"), entry.get("x-typical-maximum")
    bounds = (("from", low), ("to", high))
    typical = " ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    text = str(entry.get("description") or entry.get("title") or "")
    return f"{text} (typically {typical})" if typical else text
