"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[
    str, typer.Option("--url", envvar="DEEPE_URL", help="Address of the service.", rich_help_panel="Connection")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: one document, or one line per event of a stream.")]
HomeFolder = Annotated[
    Path | None, typer.Option("--home", help="Folder of scripts, models, data sets and runs, instead of DEEPE_HOME.")
]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="Print at most this many.")]
