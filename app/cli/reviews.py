"""`deepe reviews`: read code that waits for an approval, and decide on it."""

from typing import Annotated, Any

import typer

from app.cli.client import Api, segment
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, Limit, Url, typed
from app.cli.output import ago, print_fields, print_json, print_table, write

app = typer.Typer(no_args_is_help=True, help="Code that a second person approves before it runs.")

Digest = Annotated[str, typer.Argument(metavar="DIGEST", help="Digest of the code, or its first characters.")]
Note = Annotated[str, typer.Option("--note", help="Why, for those who come later.")]
_SHORT = 12
_SHORTEST = 6


@app.command("list")
def list_reviews(
    state: Annotated[
        str, typer.Option("--state", help="waiting, approved, rejected, withdrawn, or all.", metavar="STATE")
    ] = "waiting",
    limit: Limit = 100,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List the code that waits for an approval."""
    with Api(url) as api:
        params = {} if state == "all" else {"state": state}
        found = list(api.items("/code-reviews", params, limit=limit))
    if as_json:
        print_json({"items": found})
        return
    rows = [
        (
            one["digest"][:_SHORT],
            one["state"],
            f"{one['method']['name']} v{one['method']['version']}" if one["method"] else "-",
            one["stage"],
            one["file"],
            ago(one["created_at"]),
        )
        for one in found
    ]
    print_table(("digest", "state", "method", "stage", "file", "since"), rows, nothing="No code waits for an approval.")


@app.command("show")
def show_review(digest: Digest, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show how code differs from what was approved before, who changed it, and what to look at."""
    with Api(url, timeout=60) as api:
        review = api.get(_address(api, digest))
    if as_json:
        print_json(review)
        return
    authors = [one["name"] for one in review["changed_by"]]
    if review["unknown_author"]:
        authors.append("unknown (outside of the API)")
    print_fields(
        {
            "digest": review["digest"],
            "state": review["state"],
            "method": f"{review['method']['name']} v{review['method']['version']}" if review["method"] else "-",
            "stage": review["stage"],
            "file": review["file"],
            "changed by": ", ".join(authors),
            "compared with": f"v{review['approved_version']}" if review["approved_version"] else "nothing approved yet",
        }
    )
    for one in review["differences"]:
        write(f"\n{one['change']}: {one['path'] or 'how the method calls it'}\n")
        write("".join(f"{line}\n" for line in one["diff"].split("\n")) if one["diff"] else "")
        if not one["complete"]:
            write("(not all of it is shown here: read the file itself)\n")
    if review["not_compared"]:
        write(f"\n{review['not_compared']} more files differ.\n")
    rows = [(f"{note['path']}:{note['line']}", note["detail"], note["quoted"]) for note in review["notes"]]
    write("\n")
    print_table(("where", "to look at", "code"), rows, nothing="Nothing was noticed; that is no verdict.")
    if review["not_read"]:
        write(f"\n{review['not_read']} files were not looked at.\n")
    for one in review["decisions"]:
        write(f"{one['state']} by {one['name']} {ago(one['created_at'])} {one['note']}\n")


@app.command("approve")
def approve(digest: Digest, note: Note = "", url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Approve code that somebody else changed, and that you have read."""
    _decide(digest, "approve", note, url=url, as_json=as_json)


@app.command("reject")
def reject(digest: Digest, note: Note = "", url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Reject code that waits."""
    _decide(digest, "reject", note, url=url, as_json=as_json)


@app.command("withdraw")
def withdraw(digest: Digest, note: Note = "", url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Withdraw an approval: jobs that no node has taken do not start this code any more."""
    review = _decide(digest, "withdraw", note, url=url, as_json=as_json)
    if review["running_jobs"] and not as_json:
        write("Jobs that run it go on:\n")
        for job in review["running_jobs"]:
            write(f"  {typed(f'jobs cancel {job}')}\n")


def _decide(digest: str, action: str, note: str, *, url: str, as_json: bool) -> dict[str, Any]:
    with Api(url) as api:
        review: dict[str, Any] = api.post(f"{_address(api, digest)}:{action}", {"note": note})
    if as_json:
        print_json(review)
    else:
        write(f"{review['digest'][:_SHORT]} is {review['state']}\n")
    return review


def _address(api: Api, digest: str) -> str:
    """Return the address of the review whose digest begins so."""
    if len(digest) == 64:
        return f"/code-reviews/{segment(digest)}"
    if len(digest) < _SHORTEST:
        raise CliFailure(f"Give at least {_SHORTEST} characters of the digest.")
    found = {one["digest"] for one in api.items("/code-reviews", {}, limit=None) if one["digest"].startswith(digest)}
    if len(found) != 1:
        raise CliFailure(f"{len(found)} reviews have a digest that begins with {digest!r}.")
    return f"/code-reviews/{found.pop()}"
