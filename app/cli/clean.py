"""`deepe clean`: remove what is old enough."""

from typing import Annotated

import typer

from app.cli.options import DEFAULT_URL, AsJson, Url


def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing, show what would go.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Remove leftovers that the DEEPE_KEEP_... settings no longer keep; the service does it every hour by itself."""
    from app.cli.client import Api
    from app.cli.output import print_json, print_table, size

    with Api(url) as api:
        report = api.post("/housekeeping:run", {"dry_run": dry_run})
    if as_json:
        print_json(report)
        return
    rows = [
        (entry["kind"].replace("_", " "), entry["count"], size(entry["size_bytes"]))
        for entry in report["items"]
        if entry["count"]
    ]
    print_table(("would go" if dry_run else "removed", "count", "size"), rows, nothing="Nothing is old enough.")
