"""A model that two processes divide, by FSDP2 and DeepSpeed, learns, stops, goes on and is saved like a whole one."""

import json
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from app.domain.launchers import Launcher, LauncherKind, Strategy
from tests.presets.conftest import NewHome
from tests.presets.stage import Finished, Home, dataset

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("distributed")]

PAIR = Launcher(kind=LauncherKind.ACCELERATE, processes=2)
STEPS = ("--max_steps=6", "--save_steps=3", "--logging_steps=1", "--eval_samples=8", "--eval_fraction=0.02", "--seed=3")
KINDS: Mapping[str, tuple[str, ...]] = {
    "lora": ("--learning_rate=0.01",),
    "full": ("--finetuning_type=full", "--learning_rate=0.001"),
}
DIFFERENCE = """
import json, sys
from safetensors.torch import load_file
one, other = map(load_file, sys.argv[1:])
gap = max((one[name] - other[name]).abs().max().item() for name in one.keys() & other.keys())
scale = max(weight.abs().max().item() for weight in one.values())
print(json.dumps({"same": sorted(one) == sorted(other), "gap": gap / scale}))
"""


class Trainings:
    """Trainings by one process and by two, each once."""

    def __init__(self, home: Home, base: Path) -> None:
        self.home, self.base = home, base
        self._whole: dict[str, Finished] = {}

    def arguments(self, kind: str, output: str, *more: str) -> list[str]:
        folders = (f"--model_path={self.base}", f"--output_dir={self.home.path / output}")
        return [*folders, f"--dataset_path={dataset('sft-demo')}", *STEPS, *KINDS[kind], *more]

    def whole(self, kind: str) -> Finished:
        if kind not in self._whole:
            self._whole[kind] = self.home.run("sft-demo.py", *self.arguments(kind, f"whole-{kind}", "--batch_size=8"))
        return self._whole[kind]

    def gap(self, kind: str, output: str) -> float:
        """Return the largest difference of weights to those of one process, as a part of the largest weight."""
        name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
        files = [str(self.home.path / folder / name) for folder in (f"whole-{kind}", output)]
        said = subprocess.run([self.home.python, "-c", DIFFERENCE, *files], capture_output=True, check=True, text=True)
        found = json.loads(said.stdout)
        assert found["same"], "other weights are saved"
        return float(found["gap"])


@pytest.fixture(scope="module")
def trainings(new_home: NewHome, tiny_base: Path) -> Trainings:
    return Trainings(new_home("distributed"), tiny_base)


def require(home: Home, strategy: Strategy) -> None:
    """Skip what the environment has no DeepSpeed for."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('deepspeed') is None)"
    if strategy is not Strategy.FSDP2 and subprocess.run([home.python, "-c", look], check=False).returncode:
        pytest.skip("the environment has no DeepSpeed")


@pytest.mark.parametrize(
    ("strategy", "kind", "stops"),
    [
        (Strategy.FSDP2, "lora", True),
        (Strategy.FSDP2, "full", False),
        (Strategy.ZERO2, "lora", False),
        (Strategy.ZERO3, "full", True),
    ],
)
def test_learns_what_one_process_learns_also_over_a_stop(
    trainings: Trainings, strategy: Strategy, kind: str, *, stops: bool
) -> None:
    home, output = trainings.home, f"{strategy}-{kind}"
    require(home, strategy)
    whole = trainings.whole(kind)
    arguments = trainings.arguments(kind, output, "--batch_size=4", f"--distributed_strategy={strategy}")

    if stops:
        process = home.start("sft-demo.py", *arguments, launcher=PAIR, strategy=strategy)
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step 2/"):
            assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
        assert "its checkpoint is complete" in stderr
    divided = home.run("sft-demo.py", *arguments, launcher=PAIR, strategy=strategy)

    assert divided.code == 0, divided.stderr
    assert (min(divided.curve()) > 1) is stops
    for step, loss in divided.curve().items():
        assert loss == pytest.approx(whole.curve()[step], rel=1e-3)
    for phase in ("after",) if stops else ("before", "after"):
        assert divided.score(phase, "eval_loss") == pytest.approx(whole.score(phase, "eval_loss"), rel=1e-3)
        assert divided.exact_match(phase) == whole.exact_match(phase)
    assert trainings.gap(kind, output) < 2e-3


@pytest.mark.parametrize(
    ("script", "more", "sentence"),
    [
        (
            "sft-demo.py",
            (),
            "distributed_strategy=fsdp2 is not how the script was started (none): in a job, ask for at",
        ),
        ("sft-demo.py", ("--early_stopping_patience=1",), "the weights of the best step cannot be taken up again"),
        ("grpo-demo.py", ("--reward_model_path=x",), "a reward model must be whole in each process, and fsdp2 would"),
        ("peft-demo.py", ("--adapter=vera",), "adapter=vera is not known to learn the same when fsdp2 divides it"),
    ],
)
def test_what_cannot_be_divided_gets_one_sentence(
    trainings: Trainings, script: str, more: tuple[str, ...], sentence: str
) -> None:
    folders = (f"--model_path={trainings.base}", f"--output_dir={trainings.home.path / 'refused'}")
    data = f"--dataset_path={dataset('sft-demo')}"
    started = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if more else {}

    run = trainings.home.run(script, *folders, data, *more, "--distributed_strategy=fsdp2", environment=started)

    assert run.code == 1
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr
