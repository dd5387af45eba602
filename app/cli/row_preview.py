"""`deepe datasets preview`: rows as they stand in the file, or what a training is given and learns of them.

What is given, learned and cut is told apart by colours in a terminal, by marks elsewhere.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.text import Text

from app.cli.client import Api, segment
from app.cli.command import DEFAULT_URL, AsJson, Misused, Url
from app.cli.jobs import Parameter, ParameterFile, parameters
from app.cli.output import console, is_terminal, print_json, write

PREVIEW_SECONDS = 90.0  # longer than the service waits
_STYLES = {"given": "dim", "learned": "bold green", "unlearned": "yellow", "cut": "red"}


def preview_dataset(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Id or name.")],
    method: Annotated[str | None, typer.Option("--method", "-m", help="Show what a training with it learns.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", "-b", help="What it trains on.")] = None,
    row: Annotated[
        list[int] | None, typer.Option("--row", "-r", min=1, help="Number of a line. May be repeated. Default: 1 to 3.")
    ] = None,
    param: Parameter = None,
    params: ParameterFile = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show rows as they stand in the file, or what a training with a method would be given and would learn of them.

    With --method and --base-model the training's own code writes them, in the method's environment.
    """
    if (method is None) != (base_model is None):
        raise Misused("Name both --method and --base-model, or neither.")
    with Api(url, timeout=PREVIEW_SECONDS) as api:
        if method is None:
            found = {"items": _plain_rows(api, dataset, row or [])}
        else:
            body = {"base_model": base_model, "dataset": dataset, "parameters": parameters(param or [], params)}
            found = api.post(f"/methods/{segment(method)}:preview", body | ({"rows": row} if row else {}))
    if as_json:
        print_json(found)
    elif method is not None:
        _print_preview(found)
    else:
        for one in found["items"]:
            write(json.dumps(one, ensure_ascii=False) + "\n")


def _plain_rows(api: Api, dataset: str, numbers: list[int]) -> list[Any]:
    pages = [{"offset": number - 1, "limit": 1} for number in numbers] or [{"limit": 3}]
    return [row for page in pages for row in api.get(f"/datasets/{segment(dataset)}/preview", page)["items"]]


def _print_preview(preview: Mapping[str, Any]) -> None:
    """Print the rows with their sequences, then what is worth knowing."""
    out = console()
    if is_terminal():
        out.print(Text.assemble(*_joined(Text(fate, style) for fate, style in _STYLES.items())))
    for row in preview["rows"]:
        for line in _lines_of(row):
            out.print(line, soft_wrap=True)
    if preview["lengths"] is not None:
        out.print(Text(f"all rows: {lengths_line(preview['lengths'])}"), soft_wrap=True)
    for note in preview["notes"]:
        out.print(Text(f"note: {note['detail']}"), soft_wrap=True)


def lengths_line(lengths: Mapping[str, Any]) -> str:
    """Return how many tokens rows have, in a line."""
    counted = ", ".join(f"{name} {tokens}" for name, tokens in (lengths["tokens"] or {}).items()) or "none"
    share = lengths["learned_share"]
    learned = "" if share is None else f"; {share:.0%} of all are learned"
    part = (
        ""
        if lengths["measured"] == lengths["total"]
        else f" (sample: {lengths['measured']} of {lengths['total']} rows)"
    )
    return f"tokens: {counted}{learned}{part}"


def _lines_of(row: Mapping[str, Any]) -> Iterator[Text]:
    read = " as ".join(row[name] for name in ("form", "kind") if row[name])
    yield Text(f"line {row['line']}  {read}".rstrip(), style="bold")
    if row["problem"] is not None:
        yield Text(f"refused: {row['problem']['detail']}", style="red")
    if row["left_out"] is not None:
        yield Text(f"left out: {row['left_out']}", style="red")
    for one in row["sequences"]:
        yield Text(_counts(one))
        yield Text.assemble(*map(_shown, one["spans"]))
    if (more := row["sequence_count"] - len(row["sequences"])) > 0:
        yield Text(f"and {more} more sequences")
    if row["raw"] is not None:
        hidden = row["raw_characters"] - len(row["raw"])
        yield Text(row["raw"] + (f" ... {hidden} more characters" if hidden else ""))


def _counts(one: Mapping[str, Any]) -> str:
    counted = f"{one['role']}: {one['tokens']} tokens, {one['given']} given, {one['learned']} learned"
    over = " and ".join(f"{limit['parameter']} ({limit['value']})" for limit in one["exceeded"])
    return counted if one["used"] else f"{counted}; left out" + (f": over {over}" if over else "")


def _shown(span: Mapping[str, Any]) -> Text:
    fate = "cut" if span["cut"] else {1: "learned", 0: "given", -1: "unlearned"}[span["weight"]]
    text = span["text"]
    if text is None:
        text = f" ... {span['tokens']} tokens, {span['characters']} characters ... "
    return Text(text, _STYLES[fate]) if is_terminal() else Text(f"[{fate}]{text}")


def _joined(words: Iterator[Text]) -> Iterator[Text]:
    for word in words:
        yield word
        yield Text("  ")
