"""What is proposed for scripts and modules over HTTP and by `deepe methods suggest`; nothing of it is registered."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from app.cli import app as command
from app.domain.enums import Platform
from app.store.nodes import heartbeat, register_node
from app.store.session import Database
from tests.api.client import MethodsApp, methods_app
from tests.cli.standin import document, stand_in

ARGPARSE = "import argparse\nfrom {imports} import x\np = argparse.ArgumentParser()\n{options}p.parse_args()\n"


def script(*options: str, imports: str = "peft") -> str:
    lines = "".join(f"p.add_argument('--{option}')\n" for option in options)
    return ARGPARSE.format(imports=imports, options=lines)


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home") as running:
        yield running


async def proposed(app: MethodsApp, name: str, **wanted: Any) -> dict[str, Any]:
    response = await app.client.post(f"/api/v1/scripts/{name}:suggest", json=wanted)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def environment(app: MethodsApp, name: str, prefix: Path, *modules: str) -> None:
    """Let a node say that it has an environment, with these modules in it."""
    async with app.database.writing() as session:
        node = await register_node(
            session,
            name="box",
            platform=Platform.CPU,
            slots=1,
            environments=[name],
            accelerators=[],
            boot_id="1",
            now=datetime.now(UTC),
        )
        state = {"name": name, "state": "ready", "prefix": str(prefix), "probe": {"modules": list(modules)}}
        await heartbeat(session, node.id, now=datetime.now(UTC), environment_states=[state])


async def test_a_script_of_the_root_and_one_that_is_not_there_yet(app: MethodsApp, tmp_path: Path) -> None:
    await environment(app, "tuning", tmp_path, "peft", "torch")
    app.script("sub/train.py", script("model_name_or_path", "data", "output_dir").encode())

    there = await proposed(app, "sub/train.py")
    sent = await proposed(app, "other.py", source=script("base_path", "adapter", "save_dir"), stage="saving")

    assert there["stage"]["conda_env"] == "tuning"
    assert there["method"]["stages"] == {"training": there["stage"]}
    assert [(one["option"], one["value"], one["certain"]) for one in there["placed"]] == [
        ("--model_name_or_path", "{model_path}", True),
        ("--data", "{dataset_path}", False),
        ("--output_dir", "{output_dir}", True),
    ]
    assert all(one["why"] for one in there["placed"])
    assert (sent["kind"], sent["method"], sent["stage"]["file"]) == ("saving", None, "other.py")
    validated = await app.client.post("/api/v1/methods:validate", json=there["method"])
    assert validated.json()["violations"] == []
    assert (await app.client.get("/api/v1/methods")).json()["items"] == []
    assert not (app.home.scripts / "other.py").exists()


async def test_a_module_is_read_where_its_environment_stands_on_this_machine(app: MethodsApp, tmp_path: Path) -> None:
    package = tmp_path / "lib/python3.11/site-packages/tuner/cli"
    package.mkdir(parents=True)
    package.with_name("secret.py").write_text("raise SystemExit('it is run')\n")
    (package / "common.py").write_text(
        "import argparse\ndef common():\n    p = argparse.ArgumentParser()\n    p.add_argument('--base_model')\n"
        "    return p\n"
    )
    (package / "train.py").write_text(
        "from .common import common\nfrom ..secret import x\np = common()\np.add_argument('--output')\np.parse_args()\n"
    )
    await environment(app, "mine", tmp_path, "tuner")

    found = await proposed(app, "torchrun --nproc_per_node 2 -m tuner.cli.train")
    unknown = await proposed(app, "elsewhere.train")

    assert found["stage"] == {
        "module": "tuner.cli.train",
        "conda_env": "mine",
        "launcher": {"kind": "torchrun"},
        "arguments": ["--base_model={model_path}", "--output={output_dir}", "{parameters}"],
    }
    assert {"suggest_module_unread", "suggest_no_environment"} <= {note["code"] for note in unknown["notes"]}
    assert "conda_env" not in unknown["stage"]


async def test_what_is_neither_script_nor_module_is_refused(app: MethodsApp) -> None:
    answers = [
        await app.client.post(f"/api/v1/scripts/{name}:suggest", json=body)
        for name, body in (
            ("absent.py", {}),
            ("a/b", {}),
            ("two-words", {}),
            ("x.py", {"source": "def ("}),
            ("x.py", {"stage": "?"}),
        )
    ]
    assert [answer.status_code for answer in answers] == [404, 404, 404, 422, 422]
    assert "absent.py" in answers[0].json()["detail"]


async def test_the_command_prints_a_method_with_its_reasons(
    app: MethodsApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run-it.py"
    file.write_text(script("model_id", "dataset_path", "output_dir", "rate"))
    answer = await proposed(app, file.name, source=file.read_text(), conda_env="e")
    monkeypatch.setenv("COLUMNS", "200")

    with stand_in(lambda _: document(answer)) as (url, asked):
        done = CliRunner().invoke(command, ["methods", "suggest", "accelerate", "launch", str(file), "--url", url])

    assert done.exit_code == 0, done.output
    assert asked[0].path == "/api/v1/scripts/accelerate%20launch%20run-it.py:suggest"
    assert b"ArgumentParser" in asked[0].body
    assert yaml.safe_load(done.stdout) == answer["method"]
    comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert any(line.startswith("# UNCERTAIN --model_id = {model_path}: ") for line in comments)
    assert "# may be given: --rate" in comments
