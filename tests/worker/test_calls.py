"""Stages that their method calls its own way, as real processes: one start of a worker for all forms."""

import json
import os
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from app.domain.enums import JobStatus
from app.domain.stage_calls import ConfigFile, StageCall, WorkingDirectory
from app.executor.jobs.stage_commands import NO_JOB
from app.store.nodes import all_nodes
from tests.api.jobs_app import JobsApp, jobs_app
from tests.worker.harness import Site
from tests.worker.test_contract import ABOVE, LOOK, seen_by

TOOL = (
    """
import os, sys
sys.path.insert(0, os.environ["SCRIPTS"])  # as only this test needs it
"""
    + LOOK
)
CONTENT: dict[str, Any] = {
    "model": "{model_path}",
    "data": {"folder": "{dataset_dir}", "seq": "{seq}"},
    "rate": "{param:rate}",
    "gone": "{param:gone}",
    "<<": "{parameters}",
}


OF_THE_NODE = {"DEEPE_ACCELERATORS", "DEEPE_TARGET_ADDRESSES", "PYTHONNOUSERSITE", "PYTHONUNBUFFERED"}
"""Variables that every stage has, whatever its method is."""


def environment_with(site: Site, module: str, text: str) -> str:
    """Give the node an environment that has the module."""
    prefix = site.node_home().environments / "tools"
    site.node_home().create()
    venv.create(prefix, symlinks=True, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(prefix), "platbase": str(prefix)}))
    path = packages / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return prefix.name


async def assert_runs_as_shown(site: Site, app: JobsApp, name: str, parameters: dict[str, Any], **stage: Any) -> None:
    """Register a method; what it says of its command is what the supervisor of a job is told."""
    (site.home.scripts / f"{name}.py").write_text(f"{LOOK}play.wait_for('{name}')\n")
    training = {"file": f"{name}.py", "conda_env": "base", **stage}
    method = {"name": name, "training_type": "chat", "lifecycle": ["customized"], "stages": {"training": training}}
    await app.post("/methods", method, 201)
    inputs = {"base_model": "custom01-base", "dataset": "custom01"}

    shown = await app.get(f"/methods/{name}/command", params={**inputs, "parameters": json.dumps(parameters)})
    made = await app.post("/jobs", {"method": name, **inputs, "parameters": parameters, "through": "customized"}, 201)

    await site.wait(made["id"], JobStatus.RUNNING)
    (attempt,) = await site.attempts(made["id"])
    launched = json.loads((site.node_home().attempts / attempt.id / "spec.json").read_text())
    document = json.loads(json.dumps(shown).replace(NO_JOB, made["id"]))
    contained = launched["argv"].index("--") + 1 if launched["sandboxed"] else 0
    assert (launched["argv"][contained:], launched["cwd"]) == (document["command"], document["working_directory"])
    assert launched["env"] == {**launched["env"], **document["environment"]}
    ours = {variable for variable in launched["env"] if variable.startswith(("DEEPE_", "PYTHON"))}
    assert ours - document["environment"].keys() == OF_THE_NODE
    for file in document["files"]:
        assert Path(file["path"]).read_text() == file["content"]
    site.open(name)
    await site.wait(made["id"])


async def test_every_form_of_a_call_reaches_its_process(site: Site) -> None:
    site.place_base()
    tools = environment_with(site, "tool.train", TOOL)
    (site.home.scripts / "tool.py").write_text("raise SystemExit('a file of the script root')")
    parameters = {"rate": 1e-4, "targets": ["q", "v"], "quick": True}

    def called(**call: Any) -> dict[str, Any]:
        return {"call": StageCall(**call)}

    listed = await site.submit(
        LOOK,
        parameters=parameters,
        spec=called(arguments=("go", "--m={model_path}", ("--r", "{param:rate}"), "{flag:quick}", "{parameters}")),
    )
    module = await site.submit(
        environment=tools,
        spec={
            "script": None,
            **called(module="tool.train", arguments=("{output_dir}",), env={"SCRIPTS": "{script_root}"}),
        },
    )
    written = {
        suffix: await site.submit(
            LOOK,
            parameters=parameters,
            spec=called(arguments=("{config}",), config=ConfigFile(name=f"job.{suffix}", content=CONTENT)),
        )
        for suffix in ("yaml", "json", "toml")
    }
    variables = await site.submit(
        LOOK, parameters={"n": 2}, spec=called(env={"N": "{param:n}", "M": "{param:m}"}) | {"withheld": ("n",)}
    )
    look = LOOK.replace("play.NOTES", "play.OUT")  # what is above these folders is not the home
    in_run = await site.submit(look, spec=called(working_directory=WorkingDirectory.RUN))
    in_method = await site.submit(
        ABOVE + look,
        file="folder/look.py",
        spec=called(working_directory=WorkingDirectory.METHOD),
    )

    site.start_worker()

    for job_id in (listed, module, *written.values(), variables, in_run, in_method):
        row = await site.wait(job_id)
        assert row.status is JobStatus.SUCCEEDED, site.story(row)

    base, scripts = str(site.home.models / "base"), str(site.home.scripts)
    assert seen_by(site, listed)["argv"][1:] == [
        "go", f"--m={base}", "--r", "0.0001", "--quick", "--targets", "q", "v"
    ]  # fmt: skip

    seen = seen_by(site, module)
    assert seen["argv"][1:] == [str(site.run_folder(module).output)]
    assert seen["argv"][0].endswith("site-packages/tool/train.py")
    assert seen["cwd"] == scripts

    read: dict[str, Callable[[str], Any]] = {"yaml": yaml.safe_load, "json": json.loads, "toml": tomllib.loads}
    for suffix, job_id in written.items():
        (path,) = seen_by(site, job_id)["argv"][1:]
        assert path == str(site.run_folder(job_id).path / f"job.{suffix}")
        assert read[suffix](Path(path).read_text()) == {
            "model": base,
            "data": {"folder": str(site.run_folder(job_id).path.parent / "dataset"), "seq": 1},
            "rate": 1e-4,
            "targets": ["q", "v"],
            "quick": True,
        }

    kept = seen_by(site, written["yaml"])["env"]["HF_DATASETS_CACHE"]  # it goes with the job
    assert kept == str(site.run_folder(written["yaml"]).cache / "datasets")
    assert "HF_DATASETS_CACHE" not in seen_by(site, listed)["env"]
    seen = seen_by(site, variables)
    assert (seen["env"]["N"], "M" in seen["env"]) == ("2", False)
    assert not any(word.startswith("--n=") for word in seen["argv"])

    for job_id in (in_run, in_method):
        seen = json.loads((site.run_folder(job_id).output / f"seen-{job_id}").read_text())
        folder = Path(seen["cwd"])
        assert folder == (site.run_folder(in_run).path if job_id == in_run else Path(seen["argv"][0]).parent)
        assert f"--model_path={os.path.relpath(base, folder)}" in seen["argv"]

    async with site.database.reading() as session:
        (node,) = await all_nodes(session)
    async with jobs_app(site.database, site.root, node=node.id) as app:
        await assert_runs_as_shown(site, app, "plain", {})
        await assert_runs_as_shown(
            site,
            app,
            "listed",
            parameters,
            arguments=["go", "--config={config}", ["--r", "{param:rate}"], "{flag:quick}"],
            config={"name": "job.yaml", "content": CONTENT},
            env={"M": "{model_path}"},
        )
