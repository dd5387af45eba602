"""`deepe import deepextension` from real databases into a real service."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.engine import make_url
from typer.testing import CliRunner, Result

from app.cli import app as commands
from app.domain.projects import DEFAULT_SCOPE
from app.store.deepextension import MAX_FILE_BYTES
from app.store.session import Database
from tests.api.jobs_app import JobsApp, jobs_app, served
from tests.api.resources import place_base_model, safetensors
from tests.cli.deepextension_tables import METHOD, ROWS, SHAPES, insert, installation, tables, uid
from tests.databases import execute
from tests.servers import postgres_url

pytestmark = [pytest.mark.postgres, pytest.mark.xdist_group("import")]

Import = Callable[..., Any]


@pytest.fixture(scope="module")
def source(postgres_server: str) -> str:
    """Return the address of a database with an installation of each release in a schema of its own."""
    name = f"dx_{uuid4().hex}"
    asyncio.run(execute(postgres_server, f'CREATE DATABASE "{name}"'))
    url = make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
    for shape in SHAPES:
        asyncio.run(run_sql(url, *installation(shape, shape)))
    return url


async def run_sql(url: str, *statements: str) -> None:
    """Run statements in one transaction."""
    database = Database(postgres_url(url, make_url(url).database or ""), scope=DEFAULT_SCOPE)
    async with database.engine.begin() as connection:
        for statement in statements:
            await connection.exec_driver_sql(statement)
    await database.close()


@pytest.fixture
async def app(sqlite_url: str, tmp_path: Path) -> AsyncIterator[JobsApp]:
    database = Database(sqlite_url, scope=DEFAULT_SCOPE)
    async with jobs_app(database, tmp_path / "home") as running:
        valid = SimpleNamespace(status=lambda: SimpleNamespace(state="valid", licence=None, error=None, warning=None))
        running.application.state.licence = valid
        home = running.services.home
        for file in ("finance.py", "ask.py", "qwen_inference.py", "linux_code/save_model.py"):
            (home.scripts / file).parent.mkdir(exist_ok=True)
            (home.scripts / file).write_text("print('success')\n")
        place_base_model(home.models / "qwen")
        place_base_model(home.models / "out" / "merged")
        (home.models / "out" / "tuned").mkdir(parents=True)
        (home.models / "out" / "tuned" / "adapter_config.json").write_text("{}")
        (home.models / "out" / "tuned" / "adapter_model.safetensors").write_bytes(safetensors(a=[1]))
        (home.datasets / "prod" / "7").mkdir(parents=True)
        (home.datasets / "prod" / "7" / f"{ROWS}.jsonl").write_text('{"q": "1", "a": "2"}\n')
        yield running
    await database.close()


@pytest.fixture
async def take(app: JobsApp, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Import]:
    """Return what runs the command, and gives its report and how it ended."""
    monkeypatch.chdir(tmp_path)
    async with served(app) as client:

        async def run(*words: str, mapping: Any = None, url: str = source) -> tuple[Any, Result]:
            file = tmp_path / "map.json"
            file.write_text(json.dumps(mapping or {}))
            where = ["--url", str(client.base_url), "--database-url", url, "--map", str(file), "--json"]
            given = ["import", "deepextension", *where, *words]
            result = await asyncio.to_thread(CliRunner().invoke, commands, given)
            return json.loads(result.stdout) if result.stdout.startswith("{") else None, result

        yield run


def outcomes(report: Any) -> dict[tuple[str, str], str]:
    return {(one["kind"], one["name"]): one["outcome"] for one in report["items"]}


def entry(report: Any, kind: str, name: str) -> Any:
    return next(one for one in report["items"] if (one["kind"], one["name"]) == (kind, name))


def without_ids(report: Any) -> Any:
    items = [{key: value for key, value in one.items() if key != "id"} for one in report["items"]]
    return {**report, "dry_run": None, "items": items}


async def everything(app: JobsApp) -> dict[str, Any]:
    paths = ("methods", "models", "datasets", "base-models", "deploy-targets", "environments", "scripts")
    return {path: (await app.client.get(f"/api/v1/{path}?limit=100")).json() for path in paths}


@pytest.mark.parametrize("shape", SHAPES)
async def test_takes_an_installation_and_takes_it_once(app: JobsApp, take: Import, tmp_path: Path, shape: str) -> None:
    before = await everything(app)
    planned, _ = await take("--dry-run", mapping={"schema": shape})
    unchanged = await everything(app)
    report, result = await take(mapping={"schema": shape})
    after = await everything(app)
    again, _ = await take(mapping={"schema": shape})

    assert (result.exit_code, report["release"], report["tenant"]) == (0, shape, "7"), result.output
    assert unchanged == before
    assert without_ids(planned) == without_ids(report)
    found = outcomes(report)
    assert found.pop(("models", "gone")) == "left out"
    assert {name for (kind, name), outcome in found.items() if kind != "environments" and outcome == "taken"} == {
        "Ollama", "Qwen2.5-tiny", "问答 -1", "stored", "Finance SFT", "tuned", "merged", "served",
        *([] if shape == "v2505" else ["quick"]), *(["vLLM"] if shape == "v2509" else []),
    }  # fmt: skip
    assert set(outcomes(again).values()) == {"present", "left out"}
    assert await everything(app) == after

    method = (await app.client.get("/api/v1/methods/Finance SFT")).json()
    served_model = (await app.client.get("/api/v1/models/served")).json()
    tuned = (await app.client.get("/api/v1/models/tuned")).json()
    stored = (await app.client.get("/api/v1/datasets/stored/preview")).json()
    assert method["stages"]["training"]["file"] == "finance.py"
    assert method["stages"]["saving"]["conda_env"] == "deepextension"
    assert [one["name"] for one in served_model["parents"]] == ["merged", "tuned"]
    assert (served_model["details"]["deployment"]["url"], served_model["method"]["name"]) == (
        "http://gpu-box:11434", "Finance SFT",
    )  # fmt: skip
    assert (tuned["parameters"], tuned["created_at"]) == ({"lora_rank": 8}, "2025-07-01T00:00:00Z")
    assert report["values"]["model_type"]["3"] == {"count": 1, "meaning": "complete"}
    assert stored["items"] == [{"q": str(number), "a": "中"} for number in range(3)]
    if shape == "v2509":
        assert method["lifecycle"] == ["customized", "complete", "online"]
        asked = method["stages"]["inference-customized"]
        assert (asked["file"], asked["conda_env"]) == ("ask.py", "tuned_env")
        assert method["deployment"]["target"] == "Ollama"
        other = (await app.client.get("/api/v1/methods/served")).json()["deployment"]
        assert (other["target"], other["file"], other["conda_env"]) == ("vLLM", "ask.py", "tuned_env")
        assert report["values"]["life_cycle"]["4"] == {"count": 1, "meaning": ["customized", "complete", "online"]}
    if shape != "v2505":
        written = json.loads((tmp_path / "deepextension-profiles" / "quick.json").read_text())
        assert written == {"epochs": 3, "rate": 2e-05, "note": "12"}


async def test_says_what_it_does_not_understand_and_takes_the_rest(
    app: JobsApp, take: Import, source: str, tmp_path: Path
) -> None:
    schema, other = f"broken_{uuid4().hex}", uid(20)
    await run_sql(
        source,
        *tables("v2509", schema),
        insert(schema, "table1", template_name={"en": "SFT-Demo"}, template_uuid=METHOD, co_id=7, train_file=b"ask.py"),
        insert(schema, "train_method_info", template_uuid=METHOD, training_type=[1], life_cycle=9,
               deployment_tools=[], trained_inference_support=False, saved_inference_support=False, co_id=7,
               python_file_config={"surprise": 1}),
        insert(schema, "table1", template_name={"en": "inline"}, template_uuid=other,
               train_file=b"import json\nprint(1)\n"),
        insert(schema, "train_method_info", template_uuid=other, training_type=[1, 3], life_cycle=1,
               deployment_tools=[], trained_inference_support=False, saved_inference_support=False, co_id=7,
               python_file_config={}),
        insert(schema, "base_model", technic_name="custom01-base", path="../models/qwen", co_id=7),
        insert(schema, "base_model", technic_name="elsewhere", path="/data/llm/x", co_id=7),
        insert(schema, "base_model", technic_name="half", path="half", co_id=7),
        insert(schema, "base_model", technic_name="nowhere", path=None, co_id=7),
        *(
            insert(schema, "table1", template_name=name, template_uuid=uid(30 + number), co_id=7, train_file=file)
            for number, (name, file) in enumerate(
                [({"en": "climbs"}, b"../outside.py"), ({"en": "bytes"}, b"\xff\xfe\x00print"), ({}, b"ask.py"),
                 ({"en": "large"}, b"#" * (MAX_FILE_BYTES + 1))]
            )
        ),
        insert(schema, "dataset_base_info", dataset_name="lost", dataset_uuid=ROWS.replace("5", "9"), co_id=7),
        insert(schema, "sys_plan_profile", name={"en": "odd"}, profile_uuid=uid(21), co_id=7),
        insert(schema, "sys_params", profile_uuid=uid(21), field_name="n", field_type="int", field_value="many",
               co_id=7),
        insert(schema, "model", model_name="orphan", task_uuid=uid(22), model_type=2, co_id=7, base_model="unknown",
               actual_path="../models/out/tuned"),
    )  # fmt: skip
    mine = (await app.client.get("/api/v1/base-models/custom01-base")).json()
    planned, _ = await take("--dry-run", mapping={"schema": schema})
    report, result = await take(mapping={"schema": schema})

    assert result.exit_code == 1
    assert outcomes(planned) == outcomes(report)
    found = outcomes(report)
    assert found[("base_models", "custom01-base")] == "kept"
    assert (await app.client.get("/api/v1/base-models/custom01-base")).json() == mine
    assert {name for (_, name), outcome in found.items() if outcome == "not taken"} == {
        "SFT-Demo-DeepExtension", "elsewhere", "half", "nowhere", "lost", "orphan", "climbs", "bytes", "", "large",
    }  # fmt: skip
    assert all(one["problems"] for one in report["items"] if one["outcome"] == "not taken")
    said = entry(report, "methods", "SFT-Demo-DeepExtension")["problems"]
    assert [word in " ".join(said) for word in ("life_cycle 9", "python_file_config.surprise")] == [True, True]
    assert "training types [1, 3]" in " ".join(entry(report, "methods", "inline")["changed"])
    assert (app.services.home.scripts / "inline_training.py").read_text() == "import json\nprint(1)\n"
    assert "'many' is no int" in entry(report, "profiles", "odd")["problems"][0]

    mended, _ = await take(
        mapping={
            "schema": schema,
            "values": {"life_cycle": {9: ["customized"]}},
            "columns": {"method_settings": {"python_file_config": "none_such"}},
            "names": {"methods": {"SFT-Demo": "our-sft"}},
            "folders": {"/data/llm": "models", "half": "models/qwen"},
            "leave_out": {"base_models": ["custom01-base", "nowhere"], "datasets": ["lost"], "models": ["orphan"]},
        }
    )
    assert outcomes(mended)[("methods", "our-sft")] == "taken"
    assert outcomes(mended)[("base_models", "half")] == "taken"
    assert outcomes(mended)[("models", "orphan")] == "left out"


async def test_says_why_it_cannot_begin(app: JobsApp, take: Import, source: str, tmp_path: Path) -> None:
    await run_sql(source, *tables("v2505", "two"), *(
        insert("two", "base_model", technic_name=f"m{tenant}", path="x", co_id=tenant) for tenant in (1, 2)
    ))  # fmt: skip
    socket = make_url(source).set(username="nobody", password="top-secret").render_as_string(hide_password=False)
    cases = [
        (await take(url=socket))[1],
        (await take(url="postgresql://u:top-secret@127.0.0.1:1/x"))[1],
        (await take(url="mysql://u:top-secret@x/y"))[1],
        (await take(mapping={"schema": "information_schema"}))[1],
        (await take(mapping={"schema": "v2509", "columns": {"base_models": {"path": "folder"}}}))[1],
        (await take(mapping={"schema": "two"}))[1],
        (await take(mapping={"tables": {"modells": "m"}}))[1],
    ]

    assert [result.exit_code for result in cases] == [3, 3, 2, 1, 1, 2, 2]
    assert not any("top-secret" in result.output + result.stderr for result in cases)
    words = (
        "nobody",
        "127.0.0.1:1",
        "postgresql://USER",
        "table1",
        "base_model has no column folder",
        "--tenant",
        "modells",
    )
    assert [word in result.stderr for word, result in zip(words, cases, strict=True)] == [True] * 7
