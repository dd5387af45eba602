"""What `deepe login` keeps: an API key, or a person's tokens, by the address of the service.

One file in the configuration folder of the account, mode 0600. A token goes to the address that it was kept for and to
nobody else. An access token that is about to expire is replaced by means of the refresh token: under a lock, because
issuers give a new refresh token with each use, and a command beside this one may have been quicker.
"""

import fcntl
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from app.access.loopback import is_loopback
from app.cli.command import CliFailure, ExitCode, typed

ISSUER_SECONDS: Final = 15.0
_REFRESHED_BEFORE: Final = 30.0
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class LoginEnded(CliFailure):
    """The issuer gives no more tokens for this login."""

    exit_code = ExitCode.REFUSED

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"The login at {url} has ended: {problem}.", notes=(f"Log in again: {typed('login')}",))


class IssuerUnreachable(CliFailure):
    """The issuer does not answer."""

    exit_code = ExitCode.UNREACHABLE


class IssuerRefused(CliFailure):
    """The issuer answered with an error (RFC 6749, section 5.2)."""

    exit_code = ExitCode.REFUSED

    def __init__(self, url: str, document: Mapping[str, Any], status: int) -> None:
        self.error = str(document.get("error", ""))
        said = document.get("error_description") or self.error or f"HTTP {status}"
        self.problem = str(said)
        super().__init__(f"The identity provider refused ({url}): {said}.")


@dataclass(frozen=True)
class Login:
    """An API key, or the tokens of a person and where new ones come from."""

    token: str
    expires_at: float | None = None
    refresh_token: str | None = None
    issuer: str | None = None
    client_id: str | None = None
    token_url: str | None = None
    revocation_url: str | None = None

    def ends_soon(self) -> bool:
        """Say whether the token is to be replaced, if it can be."""
        return self.expires_at is not None and self.expires_at - time.time() < _REFRESHED_BEFORE

    def with_tokens(self, answer: Mapping[str, Any]) -> "Login":
        """Return the login with the tokens of an answer (RFC 6749, section 5.1)."""
        token, seconds = answer.get("access_token"), str(answer.get("expires_in", ""))
        if not isinstance(token, str) or str(answer.get("token_type", "")).lower() != "bearer":
            raise CliFailure(f"{self.token_url} gave no bearer token.")
        return replace(
            self,
            token=token,
            expires_at=time.time() + float(seconds) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", seconds) else None,
            refresh_token=answer.get("refresh_token") or self.refresh_token,
        )


class SavedLogin(httpx.Auth):
    """Puts the token that is kept for a service into every request, a new one when it has expired."""

    def __init__(self, url: str, login: Login) -> None:
        self._url = url
        self._login = login

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if self._login.ends_soon() and self._login.refresh_token:
            self._login = _refreshed(self._url)
        request.headers["Authorization"] = f"Bearer {self._login.token}"
        yield request


def credentials_file() -> Path:
    """Return where logins are kept."""
    usual = "~/Library/Application Support" if sys.platform == "darwin" else "~/.config"
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser(usual)  # noqa: PTH111 - raises nothing
    return Path(folder) / "deepe" / "credentials.json"


def saved_login(url: str) -> Login | None:
    """Return what is kept for the service at this address."""
    entry = _read().get(_address(url))
    return None if entry is None else Login(**entry)


def save_login(url: str, login: Login) -> None:
    """Keep a login in the place of one that was kept for the same address."""
    with _locked():
        _write({**_read(), _address(url): asdict(login)})


def forget_login(url: str) -> Login | None:
    """Remove and return what is kept for the service at this address."""
    with _locked():
        logins = _read()
        entry = logins.pop(_address(url), None)
        if entry is None:
            return None
        _write(logins)
    return Login(**entry)


def ask_issuer(url: str, form: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the document at an address of the issuer, or its answer to a form."""
    try:
        answer = httpx.request(
            "GET" if form is None else "POST",
            url,
            data=form,
            headers={"Accept": "application/json"},
            timeout=ISSUER_SECONDS,
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise IssuerUnreachable(f"The identity provider does not answer ({url}: {error}).") from error
    try:
        document = answer.json() if answer.content else {}
    except ValueError:
        document = {}
    if not answer.is_success or not isinstance(document, dict):
        raise IssuerRefused(url, document if isinstance(document, dict) else {}, answer.status_code)
    return document


def _refreshed(url: str) -> Login:
    """Return the login with a new access token; raise `LoginEnded` when the issuer gives none any more."""
    with _locked():
        logins = _read()
        entry = logins.get(_address(url))
        if entry is None:
            raise LoginEnded(url, "somebody logged out meanwhile")
        login = Login(**entry)
        if not login.ends_soon() or not login.refresh_token or not login.token_url:
            return login  # another command was quicker
        form = {"grant_type": "refresh_token", "refresh_token": login.refresh_token, "client_id": login.client_id or ""}
        try:
            login = login.with_tokens(ask_issuer(login.token_url, form))
        except IssuerRefused as refused:
            raise LoginEnded(url, refused.problem) from refused
        except IssuerUnreachable:
            if login.expires_at is not None and login.expires_at > time.time():
                return login
            raise
        _write({**logins, _address(url): asdict(login)})
    return login


def _address(url: str) -> str:
    """Return one form of an address that can be written in several."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}{parts.path.rstrip('/')}"


@contextmanager
def _locked() -> Iterator[None]:
    """Keep other commands from changing the file meanwhile."""
    folder = credentials_file().parent
    if not folder.is_absolute():
        raise CliFailure("This account has no home folder to keep logins in. Set XDG_CONFIG_HOME to an absolute path.")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (folder / ".credentials.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise CliFailure(f"{error.filename or folder}: {error.strerror}: logins cannot be kept there.") from error


def _read() -> dict[str, Any]:
    file = credentials_file()
    try:
        document = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CliFailure(f"{file}: {error.strerror}.") from error
    except ValueError:
        document = None
    known = set(Login.__dataclass_fields__)
    if not isinstance(document, dict) or not all(
        isinstance(entry, dict) and "token" in entry and entry.keys() <= known for entry in document.values()
    ):
        raise CliFailure(f"{file} is not as `deepe login` writes it.", notes=("Remove it and log in again.",))
    return document


def _write(logins: Mapping[str, Any]) -> None:
    """Replace the file in one step; it is never readable by others."""
    file = credentials_file()
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".credentials.")  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as stream:
            json.dump(logins, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
