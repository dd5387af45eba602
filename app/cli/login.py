"""`deepe login` and `deepe logout`: a person's tokens by the device flow (RFC 8628), or an API key, kept for later."""

import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import typer
from rich.markup import escape

from app.access.loopback import is_loopback
from app.access.signing_keys import DISCOVERY_PATH, is_safe_url
from app.cli.client import Api, ServiceRefused, token_variable
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, Misused, Url
from app.cli.credentials import IssuerRefused, Login, ask_issuer, credentials_file, forget_login, save_login
from app.cli.output import errors, print_json, write

_DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"
_USUAL_INTERVAL: Final = 5.0  # RFC 8628, section 3.2
_SLOWER: Final = 5.0
_MAX_SECRET: Final = 64 * 1024
_PENDING: Final = "authorization_pending"
_SLOW_DOWN: Final = "slow_down"


def login(
    key: Annotated[
        bool, typer.Option("--key", help="With an API key, also where the service has an identity provider.")
    ] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Log in to a service: at its identity provider, else with an API key. Later commands need no token then.

    An API key is asked for without an echo, or read from standard input.
    """
    _warn_of_plain_http(url)
    provider = None if key else _provider(url)
    made = Login(token=_typed_key()) if provider is None else _by_device(provider)
    with Api(url, token=made.token) as api:
        me = api.get("/me")
    save_login(url, made)
    if as_json:
        print_json({"url": url, "name": me["name"], "role": me["role"], "kept_in": str(credentials_file())})
    else:
        write(f"Logged in to {url} as {me['name']} ({me['role']}).\n")
    if variable := token_variable(os.environ):
        errors().print(f"{variable} is set and counts first: unset it to use this login.")


def logout(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Forget the login to a service, and let the identity provider end it."""
    found = forget_login(url)
    problem = None if found is None else _revoked(found)
    if as_json:
        print_json({"url": url, "was_logged_in": found is not None, "problem": problem})
        return
    write(f"Logged out of {url}.\n" if found is not None else f"There was no login to {url}.\n")
    if problem:
        errors().print(escape(f"The identity provider could not be told, its session ends by itself: {problem}"))


def _provider(url: str) -> Mapping[str, Any] | None:
    """Return issuer, client and scopes of the service's identity provider; None where it has none."""
    with Api(url, token="") as api:
        try:
            told = api.get("/login")
        except ServiceRefused as refused:
            if refused.status in (401, 404):  # a service from before there was such an answer
                return None
            raise
    found: Mapping[str, Any] | None = told["oidc"]
    if found is not None and not is_safe_url(found["issuer"]):
        raise CliFailure(f"The service names {found['issuer']} as its identity provider; https:// is needed.")
    return found


def _by_device(provider: Mapping[str, Any]) -> Login:
    """Let the person log in with a browser, on whatever machine; return the tokens."""
    issuer, client = provider["issuer"], provider["client_id"]
    discovery = ask_issuer(issuer.rstrip("/") + DISCOVERY_PATH)
    endpoints = [discovery.get(name) for name in ("device_authorization_endpoint", "token_endpoint")]
    if discovery.get("issuer") != issuer or not all(
        isinstance(place, str) and is_safe_url(place) for place in endpoints
    ):
        raise CliFailure(
            f"{issuer} offers no device flow at https:// addresses of its own.",
            notes=("Let the administrator switch it on for this client, or log in with a key: deepe login --key",),
        )
    device_url, token_url = map(str, endpoints)
    offered = discovery.get("scopes_supported")
    scopes = [scope for scope in provider["scopes"] if not isinstance(offered, list) or scope in offered]
    begun = ask_issuer(device_url, {"client_id": client, "scope": " ".join(scopes)})
    if not all(isinstance(begun.get(name), str) for name in ("device_code", "user_code", "verification_uri")):
        raise CliFailure(f"{device_url} did not answer as RFC 8628 says.")
    _show(begun)
    pending = Login(
        token="",
        issuer=issuer,
        client_id=client,
        token_url=token_url,
        revocation_url=discovery.get("revocation_endpoint"),
    )
    return pending.with_tokens(_granted(token_url, client, begun))


def _show(begun: Mapping[str, Any]) -> None:
    console = errors()  # stdout is for results
    console.print(escape(f"Open {begun['verification_uri']} and enter the code {begun['user_code']}"), soft_wrap=True)
    if begun.get("verification_uri_complete"):
        console.print(escape(f"or open {begun['verification_uri_complete']}"), soft_wrap=True)


def _granted(token_url: str, client: str, begun: Mapping[str, Any]) -> dict[str, Any]:
    """Return the issuer's answer once the person has agreed."""
    form = {"grant_type": _DEVICE_GRANT, "device_code": begun["device_code"], "client_id": client}
    interval = float(begun.get("interval", _USUAL_INTERVAL))
    ends = time.monotonic() + float(begun.get("expires_in", 600))
    while time.monotonic() < ends:
        time.sleep(interval)
        try:
            return ask_issuer(token_url, form)
        except IssuerRefused as refused:
            if refused.error == _SLOW_DOWN:
                interval += _SLOWER
            elif refused.error != _PENDING:
                raise
    raise CliFailure("Nobody entered the code in time. Begin again: deepe login")


def _typed_key() -> str:
    """Return the key that is typed unseen, or comes from standard input."""
    if sys.stdin.isatty():
        secret = typer.prompt("API key", hide_input=True, err=True)
    else:
        secret = sys.stdin.read(_MAX_SECRET)
    secret = str(secret).strip()
    if not re.fullmatch(r"[!-~]+", secret):
        raise Misused("No API key was given: type it, or send it to standard input.")
    return secret


def _revoked(found: Login) -> str | None:
    """Let the issuer forget the refresh token (RFC 7009); return why that failed."""
    if not found.refresh_token or not found.revocation_url or not is_safe_url(found.revocation_url):
        return None
    try:
        ask_issuer(
            found.revocation_url,
            {"token": found.refresh_token, "token_type_hint": "refresh_token", "client_id": found.client_id or ""},
        )
    except CliFailure as failure:
        return failure.message
    return None


def _warn_of_plain_http(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        errors().print(escape(f"{url} is not https: everybody between can read the token."))
