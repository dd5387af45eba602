"""`deepe license` and `deepe doctor`, `settings`, `migrate`: commands that need no service."""

import contextlib
import json
import sqlite3
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from app.access.licence import Licence, load_public_key, read_signed
from app.cli import app
from app.cli.command import typed
from app.cli.doctor import CHECKS, Finding, Verdict, examine
from app.cli.main import COMMANDS
from app.settings import Settings, load_settings
from app.worker import run as run_worker


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("LANG", raising=False)
    monkeypatch.delenv("LC_ALL", raising=False)
    return CliRunner()


class TestLicense:
    def test_goes_from_keys_to_an_installed_licence(
        self, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home, keys, file = tmp_path / "home", tmp_path / "keys", tmp_path / "acme.json"
        made = json.loads(runner.invoke(app, ["license", "keygen", str(keys), "--json"]).stdout)
        monkeypatch.setenv("DEEPE_LICENSE_PUBLIC_KEY", made["public_key"])

        issued = runner.invoke(
            app,
            ["license", "issue", "--private-key", made["private_key"], "--licensee", "ACME", "--expires", "2999-12-31",
             "-o", str(file)],
        )  # fmt: skip
        installed = runner.invoke(app, ["license", "install", str(file), "--home", str(home), "--json"])

        assert issued.exit_code == 0
        assert installed.exit_code == 0
        assert json.loads(installed.stdout)["licensee"] == "ACME"
        assert json.loads(installed.stdout)["expires_at"].startswith("2999-12-31T23:59:59")
        assert (home / "license.json").read_text() == file.read_text()

    def test_edition_sets_terms_that_options_change(self, runner: CliRunner, tmp_path: Path) -> None:
        made = json.loads(runner.invoke(app, ["license", "keygen", str(tmp_path / "keys"), "--json"]).stdout)

        def issued(*words: str) -> Licence:
            file = tmp_path / "issued.json"
            common = ["license", "issue", "--private-key", made["private_key"], "--licensee", "ACME", "-o", str(file)]
            assert runner.invoke(app, [*common, *words]).exit_code == 0
            return read_signed(file.read_text(), load_public_key(Path(made["public_key"])))

        trial, team = issued("--edition", "trial"), issued("--edition", "team", "--projects", "7")
        plain = issued("--expires", "2999-12-31")
        unknown = runner.invoke(app, ["license", "issue", "--private-key", "x", "--licensee", "y", "--edition", "gold"])

        assert (trial.features, trial.projects, trial.expires_at) == (
            ("*",),
            None,
            trial.issued_at + timedelta(days=30),
        )
        assert trial.ends_at == trial.expires_at
        assert (team.edition, team.features, team.projects, team.ends_at) == ("team", ("methods:write",), 7, None)
        assert plain.grace == timedelta(days=14)
        assert (unknown.exit_code, "enterprise" in unknown.stderr) == (2, True)

    def test_that_ends_soon_is_a_finding_of_the_doctor(
        self, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = json.loads(runner.invoke(app, ["license", "keygen", str(tmp_path / "keys"), "--json"]).stdout)
        monkeypatch.setenv("DEEPE_LICENSE_PUBLIC_KEY", made["public_key"])
        file = tmp_path / "trial.json"
        words = ["--private-key", made["private_key"], "--licensee", "ACME", "--edition", "trial", "-o", str(file)]
        runner.invoke(app, ["license", "issue", *words])
        runner.invoke(app, ["license", "install", str(file), "--home", str(tmp_path / "home")])

        finding = CHECKS["licence"](load_settings(home=tmp_path / "home"))

        assert (finding.verdict, "expires at" in finding.detail) == ("warn", True)

    def test_refuses_a_forged_one_in_the_persons_language(
        self, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LANG", "de_DE.UTF-8")
        made = json.loads(runner.invoke(app, ["license", "keygen", str(tmp_path / "keys"), "--json"]).stdout)
        forged = runner.invoke(
            app, ["license", "issue", "--private-key", made["private_key"], "--licensee", "X"]
        ).stdout
        file = tmp_path / "forged.json"
        file.write_text(forged)

        result = runner.invoke(app, ["license", "install", str(file), "--home", str(tmp_path / "home")])

        assert result.exit_code == 1
        assert "Signatur" in result.stderr
        assert not (tmp_path / "home" / "license.json").exists()

    def test_overwrites_no_key(self, runner: CliRunner, tmp_path: Path) -> None:
        runner.invoke(app, ["license", "keygen", str(tmp_path)])

        assert runner.invoke(app, ["license", "keygen", str(tmp_path)]).exit_code == 1

    def test_says_how_a_day_is_written(self, runner: CliRunner, tmp_path: Path) -> None:
        words = ["license", "issue", "--private-key", "x", "--licensee", "y", "--expires", "31.12.2999"]

        result = runner.invoke(app, words)

        assert result.exit_code == 2
        assert "YYYY-MM-DD" in result.stderr


class TestDoctor:
    def test_finds_nothing_missing_here_and_makes_nothing(self, runner: CliRunner, tmp_path: Path) -> None:
        result = runner.invoke(app, ["doctor", "--json", "--home", str(tmp_path / "new")])

        findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
        assert result.exit_code == 0
        assert set(findings) == set(CHECKS)
        assert findings["home"]["verdict"] == "ok"
        assert not (tmp_path / "new").exists()

    def test_ends_with_1_and_advice_when_something_needed_is_missing(
        self, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DEEPE_DATABASE_URL", f"sqlite:///{tmp_path / 'file' / 'deepe.db'}")
        monkeypatch.setenv("DEEPE_MIN_FREE_BYTES", str(1024**4))

        result = runner.invoke(app, ["doctor"])

        assert result.exit_code == 1
        assert "DEEPE_MIN_FREE_BYTES" in result.stdout
        assert "disk" in result.stderr

    def test_says_which_package_the_worker_lacks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "arq.py").write_text("import arqs_own_dependency\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

        command = [sys.executable, "-P", "-m", "app.cli", "doctor", "--json"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)

        found = next(finding for finding in json.loads(result.stdout) if finding["name"] == "packages")
        assert result.returncode == 1
        assert found["verdict"] == "fail"
        assert "arqs_own_dependency" in found["detail"]

    def test_proposes_a_name_for_a_variable_that_nothing_reads(
        self, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DEEPE_REDIS_ULR", "redis://x")

        result = runner.invoke(app, ["doctor"])

        assert "DEEPE_REDIS_URL" in result.stdout

    def test_tells_a_redis_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_REDIS_URL", "redis://127.0.0.1:9")

        finding = next(finding for finding in examine(load_settings()) if finding.name == "Redis")

        assert finding.verdict is Verdict.WARN

    @pytest.mark.parametrize(
        ("mode", "verdict", "detail"),
        [
            (0o700, Verdict.OK, "your account only"),
            (0o770, Verdict.OK, "its group"),
            (0o755, Verdict.WARN, "mode 0755"),
        ],
    )
    def test_says_who_can_read_the_home(self, tmp_path: Path, mode: int, verdict: Verdict, detail: str) -> None:
        tmp_path.chmod(mode)

        findings = {finding.name: finding for finding in examine(load_settings(home=tmp_path))}

        assert findings["privacy"].verdict is verdict
        assert detail in findings["privacy"].detail

    def test_says_that_a_database_elsewhere_can_be_read(self, tmp_path: Path) -> None:
        home, file = tmp_path / "home", tmp_path / "elsewhere.db"
        home.mkdir(mode=0o700)
        file.touch(mode=0o644)

        settings = load_settings(home=home, database_url=f"sqlite:///{file}")
        findings = {finding.name: finding for finding in examine(settings)}

        assert findings["privacy"].verdict is Verdict.WARN
        assert str(file) in findings["privacy"].advice

    def test_tells_the_state_of_the_schema(
        self, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DEEPE_HOME", str(tmp_path))
        said = [_database_finding()]
        runner.invoke(app, ["migrate"])
        said.append(_database_finding())
        _set_revision(tmp_path, "0001")
        said.append(_database_finding())
        _set_revision(tmp_path, "9999")
        said.append(_database_finding())
        (tmp_path / "deepe.db").write_bytes(b"no database" * 500)
        said.append(_database_finding())

        assert [finding.verdict for finding in said] == [
            Verdict.OK, Verdict.OK, Verdict.WARN, Verdict.FAIL, Verdict.FAIL,
        ]  # fmt: skip
        assert "up to date" in said[1].detail
        assert "restore" in said[3].advice
        assert "Restore" in said[4].advice

    def test_goes_on_after_a_check_that_broke(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(_settings: Settings) -> Finding:
            raise RuntimeError("oh")

        monkeypatch.setitem(CHECKS, "disk", broken)

        findings = {finding.name: finding for finding in examine(load_settings())}

        assert findings["disk"].verdict is Verdict.FAIL
        assert "oh" in findings["disk"].detail
        assert set(findings) == set(CHECKS)


def _database_finding() -> Finding:
    return next(finding for finding in examine(load_settings()) if finding.name == "database")


def _set_revision(home: Path, revision: str) -> None:
    with contextlib.closing(sqlite3.connect(home / "deepe.db", isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))


class TestStart:
    """What cannot be used ends a command with a sentence and a way out."""

    @pytest.mark.parametrize("command", ["serve", "migrate", "worker"])
    @pytest.mark.parametrize(("what", "words"), [("damaged", "is damaged"), ("newer", "does not know")])
    def test_of_a_database_that_cannot_be_used(
        self,
        runner: CliRunner,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        command: str,
        what: str,
        words: str,
    ) -> None:
        monkeypatch.setenv("DEEPE_HOME", str(tmp_path))
        runner.invoke(app, ["migrate"])
        if what == "newer":
            _set_revision(tmp_path, "9999")
        else:
            (tmp_path / "deepe.db").write_bytes(b"no database" * 500)
        monkeypatch.setattr("app.worker.configure_logging", lambda **_: None)
        monkeypatch.setattr("app.cli.service.hide_secrets", lambda: None)

        if command == "worker":
            code, said = run_worker(load_settings(serves=False)), capsys.readouterr().err
        else:
            result = runner.invoke(app, [command])
            code, said = result.exit_code, result.stderr

        assert code in (1, 2)
        assert words in said
        assert "estore" in said
        assert "Traceback" not in said

    @pytest.mark.parametrize("command", ["dev", "serve", "migrate", "worker"])
    def test_of_a_home_that_cannot_be_made(
        self,
        runner: CliRunner,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        command: str,
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DEEPE_HOME", str(tmp_path / "file" / "home"))
        monkeypatch.setattr("app.worker.configure_logging", lambda **_: None)
        monkeypatch.setattr("app.cli.service.hide_secrets", lambda: None)

        if command == "worker":
            code, said = run_worker(load_settings(serves=False)), capsys.readouterr().err
        else:
            result = runner.invoke(app, [command])
            code, said = result.exit_code, result.stderr

        assert code in (1, 2)
        assert "DEEPE_HOME" in said
        assert "Traceback" not in said


class TestLazyCommands:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_list_says_of_each_what_it_says_of_itself(self, name: str) -> None:
        group: Any = typer.main.get_command(app)
        command = group.get_command(typer.Context(group), name)

        assert command.name == name
        assert COMMANDS[name].help == command.help.partition("\n\n")[0].replace("\n", " ")

    def test_list_imports_no_command(self, runner: CliRunner) -> None:
        program = "import sys\nfrom app.cli import app\ntry: app(['--help'])\nfinally: print('loaded', *sys.modules)"

        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

        shown, _, loaded = said.partition("loaded ")
        cli = {name for name in loaded.split() if name.startswith("app.cli.")}
        assert all(name in shown for name in COMMANDS)
        assert cli == {"app.cli.main", "app.cli.command", "app.cli.output"}
        assert {"httpx", "pydantic"}.isdisjoint(loaded.split())

    def test_completion_offers_every_command(self) -> None:
        group: Any = typer.main.get_command(app)

        offered = group.shell_complete(typer.Context(group), "")

        assert [item.value for item in offered] == list(COMMANDS)

    def test_unknown_one_comes_with_the_name_that_was_meant(self, runner: CliRunner) -> None:
        result = runner.invoke(app, ["job"])

        assert result.exit_code == 2
        assert "jobs" in result.stderr


class TestTyped:
    def call(self, monkeypatch: pytest.MonkeyPatch, *, argv: Path, path: Path) -> str:
        monkeypatch.setattr(sys, "argv", [str(argv)])
        monkeypatch.setenv("PATH", str(path))
        return typed("dev")

    @pytest.fixture
    def script(self, tmp_path: Path) -> Path:
        script = tmp_path / "my venv" / "bin" / "deepe"
        script.parent.mkdir(parents=True)
        script.touch(mode=0o755)
        return script

    def test_is_the_name_where_path_has_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: Path) -> None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "deepe").symlink_to(script)

        assert self.call(monkeypatch, argv=script, path=tmp_path / "bin") == "deepe dev"

    def test_is_the_script_where_path_has_another_one(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: Path
    ) -> None:
        (tmp_path / "deepe").touch(mode=0o755)

        assert self.call(monkeypatch, argv=script, path=tmp_path) == f"'{script}' dev"

    def test_is_relative_where_that_is_shorter(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: Path
    ) -> None:
        monkeypatch.chdir(script.parents[1])

        assert self.call(monkeypatch, argv=Path("bin/deepe"), path=tmp_path) == "bin/deepe dev"

    def test_is_the_module_where_there_is_no_script(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

        assert (
            self.call(monkeypatch, argv=tmp_path / "__main__.py", path=tmp_path) == f"{tmp_path}/python -m app.cli dev"
        )


class TestService:
    def test_migrates_a_new_database_and_again(self, runner: CliRunner) -> None:
        first = runner.invoke(app, ["migrate"])
        second = runner.invoke(app, ["migrate"])
        raw = runner.invoke(app, ["migrate", "--json"])

        assert first.exit_code == second.exit_code == raw.exit_code == 0
        assert "up to date" in second.stdout
        assert json.loads(raw.stdout) == {"database": "sqlite", "up_to_date": True}

    def test_says_what_is_wrong_with_the_database(self, runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_DATABASE_URL", "postgresql://u:p@127.0.0.1:9/d")

        result = runner.invoke(app, ["migrate"])

        assert result.exit_code == 1
        assert "DEEPE_DATABASE_URL" in result.stderr

    def test_shows_every_setting_but_no_secret(self, runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_API_TOKEN", "kQ8vTz2mYw4rBn7x")

        shown = runner.invoke(app, ["settings"]).stdout
        document = json.loads(runner.invoke(app, ["settings", "--json"]).stdout)

        assert len(document["settings"]) == len(Settings.model_fields)
        assert all(row["name"] in shown for row in document["settings"])
        assert "kQ8vTz2mYw4rBn7x" not in shown + json.dumps(document)

    def test_knows_the_variable_of_the_url_option(self, runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_URL", "http://127.0.0.1:9")

        document = json.loads(runner.invoke(app, ["settings", "--json"]).stdout)

        assert "DEEPE_URL" not in document["unknown"]
        assert {row["name"]: row["current"] for row in document["settings"]}["DEEPE_URL"] == "http://127.0.0.1:9"

    def test_prints_its_version(self, runner: CliRunner) -> None:
        assert runner.invoke(app, ["--version"]).stdout.startswith("deepe ")


class TestBackup:
    def test_goes_there_and_back(self, runner: CliRunner, tmp_path: Path) -> None:
        home, file, new = tmp_path / "home", tmp_path / "all.tar.gz", tmp_path / "new"
        assert runner.invoke(app, ["migrate", "-q"], env={"DEEPE_HOME": str(home)}).exit_code == 0
        (home / "scripts" / "a.py").write_text("1")

        written = runner.invoke(app, ["backup", str(file), "--home", str(home)])
        checked = runner.invoke(app, ["restore", str(file), "--check", "--home", str(new)])
        restored = runner.invoke(app, ["restore", str(file), "--home", str(new), "--json"])

        assert (written.exit_code, checked.exit_code, restored.exit_code) == (0, 0, 0)
        assert "Without the files of models, datasets, images, runs" in written.stdout
        assert "is whole" in checked.stdout
        assert json.loads(restored.stdout)["files"] == 1
        assert (new / "scripts" / "a.py").read_text() == "1"

    @pytest.mark.parametrize(
        ("words", "exit_code", "said"),
        [
            (["backup", "{there}"], 2, "is there already"),
            (["backup", "{new}", "--with", "everything"], 2, "There is no part everything"),
            (["backup", "{new}"], 1, "run deepe migrate first"),
            (["restore", "{new}"], 2, "There is no file"),
            (["restore", "{there}"], 1, "no backup"),
            (["backup", "{new}/no/folder.tar"], 1, "No such file or directory"),
        ],
    )
    def test_says_what_is_wrong(
        self, runner: CliRunner, tmp_path: Path, words: list[str], exit_code: int, said: str
    ) -> None:
        there, new = tmp_path / "there.tar", tmp_path / "new.tar"
        there.write_text("something else")
        (tmp_path / "home").mkdir()
        if "folder" in words[-1]:
            runner.invoke(app, ["migrate", "-q"], env={"DEEPE_HOME": str(tmp_path / "home")})

        answer = runner.invoke(
            app, [*(word.format(there=there, new=new) for word in words), "--home", str(tmp_path / "home")]
        )

        assert answer.exit_code == exit_code
        assert said in " ".join(answer.stderr.split())
        assert there.read_text() == "something else"
