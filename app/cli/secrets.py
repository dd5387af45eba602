"""`deepe secrets`: values that scripts get by their names (`secret://NAME`), and that nobody can read."""

import asyncio
import sys
from typing import Annotated

import typer

from app.cli.client import Api, segment
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, HomeFolder, Limit, Url, typed
from app.cli.output import ago, print_json, print_table, write

app = typer.Typer(no_args_is_help=True, help="Secrets: values that scripts get by their names, and nobody can read.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Referred to as secret://NAME.")]


@app.command("list")
def list_secrets(limit: Limit = 100, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the secrets; their values are not shown."""
    with Api(url) as api:
        found = list(api.items("/secrets", limit=limit))
    if as_json:
        print_json({"items": found})
        return
    rows = [(one["name"], one["reference"], one["changed_by"], ago(one["changed_at"])) for one in found]
    hint = f"No secrets. Set one: {typed('secrets set NAME')}"
    print_table(("name", "reference", "set by", "set"), rows, nothing=hint)


@app.command("set")
def set_secret(name: Name, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Set a secret. Its value is asked for, or read from stdin; it is no argument, which others could see.

    One newline at the end of stdin is left out.
    """
    with Api(url) as api:
        row = api.put(f"/secrets/{segment(name)}", {"value": _value()})
    if as_json:
        print_json(row)
    else:
        write(f"{row['name']} is set; refer to it as {row['reference']}\n")


@app.command("delete")
def delete_secret(name: Name, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Delete a secret. Jobs that refer to it and have not started will fail."""
    with Api(url) as api:
        api.delete(f"/secrets/{segment(name)}")
    if as_json:
        print_json({"deleted": name})
    else:
        write(f"{name} deleted\n")


@app.command("rotate-key")
def rotate_key(
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove older keys: earlier backups cannot be read any more.")
    ] = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Encrypt all secrets with a new key, on a machine with the home.

    The service may run meanwhile. With DEEPE_SECRETS_KEY no key is made: put the new one before the old ones,
    restart the services, and run this.
    """
    from app.access.audit import command_action
    from app.access.secrets import SecretKeys, SecretsKeyUnusable, SecretUnreadable, encrypt_anew
    from app.cli.service import load
    from app.domain.audit import acting
    from app.domain.projects import EVERY_PROJECT
    from app.store.home import Home
    from app.store.session import Database

    settings = load(home=home)
    keys = SecretKeys(Home(settings.home).secrets_key, settings.given_secrets_key)

    async def work() -> int:
        database = Database(settings.database_url, scope=EVERY_PROJECT)
        try:
            with acting(command_action("rotate_secrets_key")):
                async with database.writing() as session:
                    return await encrypt_anew(session, keys)
        finally:
            await database.close()

    try:
        if not keys.are_given:
            keys.add()
        count = asyncio.run(work())
        if forget and not keys.are_given:
            keys.keep_first()
    except SecretUnreadable as error:
        raise CliFailure(f"{error} Set it anew or delete it, then rotate again; nothing was changed.") from None
    except SecretsKeyUnusable as error:
        raise CliFailure(error.detail()) from None
    if as_json:
        print_json({"encrypted": count, "keys": len(keys.read())})
    else:
        write(f"{count} secrets are encrypted with the newest key.\n")


def _value() -> str:
    if sys.stdin.isatty():
        value: str = typer.prompt("Value", hide_input=True, confirmation_prompt=True)
        return value
    return sys.stdin.read().removesuffix("\n")
