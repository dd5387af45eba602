"""Two ways, one result: a step is the same however its rows are spread over forward passes and processes.

KTO estimates the divergence for a forward pass, by definition: it is here by a loss that needs no estimate. MLX-Demo
has its own test.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.domain.launchers import Launcher, LauncherKind
from app.presets import sample_data
from tests import training_environment
from tests.presets.conftest import NewHome
from tests.presets.stage import ALONE, Home, dataset

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("step_loss")]

PAIR = Launcher(kind=LauncherKind.TORCHRUN, processes=2)
ROWS = 8
WAYS = {"8 x 1": (8, 1), "2 x 4": (2, 4), "1 x 8": (1, 8)}
WAYS_OF_TWO = {"two processes, 4 x 1": (4, 1), "two processes, 1 x 4": (1, 4)}
ONE_STEP = ("--max_steps=1", "--eval_fraction=0", "--max_grad_norm=1000", "--learning_rate=0.001", "--seed=3")
REPLIES = ("7", "It is three.", "The answer is 10. " * 12, "4", "5", "nine or so", "well, " * 20, "2")
LEARNED = [{"prompt": f"Add {number} and 1.", "completion": text} for number, text in enumerate(REPLIES)]
PAIRS = [
    {"prompt": f"Add {number} and 1.", "chosen": text, "rejected": text[:3] + " no" * (number % 3 + 1)}
    for number, text in enumerate(REPLIES)
]
LISTS = [
    {"query": f"Add {number} and 1.", "positive": text, "negatives": [text[:3], *["no", "nine"][: number % 3]]}
    for number, text in enumerate(REPLIES)
]
QUESTIONS = [{"question": f"Add {number} and 2.", "answer": "7"} for number in range(ROWS)]
METHODS: Mapping[str, tuple[str, Sequence[Mapping[str, object]], tuple[str, ...]]] = {
    "sft": ("sft-demo.py", LEARNED, ()),
    "sft of all weights": ("sft-demo.py", LEARNED, ("--finetuning_type=full",)),
    "peft": ("peft-demo.py", LEARNED, ("--adapter=dora",)),
    "dpo": ("dpo-demo.py", PAIRS, ()),
    "dpo and sft": ("dpo-demo.py", PAIRS, ("--sft_weight=0.5",)),
    "orpo": ("dpo-demo.py", PAIRS, ("--objective=orpo",)),
    "kto without divergence": ("dpo-demo.py", PAIRS, ("--objective=kto", "--loss_type=apo_zero_unpaired")),
    "reward": ("reward-demo.py", PAIRS, ()),
    "reranker": ("reranker-demo.py", LISTS, ("--loss=lambda", "--num_negatives=1")),
    "grpo": ("grpo-demo.py", QUESTIONS, ("--num_generations=4", "--max_content_length=24", "--reward_file=mine.py")),
    "vl": ("vl-demo.py", [], ()),
    "ppo": ("ppo-demo.py", QUESTIONS, ("--rollouts=8", "--ppo_epochs=1", "--max_content_length=8")),
    "custom02": ("custom02.py", LEARNED, ("--input_train_name=prompt", "--output_train_name=completion")),
}
OF_ONE_PROCESS = ("ppo",)
OF_SEVERAL_ROWS = ("kto without divergence",)  # no pass of a single one
SHARED_BY_PROCESSES = ("custom02",)  # its batch_size is that of all of them
REWARD = """
def letters_reward(completions, **columns):
    return [float(sum(map(ord, text)) % 97) for text in completions]
"""


class Steps:
    """The loss and gradient of each method in each way."""

    def __init__(self, home: Home) -> None:
        self._home = home
        (home.scripts / "probe.py").write_text((Path(__file__).parent / "step_loss_probe.py").read_text())
        (home.scripts / "mine.py").write_text(REWARD)
        bases = {"vl": "tiny-vl", "reranker": "tiny-encoder"}
        pictures = home.path / "pictures"
        sample_data.write_with_pictures(dataset("vl-demo"), pictures)
        self.found: dict[str, dict[str, Any]] = {}
        alone: dict[str, Any] = {}
        together: dict[str, Any] = {}
        for name, (script, rows, more) in METHODS.items():
            data = home.write_rows(*map(json.dumps, rows), name=f"{name}.jsonl") if rows else pictures
            model = "base_path" if name == "custom02" else "model_path"
            saved = ("--save_path=" + str(home.path / "saved"),) if name == "custom02" else ()
            base = training_environment.base_model(bases.get(name, "tiny-styles"))
            plain = (f"--{model}={base}", f"--dataset_path={data}", *saved)
            for ways, runs in ((WAYS, alone), (WAYS_OF_TWO, together)):
                for way, (size, passes) in ways.items():
                    if size == 1 and name in OF_SEVERAL_ROWS:
                        continue
                    size *= 2 if runs is together and name in SHARED_BY_PROCESSES else 1
                    output = f"--output_dir={home.path / 'out' / name / way}"
                    sizes = (f"--batch_size={size}", f"--grad_accum_steps={passes}", f"--max_samples={ROWS}")
                    runs[f"{name}/{way}"] = (script, [*plain, output, *sizes, *ONE_STEP, *more])
        self._run(alone)
        self._run({key: run for key, run in together.items() if key.partition("/")[0] not in OF_ONE_PROCESS}, PAIR)

    def _run(self, runs: Mapping[str, Any], launcher: Launcher = ALONE) -> None:
        run = self._home.run("probe.py", json.dumps(runs), launcher=launcher)
        assert run.code == 0, run.stderr
        self.found |= {line["run"]: line for line in run.json_lines if "run" in line}


@pytest.fixture(scope="module")
def steps(new_home: NewHome) -> dict[str, dict[str, Any]]:
    return Steps(new_home("steps")).found


@pytest.mark.parametrize(
    ("method", "way"),
    [
        (method, way)
        for method in METHODS
        for way, (size, _passes) in (WAYS | WAYS_OF_TWO).items()
        if way != "8 x 1"
        and (way not in WAYS_OF_TWO or method not in OF_ONE_PROCESS)
        and (size > 1 or method not in OF_SEVERAL_ROWS)
    ],
)
def test_a_step_is_the_same_however_it_is_spread(steps: dict[str, dict[str, Any]], method: str, way: str) -> None:
    whole, spread = steps[f"{method}/8 x 1"], steps[f"{method}/{way}"]

    assert spread["loss"] == pytest.approx(whole["loss"], rel=1e-4, abs=1e-6)
    length = sum(value**2 for value in whole["gradient"]) ** 0.5
    assert length > 1e-4
    gap = sum((a - b) ** 2 for a, b in zip(whole["gradient"], spread["gradient"], strict=True)) ** 0.5
    assert gap < 1e-3 * length
