"""What earns a reward, and what a user's own function may return."""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.presets import catalogue

DEFAULTS = {
    "answer_pattern": r"(?:####|\\boxed\{)[ *$\\]*(-?\$?(?:\\?[dt]?frac\{\d+\}\{\d+\}|[\d.,]+(?:/\d+)?))",
    "answer_weight": 1.0,
    "format_weight": 0.5,
    "length_weight": 0.0,
    "target_length": 10,
    "reward_file": None,
    "reward_file_weight": 2.0,
}


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(catalogue.helpers_dir()))
    yield importlib.import_module("deepe_rewards")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("deepe_rewards", "deepe_rows")]:
        del sys.modules[name]


def judge(rewards: Any, **changed: Any) -> Any:
    return rewards.judge_of(argparse.Namespace(**DEFAULTS | changed))


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("3 + 4 = 7\n#### 7", 1.5),
        ("#### 8 or rather #### 7.0", 1.5),
        ("#### 1,000", 0.5),
        ("The answer is 7.", 0.0),
        ("", 0.0),
    ],
)
def test_right_result_and_wanted_form(rewards: Any, text: str, total: float) -> None:
    assert judge(rewards).totals([text], [[]], {"answer": ["7"]}) == [total]


@pytest.mark.parametrize(
    ("text", "right", "same"),
    [
        ("#### $42", "42", True),
        ("#### -$42.00", "-42", True),
        (r"so it is \boxed{42}.", "42", True),
        (r"#### \boxed{\frac{1}{2}}", "0.5", True),
        ("#### **1/2**", "0.5", True),
        ("#### 0.5", "1/2", True),
        ("#### 1,000", "1000.0", True),
        ("#### 1,5", "1.5", True),
        ("#### 1,5", "15", False),
        ("#### 1/3", "0.333", False),
        ("#### 1/0", "1", False),
        ("#### 4" + "2" * 9000, "42", False),
    ],
)
def test_numbers_are_compared_by_their_value(rewards: Any, text: str, right: str, same: bool) -> None:
    assert judge(rewards, format_weight=0).totals([text], [[]], {"answer": [right]}) == [float(same)]


def test_scripts_look_for_the_result_in_the_same_places() -> None:
    shared = (catalogue.helpers_dir() / "deepe_arguments.py").read_text()
    assert f'default=r"{DEFAULTS["answer_pattern"]}"' in shared


def test_brevity_falls_from_the_target_to_twice_its_length(rewards: Any) -> None:
    found = judge(rewards, answer_weight=0, format_weight=0, length_weight=1.0)

    assert found.totals(["x" * 10, "x" * 15, "x" * 20, "x" * 99], [[]] * 4, {"answer": [""] * 4}) == [
        1.0,
        0.5,
        0.0,
        0.0,
    ]


def test_result_of_a_solution_that_tells_its_way(rewards: Any) -> None:
    rows = [
        rewards.Question([{"role": "user", "content": "q"}], reference=text)
        for text in ("2 and 2 are 4\n#### 4", " 4 ")
    ]

    tasks = [task for row in rows for task in judge(rewards).recipe("Think.").split(row)]

    assert [task.reference for task in tasks] == ["4", "4"]
    assert [turn["role"] for turn in tasks[0].prompt] == ["system", "user"]


def test_answer_to_compare_with_is_asked_for(rewards: Any) -> None:
    row = rewards.Question([{"role": "user", "content": "q"}], place="rows.jsonl, line 3")

    with pytest.raises(rewards.Refused, match="line 3: there is no answer to compare with"):
        judge(rewards).check(row)
    judge(rewards, answer_weight=0).check(row)
    (task,) = judge(rewards, answer_weight=0).recipe("").split(row)
    assert task.reference == ""


def test_words_are_compared_without_case(rewards: Any) -> None:
    found = judge(rewards, answer_pattern=r"answer: (\w+)", format_weight=0)

    assert found.totals(["answer: Paris", "answer: Rome"], [[]] * 2, {"answer": ["paris"] * 2}) == [1.0, 0.0]


class TestOwnFile:
    def own(self, rewards: Any, folder: Path, body: str) -> Any:
        file = folder / "mine.py"
        file.write_text(f"def my_reward(completions, **columns):\n    return {body}\n")
        return judge(rewards, answer_weight=0, format_weight=0, reward_file=str(file))

    def test_is_weighed_and_may_have_no_opinion(self, rewards: Any, tmp_path: Path) -> None:
        found = self.own(rewards, tmp_path, "[1.0, None]")

        assert found.totals(["a", "b"], [[]] * 2, {"answer": ["", ""]}) == [2.0, 0.0]

    def test_may_name_all_that_it_takes(self, rewards: Any, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text("def my_reward(completions, prompts, answer):\n    return [float(len(answer))]\n")
        found = judge(rewards, answer_weight=0, format_weight=0, reward_file=str(file))

        assert found.totals(["a"], [[]], {"answer": [""]}) == [2.0]

    @pytest.mark.parametrize("body", ["[1.0]", "1.0", "['good', 1.0]", "[float('nan'), 1.0]"])
    def test_must_return_one_number_for_each_answer(self, rewards: Any, tmp_path: Path, body: str) -> None:
        with pytest.raises(rewards.Refused, match="my_reward"):
            self.own(rewards, tmp_path, body).totals(["a", "b"], [[]] * 2, {"answer": ["", ""]})
