"""How SFT-Demo refuses data. No torch is needed: it is refused before anything heavy is imported."""

from pathlib import Path

import pytest

from app.presets import catalogue
from tests.presets.stage import Finished, Home


def arguments(rows: Path, *more: str) -> list[str]:
    base = catalogue.ROOM / "custom01" / "custom01-base"
    return [f"--model_path={base}", f"--dataset_path={rows}", "--output_dir=out", "--eval_fraction=0", *more]


class TestBadData:
    @pytest.mark.parametrize(
        ("lines", "more", "sentence"),
        [
            (['{"a": 1, "b": 2}'], [], "rows.jsonl, line 1: the columns to learn from are missing; there are: a, b"),
            (
                ['{"a": "x"}', '{"a": "y"}'],
                ["--input_train_name=a", "--output_train_name=b"],
                "rows.jsonl: no row has the column 'b'; there are: a",
            ),
            (['{"text": "x"}'] * 6 + ["{"], [], "rows.jsonl, line 7: not valid JSON"),
            (["[1]"], [], "rows.jsonl, line 1: a JSON object is expected, it is [1]"),
            ([], [], "rows.jsonl has no rows to learn from"),
            (['{"text": "x"}'], ["--input_train_name=text"], "give both input_train_name and output_train_name"),
            (['{"text": "x"}'], ["--eval_fraction=1"], "eval_fraction must be"),
            (['{"text": "x"}'], ["--batch_size=0"], "batch_size must be at least 1"),
            (['{"text": "x"}'], ["--model_path=nowhere"], "there is no base model in nowhere"),
            (['{"text": "x"}'], ["--dataset_path=nowhere.jsonl"], "cannot read nowhere.jsonl"),
            (['{"messages": []}'], [], "line 1: /messages: the conversation has no turns"),
            (['{"messages": "hello"}'], [], "line 1: /messages: a conversation is a list of turns"),
            (['{"messages": [{"role": "user", "content": "a"}]}'], [], "no rows to learn from: there is no answer"),
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
