"""DPO-Demo for real: by each objective the model learns to prefer right; a stopped run goes on."""

import json
from pathlib import Path

import pytest

from app.presets import catalogue
from tests.presets.conftest import NewHome
from tests.presets.curves import SHORT, assert_went_on, run_whole_and_stopped
from tests.presets.stage import Finished, Home, dataset, demo_parameters

SCRIPT = "dpo-demo.py"
LABELLED = [
    json.dumps({"prompt": f"What is {a} + 1?", "completion": text, "label": label})
    for a in range(8)
    for text, label in ((f"{a} + 1 = {a + 1}\n#### {a + 1}", True), (str(a + 1), False))
]


def arguments(home: Home, base: Path, *more: str, rows: Path | None = None) -> list[str]:
    paths = [f"--model_path={base}", f"--dataset_path={rows or dataset('dpo-demo')}", f"--output_dir={home.path}/out"]
    return [*paths, *demo_parameters("DPO-Demo"), *more]


@pytest.fixture(scope="module")
def trained(new_home: NewHome, styles_base: Path) -> tuple[Home, Finished]:
    """Return the home of a finished demo training and what it reported."""
    home = new_home("dpo")
    return home, home.run(SCRIPT, *arguments(home, styles_base))


@pytest.mark.training
@pytest.mark.xdist_group("dpo_demo")
class TestTraining:
    def test_learns_to_give_the_preferred_answer(self, trained: tuple[Home, Finished]) -> None:
        home, run = trained

        assert run.code == 0, run.stderr
        assert run.score("before", "preference_accuracy") < 0.9
        assert run.score("after", "preference_accuracy") >= 0.95
        assert run.score("before") < 0.4
        assert run.score("after") >= 0.8
        run.lowered("eval_loss")
        assert any("eval_loss is the loss of dpo" in note["message"] for note in run.of_type("note"))
        assert run.curve("rewards/margins")[60] > run.curve("rewards/margins")[1]
        assert {"tokens_per_second", "memory_peak_mib"} <= run.of_type("metrics")[2]["values"].keys()
        assert (home.path / "out" / "adapter_model.safetensors").is_file()

    def test_stopped_run_goes_on_like_an_undisturbed_one(self, torch_home: Home, styles_base: Path) -> None:
        runs = run_whole_and_stopped(torch_home, SCRIPT, arguments(torch_home, styles_base, *SHORT), at=6)

        assert_went_on(*runs, "loss", "rewards/margins")

    @pytest.mark.parametrize("objective", ["kto", "orpo"])
    def test_other_objectives_take_pairs_and_go_on_too(
        self, torch_home: Home, styles_base: Path, objective: str
    ) -> None:
        few = ("--max_steps=20", "--learning_rate=0.002", "--eval_samples=20", "--logging_steps=1")
        more = (f"--objective={objective}", *few)

        run, stopped, resumed = run_whole_and_stopped(
            torch_home, SCRIPT, arguments(torch_home, styles_base, *more), at=6
        )

        assert_went_on(run, stopped, resumed, "loss", "rewards/margins", "grad_norm")
        assert run.score("after", "preference_accuracy") >= run.score("before", "preference_accuracy")
        assert run.score("after") > run.score("before")
        run.lowered("eval_loss")

    def test_kto_takes_single_answers_with_a_label(self, torch_home: Home, styles_base: Path) -> None:
        more = ("--objective=kto", "--max_steps=2", "--batch_size=4")

        run = torch_home.run(SCRIPT, *arguments(torch_home, styles_base, *more, rows=torch_home.write_rows(*LABELLED)))

        assert run.code == 0, run.stderr
        assert {event["name"] for event in run.of_type("evaluation")} <= {"exact_match", "eval_loss"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "more", "sentence"),
        [
            ({"a": "b"}, [], "line 1: the columns to learn from are missing; there are: a. Use one of these"),
            (
                {"prompt": "a", "completion": "b", "label": True},
                [],
                "line 1: the row is written as prompt-completion-label, which is not learned here",
            ),
            ({"prompt": "a", "completion": "b", "label": "x"}, ["--objective=kto"], "label must be true or false"),
            (
                {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "a"}]},
                [],
                "chosen and rejected must be the same conversation up to the last answer",
            ),
            ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["--beta=0"], "beta must be above 0"),
            (
                {"prompt": "a", "completion": "b", "label": True},
                ["--objective=kto", "--batch_size=1"],
                "objective=kto needs a batch_size of at least 2",
            ),
        ],
    )
    def test_gets_one_sentence(self, home: Home, row: dict[str, object], more: list[str], sentence: str) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"

        run = home.run(SCRIPT, *arguments(home, base, *more, rows=home.write_rows(json.dumps(row))))

        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006
