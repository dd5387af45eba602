"""`deepe queues`: how many jobs may run at once, together and for each user."""

from typing import Annotated

import typer

from app.cli.options import DEFAULT_URL, AsJson, Limit, Url

app = typer.Typer(no_args_is_help=True, help="Queues: limits of jobs that run at once.")

Queue = Annotated[str, typer.Argument(metavar="QUEUE", help="Name of the queue.")]


@app.command("list")
def list_queues(limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the queues that have limits or jobs."""
    from app.cli.client import Api
    from app.cli.output import print_json, print_table

    with Api(url) as api:
        found = list(api.items("/queues", {}, limit=limit))
    if as_json:
        print_json({"items": found})
        return
    rows = [
        (
            entry["name"],
            entry["running"],
            entry["waiting"],
            _limit(entry["max_live"]),
            _limit(entry["max_live_per_user"]),
        )
        for entry in found
    ]
    print_table(("name", "running", "waiting", "limit", "per user"), rows, nothing="No queue has limits or jobs.")


@app.command("set")
def set_limits(
    queue: Queue,
    most: Annotated[int | None, typer.Option("--max", min=0, help="Most jobs at once. Default: no limit.")] = None,
    per_user: Annotated[
        int | None, typer.Option("--max-per-user", min=0, help="Most jobs of one user at once. Default: no limit.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Set the limits of a queue, in place of those it has; what runs already goes on."""
    from app.cli.client import Api, segment
    from app.cli.output import print_json, write

    limits = {"max_live": most, "max_live_per_user": per_user}
    with Api(url) as api:
        entry = api.replace(f"/queues/{segment(queue)}", limits)
    if as_json:
        print_json(entry)
    else:
        write(f"{entry['name']}  {_limit(most)} at once, {_limit(per_user)} for each user\n")


@app.command("clear")
def clear_limits(queue: Queue, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Take the limits of a queue away; its jobs stay."""
    from app.cli.client import Api, segment
    from app.cli.output import print_json, write

    with Api(url) as api:
        api.delete(f"/queues/{segment(queue)}")
    if as_json:
        print_json({"name": queue})
    else:
        write(f"{queue}  no limits\n")


def _limit(most: int | None) -> str:
    return "any number" if most is None else str(most)
