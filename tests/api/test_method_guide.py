"""What a caller learns before starting a method: parameters and readiness."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.api.routes import system
from app.argspec.client import BoundedReader, Limits
from app.domain.enums import Platform
from app.domain.environment_reports import EnvironmentReport, EnvironmentState, Probe
from app.domain.library_options import OptionClass, OptionField
from app.domain.script_parameters import ParameterKind
from app.presets.catalogue import load_manifests
from app.store import option_classes
from app.store.nodes import all_nodes, heartbeat, register_node
from app.store.session import Database
from tests.api.client import MethodsApp, definition, methods_app
from tests.argspec.hostile import SLOW

URL = "/api/v1/methods"
SCRIPT = b"""
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--learning_rate", type=float, default=2e-5, help="Step size")
parser.add_argument("--optimizer", choices=["adam", "sgd"], required=True)
parser.add_argument("--output_dir")
arguments, _ = parser.parse_known_args()
"""
STRICT = SCRIPT.replace(b"arguments, _ = parser.parse_known_args()", b"arguments = parser.parse_args()")


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home", routers=(system.router,)) as running:
        yield running


async def start_node(app: MethodsApp, *environments: str, silent_for: timedelta = timedelta()) -> None:
    async with app.database.writing() as session:
        await register_node(
            session,
            name="gpu-1",
            platform=Platform.CUDA,
            accelerators=[],
            environments=environments,
            slots=1,
            boot_id="1",
            now=datetime.now(UTC) - silent_for,
        )


async def only_stage(app: MethodsApp) -> dict[str, Any]:
    body = (await app.client.get(f"{URL}/finance/readiness")).json()
    (stage,) = body["stages"]
    assert body["ready"] == stage["ready"]
    found: dict[str, Any] = stage
    return found


class TestParameters:
    async def test_reads_them_from_the_script(self, app: MethodsApp) -> None:
        app.script("train.py", SCRIPT)
        method = await app.create()

        body = (await app.client.get(f"{URL}/finance/parameters")).json()

        (stage,) = body["stages"]
        assert (body["method_id"], body["version"]) == (method["id"], 1)
        assert (stage["stage"], stage["file"], stage["partly_read"]) == ("training", "train.py", False)
        assert stage["schema"]["properties"]["learning_rate"]["type"] == "number"
        assert stage["schema"]["properties"]["optimizer"]["enum"] == ["adam", "sgd"]
        assert stage["schema"]["required"] == ["optimizer"]
        assert stage["schema"]["properties"]["output_dir"]["x-platform"] is True

    async def test_follow_an_edit_on_disk(self, app: MethodsApp) -> None:
        app.script("train.py", SCRIPT)
        await app.create()
        app.script("train.py", SCRIPT.replace(b"--optimizer", b"--solver"))

        (stage,) = (await app.client.get(f"{URL}/finance/parameters")).json()["stages"]

        assert stage["schema"]["required"] == ["solver"]

    async def test_speak_the_callers_language(self, app: MethodsApp) -> None:
        app.script("train.py", SCRIPT)
        await app.create()

        answers = [
            (await app.client.get(f"{URL}/finance/parameters", headers={"Accept-Language": language})).json()
            for language in ("en", "zh", "de")
        ]

        titles = {answer["stages"][0]["schema"]["properties"]["learning_rate"]["title"] for answer in answers}
        assert len(titles) == 3

    async def test_say_where_a_script_cannot_be_read(self, app: MethodsApp) -> None:
        loop = b"for name in open('names'):\n    parser.add_argument('--' + name)\n"
        app.script("train.py", SCRIPT.replace(b"arguments, _", loop + b"arguments, _"))
        await app.create()

        (stage,) = (await app.client.get(f"{URL}/finance/parameters")).json()["stages"]

        assert stage["partly_read"] is True
        assert stage["remarks"]
        assert stage["schema"]["additionalProperties"] is True

    async def test_say_that_a_customized_model_would_answer_as_its_base(self, app: MethodsApp) -> None:
        ask = SCRIPT.replace(b"--output_dir", b"--base_model_path")
        app.script("train.py", SCRIPT)
        app.script("ask.py", ask)
        stage = {"file": "ask.py", "conda_env": "base"}
        stages = {"training": {"file": "train.py", "conda_env": "base"}, "inference-customized": stage}
        await app.create(stages=stages, inference={"customized": True})
        await start_node(app, "base")

        _, found = (await app.client.get(f"{URL}/finance/parameters")).json()["stages"]
        readiness = (await app.client.get(f"{URL}/finance/readiness")).json()["stages"]
        app.script("ask.py", ask.replace(b"--base_model_path", b"--model_path"))
        await app.create(name="knowing", stages=stages, inference={"customized": True})
        _, told = (await app.client.get(f"{URL}/knowing/parameters")).json()["stages"]
        app.script("ask.py", ask + b"parser.add_argument('--model_id')\n")
        await app.create(name="by id", stages=stages, inference={"customized": True})
        _, by_id = (await app.client.get(f"{URL}/by id/parameters")).json()["stages"]

        assert "inference_ignores_model" in [remark["code"] for remark in found["remarks"]]
        codes = [finding["code"] for cell in readiness[1]["cells"] for finding in cell["findings"]]
        assert codes == ["inference_ignores_model"]
        assert "inference_ignores_model" not in [remark["code"] for remark in told["remarks"]]
        assert "inference_by_id" in [remark["code"] for remark in by_id["remarks"]]

    async def test_say_where_nobody_can_know_what_a_script_lacks(self, app: MethodsApp) -> None:
        app.script("train.py", b"import sys, os, lib\nsys.path.append(os.environ['LIB'])\n" + SCRIPT)
        await app.create()
        await start_node(app, "base")

        (stage,) = (await app.client.get(f"{URL}/finance/readiness")).json()["stages"]

        (finding,) = stage["cells"][0]["findings"]
        assert (finding["code"], "Line 2" in finding["detail"]) == ("modules_not_judged", True)

    async def test_a_preset_knows_its_own_ranges(self, app: MethodsApp) -> None:
        async with app.database.writing() as session:
            await app.services.presets.install_presets(session)

        stages = (await app.client.get(f"{URL}/Custom01/parameters")).json()["stages"]

        learning_rate = stages[0]["schema"]["properties"]["learning_rate"]
        assert (learning_rate["x-typical-minimum"], learning_rate["x-typical-maximum"]) == (0.05, 2.0)


class TestReadiness:
    async def test_ready_where_a_node_has_the_environment(self, app: MethodsApp) -> None:
        app.script("train.py", SCRIPT)
        await app.create()
        await start_node(app, "base")

        stage = await only_stage(app)

        assert (stage["ready"], stage["nodes"], stage["environment"]) == (True, ["gpu-1"], "base")

    async def test_says_what_stands_in_the_way(self, app: MethodsApp) -> None:
        app.script("train.py", STRICT)
        await start_node(app, "vision")
        await app.create(stages={"training": {"file": "train.py", "conda_env": "base"}})

        stage = await only_stage(app)

        found = {(problem["pointer"], problem["code"]) for problem in stage["problems"]}
        assert found == {
            ("/stages/training/conda_env", "environment_not_built"),
        }

    async def test_a_strict_script_gets_what_it_declares_and_the_method_says_so(self, app: MethodsApp) -> None:
        app.script("train.py", STRICT)
        await start_node(app, "base")
        await app.create()

        (stage,) = (await app.client.get(f"{URL}/finance/parameters")).json()["stages"]

        assert (await only_stage(app))["ready"] is True
        assert [remark["code"] for remark in stage["remarks"]] == ["arguments_undeclared"]

    async def test_arguments_cannot_be_limited_to_those_of_a_script_that_is_not_read(self, app: MethodsApp) -> None:
        app.script("train.py", b"import sys\nprint(sys.argv)\n")
        await start_node(app, "base")

        answer = await app.client.post(URL, json=definition(arguments={"declared_only": True}))

        assert answer.status_code == 422
        assert [(one["pointer"], one["code"]) for one in answer.json()["errors"]] == [
            ("/arguments/declared_only", "declared_only_unread")
        ]

    async def test_an_environment_that_only_a_silent_node_has_is_known_but_not_ready(self, app: MethodsApp) -> None:
        app.script("train.py", SCRIPT)
        await start_node(app, "vision", silent_for=timedelta(hours=1))
        await app.create(stages={"training": {"file": "train.py", "conda_env": "vision"}})

        assert [problem["code"] for problem in (await only_stage(app))["problems"]] == ["no_node_alive"]

    async def test_validation_says_it_before_anything_is_registered(self, app: MethodsApp) -> None:
        app.script("train.py", STRICT)
        await start_node(app, "base")

        body = (await app.client.post(f"{URL}:validate", json=definition())).json()

        (stage,) = body["readiness"]["stages"]
        assert body["valid"] is True
        assert (stage["ready"], stage["problems"]) == (True, [])

    async def test_presets_run_on_their_own_arguments(self, app: MethodsApp) -> None:
        async with app.database.writing() as session:
            await app.services.presets.install_presets(session)
        await start_node(app, "base", "trl")

        bodies = [(await app.client.get(f"{URL}/{name}/readiness")).json() for name in ("Custom01", "SFT-Demo")]

        assert [body["ready"] for body in bodies] == [True, True]


class TestForm:
    async def test_says_what_can_be_chosen_here(self, app: MethodsApp) -> None:
        await start_node(app, "vision")

        body = (await app.client.get("/api/v1/method-form")).json()

        assert body["environments"] == ["base", "vision"]
        assert [choice["value"] for choice in body["deploy_targets"]] == ["custom"]
        assert len(body["lifecycles"]) == 6
        assert set(body["training_types"][0]["label"]) == {"en", "zh", "de"}


class TestPresets:
    async def test_are_listed_by_pages_and_read_one_by_one(self, app: MethodsApp) -> None:
        async with app.database.writing() as session:
            await app.services.presets.install_presets(session)

        first = (await app.client.get("/api/v1/presets", params={"limit": 1})).json()
        rest = (await app.client.get("/api/v1/presets", params={"cursor": first["next_cursor"]})).json()
        one = await app.client.get("/api/v1/presets/Custom01")
        unknown = await app.client.get("/api/v1/presets/nope")

        listed = [preset["name"] for preset in first["items"] + rest["items"]]
        assert listed == [manifest.name for manifest in load_manifests()]
        assert rest["next_cursor"] is None
        assert one.json() == first["items"][0]
        assert one.json()["installed"]
        assert (unknown.status_code, unknown.json()["code"]) == (404, "preset_not_found")


class TestMatrix:
    async def test_cells_say_what_to_do_on_every_node(self, app: MethodsApp) -> None:
        app.script("train.py", b"import json, torch\n" + SCRIPT)
        app.script("helper.py", b"")
        await app.create()
        await start_node(app, "base", "trl")
        environment = (await app.client.get(f"{URL}/finance")).json()["stages"]["training"]["conda_env"]
        probe = {"modules": ["torch"], "missing": ["torch"]}
        states = [{"name": environment, "state": "ready", "probe": probe}]
        async with app.database.writing() as session:
            row = (await all_nodes(session))[0]
            await heartbeat(session, row.id, now=datetime.now(UTC), environment_states=states)

        stage = await only_stage(app)
        (listed,) = (await app.client.get("/api/v1/readiness")).json()["items"]

        (cell,) = stage["cells"]
        assert (stage["ready"], stage["nodes"]) == (False, [])
        assert (cell["node"], cell["verdict"], cell["environment"]) == ("gpu-1", "never", "ready")
        assert [finding["code"] for finding in cell["findings"]] == ["cell_modules_missing"]
        assert "imports torch" in cell["findings"][0]["detail"]
        assert (listed["method"], listed["ready"], listed["stages"]) == ("finance", False, [stage])


class TestHostileScripts:
    async def test_the_service_answers_while_a_script_is_read(self, app: MethodsApp) -> None:
        app.services.files.reader = BoundedReader(Limits(cpu_seconds=0.5))
        app.script("train.py", SLOW)
        await app.create()
        reading = asyncio.create_task(app.client.get(f"{URL}/finance/parameters"))

        answered = 0
        while not (await asyncio.wait([reading], timeout=0.05))[0]:
            assert (await app.client.get("/healthz")).status_code == 200
            answered += not reading.done()

        (stage,) = (await reading).json()["stages"]
        app.services.files.reader.close()
        assert answered > 1
        assert stage["partly_read"] is True
        assert [remark["code"] for remark in stage["remarks"]] == ["unread_cpu_time"]
        assert "0.5 s" in stage["remarks"][0]["detail"]

    async def test_a_default_that_would_take_for_ever_hides_no_other_parameter(self, app: MethodsApp) -> None:
        app.script(
            "train.py",
            SCRIPT.replace(b"arguments, _", b"parser.add_argument('--x', default=round(5, -10**9))\narguments, _"),
        )
        await app.create()

        (stage,) = (await app.client.get(f"{URL}/finance/parameters")).json()["stages"]

        assert stage["partly_read"] is False
        assert stage["schema"]["properties"]["x"]["x-default-text"] == "round(5, -10 ** 9)"
        assert "optimizer" in stage["schema"]["properties"]


OPTIONS = b"""
LIBRARY_OPTIONS = {"classes": {"lib.Config": {}}}
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--learning_rate", type=float, default=2e-5)
arguments, rest = parser.parse_known_args()
"""
CONFIG = OptionClass(
    path="lib.Config",
    library="lib",
    version="1.2",
    fields=(
        OptionField(name="learning_rate", kind=ParameterKind.NUMBER, default=5e-5),
        OptionField(name="weight_decay", kind=ParameterKind.NUMBER, default=0.0, help="What the library says."),
        OptionField(name="adam_beta2", kind=ParameterKind.NUMBER, default=0.999, help="Second moment."),
        OptionField(name="report_to", kind=ParameterKind.ANY, default="none"),
    ),
)


async def describe(app: MethodsApp) -> None:
    """Let the node say what it found in the environment."""
    probe = Probe(options={CONFIG.path: CONFIG.digest})
    report = EnvironmentReport(name="base", state=EnvironmentState.READY, probe=probe)
    async with app.database.writing() as session:
        (node,) = await all_nodes(session)
        now = datetime.now(UTC)
        await option_classes.keep(session, {CONFIG.digest: CONFIG.document()}, now=now)
        await heartbeat(session, node.id, now=now, environment_states=[report.document()])


class TestOptionsOfLibraries:
    async def test_are_listed_when_a_node_has_described_them(self, app: MethodsApp) -> None:
        app.script("train.py", OPTIONS)
        await app.create()
        await start_node(app, "base")

        (before,) = (await app.client.get(f"{URL}/finance/parameters")).json()["stages"]
        await describe(app)
        (after,) = (await app.client.get(f"{URL}/finance/parameters")).json()["stages"]

        unknown: dict[str, Any] = {"path": "lib.Config", "when": {}, "library": None, "version": None}
        assert before["option_classes"] == [unknown]
        assert [remark["code"] for remark in before["remarks"]] == ["options_not_described"]
        assert list(before["schema"]["properties"]) == ["learning_rate"]
        assert before["schema"]["additionalProperties"] is True
        assert after["option_classes"] == [unknown | {"library": "lib", "version": "1.2"}]
        assert after["remarks"] == []
        properties = after["schema"]["properties"]
        assert list(properties) == ["learning_rate", "weight_decay", "adam_beta2"]
        assert properties["learning_rate"]["default"] == 2e-5
        assert properties["adam_beta2"]["description"] == "Second moment."
        assert properties["adam_beta2"]["x-advanced"] is True

    async def test_say_why_a_library_could_not_be_asked(self, app: MethodsApp) -> None:
        app.script("train.py", OPTIONS)
        await app.create()
        await start_node(app, "base")
        probe = Probe(options_trouble={CONFIG.path: "ModuleNotFoundError: No module named 'lib'"})
        report = EnvironmentReport(name="base", state=EnvironmentState.READY, probe=probe)
        async with app.database.writing() as session:
            (node,) = await all_nodes(session)
            await heartbeat(session, node.id, now=datetime.now(UTC), environment_states=[report.document()])

        (stage,) = (await app.client.get(f"{URL}/finance/parameters")).json()["stages"]

        assert [remark["code"] for remark in stage["remarks"]] == ["options_not_readable"]
        assert "No module named 'lib'" in stage["remarks"][0]["detail"]

    async def test_a_copy_keeps_them(self, app: MethodsApp) -> None:
        app.script("train.py", OPTIONS)
        await app.create()
        await start_node(app, "base")
        await describe(app)

        copied = await app.client.post(f"{URL}/finance:copy", json={"name": "again"})
        (stage,) = (await app.client.get(f"{URL}/again/parameters")).json()["stages"]

        assert copied.status_code == 201, copied.text
        assert "adam_beta2" in stage["schema"]["properties"]
