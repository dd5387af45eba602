"""`deepe login` at a real service and a real identity provider."""

import asyncio
import json
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner, Result

from app.cli import app
from app.cli.client import Api
from app.cli.credentials import credentials_file, saved_login
from app.main import create_app
from app.settings import load_settings
from tests.identity_provider import AUDIENCE, CLIENT, IdentityProvider, identity_provider
from tests.waiting import wait_until

TOKEN = "k3J9-very-random-token"

Deepe = Callable[..., Result]


@pytest.fixture
def provider() -> Iterator[IdentityProvider]:
    with identity_provider() as running:
        yield running


@contextmanager
def serving(folder: Path, database_url: str, **options: Any) -> Iterator[str]:
    """Serve the API on a socket."""
    application = create_app(load_settings(home=folder, database_url=database_url, api_token=TOKEN, **options))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(application, log_config=None, lifespan="off"))

        async def serve() -> None:
            await server.serve([listener])
            await application.state.services.database.close()

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        try:
            wait_until(lambda: server.started, "the server")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def url(provider: IdentityProvider, sqlite_url: str, tmp_path: Path) -> Iterator[str]:
    with serving(
        tmp_path,
        sqlite_url,
        oidc_issuers=provider.url,
        oidc_audiences=AUDIENCE,
        oidc_roles="ml=developer",
        oidc_client_id=CLIENT,
    ) as address:
        yield address


@pytest.fixture
def deepe(url: str, monkeypatch: pytest.MonkeyPatch) -> Deepe:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("DEEPE_URL", url)
    monkeypatch.setattr("app.cli.login._SLOWER", 0.0)
    return lambda *words, given=None: CliRunner().invoke(app, words, input=given)


def me(deepe: Deepe) -> dict[str, Any]:
    result = deepe("me", "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(credentials_file().read_text())
    return found


class TestPerson:
    def test_logs_in_by_a_code_and_out_again(
        self, deepe: Deepe, url: str, provider: IdentityProvider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        provider.outcomes = ["authorization_pending", "slow_down", "authorization_pending"]

        before = deepe("me")
        login = deepe("login")
        after = me(deepe)
        monkeypatch.setenv("DEEPE_API_TOKEN", TOKEN)
        with_variable = me(deepe)
        monkeypatch.delenv("DEEPE_API_TOKEN")
        logout = deepe("logout")

        assert (before.exit_code, "deepe login" in before.stderr.replace(" -m app.cli", "")) == (4, True)
        assert login.exit_code == 0, login.stderr
        assert f"{provider.url}/activate and enter the code WDJB-MJHT" in login.stderr
        assert "as ada (developer)" in login.stdout
        assert (after["kind"], after["name"]) == ("person", "ada")
        assert "credentials.json" in after["token_from"]
        assert (with_variable["kind"], with_variable["token_from"]) == ("token", "DEEPE_API_TOKEN")
        assert provider.forms[0] == {"client_id": CLIENT, "scope": "openid profile offline_access"}
        assert logout.exit_code == 0
        assert (provider.refresh_tokens, kept()) == (set(), {})
        assert "no login" in deepe("logout").stdout
        assert deepe("me").exit_code == 4

    def test_tokens_are_kept_for_one_address_where_nobody_else_reads(
        self, deepe: Deepe, url: str, sqlite_url: str, tmp_path: Path
    ) -> None:
        deepe("login")
        with serving(tmp_path / "other", sqlite_url) as other:
            elsewhere = deepe("me", "--url", other)

        modes = [stat.S_IMODE(path.stat().st_mode) for path in (credentials_file(), credentials_file().parent)]
        assert modes == [0o600, 0o700]
        assert list(kept()) == [url]
        assert me(lambda *words: deepe(*words, "--url", url.upper().replace("HTTP", "http") + "/"))["name"] == "ada"
        assert (elsewhere.exit_code, "asks for a token" in elsewhere.stderr) == (4, True)

    def test_expired_token_is_replaced(self, deepe: Deepe, url: str, provider: IdentityProvider) -> None:
        """Also by two commands at once, where the provider takes each refresh token once."""
        provider.lifetime = 5.0  # each use finds that it ends soon
        deepe("login")
        first = kept()[url]

        def ask(_: int) -> str:
            with Api(url) as api:
                return str(api.get("/me")["name"])

        with ThreadPoolExecutor(4) as pool:
            names = list(pool.map(ask, range(8)))

        assert names == ["ada"] * 8
        assert kept()[url]["refresh_token"] != first["refresh_token"]
        assert provider.refresh_tokens == {kept()[url]["refresh_token"]}

    def test_valid_token_goes_on_while_the_provider_is_away(
        self, deepe: Deepe, url: str, provider: IdentityProvider
    ) -> None:
        provider.lifetime = 20.0
        deepe("login")
        me(deepe)
        login = saved_login(url)
        assert login is not None
        changed = {url: {**kept()[url], "token_url": "http://127.0.0.1:9/token"}}
        credentials_file().write_text(json.dumps(changed))

        assert me(deepe)["name"] == "ada"
        credentials_file().write_text(json.dumps({url: {**changed[url], "expires_at": time.time() - 1}}))
        assert deepe("me").exit_code == 3

    def test_login_that_the_provider_ended_says_so(self, deepe: Deepe, provider: IdentityProvider) -> None:
        provider.lifetime = 5.0
        deepe("login")
        provider.refresh_tokens.clear()

        ended = deepe("jobs", "list")

        assert ended.exit_code == 4
        assert "the session is over" in ended.stderr
        assert "Log in again" in ended.stderr

    def test_nothing_is_kept_of_a_login_that_failed(self, deepe: Deepe, provider: IdentityProvider) -> None:
        provider.outcomes = ["authorization_pending", "access_denied"]
        denied = deepe("login")
        provider.outcomes = ["expired_token"]
        late = deepe("login")
        provider.discovery["device_authorization_endpoint"] = "http://elsewhere.example/device"
        elsewhere = deepe("login")

        assert [result.exit_code for result in (denied, late, elsewhere)] == [4, 4, 1]
        assert "access_denied" in denied.stderr
        assert not credentials_file().exists()


class TestKey:
    def test_comes_from_standard_input_and_is_tried_first(
        self, deepe: Deepe, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DEEPE_API_TOKEN", TOKEN)
        made = json.loads(deepe("keys", "create", "nightly", "--role", "operator", "--json").stdout)
        monkeypatch.delenv("DEEPE_API_TOKEN")

        wrong = deepe("login", "--key", given="deepe_wrong\n")
        empty = deepe("login", "--key", given="\n")
        nothing_kept = not credentials_file().exists()
        right = deepe("login", "--key", "--json", given=f"{made['secret']}\n")

        assert [result.exit_code for result in (wrong, empty, right)] == [4, 2, 0]
        assert nothing_kept
        assert json.loads(right.stdout)["name"] == "nightly"
        assert me(deepe)["role"] == "operator"
        assert not any(made["secret"] in result.output + result.stderr for result in (wrong, right))

    def test_is_asked_for_where_there_is_no_provider(self, deepe: Deepe, sqlite_url: str, tmp_path: Path) -> None:
        with serving(tmp_path / "other", sqlite_url) as other:
            result = deepe("login", "--url", other, given=TOKEN)

        assert (result.exit_code, "as token (admin)" in result.stdout) == (0, True)


def test_file_that_is_no_list_of_logins_is_named(deepe: Deepe) -> None:
    credentials_file().parent.mkdir(parents=True)
    credentials_file().write_text("[]")

    result = deepe("me")

    assert result.exit_code == 1
    assert str(credentials_file()) in result.stderr
