"""GRPO-Demo for real: rewards rise, a stopped run goes on, and what cannot work is refused at once."""

from pathlib import Path

import pytest

from app.presets import catalogue
from tests.presets.conftest import NewHome
from tests.presets.curves import assert_measured_meanwhile, assert_went_on, stop_and_resume, with_own_settings
from tests.presets.stage import Finished, Home, dataset, demo_parameters

SCRIPT = "grpo-demo.py"
SHORT = ("--max_steps=10",)
OWN_REWARD = """
def brevity_reward(completions, **columns):
    return [1.0 if len(text) < 4 else 0.0 for text in completions]
"""


def arguments(home: Home, base: Path, *more: str, rows: Path | None = None) -> list[str]:
    paths = [f"--model_path={base}", f"--dataset_path={rows or dataset('grpo-demo')}", f"--output_dir={home.path}/out"]
    return [*paths, *demo_parameters("GRPO-Demo"), *more]


@pytest.fixture(scope="module")
def trained(new_home: NewHome, styles_base: Path) -> tuple[Home, Finished]:
    """Return the home of a finished demo training and what it reported."""
    home = new_home("grpo")
    return home, home.run(SCRIPT, *arguments(home, styles_base))


@pytest.mark.training
@pytest.mark.xdist_group("grpo_demo")
class TestTraining:
    def test_learns_the_wanted_form_from_rewards(self, trained: tuple[Home, Finished]) -> None:
        home, run = trained

        assert run.code == 0, run.stderr
        assert run.score("before") < 0.4
        assert run.score("after") >= 0.85
        assert run.score("before", "reward") + 0.5 < run.score("after", "reward") <= 1.5
        assert (home.path / "out" / "adapter_model.safetensors").is_file()

    def test_reports_reward_kl_speed_and_memory(self, trained: tuple[Home, Finished]) -> None:
        _, run = trained

        assert run.curve("reward")[40] > run.curve("reward")[1]
        assert run.curve("kl")[40] > 0
        for name in ("rewards/answer_reward/mean", "learning_rate", "tokens_per_second", "memory_peak_mib"):
            assert len(run.curve(name)) >= 39
        assert run.of_type("progress")[-1]["step"] == run.of_type("progress")[-1]["total"] == 40

    def test_answers_held_out_questions_meanwhile(self, trained: tuple[Home, Finished]) -> None:
        assert_measured_meanwhile(trained[1], 0, 20, 40)

    def test_stopped_run_goes_on_like_an_undisturbed_one(
        self, torch_home: Home, styles_base: Path, trained: tuple[Home, Finished]
    ) -> None:
        short = arguments(torch_home, styles_base, *SHORT, "--eval_steps=5")

        stopped, resumed = stop_and_resume(torch_home, SCRIPT, short, at=3)

        assert_went_on(trained[1], stopped, resumed, "loss", "reward", "kl")
        assert set(resumed.curve("eval_reward")) == {5, 10}

    def test_samples_from_the_policy_that_is_scored(
        self, torch_home: Home, styles_base: Path, trained: tuple[Home, Finished]
    ) -> None:
        """What the base's folder says of sampling and dropout would make other answers than the policy's own."""
        base = with_own_settings(styles_base, torch_home.path / "base")

        run = torch_home.run(SCRIPT, *arguments(torch_home, base, "--max_steps=2"))

        assert run.code == 0, run.stderr
        for name in ("reward", "completions/mean_length", "entropy", "loss"):
            assert run.curve(name)[1] == trained[1].curve(name)[1], name

    def test_takes_rewards_of_a_file(self, torch_home: Home, styles_base: Path) -> None:
        (torch_home.scripts / "mine.py").write_text(OWN_REWARD)
        own = ("--reward_file=mine.py", "--answer_weight=0", "--length_weight=0.1", "--save_steps=1")
        few = ("--max_steps=2", "--batch_size=8", "--eval_samples=4")

        run = torch_home.run(SCRIPT, *arguments(torch_home, styles_base, *own, *few))

        assert run.code == 0, run.stderr
        for name in ("brevity", "length"):
            assert run.curve(f"rewards/{name}_reward/mean").keys() == {1, 2}
        assert not run.curve("rewards/answer_reward/mean")


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "more", "sentence"),
        [
            ('{"a": 1}', [], "line 1: the columns to learn from are missing; there are: a. Name the"),
            (
                '{"question": "a"}',
                [],
                "line 1: there is no answer to compare with; add one (answer), or set",
            ),
            ('{"text": "a"}', [], "line 1: the row is written as text, which is not learned here"),
            (None, ["--num_generations=1"], "num_generations must be at least 2"),
            (None, ["--num_generations=7"], "(64) must be a multiple of num_generations (7)"),
            (None, ["--vllm=true"], "vllm=true needs the package vllm, which this environment does not have"),
            (None, ["--temperature=0"], "temperature must be above 0"),
            (None, ["--kept_completions=-1"], "kept_completions must be at least 0"),
            (None, ["--answer_pattern=("], "answer_pattern is not a regular expression"),
            (None, ["--answer_pattern=####"], "answer_pattern must have one group"),
            (None, ["--answer_weight=0", "--format_weight=0"], "there is no reward"),
            (None, ["--reward_file=nowhere.py"], "reward_file nowhere.py is no Python file"),
            (None, ["--reward_file=empty.py"], "has no function whose name ends with _reward"),
            (None, ["--reward_file=broken.py"], "cannot be loaded: NameError: name 'oops' is not defined"),
        ],
    )
    def test_gets_one_sentence(self, home: Home, row: str | None, more: list[str], sentence: str) -> None:
        (home.scripts / "empty.py").write_text("")
        (home.scripts / "broken.py").write_text("oops")
        base = catalogue.ROOM / "custom01" / "custom01-base"
        rows = home.write_rows(row or '{"question": "a", "answer": "b"}')

        run = home.run(SCRIPT, *arguments(home, base, *more, rows=rows))

        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006
