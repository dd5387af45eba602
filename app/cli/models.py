"""`deepe models`: what jobs made, and asking it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.exits import Misused
from app.cli.options import DEFAULT_URL, AsJson, Limit, Url

app = typer.Typer(no_args_is_help=True, help="Models that jobs made: customized, complete, online.")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name or id of the model.")]


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
    from app.cli.client import Api
    from app.cli.output import ago, print_json, print_table

    with Api(url) as api:
        models = list(api.items("/models", {"state": state, "method": method, "q": text}, limit=limit))
    if as_json:
        print_json({"items": models})
        return
    rows = [
        (model["id"], model["name"], model["state"], model["training_type"], ago(model["created_at"]))
        for model in models
    ]
    print_table(("id", "name", "state", "type", "made"), rows, nothing="No models yet.")


@app.command()
def show(model: Model, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show a model and where it comes from."""
    from app.cli.client import Api, segment
    from app.cli.output import print_fields, print_json, size

    with Api(url) as api:
        document = api.get(f"/models/{segment(model)}")
    if as_json:
        print_json(document)
    else:
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
                "job": document["job"]["id"],
                "parameters": document["parameters"],
                "made from": ", ".join(parent["name"] for parent in document["parents"]),
                "made into": ", ".join(child["name"] for child in document["children"]),
                "made": document["created_at"],
            }
        )


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The question; without one, a conversation.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture that the question is about; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before the question.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1)] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0)] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0)] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Ask a model; the answer comes as it is made."""
    from app.cli.chat import ask, converse, picture
    from app.cli.client import Api

    given = {
        "system_prompt": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
    }
    options = {name: value for name, value in given.items() if value is not None}
    with Api(url) as api:
        if prompt is None and sys.stdin.isatty() and not as_json and not image:
            converse(api, model, options)
            return
        question = prompt if prompt is not None else sys.stdin.read().strip()
        if not question:
            raise Misused("Give a question, or run it in a terminal for a conversation.")
        message: dict[str, Any] = {"role": "user", "content": question}
        if image:
            message["images"] = [picture(path) for path in image]
        ask(api, model, [message], options, as_json=as_json)
