import os
from pathlib import Path
from typing import Any

import pytest

from app.settings import SettingsError, database_url, describe_settings, load_settings, unknown_variables

TOKEN = "k3J9-very-random-token"


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("DEEPE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def problem(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    return str(caught.value)


class TestDefaults:
    def test_need_nothing_and_stay_on_this_machine(self, tmp_path: Path) -> None:
        settings = load_settings()

        assert settings.home == tmp_path / ".deepe"
        assert settings.node_home == tmp_path / ".deepe/nodes" / settings.node_name
        assert settings.database_url == f"sqlite+aiosqlite:///{tmp_path}/.deepe/deepe.db"
        assert (settings.host, settings.port, settings.token, settings.redis_url) == ("127.0.0.1", 8000, None, None)

    def test_derived_ones_follow_the_home_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_HOME", "/srv/deepe")
        monkeypatch.setenv("DEEPE_NODE_NAME", "gpu-1")

        settings = load_settings()

        assert settings.node_home == Path("/srv/deepe/nodes/gpu-1")
        assert settings.database_url == "sqlite+aiosqlite:////srv/deepe/deepe.db"

    def test_empty_variables_count_as_unset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_PORT", "")
        monkeypatch.setenv("DEEPE_API_TOKEN", "")

        assert load_settings().port == 8000

    def test_overrides_win_and_none_is_no_override(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_PORT", "9000")

        assert load_settings(port=9001).port == 9001
        assert load_settings(port=None).port == 9000

    def test_relative_home_becomes_absolute(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)

        assert load_settings(home=Path("here")).home == tmp_path / "here"

    def test_lists_are_separated_by_commas(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_ALLOWED_ORIGINS", "https://A.example.com/ , http://localhost:3000")

        assert load_settings().allowed_origins == ("https://a.example.com", "http://localhost:3000")


class TestDatabaseUrl:
    @pytest.mark.parametrize(
        ("given", "used"),
        [
            ("postgres://u:p@h/db", "postgresql+asyncpg://u:p@h/db"),
            ("postgresql://u:p%40x@h:5433/db?sslmode=require", "postgresql+asyncpg://u:p%40x@h:5433/db?ssl=require"),
            ("postgresql+asyncpg://h/db", "postgresql+asyncpg://h/db"),
            ("sqlite:////srv/a.db", "sqlite+aiosqlite:////srv/a.db"),
            ("sqlite+aiosqlite:///a.db", "sqlite+aiosqlite:///a.db"),
        ],
    )
    def test_names_our_driver(self, given: str, used: str) -> None:
        assert database_url(given) == used

    @pytest.mark.parametrize("given", ["mysql://h/db", "deepe.db", "postgresql+psycopg://h/db"])
    def test_refuses_what_we_have_no_driver_for(self, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
        assert "DEEPE_DATABASE_URL" in problem(monkeypatch, DEEPE_DATABASE_URL=given)


class TestBadValues:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("DEEPE_PORT", "http"),
            ("DEEPE_PORT", "70000"),
            ("DEEPE_SLOTS", "0"),
            ("DEEPE_POLL_SECONDS", "-1"),
            ("DEEPE_PLATFORM", "tpu"),
            ("DEEPE_LOG_LEVEL", "loud"),
            ("DEEPE_NODE_NAME", "../up"),
            ("DEEPE_HOST", "http://x"),
            ("DEEPE_RUNNER_HOST", "http://x"),
            ("DEEPE_RUNNER_CLIENTS", "backend.lab"),
            ("DEEPE_REDIS_URL", "http://localhost"),
            ("DEEPE_ALLOWED_ORIGINS", "*"),
            ("DEEPE_ALLOWED_HOSTS", "*.example.com"),
            ("DEEPE_LICENSE_PUBLIC_KEY", "/nowhere/key.pem"),
            ("DEEPE_CONDA_ROOT", "/nowhere"),
            ("DEEPE_OIDC_ISSUERS", "http://idp.example.com"),
            ("DEEPE_OIDC_KEYS", "http://idp.example.com/keys"),
            ("DEEPE_OIDC_ALGORITHMS", "RS256,HS256"),
            ("DEEPE_OIDC_ALGORITHMS", "none"),
            ("DEEPE_OIDC_ROLES", "ml=root"),
            ("DEEPE_OIDC_ROLES", "ml"),
            ("DEEPE_OIDC_ROLES", '{"ml": '),
            ("DEEPE_OIDC_DEFAULT_ROLE", "root"),
            ("DEEPE_OIDC_CLIENT_ID", "cli-without-an-issuer"),
        ],
    )
    def test_message_names_the_variable(self, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
        assert name in problem(monkeypatch, **{name: value})

    def test_all_problems_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        message = problem(monkeypatch, DEEPE_PORT="x", DEEPE_SLOTS="0")

        assert "DEEPE_PORT" in message
        assert "From 1 to 1024" in message

    def test_has_no_traceback_of_pydantic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        message = problem(monkeypatch, DEEPE_PORT="x")

        assert "pydantic" not in message
        assert "validation error" not in message


class TestToken:
    @pytest.mark.parametrize(
        "token",
        [
            "Abc-123",
            "changeme-changeme",
            "aaaaaaaaaaaaaaaaaaaa",
            "with a space inside",
            "密钥密钥密钥密钥密钥密钥密钥密钥",
        ],
    )
    def test_weak_one_is_refused_and_not_shown(self, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
        message = problem(monkeypatch, DEEPE_API_TOKEN=token)

        assert "DEEPE_API_TOKEN" in message
        assert token not in message

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu.lab"])
    def test_is_demanded_for_an_address_others_can_reach(self, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
        message = problem(monkeypatch, DEEPE_HOST=host)

        assert "DEEPE_API_TOKEN must be set" in message
        assert load_settings(api_token=TOKEN).token == TOKEN

    def test_is_not_needed_by_a_process_that_answers_nobody(self) -> None:
        assert load_settings(serves=False, host="0.0.0.0").token is None

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1", "[::1]"])
    def test_is_not_needed_on_this_machine(self, host: str) -> None:
        assert load_settings(host=host).token is None


class TestRunner:
    def test_is_off_by_default(self) -> None:
        assert load_settings().runner_port is None

    def test_is_for_this_machine_unless_clients_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        message = problem(monkeypatch, DEEPE_RUNNER_PORT="5555", DEEPE_RUNNER_HOST="0.0.0.0")
        assert "DEEPE_RUNNER_CLIENTS must name" in message

        monkeypatch.setenv("DEEPE_RUNNER_CLIENTS", "172.18.0.5, 10.1.0.0/16")
        assert list(map(str, load_settings().runner_clients)) == ["172.18.0.5/32", "10.1.0.0/16"]

    def test_has_a_port_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "is DEEPE_PORT as well" in problem(monkeypatch, DEEPE_RUNNER_PORT="8000")


SECRETS = {
    "DEEPE_API_TOKEN": TOKEN,
    "DEEPE_METRICS_TOKEN": TOKEN,
    "DEEPE_JOIN_TOKEN": TOKEN,
    "DEEPE_DATABASE_URL": "postgresql+asyncpg://u:pw@h/db",
    "DEEPE_REDIS_URL": "redis://:pw@h",
}


class TestSecretFiles:
    @pytest.mark.parametrize("name", SECRETS)
    def test_hold_what_the_variable_would(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
        (tmp_path / "secret").write_text(f"{SECRETS[name]}\n")
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))

        settings = load_settings()

        assert settings.secret_variables()[name] == SECRETS[name]
        assert {row.name: row.is_set for row in describe_settings(settings)}[name]
        assert unknown_variables() == {}

    def test_empty_variable_names_no_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_API_TOKEN_FILE", "")

        assert load_settings().token is None

    def test_weak_token_in_a_file_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("changeme-changeme")

        message = problem(monkeypatch, DEEPE_API_TOKEN_FILE=str(tmp_path / "secret"))

        assert "placeholder" in message
        assert "changeme" not in message

    @pytest.mark.parametrize(
        ("content", "said"),
        [(None, "No such file"), (b"\n", "is empty"), (b"\xff\xfe", "not UTF-8"), (b"x" * 70_000, "too large")],
    )
    def test_unusable_one_is_named(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, said: str
    ) -> None:
        path = tmp_path / "secret"
        if content is not None:
            path.write_bytes(content)

        message = problem(monkeypatch, DEEPE_JOIN_TOKEN_FILE=str(path), DEEPE_METRICS_TOKEN_FILE=str(path))

        assert "DEEPE_JOIN_TOKEN_FILE" in message
        assert "DEEPE_METRICS_TOKEN_FILE" in message
        assert message.count(said) == 2

    def test_variable_beside_its_file_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text(TOKEN)

        message = problem(monkeypatch, DEEPE_API_TOKEN=TOKEN, DEEPE_API_TOKEN_FILE=str(tmp_path / "secret"))

        assert "both set" in message


class TestDescription:
    def rows(self, **settings: Any) -> dict[str, Any]:
        return {row.name: row for row in describe_settings(load_settings(**settings))}

    def test_every_setting_has_a_description(self) -> None:
        rows = self.rows()

        assert len(rows) > 20
        assert all(row.description and row.type for row in rows.values())

    def test_secrets_are_masked(self) -> None:
        rows = self.rows(api_token=TOKEN, database_url="postgresql://u:pass@word@h/db", redis_url="redis://:pw@h")

        shown = " ".join(row.current for row in rows.values())
        assert "u:********@h/db" in shown
        assert not any(secret in shown for secret in (TOKEN, "pass", "word", "pw"))

    def test_says_what_is_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_SLOTS", "3")

        rows = self.rows()

        assert (rows["DEEPE_SLOTS"].is_set, rows["DEEPE_SLOTS"].current, rows["DEEPE_SLOTS"].default) == (
            True,
            "3",
            "1",
        )
        assert not rows["DEEPE_PORT"].is_set


def test_unknown_variable_comes_with_the_name_that_was_meant() -> None:
    environ = {"DEEPE_DATABSE_URL": "x", "DEEPE_QQQQ": "x", "DEEPE_PORT": "1", "DEEPE_JOB_ID": "j", "HOME": "/"}

    assert unknown_variables(environ) == {"DEEPE_DATABSE_URL": "DEEPE_DATABASE_URL", "DEEPE_QQQQ": None}


class TestPeople:
    ISSUER = "https://idp.example.com/realms/lab"

    def test_need_an_audience_and_the_administrators_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        message = problem(
            monkeypatch, DEEPE_OIDC_ISSUERS=self.ISSUER, DEEPE_OIDC_KEYS="https://a.example,https://b.example"
        )

        assert all(name in message for name in ("DEEPE_OIDC_AUDIENCES", "DEEPE_API_TOKEN", "DEEPE_OIDC_KEYS"))

    def test_have_roles_by_groups_whose_names_may_hold_anything(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_OIDC_ROLES", "ml-team = developer, CN=ops=admin")
        by_pairs = load_settings().oidc_roles
        monkeypatch.setenv("DEEPE_OIDC_ROLES", '{"CN=ops,DC=lab": "admin"}')

        assert by_pairs == {"ml-team": "developer", "CN=ops": "admin"}
        assert load_settings().oidc_roles == {"CN=ops,DC=lab": "admin"}
