"""How SFT-Demo reads data. No torch is needed: bad data is refused before anything heavy is imported."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.presets import catalogue
from tests.presets.stage import Finished, Home

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PAIR = {"prompt": [USER], "completion": [ASSISTANT]}
PROBE = """
import json, runpy, sys
sft = runpy.run_path("sft-demo.py", run_name="sft")
args, _ = sft["make_parser"]().parse_known_args()
train, held_out = sft["load_parts"](args, sft["load_rows"])
print(json.dumps({"train": train, "held_out": held_out}))
"""


def arguments(rows: Path, *more: str) -> list[str]:
    base = catalogue.ROOM / "custom01" / "custom01-base"
    return [f"--model_path={base}", f"--dataset_path={rows}", "--output_dir=out", "--eval_fraction=0", *more]


def read(home: Home, rows: Path, *more: str) -> dict[str, list[dict[str, Any]]]:
    (home.scripts / "probe.py").write_text(PROBE)
    run = home.run("probe.py", *arguments(rows, *more))
    assert run.code == 0, run.stderr
    parts: dict[str, list[dict[str, Any]]] = run.json_lines[-1]
    return parts


class TestForms:
    @pytest.mark.parametrize(
        ("row", "more", "examples"),
        [
            ({"messages": [USER, ASSISTANT]}, [], [PAIR]),
            ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [], [PAIR]),
            ({"prompt": "a", "completion": "b"}, [], [PAIR]),
            (PAIR, [], [PAIR]),
            ({"instruction": "a", "input": "", "output": "b"}, [], [PAIR]),
            ({"question": "a", "answer": "b"}, [], [PAIR]),
            ({"text": "a b"}, [], [{"text": "a b"}]),
            ({"q": "a", "text": "b"}, ["--input_train_name=q", "--output_train_name=text"], [PAIR]),
        ],
        ids=["messages", "sharegpt", "prompt", "chat prompt", "alpaca", "question", "text", "named"],
    )
    def test_rows_become_examples(
        self, home: Home, row: dict[str, Any], more: list[str], examples: list[dict[str, Any]]
    ) -> None:
        parts = read(home, home.write_rows(json.dumps(row)), *more)

        assert parts == {"train": examples, "held_out": []}

    def test_alpaca_input_follows_the_instruction(self, home: Home) -> None:
        rows = home.write_rows('{"instruction": "Add.", "input": "1 2", "output": "3"}')

        assert read(home, rows)["train"][0]["prompt"][0]["content"] == "Add.\n\n1 2"

    def test_every_answer_of_a_conversation_is_learned(self, home: Home) -> None:
        rows = home.write_rows(json.dumps({"messages": [USER, ASSISTANT, USER, ASSISTANT]}))

        assert read(home, rows)["train"] == [PAIR, {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}]


class TestSplit:
    def test_holds_out_a_part_and_loses_no_row(self, home: Home) -> None:
        rows = home.write_rows(*(json.dumps({"text": str(number)}) for number in range(50)))

        parts = read(home, rows, "--eval_fraction=0.2")

        assert len(parts["held_out"]) == 10
        assert sorted(int(row["text"]) for part in parts.values() for row in part) == list(range(50))

    def test_takes_the_held_out_file_of_a_folder(self, home: Home) -> None:
        folder = home.path / "datasets" / "mine"
        folder.mkdir()
        (folder / "train.jsonl").write_text('{"text": "learn"}\n')
        (folder / "heldout.jsonl").write_text('{"text": "score"}\n')

        assert read(home, folder) == {"train": [{"text": "learn"}], "held_out": [{"text": "score"}]}

    def test_max_samples(self, home: Home) -> None:
        rows = home.write_rows(*['{"text": "x"}'] * 9)

        assert len(read(home, rows, "--max_samples=4")["train"]) == 4


class TestBadData:
    @pytest.mark.parametrize(
        ("lines", "more", "sentence"),
        [
            (['{"a": 1, "b": 2}'], [], "rows.jsonl, line 1: the columns to learn from are missing; there are: a, b"),
            (
                ['{"a": "x", "b": "y"}', '{"a": "x"}'],
                ["--input_train_name=a", "--output_train_name=b"],
                "rows.jsonl, line 2: column 'b' is missing; there are: a",
            ),
            (['{"text": "x"}'] * 6 + ["{"], [], "rows.jsonl, line 7: not valid JSON"),
            (["[1]"], [], "rows.jsonl, line 1: a JSON object is expected"),
            ([], [], "rows.jsonl has no rows"),
            (['{"text": "x"}'], ["--input_train_name=text"], "give both input_train_name and output_train_name"),
            (['{"text": "x"}'], ["--eval_fraction=1"], "eval_fraction must be"),
            (['{"text": "x"}'], ["--batch_size=0"], "batch_size must be at least 1"),
            (['{"text": "x"}'], ["--model_path=nowhere"], "there is no base model in nowhere"),
            (['{"text": "x"}'], ["--dataset_path=nowhere.jsonl"], "cannot read nowhere.jsonl"),
            (['{"messages": []}'], [], "every turn of a conversation needs"),
            (['{"messages": "hello"}'], [], "a conversation is a list"),
            (['{"messages": [{"role": "user", "content": "a"}]}'], [], "has no answer of the assistant"),
        ],
    )
    def test_gets_one_sentence(self, home: Home, lines: list[str], more: list[str], sentence: str) -> None:
        run = home.run("sft-demo.py", *arguments(home.write_rows(*lines), *more))

        self.assert_refused(run, sentence)

    def test_folder_with_two_files(self, home: Home) -> None:
        for name in ("a.jsonl", "b.jsonl"):
            home.write_rows('{"text": "x"}', name=f"datasets/{name}")

        run = home.run("sft-demo.py", *arguments(home.path / "datasets"))

        self.assert_refused(run, "must hold exactly one .jsonl file, it holds 2")

    def assert_refused(self, run: Finished, sentence: str) -> None:
        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006
        assert sentence in run.records[-1]["msgDetail"]
