"""Methods that say how their stages are called: refused where they cannot work, and shown before anything runs."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.domain.library_options import OptionClass, OptionField
from app.domain.projects import DEFAULT_SCOPE
from app.domain.script_parameters import ParameterKind
from app.executor.jobs.stage_commands import NO_JOB
from app.store import option_classes
from app.store.methods import modules_by_environment
from app.store.nodes import all_nodes, heartbeat
from app.store.session import Database
from tests.api.jobs_app import SUBMIT, JobsApp, codes, jobs_app

SCRIPT = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path", required=True)
parser.add_argument("--learning_rate", type=float, default=1e-4)
parser.add_argument("--targets", nargs="*")
parser.add_argument("--packing", action="store_true")
parser.parse_args()
"""
INPUTS = {"base_model": SUBMIT["base_model"], "dataset": SUBMIT["dataset"]}


@pytest.fixture
async def app(sqlite_url: str, tmp_path: Path) -> AsyncIterator[JobsApp]:
    database = Database(sqlite_url, scope=DEFAULT_SCOPE)
    async with jobs_app(database, tmp_path / "home") as app:
        (app.services.home.scripts / "own.py").write_text(SCRIPT)
        yield app
    await database.close()


async def called(app: JobsApp, name: str = "own", status: int = 201, **stage: Any) -> Any:
    """Register a method whose training is called like this."""
    training = {"conda_env": "base", **({} if "module" in stage else {"file": "own.py"}), **stage}
    body = {"name": name, "training_type": "chat", "lifecycle": ["customized"], "stages": {"training": training}}
    return await app.post("/methods", body, status)


async def command(app: JobsApp, method: str = "own", status: int = 200, **query: Any) -> Any:
    wanted = {**INPUTS, **query}
    if "parameters" in wanted and not isinstance(wanted["parameters"], str):
        wanted["parameters"] = json.dumps(wanted["parameters"])
    return await app.get(f"/methods/{method}/command", status, params=wanted)


class TestRegistration:
    async def test_says_everything_that_is_wrong_with_a_call(self, app: JobsApp) -> None:
        refused = await called(
            app,
            status=422,
            module="a b",
            file="own.py",
            arguments=["{nothing}", ["{config}"]],
            env={"PYTHONPATH": "x"},
            working_directory="home",
        )

        assert sorted(codes(refused)) == [
            ("/stages/training/arguments/0", "unknown_placeholder"),
            ("/stages/training/arguments/1/0", "placeholder_without_config"),
            ("/stages/training/env/PYTHONPATH", "variable_of_platform"),
            ("/stages/training/module", "invalid_module"),
            ("/stages/training/module", "module_beside_file"),
            ("/stages/training/working_directory", "unknown_working_directory"),
        ]

    async def test_a_call_is_part_of_the_version_and_of_what_can_be_set(self, app: JobsApp) -> None:
        stage: dict[str, Any] = {
            "arguments": ["--model_name_or_path={model_path}", ["--learning_rate", "{param:rate}"], "{flag:fast}"]
        }
        made = await called(app, **stage)

        assert made["stages"]["training"]["arguments"] == stage["arguments"]
        (training,) = (await app.get("/methods/own/parameters"))["stages"]
        schema = training["schema"]
        assert {name: one.get("type") for name, one in schema["properties"].items()} == {
            "rate": "number",  # as the option that it is the value of
            "fast": "boolean",
        }
        assert (schema["additionalProperties"], schema["required"]) == (False, [])

    async def test_a_module_needs_no_file_and_is_not_read(self, app: JobsApp) -> None:
        await called(app, module="mlx_lm.lora", arguments=["{parameters}"])

        (training,) = (await app.get("/methods/own/parameters"))["stages"]
        assert (training["file"], training["module"], training["partly_read"]) == (None, "mlx_lm.lora", True)
        assert [one["code"] for one in training["remarks"]] == ["unread_module"]
        (shown,) = (await app.get("/methods/own/readiness"))["stages"]
        assert shown["stage"] == "training"
        copy = await app.post("/methods/own:copy", {"name": "copied"}, 201)
        assert copy["stages"] == (await app.get("/methods/own"))["stages"]

    async def test_a_module_of_the_script_root_is_pinned_and_read_with_its_package(self, app: JobsApp) -> None:
        own = app.services.home.scripts / "mine"
        own.mkdir()
        (own / "__init__.py").write_text("")
        (own / "train.py").write_text("from .options import parsed\nparsed()\n")
        (own / "options.py").write_text("def parsed():\n    " + "\n    ".join(SCRIPT.strip().splitlines()) + "\n")
        launcher = {"kind": "torchrun", "processes": 2}
        made = await called(
            app, module="mine.train", arguments=["{parameters}"], launcher=launcher, include=["*.txt"], status=422
        )
        assert codes(made) == [("/stages/training/include/0", "include_matches_nothing")]
        await called(app, module="mine.train", arguments=["{parameters}"], launcher=launcher)

        (file,) = (await app.get("/methods/own"))["files"]
        assert (file["module"], file["file"]) == ("mine.train", "mine/train.py")
        assert [one["path"] for one in file["beside"]] == ["mine/__init__.py", "mine/options.py"]
        (training,) = (await app.get("/methods/own/parameters"))["stages"]
        assert (training["file"], training["module"]) == ("mine/train.py", "mine.train")
        assert training["schema"]["properties"]["learning_rate"]["type"] == "number"
        shown = await command(app, parameters={"model_name_or_path": "x", "packing": True, "targets": ["a", "b"]})
        at = shown["command"].index("mine.train")
        assert shown["command"][at - 1 : at + 2] == ["-m", "mine.train", "--model_name_or_path=x"]
        assert shown["environment"]["PYTHONSAFEPATH"] == "1"
        (tree, _) = shown["environment"]["PYTHONPATH"].split(":")
        assert (Path(tree) / "mine" / "options.py").is_file()
        (own / "options.py").write_text("def parsed():\n    raise SystemExit\n")
        assert (await app.get("/methods/own"))["disk_changed"]
        restored = await app.post("/methods/own:restore")
        assert "learning_rate" in (own / "options.py").read_text()
        assert [one["module"] for one in restored["files"]] == ["mine.train"]
        (own / "train.py").unlink()
        refused = await app.post("/methods:validate?method=own", restored, 200)
        found = [(one["pointer"], one["code"]) for one in refused["violations"]]
        assert found == [("/stages/training/module", "file_not_found")]

    async def test_a_module_is_read_where_its_environment_stands(self, app: JobsApp, tmp_path: Path) -> None:
        packages = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
        (packages / "tool").mkdir(parents=True)
        (packages / "tool" / "cli.py").write_text("from .options import parser\nparser().parse_args()\n")
        lines = SCRIPT.strip().removesuffix("parser.parse_args()").splitlines()
        options = "def parser():\n    " + "\n    ".join([*lines, "return parser"]) + "\n"
        (packages / "tool" / "options.py").write_text(options)
        async with app.database.writing() as session:
            (row,) = await all_nodes(session)
            states = [{"name": "base", "state": "ready", "prefix": str(tmp_path / "env")}]
            await heartbeat(session, row.id, now=datetime.now(UTC), environment_states=states)
        await called(app, module="tool.cli", arguments=["{parameters}"])

        (training,) = (await app.get("/methods/own/parameters"))["stages"]
        given = {"packing": True, "targets": ["a", "b"], "unheard": 1}
        shown = await command(app, parameters=given)
        refused = await command(app, parameters={"learning_rate": "fast"}, status=422)

        assert [one["code"] for one in training["remarks"]] == ["read_module"]
        assert (training["schema"]["properties"]["targets"]["type"], training["schema"]["required"]) == ("array", [])
        at = shown["command"].index("tool.cli")
        assert shown["command"][at + 1 :] == ["--targets", "a", "b", "--packing", "--unheard=1"]
        assert codes(refused) == [("/parameters/learning_rate", "parameter_wrong_type")]

    async def test_classes_of_a_modules_parser_are_described_by_its_environment(
        self, app: JobsApp, tmp_path: Path
    ) -> None:
        packages = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
        (packages / "tool").mkdir(parents=True)
        text = "from options import Args\nfrom transformers import HfArgumentParser\nHfArgumentParser((Args,))"
        (packages / "tool" / "cli.py").write_text(f"{text}.parse_args_into_dataclasses()\n")
        rate = OptionField(name="rate", kind=ParameterKind.NUMBER, default=0.1)
        described = OptionClass(path="options.Args", library="options", version="1", fields=(rate,))
        probe = {"modules": ["tool"], "missing": [], "options": {described.path: described.digest}}
        async with app.database.writing() as session:
            await option_classes.keep(session, {described.digest: described.document()}, now=datetime.now(UTC))
            (row,) = await all_nodes(session)
            states = [{"name": "base", "state": "ready", "prefix": str(tmp_path / "env"), "probe": probe}]
            await heartbeat(session, row.id, now=datetime.now(UTC), environment_states=states)
        await called(app, module="tool.cli", arguments=["{parameters}"])

        (training,) = (await app.get("/methods/own/parameters"))["stages"]
        refused = await command(app, parameters={"rate": "fast"}, status=422)

        assert [one["code"] for one in training["remarks"]] == ["read_module"]
        assert training["schema"]["properties"]["rate"]["type"] == "number"
        assert codes(refused) == [("/parameters/rate", "parameter_wrong_type")]

    async def test_a_module_that_could_be_another_is_refused(self, app: JobsApp) -> None:
        scripts = app.services.home.scripts
        files = (
            "bare/train.py",
            "whole/__init__.py",
            "json/__init__.py",
            "json/x.py",
            "tool/__init__.py",
            "tool/__main__.py",
        )
        for name in files:
            (scripts / name).parent.mkdir(exist_ok=True)
            (scripts / name).write_text("")
        probe = {"modules": ["tool", "late"], "missing": []}
        async with app.database.writing() as session:
            (row,) = await all_nodes(session)
            states = [{"name": "base", "state": "ready", "probe": probe}]
            await heartbeat(session, row.id, now=datetime.now(UTC), environment_states=states)

        refused = [
            codes(await called(app, module=name, status=422)) for name in ("bare.train", "whole", "json.x", "tool")
        ]
        await called(app, module="late.cli")  # the environment's, until now
        late = await app.client.put("/api/v1/scripts/late/__init__.py", content=b"")
        for name in ("__init__", "cli"):
            (scripts / "late").mkdir(exist_ok=True)
            (scripts / "late" / f"{name}.py").write_text("")
        submitted = await app.post("/jobs", {"method": "own", **INPUTS, "through": "customized"}, 422)

        at = "/stages/training/module"
        assert refused == [
            [(at, "module_without_init")],
            [(at, "module_without_main")],
            [(at, "script_hides_standard_module")],
            [(at, "module_hides_package")],
        ]
        assert codes(late.json()) == [("", "script_hides_package")]
        assert codes(submitted) == [("/method", "module_hides_package")]

    async def test_a_module_needs_its_package(self, app: JobsApp) -> None:
        await called(app, module="mlx_lm.lora", arguments=[])
        probe = {"modules": ["mlx_lm"], "missing": ["mlx_lm"]}
        states = [{"name": "base", "state": "ready", "probe": probe}]
        async with app.database.writing() as session:
            (row,) = await all_nodes(session)
            await heartbeat(session, row.id, now=datetime.now(UTC), environment_states=states)
            assert await modules_by_environment(session) == {"base": ["mlx_lm.lora"]}

        refused = await app.post("/jobs", {"method": "own", **INPUTS, "through": "customized"}, 422)

        assert codes(refused) == [("/method", "stage_runs_nowhere"), ("/method", "cell_modules_missing")]


class TestSubmit:
    async def test_refuses_a_parameter_without_a_place(self, app: JobsApp) -> None:
        await called(app, arguments=["--model_name_or_path={model_path}", ["{param:a}", "{param:b}"]])
        body = {"method": "own", **INPUTS, "through": "customized"}

        refused = await app.post("/jobs", {**body, "parameters": {"a": 1, "learning_rate": 2}}, 422)

        assert sorted(codes(refused)) == [
            ("/parameters/a", "parameter_partner_missing"),
            ("/parameters/learning_rate", "parameter_without_place"),
        ]

    async def test_refuses_what_the_method_sets_itself_and_values_of_the_wrong_kind(self, app: JobsApp) -> None:
        await called(app, arguments=["--model_name_or_path={model_path}", "{flag:quick}", "{parameters}"])
        body = {"method": "own", **INPUTS, "through": "customized"}
        given = {"model_name_or_path": "x", "quick": 1, "learning_rate": "fast", "unheard": 1}

        refused = await app.post("/jobs", {**body, "parameters": given}, 422)

        assert sorted(codes(refused)) == [
            ("/parameters/learning_rate", "parameter_wrong_type"),
            ("/parameters/model_name_or_path", "parameter_set_by_method"),
            ("/parameters/quick", "parameter_wrong_type"),
            ("/parameters/unheard", "unknown_parameter"),
        ]

    async def test_fills_nothing_in(self, app: JobsApp) -> None:
        await called(app, arguments=["--model_name_or_path={model_path}", "{parameters}"])

        made = await app.submit(method="own", through="customized", parameters={"packing": True})

        job = await app.get(f"/jobs/{made['id']}")
        assert job["effective_parameters"] == {"packing": True}
        assert made["warnings"] == []


class TestCommand:
    async def test_shows_the_platforms_call_with_its_decisions(self, app: JobsApp) -> None:
        await called(app)

        refused = await command(app, status=422)
        shown = await command(app, parameters={"model_name_or_path": "x"})

        assert ("/parameters/model_name_or_path", "missing_parameter") in codes(refused)
        assert shown["command"][-1] == "--model_name_or_path=x"
        assert shown["command"][:2] == ["<base>/bin/python", "-u"]
        assert {"arguments_undeclared", "command_without_environment"} <= {one["code"] for one in shown["notes"]}

    async def test_shows_files_and_variables_of_an_explicit_call(self, app: JobsApp) -> None:
        home = app.services.home
        await called(
            app,
            module="tool.cli",
            arguments=["train", "{config}", ["--rate", "{param:rate}"]],
            config={"name": "job.yaml", "content": {"model": "{model_path}", "gone": "{param:gone}", "steps": 3}},
            env={"DATA": "{dataset_dir}"},
            working_directory="run",
            launcher={"kind": "torchrun", "processes": 2},
        )

        shown = await command(app, parameters={"gone": None})

        run = home.run_folder(NO_JOB, 1)
        at = shown["command"].index("tool.cli")
        assert shown["command"][at - 1 :] == ["-m", "tool.cli", "train", str(run / "job.yaml")]
        assert shown["command"][3:5] == ["-m", "torch.distributed.run"]
        (file,) = [one for one in shown["files"] if one["path"].endswith("job.yaml")]
        assert file["content"] == f"model: {home.models / 'custom01-base'}\nsteps: 3\n"
        assert shown["working_directory"] == str(run)
        assert shown["environment"]["DATA"] == str(run.parent / "dataset")  # the rows of the job alone
        assert shown["environment"]["PYTHONSAFEPATH"] == "1"
        left_out = [one["detail"] for one in shown["notes"] if one["code"] == "call_part_left_out"]
        assert any("{param:gone}" in one for one in left_out)
        assert any("--rate {param:rate}" in one for one in left_out)

    async def test_shows_later_stages(self, app: JobsApp) -> None:
        saving = await command(app, "Custom01", stage="saving")
        unasked = await command(app, "Custom01", 422, stage="inference-complete")

        assert saving["stage"] == "saving"
        place = saving["command"].index("--adapter_path") + 1
        assert saving["command"][place] != saving["command"][saving["command"].index("--save_path") + 1]
        assert codes(unasked) == [("?model", "model_needed")]

    async def test_refuses_what_a_submit_would(self, app: JobsApp) -> None:
        for query, expected in (
            ({"stage": "cooking"}, ("?stage", "stage_not_runnable")),
            ({"parameters": "["}, ("?parameters", "parameters_not_an_object")),
            ({"parameters": "[1]"}, ("?parameters", "parameters_not_an_object")),
            ({"base_model": "nobody"}, ("?base_model", "unknown_base_model")),
        ):
            assert codes(await command(app, "Custom01", 422, **query)) == [expected]
