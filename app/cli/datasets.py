"""`deepe datasets`: list, add, mix, show, profile and preview data sets."""

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.client import Api, call_service, list_items, segment
from app.cli.command import DEFAULT_URL, AsJson, Description, Limit, Text, Url, mix_part, typed
from app.cli.output import print_fields, print_json, print_table, size, write
from app.cli.row_preview import PREVIEW_SECONDS, lengths_line, preview_dataset

app = typer.Typer(no_args_is_help=True, help="Data sets: what models are trained with.")
app.command("preview")(preview_dataset)


@app.command("list")
def list_datasets(text: Text = None, limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the data sets."""
    found = list_items(url, "/datasets", {"q": text}, limit=limit, as_json=as_json)
    rows = [(entry["name"], entry["rows"], ", ".join(entry["columns"]), size(entry["size_bytes"])) for entry in found]
    print_table(
        ("name", "rows", "columns", "size"), rows, nothing=f"No data sets. Add one: {typed('datasets add FILE')}"
    )


@app.command("add")
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


@app.command("mix")
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
    made = call_service(
        url, lambda api: api.post("/datasets:mix", body if seed is None else {**body, "seed": seed}), as_json=as_json
    )
    write(f"{made['id']}  {made['name']}  {made['rows']} rows\n")
    _print_mix(made["source"]["mix"])


@app.command("show")
def show_dataset(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Id or name.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show a data set: how its file was read, and how many rows have a value in each column."""
    found = call_service(url, lambda api: api.get(f"/datasets/{segment(dataset)}"), as_json=as_json)
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


@app.command("profile")
def profile_dataset(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Id or name.")],
    method: Annotated[str | None, typer.Option("--method", "-m", help="Count tokens in its environment.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", "-b", help="Count tokens by its tokenizer.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say how the rows are written, how long they are, and what would be left out."""
    found = call_service(
        url,
        lambda api: api.get(f"/datasets/{segment(dataset)}/profile", {"method": method, "base_model": base_model}),
        as_json=as_json,
        timeout=PREVIEW_SECONDS,
    )

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
