"""The commands against the real service: from a folder and a file to a model that answers."""

import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from app.cli.command import ExitCode
from app.cli.embedded import EmbeddedOptions, EmbeddedService
from app.presets.catalogue import ROOM
from app.settings import load_settings
from tests.base_model_folders import model
from tests.servers import free_port
from tests.waiting import wait_until
from tests.webhook_receiver import receiving

pytestmark = [pytest.mark.xdist_group("walk_through")]

Deepe = Callable[..., Result]

JSON = {"Accept": "application/json"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with a base model's folder, whose node has `base` already: the interpreter that runs the tests."""
    folder = tmp_path_factory.mktemp("walk") / "home"
    shutil.copytree(ROOM / "custom01" / "custom01-base", folder / "models" / "faq-base")
    environments = folder / "nodes" / "test" / "envs"
    environments.mkdir(parents=True)
    (environments / "base").symlink_to(sys.prefix)
    return folder


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    settings = load_settings(home=home, port=free_port(), node_name="test")
    service = EmbeddedService(settings, EmbeddedOptions(log_folder=home / "process-logs"), say=print)
    yield service.start()
    service.stop()


@pytest.fixture
def deepe(url: str, monkeypatch: pytest.MonkeyPatch) -> Deepe:
    """Return what runs a command against the service."""
    monkeypatch.setenv("DEEPE_URL", url)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("LANG", raising=False)
    return lambda *words: CliRunner().invoke(app, list(words))


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_from_folder_and_file_to_a_model_that_answers(deepe: Deepe, home: Path, tmp_path: Path) -> None:
    added = deepe("base-models", "add", "faq-base")
    uploaded = deepe("datasets", "add", str(ROOM / "custom01" / "custom01.jsonl"), "--name", "faq", "--json")
    rows = document(deepe("datasets", "preview", "faq", "--json"))["items"]
    submitted = deepe(
        "jobs", "submit", "Custom01", "-b", "faq-base", "-d", "faq", "-p", "epochs=20", "-p", "learning_rate=0.5",
        "-p", "batch_size=8", "--through", "complete", "--name", "walk", "--watch",
    )  # fmt: skip
    read = deepe("datasets", "preview", "faq", "--method", "Custom01", "--base-model", "faq-base", "--row", "2")
    jobs = document(deepe("jobs", "list", "--json"))["items"]
    models = document(deepe("models", "list", "--json"))["items"]
    training = next(job for job in jobs if job["stage"] == "training")
    complete = next(model for model in models if model["state"] == "complete")
    answer = deepe("models", "chat", complete["name"], "How can I give the bike back?")

    assert added.exit_code == 0, added.output
    assert document(uploaded)["rows"] == 144
    assert [sorted(row) for row in rows] == [["answer", "question"]] * 3
    assert "line 2  question-answer as conversation" in read.stdout, read.output
    assert submitted.exit_code == 0, submitted.output
    assert "training: succeeded" in submitted.stdout
    assert "saving: succeeded" in submitted.stdout
    assert {model["state"] for model in models} == {"customized", "complete"}
    assert answer.stdout.strip() == "You can return the bicycle at any green station."
    for words in (
        ("jobs", "show", training["id"]),
        ("jobs", "logs", training["id"]),
        ("models", "show", complete["id"]),
    ):
        shown = deepe(*words)
        assert shown.exit_code == 0, shown.output
        assert shown.stdout.strip()
    assert "faq-base" in shown.stdout
    assert "Custom01 (version 1)" in shown.stdout

    again = document(deepe("jobs", "copy", training["id"], "-p", "epochs=2", "--json"))
    assert deepe("jobs", "watch", again["id"]).exit_code == 0
    compared = deepe("jobs", "compare", training["id"], again["id"])
    assert compared.exit_code == 0, compared.output
    assert "epochs" in compared.stdout
    assert "exact_match" in compared.stdout

    fetched = deepe("models", "download", complete["name"], "--to", str(tmp_path / "fetched"))
    assert fetched.exit_code == 0, fetched.output
    recorded = document(deepe("models", "show", complete["id"], "--json"))
    files = {file["path"]: file["sha256"] for file in recorded["details"]["files"]}
    assert files == {
        path.relative_to(tmp_path / "fetched").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "fetched").rglob("*")
        if path.is_file()
    }
    assert recorded["size_bytes"] == sum(path.stat().st_size for path in (tmp_path / "fetched").rglob("*"))

    shutil.copytree(tmp_path / "fetched", home / "models" / "brought")
    brought = deepe("models", "add", "brought", "-b", "faq-base", "--method", "Custom01", "--state", "complete")
    assert brought.exit_code == 0, brought.output
    answer = deepe("models", "chat", "brought", "How can I give the bike back?")
    assert answer.stdout.strip() == "You can return the bicycle at any green station.", answer.output
    assert "none: made elsewhere" in deepe("models", "show", "brought").stdout


def test_a_folder_becomes_a_base_model_and_comes_back(url: str, deepe: Deepe, tmp_path: Path) -> None:
    folder = model(tmp_path / "tiny")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    (folder / "extra").mkdir()
    (folder / "extra" / "empty").touch()
    weights = (folder / "model.safetensors").read_bytes()
    address = f"{url}/api/v1/base-models/tiny/files/model.safetensors"
    part = {"Content-Range": f"bytes 0-9/{len(weights)}"}
    assert httpx.put(address, content=weights[:10], headers=part, trust_env=False).json()["complete"] is False

    uploaded = deepe("base-models", "upload", str(folder), "--continue", "--json")
    shown = deepe("base-models", "show", "tiny")
    listed = deepe("base-models", "files", "tiny")
    half = tmp_path / "back" / "model.safetensors.incomplete"
    half.parent.mkdir()
    half.write_bytes(weights[:20])
    refused = deepe("base-models", "download", "tiny", "--to", str(tmp_path / "back"))
    fetched = deepe("base-models", "download", "tiny", "--to", str(tmp_path / "back"), "--continue")
    again = deepe("base-models", "upload", str(folder))

    assert json.loads(uploaded.stdout)["path"] == "models/tiny", uploaded.output
    assert "left out: .git" in uploaded.stderr
    assert "going on at" in uploaded.stderr
    assert "image-generation" in shown.stdout
    assert "extra/empty" in listed.stdout
    assert refused.exit_code == ExitCode.FAILED
    assert fetched.exit_code == 0, fetched.output
    assert {path.relative_to(tmp_path / "back").as_posix(): path.read_bytes() for path in half.parent.rglob("*.*")} == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*.*") if path.is_file()
    }
    assert (again.exit_code, deepe("base-models", "delete", "tiny").exit_code) == (ExitCode.REFUSED, 0)
    archive = shutil.make_archive(str(tmp_path / "packed-1.0"), "gztar", root_dir=folder.parent, base_dir="tiny")
    packed = deepe("base-models", "upload", archive, "--json")
    assert document(packed)["name"] == "packed-1.0"
    assert document(packed)["card"]["turn_end"] == "<|im_end|>"


def test_a_method_that_came_with_the_product_is_trained_without_any_preparation(url: str, deepe: Deepe) -> None:
    """What a newcomer does on an empty home: read what suits the method, submit it, ask the model."""
    with httpx.Client(base_url=f"{url}/api/v1", timeout=None, trust_env=False) as client:
        preset = client.get("/presets/Custom01").json()
        samples = preset["samples"]
        chosen = {name: samples[name] for name in ("dataset", "base_model", "parameters", "through")}
        submitted = client.post("/jobs", json={"method": preset["name"], **chosen})
        assert submitted.status_code == 201, submitted.text
        watched = deepe("jobs", "watch", submitted.json()["id"])
        assert watched.exit_code == 0, watched.output
        model = client.get(f"/jobs/{submitted.json()['id']}").json()["result_model"]
        message = {"role": "user", "content": samples["questions"][0]}
        answer = client.post(f"/models/{model}/chat", json={"messages": [message]}, headers=JSON)

    assert answer.status_code == 200, answer.text
    assert answer.json()["text"].strip() == "You can return the bicycle at any green station."


def test_the_command_that_a_preset_shows_works(deepe: Deepe) -> None:
    shown = deepe("presets", "show", "Custom01").stdout
    (command,) = [line.split("deepe ", 1)[1] for line in shown.splitlines() if "jobs submit" in line]

    result = deepe(*shlex.split(command.removesuffix(" -w")), "-p", "epochs=2", "--watch")

    assert result.exit_code == 0, result.output
    assert "How can I give the bike back?" in shown


@pytest.mark.parametrize(
    "words",
    [
        ("methods", "list"),
        ("methods", "show", "Custom01"),
        ("methods", "parameters", "Custom01"),
        ("base-models", "list"),
        ("datasets", "list"),
        ("environments", "list"),
        ("presets", "list"),
        ("presets", "show", "Custom01"),
        ("nodes", "list"),
        ("models", "list"),
        ("jobs", "list"),
        ("license", "show"),
    ],
)
def test_shows_tables_and_json(deepe: Deepe, words: tuple[str, ...]) -> None:
    table, raw = deepe(*words), deepe(*words, "--json")

    assert table.exit_code == 0, table.output
    assert table.stdout.strip()
    assert isinstance(document(raw), dict)


def test_validates_a_method_and_says_everything(deepe: Deepe, tmp_path: Path) -> None:
    file = tmp_path / "method.toml"
    file.write_text('name = "mine"\ntraining_type = "chat"\ntechnique = "sft"\nlifecycle = ["customized"]\n')

    result = deepe("methods", "validate", str(file))

    assert result.exit_code == 1
    assert "/stages/training/file" in result.stdout
    assert "/stages/training/conda_env" in result.stdout


def test_needs_a_licence_to_create(deepe: Deepe, tmp_path: Path) -> None:
    file = tmp_path / "method.json"
    training = {"file": "custom01.py", "conda_env": "base"}
    definition = {"name": "mine", "training_type": "chat", "technique": "sft", "lifecycle": ["customized"]}
    file.write_text(json.dumps({**definition, "stages": {"training": training}}))

    result = deepe("methods", "create", str(file))

    assert result.exit_code == 4
    assert "licence" in result.stderr


def test_replaces_the_file_of_a_stage_that_everyone_may_adapt(deepe: Deepe, tmp_path: Path) -> None:
    file = tmp_path / "custom02.py"
    original = (ROOM / "custom02" / "custom02.py").read_text("utf-8")
    file.write_text(f"{original}\n# adapted\n")
    stages = document(deepe("methods", "show", "Custom02", "--json"))["stages"]
    stage = next(name for name, config in stages.items() if config.get("file") == "custom02.py")

    result = deepe("methods", "upload", "Custom02", stage, str(file))

    assert result.exit_code == 0, result.output
    assert "version 2" in result.stdout

    restored = deepe("methods", "restore", "Custom02", "--version", "2")
    reset, again = deepe("methods", "reset", "Custom02"), deepe("methods", "reset", "Custom02", "--json")

    assert "version 2" in restored.stdout
    assert "version 3" in reset.stdout
    assert document(again)["source"] == "reset"


def test_tells_an_address_about_ends_until_that_is_deleted(deepe: Deepe, tmp_path: Path) -> None:
    with receiving(tmp_path) as receiver:
        added = document(deepe("webhooks", "add", receiver.url("/ok"), "--json"))
        sent = document(deepe("webhooks", "test", added["id"], "--json"))
        wait_until(lambda: receiver.received("/ok"), "the message")
        (delivery,) = wait_until(
            lambda: [
                one
                for one in document(deepe("webhooks", "deliveries", added["id"], "--json"))["items"]
                if one["state"] == "delivered"
            ],
            "the delivery",
        )
        again = deepe("webhooks", "redeliver", added["id"], delivery["id"])
        wait_until(lambda: len(receiver.received("/ok")) == 2, "the second message")

    assert added["secret"]
    assert delivery["id"] == sent["id"]
    assert again.exit_code == 0, again.output
    assert receiver.url("/ok") in deepe("webhooks", "list").stdout
    assert added["secret"] not in deepe("webhooks", "list", "--json").stdout
    assert deepe("webhooks", "delete", added["id"]).stdout == f"{added['id']} deleted\n"
    assert "No webhooks" in deepe("webhooks", "list").stdout
    missing = deepe("webhooks", "test", added["id"])
    assert (missing.exit_code, added["id"] in missing.stderr) == (ExitCode.REFUSED, True)


def test_a_deploy_target_is_added_changed_tested_and_deleted(deepe: Deepe) -> None:
    assert "No deploy targets" in deepe("targets", "list").stdout
    address = f"http://127.0.0.1:{free_port()}"
    kept = ("--setting", "replicas=2", "--setting", "zone=b", "--file", "push.py", "--env", "base")

    added = document(
        deepe("targets", "add", "box", "http://box", "--kind", "custom", "--port", "8080", *kept, "--json")
    )
    changes = ("--address", address, "--setting", "replicas=null", "--setting", "tags=[1]", "--file", "")
    changed = document(deepe("targets", "change", "box", *changes, "--json"))
    shown = deepe("targets", "show", "box").stdout
    listed = deepe("targets", "list").stdout
    silent = deepe("targets", "test", "box")
    nothing, unknown = deepe("targets", "change", "box"), deepe("targets", "change", "none", "--port", "1")
    gone = document(deepe("targets", "delete", "box", "--json"))

    assert (added["url"], added["settings"], added["file"]) == (
        "http://box:8080", {"replicas": 2, "zone": "b"}, "push.py",
    )  # fmt: skip
    assert changed == {**added, "url": address, "settings": {"zone": "b", "tags": [1]}, "file": None}
    assert all(word in shown for word in (address, "zone", '"b"', "[1]", "base"))
    assert address in listed
    assert (silent.exit_code, address in silent.stdout) == (ExitCode.FAILED, True)
    assert (nothing.exit_code, unknown.exit_code) == (ExitCode.USAGE, ExitCode.REFUSED)
    assert gone == {"deleted": "box"}


def test_shows_what_a_clean_up_would_remove(deepe: Deepe) -> None:
    assert document(deepe("clean", "--dry-run", "--json"))["items"]
    assert deepe("clean", "--dry-run").stdout.strip() == "Nothing is old enough."


def test_shows_where_an_environment_is_ready(deepe: Deepe) -> None:
    shown = deepe("environments", "show", "base")

    assert shown.exit_code == 0, shown.output
    assert "ready" in shown.stdout
    assert document(deepe("environments", "show", "base", "--json"))["nodes"][0]["node"] == "test"


def test_cleans_environments_of_a_node_only_where_there_is_one(
    deepe: Deepe, url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert url  # the node has joined
    monkeypatch.setenv("DEEPE_HOME", str(home))
    monkeypatch.setenv("DEEPE_NODE_NAME", "test")
    left = home / "nodes" / "test" / "envs" / "unneeded"
    (left / "conda-meta").mkdir(parents=True)

    planned = document(deepe("environments", "clean", "--dry-run", "--json"))
    monkeypatch.setenv("DEEPE_NODE_NAME", "elsewhere")
    stranger = deepe("environments", "clean")

    assert planned["dry_run"] is True
    assert "base" not in {one["environment"] for one in planned["items"]}
    assert stranger.exit_code == 1
    assert "elsewhere" in stranger.stderr


def test_data_sets_as_peoples_tools_write_them(deepe: Deepe, url: str, tmp_path: Path) -> None:
    rows: list[dict[str, str | None]] = [{"问题": "你好; 世界", "答案": "第一行\n第二行"}, {"问题": "b", "答案": None}]
    table = '问题;答案\r\n"你好; 世界";"第一行\n第二行"\r\nb;\r\n'
    book = openpyxl.Workbook()
    book.worksheets[0].append(["问题", "答案"])
    for row in rows:
        book.worksheets[0].append([row["问题"], row["答案"]])
    book.create_sheet("notes").append(["not these"])
    book.save(tmp_path / "workbook.xlsx")
    (tmp_path / "german.csv").write_bytes(table.encode("utf-8-sig"))
    (tmp_path / "chinese.csv").write_bytes(table.encode("gbk"))
    (tmp_path / "pretty.json").write_text(json.dumps(rows, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "columns.parquet")

    refused = {name: deepe("datasets", "add", str(tmp_path / name)).output for name in ("chinese.csv", "workbook.xlsx")}
    added = {
        name: deepe("datasets", "add", str(tmp_path / name), *options)
        for name, options in {
            "german.csv": (),
            "chinese.csv": ("--encoding", "gbk"),
            "workbook.xlsx": ("--sheet", "Sheet"),
            "pretty.json": (),
            "columns.parquet": (),
        }.items()
    }

    assert "?encoding=gb18030" in refused["chinese.csv"]
    assert "Sheet, notes" in refused["workbook.xlsx"]
    assert [result.exit_code for result in added.values()] == [ExitCode.OK] * 5, [one.output for one in added.values()]
    assert "read as csv, utf-8, delimiter semicolon" in added["german.csv"].output
    for name in added:
        stem = Path(name).stem
        shown = deepe("datasets", "show", stem).output
        got = httpx.get(f"{url}/api/v1/datasets/{stem}/file").text
        assert [json.loads(line) for line in got.splitlines()] == rows
        assert httpx.get(f"{url}/api/v1/datasets/{stem}/original").content == (tmp_path / name).read_bytes()
        assert "答案" in shown
    assert "notes" in deepe("datasets", "show", "workbook").output

    mixed = deepe("datasets", "mix", "support", "german=2", "pretty:1", "--seed", "7")
    assert mixed.exit_code == ExitCode.OK, mixed.output
    assert f"support  {2 * len(rows) + 1} rows" in mixed.output
    assert "mixed, seed 7" in deepe("datasets", "show", "support").output


def test_a_key_is_made_used_changed_rotated_and_revoked(deepe: Deepe, monkeypatch: pytest.MonkeyPatch) -> None:
    def me(secret: str) -> Result:
        with monkeypatch.context() as patch:
            patch.setenv("DEEPE_API_TOKEN", secret)
            return deepe("me")

    assert "No API keys" in deepe("keys", "list").stdout
    assert all(word in deepe("me").stdout for word in ("local", "admin", "administer"))

    made = document(deepe("keys", "create", "ada", "--role", "viewer", "--days", "30", "--json"))
    asked = me(made["secret"]).stdout
    listed = deepe("keys", "list").stdout
    changed = deepe("keys", "change", "ada", "--role", "operator", "--forever").stdout
    rotated = deepe("keys", "rotate", "ada").stdout
    old = me(made["secret"])
    gone = document(deepe("keys", "revoke", "ada", "--json"))

    assert all(word in asked for word in ("ada", "viewer", "read", made["expires_at"]))
    assert all(word in listed for word in (made["prefix"], made["expires_at"][:10]))
    assert changed == "ada  operator  never\n"
    secret = rotated.splitlines()[1].rpartition(" ")[2]
    assert (old.exit_code, me(secret).exit_code) == (ExitCode.REFUSED, ExitCode.REFUSED)
    assert gone == {"revoked": "ada"}
    assert "revoked" in deepe("keys", "list", "--revoked").stdout
    wrong = deepe("keys", "change", "ada"), deepe("keys", "change", "ada", "--days", "1", "--forever")
    assert [one.exit_code for one in wrong] == [ExitCode.USAGE] * 2
