"""A stage's environment: what may pass, what activation sets, and that it costs one shell only once."""

import json
import os
import time
from pathlib import Path

import pytest

from app.executor.environments import activation
from app.executor.environments.activation import ActivationFailed, builder_environment, interpreter, stage_environment

WORKER = {
    "PATH": "/srv/worker/bin:/usr/bin:/bin",
    "VIRTUAL_ENV": "/srv/worker",
    "HOME": "/home/me",
    "LC_ALL": "C.UTF-8",
    "CUDA_VISIBLE_DEVICES": "0",
    "HF_HOME": "/data/hf",
    "AI_PY_REDIS_HOST": "127.0.0.1",
    "TRAINING_START_PORT": "5555",
    "DEEPE_DATABASE_URL": "postgresql://secret",
    "DEEPE_API_TOKEN": "secret",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "PYTHONPATH": "/srv/worker/lib",
    "PYTHONHOME": "/srv/worker",
    "PIP_INDEX_URL": "https://index.example/simple",
    "PIP_TARGET": "/elsewhere",
    "CONDA_PREFIX": "/srv/conda",
    "CONDA_PKGS_DIRS": "/data/pkgs",
    "https_proxy": "http://proxy.example:3128",
    "SSL_CERT_FILE": "/etc/ca.pem",
}


@pytest.fixture
def conda_prefix(tmp_path: Path) -> Path:
    prefix = tmp_path / "envs" / "demo"
    (prefix / "conda-meta").mkdir(parents=True)
    (prefix / "etc" / "conda" / "activate.d").mkdir(parents=True)
    (prefix / "etc" / "conda" / "env_vars.d").mkdir()
    return prefix


def add_script(prefix: Path, name: str, text: str) -> Path:
    script = prefix / "etc" / "conda" / "activate.d" / name
    script.write_text(text)
    return script


class TestAllowList:
    def test_passes_what_stages_need_and_nothing_else(self, tmp_path: Path) -> None:
        env = stage_environment(WORKER, tmp_path, {})

        assert env == {
            "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
            "HOME": "/home/me",
            "LC_ALL": "C.UTF-8",
            "CUDA_VISIBLE_DEVICES": "0",
            "HF_HOME": "/data/hf",
            "AI_PY_REDIS_HOST": "127.0.0.1",
            "TRAINING_START_PORT": "5555",
            "VIRTUAL_ENV": str(tmp_path),
            "PYTHONUNBUFFERED": "1",
            "PYTHONNOUSERSITE": "1",
        }

    def test_operator_adds_to_it_but_nothing_of_the_service(self, tmp_path: Path) -> None:
        worker = {**WORKER, "MODELSCOPE_CACHE": "/m", "HTTPS_PROXY": "http://p", "DEEPE_API_TOKEN": "secret"}

        added = stage_environment(worker, tmp_path, {}, also=("MODELSCOPE_*", "HTTPS_PROXY", "DEEPE_*"))

        plain = stage_environment(worker, tmp_path, {})
        assert added == {**plain, "MODELSCOPE_CACHE": "/m", "HTTPS_PROXY": "http://p"}

    def test_extra_wins(self, tmp_path: Path) -> None:
        env = stage_environment(WORKER, tmp_path, {"PYTHONPATH": "/scripts", "HOME": "/other"})

        assert (env["PYTHONPATH"], env["HOME"]) == ("/scripts", "/other")

    def test_builders_inherit_installer_settings_but_no_redirection(self) -> None:
        env = builder_environment(WORKER)

        assert env.keys() - stage_environment(WORKER, Path("/x"), {}).keys() == {
            "PIP_INDEX_URL",
            "CONDA_PKGS_DIRS",
            "https_proxy",
            "SSL_CERT_FILE",
        }


class TestConda:
    def test_sets_what_conda_sets(self, conda_prefix: Path) -> None:
        env = stage_environment({"PATH": "/usr/bin"}, conda_prefix, {})

        assert env == {
            "PATH": f"{conda_prefix}/bin:/usr/bin",
            "CONDA_PREFIX": str(conda_prefix),
            "CONDA_SHLVL": "1",
            "CONDA_DEFAULT_ENV": "demo",
            "CONDA_PROMPT_MODIFIER": "(demo) ",
            "PYTHONUNBUFFERED": "1",
            "PYTHONNOUSERSITE": "1",
        }

    def test_declared_variables_in_order_and_state_wins(self, conda_prefix: Path) -> None:
        folder = conda_prefix / "etc" / "conda" / "env_vars.d"
        (folder / "b.json").write_text(json.dumps({"ONE": "b", "TWO": "b", "PATH": "/evil"}))
        (folder / "a.json").write_text(json.dumps({"ONE": "a", "THREE": "a", "FOUR": "a"}))
        state = {"version": 1, "env_vars": {"TWO": "state", "FOUR": "***unset***"}}
        (conda_prefix / "conda-meta" / "state").write_text(json.dumps(state))

        env = stage_environment({"PATH": "/usr/bin"}, conda_prefix, {})

        assert (env["ONE"], env["TWO"], env["THREE"]) == ("b", "state", "a")
        assert env["PATH"].endswith("/bin:/usr/bin")
        assert "FOUR" not in env

    def test_sources_scripts_in_order_with_variables_set(self, conda_prefix: Path) -> None:
        add_script(conda_prefix, "b.sh", 'export SEEN="$SEEN then $CONDA_DEFAULT_ENV"\necho noise\nlocal_only=1\n')
        add_script(conda_prefix, "a.sh", "export SEEN=$'first\\nline'\nunset CONDA_PROMPT_MODIFIER\n")

        env = stage_environment({"PATH": os.environ["PATH"]}, conda_prefix, {})

        assert env["SEEN"] == "first\nline then demo"
        assert not {"CONDA_PROMPT_MODIFIER", "local_only", "SHLVL", "PWD", "_"} & env.keys()

    def test_shell_runs_once_until_a_script_changes(self, conda_prefix: Path, tmp_path: Path) -> None:
        count = tmp_path / "count"
        script = add_script(conda_prefix, "a.sh", f"echo x >> {count}\nexport GREETING=one\n")

        first = [stage_environment({"PATH": "/usr/bin:/bin"}, conda_prefix, {"N": str(n)}) for n in range(3)]
        script.write_text(f"echo x >> {count}\nexport GREETING=two\n")
        os.utime(script, ns=(time.time_ns(), time.time_ns() + 1_000_000_000))
        second = stage_environment({"PATH": "/usr/bin:/bin"}, conda_prefix, {})

        assert [env["GREETING"] for env in (*first, second)] == ["one"] * 3 + ["two"]
        assert count.read_text() == "x\nx\n"

    def test_failing_script_says_what_it_printed(self, conda_prefix: Path) -> None:
        add_script(conda_prefix, "a.sh", "echo no licence >&2\nfalse\n")

        with pytest.raises(ActivationFailed, match="no licence"):
            stage_environment({"PATH": "/usr/bin:/bin"}, conda_prefix, {})

    def test_hanging_script_is_ended(self, conda_prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        add_script(conda_prefix, "a.sh", "read line\nexec sleep 60\n")
        monkeypatch.setattr(activation, "_SCRIPT_SECONDS", 0.2)

        with pytest.raises(ActivationFailed, match="timed out"):
            stage_environment({"PATH": "/usr/bin:/bin"}, conda_prefix, {})


def test_interpreter_is_the_prefix_s_own() -> None:
    assert interpreter(Path("/envs/x")) == Path("/envs/x/bin/python")
