"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli.exits import JSON_WANTED

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[
    str, typer.Option("--url", envvar="DEEPE_URL", help="Address of the service.", rich_help_panel="Connection")
]


def _remember(ctx: typer.Context, wanted: bool) -> bool:
    ctx.meta[JSON_WANTED] = wanted
    return wanted


AsJson = Annotated[
    bool,
    typer.Option("--json", callback=_remember, help="Print JSON: one document, or one line per event of a stream."),
]
HomeFolder = Annotated[
    Path | None, typer.Option("--home", help="Folder of scripts, models, data sets and runs, instead of DEEPE_HOME.")
]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="Print at most this many.")]
