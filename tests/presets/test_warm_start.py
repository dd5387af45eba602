"""SFT-Demo, started cold and warm: the same curve to the last digit, the same weights to the last bit."""

import json
import os
import sys
from pathlib import Path

import pytest

from app.presets import catalogue
from app.presets.sample_data import DATA
from tests.executor.attempts import attempts

pytestmark = [
    pytest.mark.training,
    pytest.mark.timeout(240),
    pytest.mark.xdist_group("training"),
    pytest.mark.skipif(sys.platform != "linux", reason="warm starts are for Linux"),
]


def test_trains_the_same_cold_and_warm(training_python: Path, tiny_base: Path, tmp_path: Path) -> None:
    curves, weights = [], []
    for warm in (False, True):
        maker = attempts(tmp_path, warm=warm)
        attempt = next(maker)()
        output = tmp_path / ("warm" if warm else "cold")
        attempt.start(
            "",
            argv=(
                *(str(training_python), "-u", str(catalogue.script_path("sft-demo.py"))),
                *(f"--model_path={tiny_base}", f"--dataset_path={DATA / 'sft-demo.jsonl'}", f"--output_dir={output}"),
                *("--max_steps=8", "--batch_size=8", "--logging_steps=1", "--eval_fraction=0", "--seed=7"),
            ),
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "PYTHONPATH": str(catalogue.helpers_dir()),
                "DEEPE_EVENTS": str(output.with_suffix(".jsonl")),
            },
            preload=catalogue.helpers_dir() / "warm_trl.py" if warm else None,
        )
        record = attempt.wait_for_end(200)

        assert record.code == 0, attempt.output.read_text()
        assert (attempt.folder / "supervisor.log").read_text() == ""  # else it says why it was not warm
        curves.append(curve(output.with_suffix(".jsonl")))
        weights.append((output / "adapter_model.safetensors").read_bytes())
        next(maker, None)

    assert len(curves[0]) == 8
    assert curves[1] == curves[0]
    assert weights[1] == weights[0]


def curve(events: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and length of the gradient of each point."""
    found = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
    points = [(event["step"], event["values"]) for event in found if event["type"] == "metrics"]
    return [(step, values["loss"], values["grad_norm"]) for step, values in points if "loss" in values]
