"""PPO-Demo for real: judged by a rule and by a reward model; a stopped run goes on."""

import json
from pathlib import Path

import pytest

from app.presets import catalogue
from tests.presets.conftest import NewHome
from tests.presets.curves import assert_measured_meanwhile, assert_went_on, stop_and_resume, with_own_settings
from tests.presets.stage import Finished, Home, dataset, demo_parameters

SCRIPT = "ppo-demo.py"
SHORT = ("--max_steps=10",)


def arguments(home: Home, base: Path, *more: str, rows: Path | None = None) -> list[str]:
    paths = [f"--model_path={base}", f"--dataset_path={rows or dataset('grpo-demo')}", f"--output_dir={home.path}/out"]
    return [*paths, *demo_parameters("PPO-Demo"), *more]


@pytest.fixture(scope="module")
def trained(new_home: NewHome, styles_base: Path) -> tuple[Home, Finished]:
    """Return the home of a finished demo training and what it reported."""
    home = new_home("ppo")
    return home, home.run(SCRIPT, *arguments(home, styles_base))


@pytest.mark.training
@pytest.mark.xdist_group("ppo_demo")
class TestTraining:
    def test_learns_what_the_rule_rewards(self, trained: tuple[Home, Finished]) -> None:
        home, run = trained

        assert run.code == 0, run.stderr
        assert run.score("before") < 0.4
        assert run.score("after") >= 0.85
        assert run.score("before", "reward") + 0.5 < run.score("after", "reward") <= 1.5
        assert (home.path / "out" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
        assert {f.name for f in (home.path / "out").glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-20"}

    def test_reports_reward_kl_value_loss_speed_and_memory(self, trained: tuple[Home, Finished]) -> None:
        _, run = trained

        assert run.curve("reward")[30] > run.curve("reward")[1]
        assert run.curve("kl")[1] == pytest.approx(0, abs=1e-3)
        assert run.curve("kl")[30] > 0.1
        for name in ("policy_loss", "value_loss", "entropy", "clip_fraction", "eta_seconds", "memory_peak_mib"):
            assert len(run.curve(name)) >= 29
        assert run.of_type("progress")[-1]["step"] == run.of_type("progress")[-1]["total"] == 30
        (first, *_) = [record for record in run.records if record["msg"] == 200009 and record["details"]["step"] == 1]
        assert first["details"]["reward"] == run.curve("reward")[1]

    def test_answers_held_out_questions_meanwhile(self, trained: tuple[Home, Finished]) -> None:
        assert_measured_meanwhile(trained[1], 0, 10, 20, 30)

    def test_stopped_run_goes_on_like_an_undisturbed_one(
        self, torch_home: Home, styles_base: Path, trained: tuple[Home, Finished]
    ) -> None:
        short = arguments(torch_home, styles_base, *SHORT, "--eval_steps=3")

        stopped, resumed = stop_and_resume(torch_home, SCRIPT, short, at=3)

        assert_went_on(trained[1], stopped, resumed, "loss", "reward", "kl", "grad_norm")
        assert set(stopped.curve("eval_reward")) == {0}, "a stop does not wait for the held-out questions"
        assert set(resumed.curve("eval_reward")) == {6, 9}

    def test_samples_from_the_policy_that_is_scored(
        self, torch_home: Home, styles_base: Path, trained: tuple[Home, Finished]
    ) -> None:
        """What the base's folder says of sampling and dropout would make other answers than the policy's own."""
        base = with_own_settings(styles_base, torch_home.path / "base")

        run = torch_home.run(SCRIPT, *arguments(torch_home, base, "--max_steps=2"))

        assert run.code == 0, run.stderr
        for name in ("reward", "answer_length", "entropy", "policy_loss"):
            assert run.curve(name)[1] == trained[1].curve(name)[1], name

    def test_makes_a_reward_model_first_and_keeps_it(self, torch_home: Home, styles_base: Path) -> None:
        judge = ("--reward=model", f"--preference_path={dataset('dpo-demo')}", "--reward_steps=60")
        more = (*judge, "--reward_learning_rate=0.001", "--max_steps=3", "--eval_samples=4")

        first = torch_home.run(SCRIPT, *arguments(torch_home, styles_base, *more))

        assert first.code == 0, first.stderr
        (note,) = [note["message"] for note in first.of_type("note") if "the reward model judges" in note["message"]]
        assert int(note.split("judges ")[1].split("%")[0]) >= 75
        kept = json.loads((torch_home.path / "out" / "reward-model" / "config.json").read_text())
        assert kept["architectures"] == ["Qwen3ForSequenceClassification"]
        assert len(first.curve("reward")) == 3


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
            (None, ["--rollouts=0"], "rollouts must be at least 1"),
            (None, ["--clip=0"], "clip must be above 0"),
            (None, ["--reward=model"], "reward=model needs a reward_model_path, or a preference_path"),
            (None, ["--reward=model", "--reward_model_path=nowhere"], "there is no reward model in nowhere"),
        ],
    )
    def test_gets_one_sentence(self, home: Home, row: str | None, more: list[str], sentence: str) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"
        rows = home.write_rows(row or '{"question": "a", "answer": "b"}')

        run = home.run(SCRIPT, *arguments(home, base, *more, rows=rows))

        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006

    def test_a_group_of_processes_is_refused(self, home: Home) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"
        rows = home.write_rows('{"question": "a", "answer": "b"}')

        run = home.run(SCRIPT, *arguments(home, base, rows=rows), environment={"WORLD_SIZE": "2"})

        assert run.code == 1
        assert "PPO-Demo trains in one process" in run.stderr
