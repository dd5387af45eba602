"""GRPO-Demo with functions that the model calls while it answers, and with an environment that it acts in."""

import importlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from app.presets import catalogue
from tests.presets.conftest import NewHome
from tests.presets.curves import assert_went_on, stop_and_resume
from tests.presets.stage import Finished, Home

SCRIPT = "grpo-demo.py"
UNREAD_BASE = catalogue.ROOM / "custom01" / "custom01-base"
ADD = '''
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    if a == b:
        raise ValueError("equal numbers")
    return a + b
'''
SUMS = '''
class Sums:
    """Knows whether the numbers of the question were added."""

    def reset(self, answer, level, **row):
        self.right, self.level, self.found = int(answer), level, None

    def add(self, a: int, b: int) -> str:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.found = a + b
        return str(self.found)

    def get_reward(self) -> float:
        return float(self.found == self.right) * self.level["weight"]
'''
SUMS_SEEN = """
def seen_reward(completions, environments, completion_turns, **columns):
    calls = [sum(turn["role"] == "tool" for turn in turns) for turns in completion_turns]
    assert [environment.found is not None for environment in environments] == [bool(count) for count in calls]
    return [float(count) for count in calls]
"""


def arguments(home: Home, base: Path, *more: str, **columns: Any) -> list[str]:
    """Return those of a short training on sums, asked in the one way that the base knows."""
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b), **columns} for a, b in pairs]
    (home.scripts / "add.py").write_text(ADD)
    (home.scripts / "sums.py").write_text(SUMS)
    return [
        *(f"--model_path={base}", f"--dataset_path={home.write_rows(*map(json.dumps, rows))}"),
        *(f"--output_dir={home.path}/out", "--system_prompt=", "--batch_size=8", "--grad_accum_steps=1"),
        *("--num_generations=4", "--learning_rate=0.001", "--max_content_length=90", "--eval_samples=4"),
        *("--temperature=0.7", "--save_steps=1", *more),
    ]


def kept(home: Home) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home.path / "out" / "completions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tool_base(new_home: NewHome, tiny_base: Path) -> Path:
    """Return a base that calls `add`."""
    home = new_home("tool-base")
    made = home.run(str(Path(__file__).with_name("tool_base.py")), str(tiny_base), str(home.path / "base"))
    assert made.code == 0, made.stderr
    return home.path / "base"


@pytest.fixture(scope="module")
def trained(new_home: NewHome, tool_base: Path) -> tuple[Home, Finished]:
    """Return the home of a finished training with a function, and what it reported."""
    home = new_home("grpo-tools")
    run = home.run(SCRIPT, *arguments(home, tool_base, "--tools_file=add.py", "--max_steps=7"))
    assert run.code == 0, run.stderr
    return home, run


@pytest.mark.training
@pytest.mark.xdist_group("grpo_tools")
class TestTools:
    def test_results_of_calls_stand_in_the_answers_that_are_kept(self, trained: tuple[Home, Finished]) -> None:
        home, run = trained
        lines = kept(home)
        called = [line for line in lines if any(turn["role"] == "tool" for turn in line["completion"])]

        assert {line["step"] for line in lines} == set(range(1, 8))
        assert len(lines) == 7 * 8
        assert called
        for line in called:
            call, result, *_ = line["completion"]
            numbers = call["tool_calls"][0]["function"]["arguments"]
            assert result["name"] == "add"
            assert result["content"] in (str(numbers["a"] + numbers["b"]), "{'error': 'equal numbers'}")
        for line in lines:
            assert set(line["rewards"]) == {"answer_reward", "format_reward"}
            assert line["prompt"][-1]["content"].startswith("What is ")
        assert sum(run.curve("tools/call_frequency").values()) > 0
        assert {event["kind"] for event in run.of_type("artifact")} >= {"completions", "adapter"}

    def test_advantages_are_those_of_their_group(self, trained: tuple[Home, Finished]) -> None:
        lines = kept(trained[0])
        groups = [lines[start : start + 4] for start in range(0, len(lines), 4)]

        for group in groups:
            assert len({json.dumps(line["prompt"]) for line in group}) == 1
            assert sum(line["advantage"] for line in group) == pytest.approx(0, abs=1e-3)
            by_reward = sorted(group, key=lambda line: line["rewards"]["answer_reward"] + line["advantage"] / 100)
            assert by_reward[-1]["advantage"] == max(line["advantage"] for line in group)

    def test_score_is_that_of_answers_with_calls(self, trained: tuple[Home, Finished]) -> None:
        before = [event for event in trained[1].of_type("sample") if event["phase"] == "before"]

        assert len(before) == 4
        assert any("add({" in event["answer"] and "\nadd: " in event["answer"] for event in before)
        assert 0 <= trained[1].score("before", "reward") <= 1.5

    def test_stopped_run_goes_on_like_an_undisturbed_one(
        self, torch_home: Home, tool_base: Path, trained: tuple[Home, Finished]
    ) -> None:
        args = arguments(torch_home, tool_base, "--tools_file=add.py", "--max_steps=7")
        stopped, resumed = stop_and_resume(torch_home, SCRIPT, args, at=2)

        assert_went_on(trained[1], stopped, resumed, "loss", "reward", "tools/call_frequency")
        assert kept(torch_home) == kept(trained[0])

    def test_environment_rewards_what_was_done_in_it(self, torch_home: Home, tool_base: Path) -> None:
        (torch_home.scripts / "seen.py").write_text(SUMS_SEEN)
        alone = ("--tools_file=sums.py", "--answer_weight=0", "--format_weight=0")
        seen = ("--reward_file=seen.py", "--max_steps=2", "--max_tool_calling_iterations=2", "--kept_completions=3")

        run = torch_home.run(SCRIPT, *arguments(torch_home, tool_base, *alone, *seen, level={"weight": 2}))

        assert run.code == 0, run.stderr
        lines = kept(torch_home)
        assert len(lines) == 2 * 3
        for line in lines:
            results = [turn["content"] for turn in line["completion"] if turn["role"] == "tool"]
            a, b = (int(word.strip("?")) for word in line["prompt"][-1]["content"].split() if word.strip("?").isdigit())
            assert line["rewards"] == {"seen_reward": len(results), "Sums": 2.0 * (results[-1:] == [str(a + b)])}
        assert any(line["rewards"]["seen_reward"] for line in lines)

    @pytest.mark.parametrize(
        ("more", "columns", "sentence"),
        [
            (["--chat_template={% for m in messages %}{{ m.content }}{% endfor %}"], {}, "cannot write calls of"),
            (["--tools_file=", "--max_tool_calling_iterations=2"], {}, "has no effect without tools_file"),
            (["--tools_file=bare.py"], {}, "bare needs type hints, and a docstring"),
            ([], {"tools": [{"name": "look_up", "parameters": {}}]}, "its tools are look_up, and tools_file has add"),
        ],
    )
    def test_is_refused_before_the_model_is_read(
        self, torch_home: Home, tool_base: Path, more: list[str], columns: dict[str, Any], sentence: str
    ) -> None:
        (torch_home.scripts / "bare.py").write_text("def bare(a):\n    return a\n")

        run = torch_home.run(SCRIPT, *arguments(torch_home, tool_base, "--tools_file=add.py", *more, **columns))

        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr
        assert not any("expected memory" in note["message"] for note in run.of_type("note"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "tools_file mine.py is no Python file"),
        ("_hidden = 1\n", "has no function that the model may call"),
        ("class A:\n    def reset(self): ...\nclass B(A): ...\n", "has several environments (A, B)"),
        ("class A:\n    def __init__(self, n): ...\n    def reset(self): ...\n", "A() raises TypeError"),
    ],
)
def test_file_without_what_it_is_for_is_refused(home: Home, content: str | None, sentence: str) -> None:
    if content is not None:
        (home.scripts / "mine.py").write_text(content)

    run = home.run(SCRIPT, *arguments(home, UNREAD_BASE, "--tools_file=mine.py"))

    assert run.code == 1
    assert sentence in run.stderr, run.stderr
    assert "Traceback" not in run.stderr


class TestKeptCompletions:
    @pytest.fixture
    def rollouts(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(str(catalogue.helpers_dir()))
        return importlib.import_module("deepe_rollouts")

    def logs(self, text: str) -> dict[str, Any]:
        turns = [[{"role": "user", "content": "q"}]], [[{"role": "assistant", "content": text}]]
        return {"prompt": turns[0], "completion": turns[1], "advantages": [float("nan")], "rewards": {"r": [1.0]}}

    def test_whole_course_stays_in_a_file_that_is_full(self, rollouts: Any, tmp_path: Path) -> None:
        file = rollouts.Completions(tmp_path / "kept.jsonl", 8, most=4000)
        file.go_on_from(0)
        for step in range(1, 401):
            file.add(step, self.logs("x" * 10))

        steps = [json.loads(line)["step"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
        assert (tmp_path / "kept.jsonl").stat().st_size <= 4000
        assert steps[0] < 40
        assert steps[-1] > 360
        assert len({later - step for step, later in pairwise(steps)}) == 1

    def test_long_text_is_cut_and_said_to_be(self, rollouts: Any, tmp_path: Path) -> None:
        file = rollouts.Completions(tmp_path / "kept.jsonl", 8)
        file.go_on_from(0)
        file.add(1, self.logs("x" * 10_001))

        (line,) = map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines())
        assert line["completion"] == [{"role": "assistant", "content": "x" * 10_000, "cut_from": 10_001}]
        assert line["advantage"] is None

    def test_steps_that_are_done_again_replace_the_old_ones(self, rollouts: Any, tmp_path: Path) -> None:
        for start, text in ((0, "old"), (2, "new")):
            file = rollouts.Completions(tmp_path / "kept.jsonl", 8)
            file.go_on_from(start)
            for step in range(start + 1, 5):
                file.add(step, self.logs(text))

        found = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
        said = [(one["step"], one["completion"][0]["content"]) for one in found]
        assert said == [(1, "old"), (2, "old"), (3, "new"), (4, "new")]
