"""`deepe webhooks`: addresses that are told when a job ends."""

from typing import Annotated

import typer

from app.cli.options import DEFAULT_URL, AsJson, Limit, Url

app = typer.Typer(no_args_is_help=True, help="Addresses that are told when a job ends.")

WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Id of the webhook.")]


@app.command("list")
def list_webhooks(limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the webhooks."""
    from app.cli.client import Api
    from app.cli.output import print_json, print_table

    with Api(url) as api:
        found = list(api.items("/webhooks", limit=limit))
    if as_json:
        print_json({"items": found})
        return
    rows = [
        (entry["id"], entry["url"], "on" if entry["active"] else "off", ", ".join(entry["events"])) for entry in found
    ]
    print_table(("id", "address", "", "events"), rows, nothing="No webhooks. Add one: deepe webhooks add ADDRESS")


@app.command("add")
def add_webhook(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="http or https.")],
    events: Annotated[
        list[str] | None, typer.Option("--event", "-e", help="What to tell; repeat it. Default: the ends of jobs.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Have an address told when jobs end; prints the secret of its signatures, once."""
    from app.cli.client import Api
    from app.cli.output import print_json, write

    body = {"url": address} | ({"events": events} if events else {})
    with Api(url) as api:
        made = api.post("/webhooks", body)
    if as_json:
        print_json(made)
    else:
        write(f"{made['id']}\nSecret, shown this once: {made['secret']}\n")


@app.command("delete")
def delete_webhook(webhook: WebhookId, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Delete a webhook and its messages."""
    from app.cli.client import Api, segment
    from app.cli.output import print_json, write

    with Api(url) as api:
        api.delete(f"/webhooks/{segment(webhook)}")
    if as_json:
        print_json({"deleted": webhook})
    else:
        write(f"{webhook} deleted\n")


@app.command("test")
def send_test(webhook: WebhookId, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Send a test message; `deepe webhooks deliveries` shows what came of it."""
    from app.cli.client import Api, segment
    from app.cli.output import print_json, write

    with Api(url) as api:
        made = api.post(f"/webhooks/{segment(webhook)}:test")
    if as_json:
        print_json(made)
    else:
        write(f"{made['id']}\n")


@app.command("deliveries")
def list_deliveries(webhook: WebhookId, limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the messages of a webhook, newest first."""
    from app.cli.client import Api, segment
    from app.cli.output import print_json, print_table

    with Api(url) as api:
        found = list(api.items(f"/webhooks/{segment(webhook)}/deliveries", limit=limit))
    if as_json:
        print_json({"items": found})
        return
    rows = [
        (entry["id"], entry["event"], entry["state"], entry["tries"], entry["last_error"] or "", entry["created_at"])
        for entry in found
    ]
    print_table(("id", "event", "state", "tries", "last error", "created"), rows, nothing="No messages.")


@app.command("redeliver")
def redeliver(
    webhook: WebhookId,
    delivery: Annotated[str, typer.Argument(metavar="MESSAGE", help="Id of the message.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Send a message again, also one that was given up."""
    from app.cli.client import Api, segment
    from app.cli.output import print_json, write

    with Api(url) as api:
        sent = api.post(f"/webhooks/{segment(webhook)}/deliveries/{segment(delivery)}:redeliver")
    if as_json:
        print_json(sent)
    else:
        write(f"{sent['id']}  {sent['state']}\n")
