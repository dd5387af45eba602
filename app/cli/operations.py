"""What operators set: `deepe queues`, `deepe webhooks`, `deepe clean`."""

from typing import Annotated

import typer

from app.cli.client import Api, call_service, list_items, segment
from app.cli.command import DEFAULT_URL, AsJson, Limit, Url, typed
from app.cli.output import print_json, print_table, size, write

queues = typer.Typer(no_args_is_help=True, help="Queues: limits of jobs that run at once.")

Queue = Annotated[str, typer.Argument(metavar="QUEUE", help="Name of the queue.")]


@queues.command("list")
def list_queues(limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the queues that have limits or jobs."""
    found = list_items(url, "/queues", {}, limit=limit, as_json=as_json)
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


@queues.command("set")
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
    limits = {"max_live": most, "max_live_per_user": per_user}
    entry = call_service(url, lambda api: api.replace(f"/queues/{segment(queue)}", limits), as_json=as_json)
    write(f"{entry['name']}  {_limit(most)} at once, {_limit(per_user)} for each user\n")


@queues.command("clear")
def clear_limits(queue: Queue, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Take the limits of a queue away; its jobs stay."""
    with Api(url) as api:
        api.delete(f"/queues/{segment(queue)}")
    if as_json:
        print_json({"name": queue})
    else:
        write(f"{queue}  no limits\n")


def _limit(most: int | None) -> str:
    return "any number" if most is None else str(most)


webhooks = typer.Typer(no_args_is_help=True, help="Addresses that get a message when a job ends.")

WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Id of the webhook.")]


@webhooks.command("list")
def list_webhooks(limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the webhooks."""
    found = list_items(url, "/webhooks", limit=limit, as_json=as_json)
    rows = [
        (entry["id"], entry["url"], "on" if entry["active"] else "off", ", ".join(entry["events"])) for entry in found
    ]
    print_table(("id", "address", "", "events"), rows, nothing=f"No webhooks. Add one: {typed('webhooks add ADDRESS')}")


@webhooks.command("add")
def add_webhook(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="http or https.")],
    events: Annotated[
        list[str] | None, typer.Option("--event", "-e", help="What to tell; repeat it. Default: the ends of jobs.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Send messages to an address when jobs end; prints the secret of their signatures, once."""
    body = {"url": address} | ({"events": events} if events else {})
    made = call_service(url, lambda api: api.post("/webhooks", body), as_json=as_json)
    write(f"{made['id']}\nSecret, shown this once: {made['secret']}\n")


@webhooks.command("delete")
def delete_webhook(webhook: WebhookId, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Delete a webhook and its messages."""
    with Api(url) as api:
        api.delete(f"/webhooks/{segment(webhook)}")
    if as_json:
        print_json({"deleted": webhook})
    else:
        write(f"{webhook} deleted\n")


@webhooks.command("test")
def send_test(webhook: WebhookId, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Send a test message; `deepe webhooks deliveries` shows what came of it."""
    made = call_service(url, lambda api: api.post(f"/webhooks/{segment(webhook)}:test"), as_json=as_json)
    write(f"{made['id']}\n")


@webhooks.command("deliveries")
def list_deliveries(webhook: WebhookId, limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the messages of a webhook, newest first."""
    found = list_items(url, f"/webhooks/{segment(webhook)}/deliveries", limit=limit, as_json=as_json)
    rows = [
        (entry["id"], entry["event"], entry["state"], entry["tries"], entry["last_error"] or "", entry["created_at"])
        for entry in found
    ]
    print_table(("id", "event", "state", "tries", "last error", "created"), rows, nothing="No messages.")


@webhooks.command("redeliver")
def redeliver(
    webhook: WebhookId,
    delivery: Annotated[str, typer.Argument(metavar="MESSAGE", help="Id of the message.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Send a message again, also one that was given up."""
    sent = call_service(
        url,
        lambda api: api.post(f"/webhooks/{segment(webhook)}/deliveries/{segment(delivery)}:redeliver"),
        as_json=as_json,
    )
    write(f"{sent['id']}  {sent['state']}\n")


def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing, show what would go.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Remove files and rows that are older than the DEEPE_KEEP_... settings allow. The service does it every hour."""
    report = call_service(url, lambda api: api.post("/housekeeping:run", {"dry_run": dry_run}), as_json=as_json)
    rows = [
        (entry["kind"].replace("_", " "), entry["count"], size(entry["size_bytes"]))
        for entry in report["items"]
        if entry["count"]
    ]
    print_table(("would go" if dry_run else "removed", "count", "size"), rows, nothing="Nothing is old enough.")
