"""Reward-Demo for real: a model learns to rank answers, is saved and asked, and is the judge of another training."""

import json
import shutil
from pathlib import Path

import pytest

from app.presets import catalogue
from tests.presets.conftest import NewHome
from tests.presets.curves import assert_went_on, stop_and_resume
from tests.presets.stage import Finished, Home, dataset, demo_parameters

SCRIPT = "reward-demo.py"
ANSWERS = ("11", "The answer is 11.", "3 + 8 = 11\n#### 11")
SEVERAL = json.dumps({"prompt": "What is 3 + 8?", "answers": ANSWERS})
PROBE = """
import json, runpy, sys
judged_in = runpy.run_path("ask_reward.py", run_name="script")["judged_in"]
for text in json.loads(sys.argv[1]):
    print(json.dumps({"judged": judged_in(text, "".join(sys.argv[2:]))}))
"""


def arguments(home: Home, base: Path, *more: str, rows: Path | None = None) -> list[str]:
    paths = [f"--model_path={base}", f"--dataset_path={rows or dataset('dpo-demo')}", f"--output_dir={home.path}/out"]
    return [*paths, *demo_parameters("Reward-Demo"), *more]


@pytest.fixture(scope="module")
def trained(new_home: NewHome, styles_base: Path) -> tuple[Home, Finished]:
    """Return the home of a finished demo training and what it reported; its model is saved as a complete one."""
    home = new_home("reward")
    run = home.unforked.run(SCRIPT, *arguments(home, styles_base))
    assert run.code == 0, run.stderr
    return home, run


@pytest.fixture(scope="module")
def complete(trained: tuple[Home, Finished], styles_base: Path) -> Path:
    home, _ = trained
    return save(home, styles_base, home.path / "out")


def save(home: Home, base: Path, customized: Path) -> Path:
    folder = customized.with_name(f"{customized.name}-complete")
    paths = ("--base_path", str(base), "--adapter_path", str(customized), "--save_path", str(folder))
    run = home.run("save_model.py", *paths, "--dtype_str", "float32", "--model_usage_type", "chat")
    assert run.json_lines[-1]["status"] == "success", run.stderr
    return folder


def ask(home: Home, base: Path, model: Path, prompt: str, *more: str) -> Finished:
    return home.run(
        "ask_reward.py",
        f"--base_model_path={base}",
        f"--model_path={model}",
        f"--prompt={prompt}",
        "--top_p=None",
        *more,
    )


@pytest.mark.training
@pytest.mark.xdist_group("reward_demo")
class TestTraining:
    def test_learns_to_rank_answers_which_it_did_not_before(self, trained: tuple[Home, Finished]) -> None:
        home, run = trained

        assert run.score("before", "reward_accuracy") < 0.8
        assert run.score("after", "reward_accuracy") >= 0.95
        assert run.score("before", "reward_margin") < 1 < run.score("after", "reward_margin")
        run.lowered("eval_loss")
        assert run.curve("eval_accuracy")[40] >= 0.95
        assert run.curve("eval_margin")[40] > run.curve("eval_margin")[20]
        assert (home.path / "out" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
        (shown, *_) = [one for one in run.of_type("sample") if one["phase"] == "after"]
        assert shown["wanted"] in shown["answer"]

    def test_stopped_run_goes_on_like_an_undisturbed_one(
        self, torch_home: Home, styles_base: Path, trained: tuple[Home, Finished]
    ) -> None:
        stopped, resumed = stop_and_resume(torch_home, SCRIPT, arguments(torch_home, styles_base), at=10)

        assert_went_on(trained[1], stopped, resumed, "loss", "accuracy", "margin", "grad_norm")
        files = [home.path / "out" / "adapter_model.safetensors" for home in (torch_home, trained[0])]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_complete_model_gives_the_rewards_of_the_adapter(
        self, trained: tuple[Home, Finished], complete: Path, styles_base: Path
    ) -> None:
        home, _ = trained

        adapted, merged = (
            ask(home, base, model, SEVERAL) for base, model in ((styles_base, home.path / "out"), (complete, complete))
        )

        assert adapted.code == 0, adapted.stdout
        assert merged.answer == adapted.answer
        (_best, first), *rest = [line.split("  ", 1) for line in adapted.answer.replace("\n####", " ####").splitlines()]
        assert first == "3 + 8 = 11 #### 11"
        assert {text for _, text in rest} == {"11", "The answer is 11."}
        alone = ask(home, complete, complete, "What is 3 + 8?\n---\n11", "--system_prompt=")
        assert float(alone.answer) == pytest.approx(float(next(one for one, text in rest if text == "11")), abs=6e-4)

    def test_last_layers_learn_with_the_head_and_are_saved_as_well(self, torch_home: Home, styles_base: Path) -> None:
        more = ("--finetuning_type=freeze", "--freeze_trainable_layers=1", "--max_steps=12", "--learning_rate=0.002")

        run = torch_home.run(SCRIPT, *arguments(torch_home, styles_base, *more, "--eval_samples=20"))

        assert run.code == 0, run.stderr
        run.lowered("eval_loss")
        folder = save(torch_home, styles_base, torch_home.path / "out")
        assert float(ask(torch_home, folder, folder, "Add 1 and 2.\n---\n1 + 2 = 3\n#### 3").answer) != 0

    @pytest.mark.parametrize("method", ["grpo", "ppo"])
    def test_judges_another_training_whose_rewards_rise(
        self, torch_home: Home, styles_base: Path, complete: Path, method: str, trained: tuple[Home, Finished]
    ) -> None:
        judge = complete if method == "grpo" else trained[0].path / "out"
        paths = (
            f"--model_path={styles_base}",
            f"--dataset_path={dataset('grpo-demo')}",
            f"--output_dir={torch_home.path}/out",
        )
        only = ("--answer_weight=0", "--format_weight=0") if method == "grpo" else ()
        more = ("--max_steps=14", "--eval_samples=40", f"--reward_model_path={judge}", *only)

        run = torch_home.run(f"{method}-demo.py", *paths, *demo_parameters(f"{method.upper()}-Demo"), *more)

        assert run.code == 0, run.stderr
        rewards = run.curve("reward")
        assert sum(rewards[step] for step in (12, 13, 14)) / 3 > sum(rewards[step] for step in (1, 2, 3)) / 3 + 1
        assert run.score("after", "reward") > run.score("before", "reward") + 1
        assert any(note["message"] == "rewards: 1 x model_reward" for note in run.of_type("note"))


class TestQuestions:
    def test_forms_of_a_question_are_one_conversation(self, home: Home) -> None:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        forms = [
            "q\n---\na",
            json.dumps({"prompt": "q", "answer": "a"}),
            json.dumps({"question": "q", "answer": "a"}),
            json.dumps({"messages": turns}),
            json.dumps({"prompt": "q", "answers": ["a"]}),
        ]
        (home.scripts / "probe.py").write_text(PROBE)

        run = home.run("probe.py", json.dumps([*forms, json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})]))

        *alone, both = run.json_lines
        assert alone == [{"judged": [[turns, "a"]]}] * len(forms), run.stderr
        assert both == {"judged": [[turns, "a"], [[turns[0], {"role": "assistant", "content": "b"}], "b"]]}

    def test_instruction_comes_before_the_conversation_unless_it_has_its_own(self, home: Home) -> None:
        own = json.dumps({"prompt": "q", "answer": "a", "system": "mine"})
        (home.scripts / "probe.py").write_text(PROBE)

        run = home.run("probe.py", json.dumps(["q\n---\na", own]), "given")

        assert [line["judged"][0][0][0]["content"] for line in run.json_lines] == ["given", "mine"], run.stderr


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "sentence"),
        [
            ("What is 1?", "a reward model judges an answer to a question, and there is none"),
            ('{"prompt": "a"', "begins like JSON and is none"),
            ('{"prompt": "a", "answers": []}', "answers must be a list of answers"),
            ('{"prompt": "a", "answers": "b"}', "answers must be a list of answers"),
            ('{"a": "b"}', "no question and answer can be read from a"),
            ('{"prompt": "a", "answer": "b", "c": 1}', "not all of the question can be judged: column 'c' is not used"),
            ('{"prompt": "a", "answer": null}', "there is none to learn from in this row"),
        ],
    )
    def test_question_without_an_answer(self, home: Home, prompt: str, sentence: str) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"

        run = ask(home, base, base, prompt)

        assert (run.code, run.json_lines[-1]["status"]) == (1, "error")
        assert sentence in run.json_lines[-1]["error"]
        assert run.json_lines[-1]["traceback"] == ""

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({}, "custom01-base holds BagOfWords, which gives no rewards"),
            ({"architectures": ["BertForSequenceClassification"]}, "gives 2 numbers, a reward is one"),
            ({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, "has no chat template"),
            (None, "config.json is missing"),
        ],
    )
    @pytest.mark.parametrize("method", ["grpo", "ppo"])
    def test_judge_that_is_no_reward_model(
        self, home: Home, change: dict[str, object] | None, sentence: str, method: str
    ) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"
        judge = shutil.copytree(base, home.path / "custom01-base")
        config = json.loads((base / "config.json").read_text())
        if change is None:
            (judge / "config.json").unlink()
        else:
            (judge / "config.json").write_text(json.dumps(config | change))
        rows = home.write_rows('{"question": "a", "answer": "b"}')
        paths = (f"--model_path={base}", f"--dataset_path={rows}", f"--output_dir={home.path}/out")

        run = home.run(f"{method}-demo.py", *paths, f"--reward_model_path={judge}")

        assert (run.code, "Traceback" in run.stderr) == (1, False)
        assert sentence in run.stderr
