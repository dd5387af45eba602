"""`deepe me` and `deepe keys`: who calls the service, and with which role."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from app.cli.client import Api, segment
from app.cli.command import DEFAULT_URL, AsJson, Limit, Misused, Url, typed
from app.cli.output import ago, print_fields, print_json, print_table, write

keys = typer.Typer(no_args_is_help=True, help="API keys: callers with a name and a role.")

Key = Annotated[str, typer.Argument(metavar="KEY", help="Id or name.")]
Role = Annotated[str, typer.Option("--role", help="viewer, operator, developer or admin.")]
Days = Annotated[int | None, typer.Option("--days", min=1, max=36500, help="It ends after so many days.")]


def me(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Say who you are to the service, and what you may do."""
    with Api(url) as api:
        found, token_from = api.get("/me"), api.token_from
    if as_json:
        print_json({**found, "token_from": token_from})
        return
    print_fields(
        {
            "name": found["name"],
            "known by": found["kind"],
            "role": found["role"],
            **({"project": f"{found['project']}, {found['role_in_project']}"} if found["project"] != "default" else {}),
            "may": ", ".join(found["permissions"]),
            "until": found["expires_at"],
            "token from": token_from,
        }
    )
    for notice in found.get("notices", ()):
        write(f"{notice['detail']}\n")


@keys.command("list")
def list_keys(
    revoked: Annotated[bool, typer.Option("--revoked", help="Those as well that were revoked.")] = False,
    limit: Limit = 100,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List the API keys; their secrets are not shown."""
    with Api(url) as api:
        found = list(api.items("/keys", {"revoked": revoked}, limit=limit))
    if as_json:
        print_json({"items": found})
        return
    rows = [
        (key["name"], key["role"], f"{key['prefix']}…", ago(key["last_used_at"]) or "never", _end(key)) for key in found
    ]
    hint = f"No API keys. Make one: {typed('keys create NAME --role operator')}"
    print_table(("name", "role", "secret", "used", "ends"), rows, nothing=hint)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is, or what for.")],
    role: Role,
    days: Days = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Make an API key; prints its secret, once."""
    with Api(url) as api:
        made = api.post("/keys", {"name": name, "role": role, "expires_at": _after(days)})
    _print_secret(made, as_json=as_json)


@keys.command("change")
def change_key(
    key: Key,
    role: Annotated[str | None, typer.Option("--role", help="viewer, operator, developer or admin.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="A new name.")] = None,
    days: Days = None,
    forever: Annotated[bool, typer.Option("--forever", help="It never ends.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Change role, name or end of an API key; its secret stays."""
    changes: dict[str, Any] = {name_: value for name_, value in (("role", role), ("name", name)) if value is not None}
    if days is not None and forever:
        raise Misused("Give --days or --forever, not both.")
    if days is not None or forever:
        changes["expires_at"] = _after(days)
    if not changes:
        raise Misused("Nothing to change: give --role, --name, --days or --forever.")
    with Api(url) as api:
        changed = api.patch(f"/keys/{segment(key)}", changes)
    if as_json:
        print_json(changed)
    else:
        write(f"{changed['name']}  {changed['role']}  {_end(changed)}\n")


@keys.command("rotate")
def rotate_key(key: Key, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Give an API key a new secret; the old one ends at once."""
    with Api(url) as api:
        made = api.post(f"/keys/{segment(key)}:rotate")
    _print_secret(made, as_json=as_json)


@keys.command("revoke")
def revoke_key(key: Key, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """End an API key for good."""
    with Api(url) as api:
        api.delete(f"/keys/{segment(key)}")
    if as_json:
        print_json({"revoked": key})
    else:
        write(f"{key} revoked\n")


def _print_secret(key: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(key)
    else:
        write(f"{key['name']}  {key['role']}  {_end(key)}\nSecret, shown this once: {key['secret']}\n")


def _after(days: int | None) -> str | None:
    return None if days is None else (datetime.now(UTC) + timedelta(days=days)).isoformat()


def _end(key: dict[str, Any]) -> str:
    if key["revoked_at"] is not None:
        return f"revoked {ago(key['revoked_at'])}"
    return "never" if key["expires_at"] is None else str(key["expires_at"])[:10]
