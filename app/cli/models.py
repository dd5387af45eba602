"""`deepe models`: list models and send them messages, one at a time or as a conversation."""

import base64
import mimetypes
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.client import Api, ServiceRefused, call_service, list_items, segment
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, Limit, Misused, Url, typed
from app.cli.output import ago, print_entries, print_fields, print_json_line, print_table, size, write
from app.cli.transfer import Continue, Target, download

app = typer.Typer(no_args_is_help=True, help="Models that jobs made: customized, complete, online.")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name or id of the model.")]
LEAVE = frozenset({"/bye", "/exit", "/quit"})
AGAIN = "/new"
WHOLE = frozenset({"stop", "length"})
"""Ways to finish that leave an answer."""


@app.command("list")
def list_models(
    state: Annotated[str | None, typer.Option("--state", help="customized, complete or online.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Only models of this method.")] = None,
    text: Annotated[str | None, typer.Option("--text", "-q", help="Only models with this text in their name.")] = None,
    limit: Limit = 50,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List models, newest first."""
    models = list_items(url, "/models", {"state": state, "method": method, "q": text}, limit=limit, as_json=as_json)
    rows = [
        (model["id"], model["name"], model["state"], model["training_type"], ago(model["created_at"]))
        for model in models
    ]
    print_table(("id", "name", "state", "type", "made"), rows, nothing="No models yet.")


@app.command()
def show(model: Model, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show a model and where it comes from."""
    document = call_service(url, lambda api: api.get(f"/models/{segment(model)}"), as_json=as_json)
    print_fields(
        {
            "id": document["id"],
            "name": document["name"],
            "state": document["state"],
            "type": document["training_type"],
            "folder": document["path"],
            "size": size(document["size_bytes"]) if document["path"] else None,
            "served": (document["details"].get("deployment") or {}).get("url"),
            "base model": document["base_model"]["name"],
            "data set": (document["dataset"] or {}).get("name"),
            "method": f"{document['method']['name']} (version {document['method']['version']})",
            "job": document["job"]["id"] if document["job"] else "none: made elsewhere",
            "parameters": document["parameters"],
            "made from": ", ".join(parent["name"] for parent in document["parents"]),
            "made into": ", ".join(child["name"] for child in document["children"]),
            "made": document["created_at"],
        }
    )
    print_entries("warning", document.get("warnings", ()))


@app.command("add")
def add_model(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Relative to models/ of the service's home.")],
    base_model: Annotated[str, typer.Option("--base-model", "-b", help="What it was made from in the end.")],
    method: Annotated[str, typer.Option("--method", help="What made it; its scripts answer for it.")],
    state: Annotated[str, typer.Option("--state", help="customized or complete.")] = "customized",
    parent: Annotated[str | None, typer.Option("--parent", help="The model that it was made from.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="What it learned from.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="What it is called. Default: the folder's name.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Register a model that was made elsewhere; its files are checked and not moved."""
    given = {
        "name": name or Path(folder).name, "state": state, "path": folder, "base_model": base_model, "method": method,
        "parent": parent, "dataset": dataset,
    }  # fmt: skip
    made = call_service(
        url,
        lambda api: api.post("/models", {key: value for key, value in given.items() if value is not None}),
        as_json=as_json,
    )
    write(f"{made['id']}  {made['name']}\n")


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The message. Default: a conversation.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="An image for the message; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1)] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0)] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0)] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Reason before the answer, or not.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Ask a model; the answer comes as it is made."""
    given = {
        "system_prompt": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "enable_thinking": thinking,
    }
    options = {name: value for name, value in given.items() if value is not None}
    with Api(url) as api:
        if prompt is None and sys.stdin.isatty() and not as_json and not image:
            converse(api, model, options)
            return
        question = prompt if prompt is not None else sys.stdin.read().strip()
        if not question:
            raise Misused("Give a message, or run the command in a terminal for a conversation.")
        message: dict[str, Any] = {"role": "user", "content": question}
        if image:
            message["images"] = [picture(path) for path in image]
        ask(api, model, [message], options, as_json=as_json)
        if not as_json:
            with suppress(ServiceRefused):  # the question is answered
                print_entries("warning", api.get(f"/models/{segment(model)}").get("warnings", ()))


@app.command("download")
def download_model(model: Model, target: Target = None, go_on: Continue = False, url: Url = DEFAULT_URL) -> None:
    """Download the files of a model into a folder; each is compared with the digest that was recorded."""
    with Api(url) as api:
        document = api.get(f"/models/{segment(model)}")
        if document["path"] is None:
            raise CliFailure("An online model has no files here; download the model that it was made from.")
        digests = {file["path"]: file["sha256"] for file in document["details"].get("files", ())}
        address = f"/models/{segment(document['id'])}"
        download(api, address, target or Path(document["name"]), go_on=go_on, digests=digests)


class AnswerFailed(CliFailure):
    """The model gave no whole answer."""


def ask(api: Api, model: str, messages: list[dict[str, Any]], options: Mapping[str, Any], *, as_json: bool) -> str:
    """Stream one answer to stdout and return it."""
    pieces: list[str] = []
    end: dict[str, Any] | None = None
    body = {"messages": messages, **options}
    for event in api.stream("POST", f"/models/{segment(model)}/chat", body=body):
        if as_json:
            print_json_line({"event": event.event, "data": event.data})
        match event.event:
            case "piece":
                pieces.append(event.data["text"])
                if not as_json:
                    write(event.data["text"])
            case "done":
                end = event.data
            case "problem":
                raise AnswerFailed(event.data["detail"], notes=[str(e["detail"]) for e in event.data.get("errors", ())])
    if not as_json:
        write("\n")
    if end is None:
        raise AnswerFailed("The answer broke off.")
    if end["finish_reason"] not in WHOLE:
        lines = (end["error"], end["reason_detail"], f"Its output: {typed('jobs logs')} {end['job']}")
        raise AnswerFailed("The model could not answer.", notes=[line for line in lines if line])
    return "".join(pieces)


def picture(path: Path) -> dict[str, str]:
    """Return a picture file as a message carries it."""
    kind = mimetypes.guess_type(path.name, strict=False)[0] or ""
    if not kind.startswith("image/"):
        raise CliFailure(f"{path} is not called like a picture (.png, .jpg, .webp, .gif, .bmp).")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CliFailure(f"{path} cannot be read: {error.strerror}") from error
    return {"data": f"data:{kind};base64,{base64.b64encode(content).decode()}"}


def converse(api: Api, model: str, options: Mapping[str, Any]) -> None:
    """Ask what the person types until the input ends; the model sees the whole conversation."""
    print(f"Talking to {model}. {AGAIN} forgets what was said, {'/bye'} or Ctrl-D ends.", file=sys.stderr)
    messages: list[dict[str, Any]] = []
    while (question := _question()) is not None:
        if question == AGAIN:
            messages = []
        elif question:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": ask(api, model, messages, options, as_json=False)})


def _question() -> str | None:
    try:
        line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        write("\n")
        return None
    return None if line in LEAVE else line
