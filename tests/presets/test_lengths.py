"""Tokens of the rows of a file: which rows are counted, and what is made of the counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.presets.shared.helpers.deepe_rows import CONVERSATION, TEXT, RowProblem, Wanted
from app.presets.shared.helpers.deepe_rows import lengths as lengths_
from app.presets.shared.helpers.deepe_rows.lengths import Lengths, RowLength, measure, row_length
from app.presets.shared.helpers.deepe_rows.values import Conversation, Example, Text

WANTED = Wanted(kinds=frozenset({CONVERSATION, TEXT}), pictures=True)


def characters(example: Example) -> RowLength | None:
    """Count characters as tokens."""
    if isinstance(example, Text):
        return row_length([(0, len(example.text))], split=True)
    assert isinstance(example, Conversation)
    found = []
    for answer in example.answers():
        given = sum(len(turn["content"]) for turn in answer.prompt)
        if "refuse" in answer.completion["content"]:
            raise RowProblem("template_refused", error="no")
        found.append((given, given + len(answer.completion["content"])))
    return row_length(found)


def measured(folder: Path, rows: list[Any], **options: Any) -> Lengths:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Lengths.of(json.loads(json.dumps(measure(path, WANTED, characters, **options))))


def asked(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


class TestMeasure:
    def test_counts_the_longest_sequence_of_each_row(self, tmp_path: Path) -> None:
        chat = [("user", "abc"), ("assistant", "de"), ("user", "f"), ("assistant", "ghij")]
        rows = [{"messages": [{"role": role, "content": content} for role, content in chat]}, asked("ab", "c")]

        found = measured(tmp_path, rows)

        assert sorted(found.rows) == [RowLength(1, 2, 3, 2, 1, 3), RowLength(2, 9, 15, 6, 4, 10)]
        assert found.percentiles == {"p50": 3, "p90": 10, "p99": 10, "p100": 10}
        assert found.learned_share({}) == round(7 / 18, 4)
        assert found.learned_share({"mask_prompt": False}) == 1

    def test_names_rows_that_would_be_refused_and_counts_those_left_out(self, tmp_path: Path) -> None:
        rows = [asked("a", "b"), asked("a", "refuse"), {"prompt": "a", "completion": None}, {"messages": 7}]

        found = measured(tmp_path, rows)

        assert (len(found.rows), found.measured, found.total) == (1, 4, 4)
        assert (found.refused, found.refused_lines) == (2, [2, 4])

    def test_says_of_which_rows_pictures_are_not_counted(self, tmp_path: Path) -> None:
        found = measured(tmp_path, [asked("a", "b") | {"images": ["a.png"]}, asked("a", "b")])

        assert found.pictures == 1

    def test_draws_a_sample_from_everywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lengths_, "SAMPLED_ROWS", 100)

        found = measured(tmp_path, [asked("a", "b" * (number // 100 + 1)) for number in range(1000)])

        assert (found.measured, found.total) == (100, 1000)
        tenths = [sum(row.longest == tenth + 2 for row in found.rows) for tenth in range(10)]
        assert min(tenths) >= 3
        assert measured(tmp_path, [asked("a", "b")] * 50, limit=30).total == 30

    def test_holds_few_of_long_lines(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lengths_, "SAMPLED_CHARACTERS", 40 * 1000)

        found = measured(tmp_path, [asked("a", "b")] * 100 + [asked("a", "b" * 1000)] * 900)

        assert 20 <= found.measured <= 50
        assert found.total == 1000

    def test_ends_when_its_time_is_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lengths_, "SECONDS", -1.0)

        found = measured(tmp_path, [asked("a", "b")] * 500)

        assert (found.measured, found.total) == (lengths_.FEWEST_ROWS, 500)


class TestLimits:
    @pytest.mark.parametrize(
        ("limits", "beyond", "learned"),
        [
            ({}, {}, (1.0, 46 / 4)),
            ({"max_seq_length": 7}, {"max_seq_length": 2}, (7 / 4, 38 / 7)),
            ({"max_input_length": 3}, {"max_input_length": 2}, (2 / 4, 33 / 2)),
            ({"max_input_length": 9, "max_content_length": 3}, {"max_content_length": 2}, (5 / 4, 38 / 5)),
            ({"max_seq_length": 1}, {"max_seq_length": 4}, (30 / 4, 1.0)),
        ],
    )
    def test_leave_out_rows_and_split_texts(
        self, tmp_path: Path, limits: dict[str, int], beyond: dict[str, int], learned: tuple[float, float]
    ) -> None:
        rows = [asked("abcd", "e"), asked("abcd", "efgh"), asked("a", "bc"), {"text": "x" * 30}]

        found = measured(tmp_path, rows)

        assert found.beyond(limits) == beyond
        assert found.learned_from(limits) == pytest.approx(learned)

    def test_that_leave_nothing(self, tmp_path: Path) -> None:
        assert measured(tmp_path, [asked("abcd", "e")]).learned_from({"max_seq_length": 2}) == (0, 0)
        assert measured(tmp_path, [{"prompt": "a", "completion": None}]).learned_from({}) is None
