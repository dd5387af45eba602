"""Trackers of the shipped trainings: event files as TensorBoard reads them, runs as a real MLflow server keeps them."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.presets import catalogue
from tests.presets.stage import Home
from tests.servers import free_port
from tests.waiting import wait_until

READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1]); found.Reload()
print(json.dumps({tag: [[one.step, one.value] for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}))
"""
ROWS = [{"prompt": f"What is {a} + 1?", "completion": str(a + 1)} for a in range(9)]


def has(python: Path, module: str) -> bool:
    program = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", program]).returncode == 0


def tensorboard_scalars(python: Path, folder: Path) -> dict[str, list[list[float]]]:
    done = subprocess.run([python, "-c", READ_EVENTS, folder], capture_output=True, text=True, check=True)
    found: dict[str, list[list[float]]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def tracking_python(training_python: Path) -> Path:
    if not (has(training_python, "tensorboard") and has(training_python, "mlflow")):
        pytest.skip("the training environment is older than the trackers in it")
    return training_python


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a real MLflow server."""
    python = os.environ.get("DEEPE_TEST_MLFLOW_PYTHON")
    if not python:
        pytest.skip("DEEPE_TEST_MLFLOW_PYTHON names no Python with MLflow's server, which is too large for these tests")
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    store = f"sqlite:///{folder}/mlflow.db"
    command = [python, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", str(folder / "artifacts")]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until(lambda: answers(f"{address}/health") or server.poll() is not None, "MLflow answers")
            assert server.poll() is None, (folder / "log").read_text()
            yield address
        finally:
            server.terminate()


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url).status == 200)
    except OSError:
        return False


def runs_of(address: str) -> list[dict[str, Any]]:
    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{address}/api/2.0/mlflow/{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        found: dict[str, Any] = json.load(urllib.request.urlopen(request))
        return found

    experiments = post("experiments/search", {"max_results": 10})["experiments"]
    (mine,) = [one["experiment_id"] for one in experiments if one["name"] == "deepextension"]
    return post("runs/search", {"experiment_ids": [mine]}).get("runs", [])  # type: ignore[no-any-return]


@pytest.mark.training
class TestTraining:
    def arguments(self, home: Home, base: Path) -> list[str]:
        rows = home.path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        return [f"--model_path={base}", f"--dataset_path={rows}", "--output_dir=../out", "--max_steps=3"]

    def test_trainer_reports_to_mlflow_and_tensorboard(
        self, tracking_python: Path, torch_home: Home, tiny_base: Path, mlflow: str
    ) -> None:
        run = torch_home.run(
            "sft-demo.py",
            *self.arguments(torch_home, tiny_base),
            *("--report_to=mlflow", "--logging_steps=1", "--eval_samples=1", "--eval_max_new_tokens=2"),
            environment={"MLFLOW_TRACKING_URI": mlflow, "DEEPE_JOB_ID": "job-1"},
        )

        assert run.code == 0, run.stderr
        (kept,) = runs_of(mlflow)
        assert kept["info"]["run_name"] == "job-1"
        assert kept["info"]["status"] == "FINISHED"
        tags = {tag["key"]: tag["value"] for tag in kept["data"]["tags"]}
        assert (tags["job"], tags["method"], tags["base"]) == ("job-1", "sft-demo", tiny_base.name)
        measured = {one["key"]: one["value"] for one in kept["data"]["metrics"]}
        assert measured["loss"] == pytest.approx(run.curve()[3])
        links = [event["message"] for event in run.of_type("note") if event["message"].startswith("mlflow: http")]
        assert links == [
            f"mlflow: {mlflow}/#/experiments/{kept['info']['experiment_id']}/runs/{kept['info']['run_id']}"
        ]
        scalars = tensorboard_scalars(tracking_python, torch_home.path / "tensorboard")
        assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3]

    def test_loop_of_its_own_trains_on_without_a_server_and_says_so(
        self, tracking_python: Path, torch_home: Home, tiny_base: Path
    ) -> None:
        run = torch_home.run(
            "custom02.py",
            *(argument.replace("--model_path", "--base_path") for argument in self.arguments(torch_home, tiny_base)),
            *("--save_path=../saved", "--report_to=mlflow", "--logging_steps=1", "--eval_samples=1"),
            *("--input_train_name=prompt", "--output_train_name=completion"),
            environment={"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"},
        )

        assert run.code == 0, run.stderr
        said = [event["message"] for event in run.of_type("note") if event["message"].startswith("mlflow gets nothing")]
        assert len(said) == 1
        scalars = tensorboard_scalars(tracking_python, torch_home.path / "tensorboard")
        assert [value for _, value in scalars["train/loss"]] == pytest.approx(list(run.curve().values()))


@pytest.mark.parametrize(("asked", "says"), [("mlfow", "known are"), ("swanlab", "needs the package swanlab")])
def test_unknown_or_missing_is_refused_before_a_row_is_read(home: Home, tmp_path: Path, asked: str, says: str) -> None:
    run = home.run(
        "sft-demo.py", f"--model_path={tmp_path}", "--dataset_path=no", "--output_dir=../o", f"--report_to={asked}"
    )

    assert run.code == 1
    assert says in run.stderr


KEY_OF_FILE = """
import argparse, os, deepe_trackers
args = argparse.Namespace(train_id="job-1", model_path="/models/base", output_dir=".", report_to="wandb", seq=1)
deepe_trackers.callbacks(args)
print(os.environ["WANDB_API_KEY"], os.environ["WANDB_TAGS"])
"""


def test_key_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret-of-a-file\n")
    variables = {"PYTHONPATH": str(catalogue.helpers_dir()), "WANDB_API_KEY_FILE": str(tmp_path / "key")}

    done = subprocess.run(
        [sys.executable, "-c", KEY_OF_FILE], env=variables, cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["secret-of-a-file", "job:job-1,method:-c,base:base"]


def test_every_training_takes_trackers() -> None:
    trainings = [
        stage["file"]
        for manifest in catalogue.load_manifests()
        for name, stage in manifest.definition["stages"].items()
        if name == "training" or (name == "saving" and manifest.name == "Custom02")
    ]
    texts = {name: catalogue.script_path(name).read_text() for name in trainings if name != "custom01.py"}

    assert all("add_watch(" in text or "add_trackers(" in text for text in texts.values())
    assert all("llm.callbacks(" in text or "follow(args" in text for text in texts.values())
