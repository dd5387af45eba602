"""What a submit says of the rows of a data set: refused with their lines, left out and counted, or unusual."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.domain.definition import ROW_KINDS, MethodDefinition
from app.domain.enums import JobKind, VersionSource
from app.domain.errors import Violation
from app.domain.texts import DEFAULT_LANGUAGE, Language, catalogue
from app.executor.jobs.data_check import CheckedData, Data, check_data
from app.presets.catalogue import load_manifests
from app.presets.shared.helpers.deepe_rows import KINDS
from app.presets.shared.helpers.deepe_rows.problems import SENTENCES
from app.registry.datasets import row_surveys
from app.registry.datasets.check import Column
from app.registry.datasets.process import DatasetUnprocessed
from app.registry.datasets.row_surveys import RowSurveys
from app.registry.methods.record import Method

NOW = datetime(2026, 11, 23, tzinfo=UTC)
USER, ANSWER = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
SPOKEN = {"messages": [USER, ANSWER]}
CALLED = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
SPEECH = ["conversation", "text"]


def declared(learns_from: list[str], **more: Any) -> Method:
    """Return a method that says what it learns from; its script is of no matter."""
    return Method(
        id="m", name="m", version=1, files={}, source=VersionSource.CREATE, preset=None, preset_version=None,
        definition=MethodDefinition.model_validate({"data": {"learns_from": learns_from, **more}}),
        read_only=False, created_by="", created_at=NOW, updated_at=NOW, version_created_by="", version_created_at=NOW,
        deleted_at=None,
    )  # fmt: skip


def checked(folder: Path, rows: list[Any], method: Method, **values: Any) -> CheckedData:
    jsonl = folder / "rows.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [Column(name, sum(name in row for row in rows)) for name in names]
    return check_data(RowSurveys(), method, JobKind.TRAINING, values, Data(jsonl, "digest", columns))


def said(found: list[Violation] | tuple[Violation, ...]) -> list[tuple[str, str]]:
    return [(one.pointer, one.code) for one in found]


def test_tools_are_learned_where_their_functions_are_given(tmp_path: Path) -> None:
    method = declared(SPEECH, tools=False)

    assert not checked(tmp_path, [CALLED], method, tools_file="tools.py").violations
    (refused,) = checked(tmp_path, [CALLED], method, tools_file="").violations
    assert refused.code == "tools_not_learned"


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "learns_from", "more", "code", "where"),
        [
            ({"messages": [USER, {"role": "narrator", "content": "x"}]}, SPEECH, {}, "turn_role_unknown", "messages/1"),
            ({"prompt": "a", "chosen": "b", "rejected": "c"}, SPEECH, {}, "row_form_not_learned", ""),
            ({"prompt": "a", "completion": "b", "label": False}, SPEECH, {}, "row_form_not_learned", ""),
            ({"instruction": "a", "output": "b", "text": "c"}, SPEECH, {}, "row_forms_several", ""),
            (CALLED, SPEECH, {"tools": False}, "tools_not_learned", ""),
            ({**SPOKEN, "images": ["a.png"]}, SPEECH, {}, "pictures_not_learned", ""),
            ({"frage": "a"}, SPEECH, {}, "columns_missing", None),
        ],
    )
    def test_names_line_place_and_reason(
        self, tmp_path: Path, row: Any, learns_from: list[str], more: Any, code: str, where: str | None
    ) -> None:
        found = checked(tmp_path, [row], declared(learns_from, **more))

        (violation,) = found.violations
        assert (violation.pointer, violation.code) == ("/dataset", code)
        if where is not None:
            assert violation.params["line"] == 1
            assert where in violation.params["place"]
            assert "1" in violation.detail(Language.ZH)

    def test_lists_what_is_alike_a_few_times_and_counts_the_rest(self, tmp_path: Path) -> None:
        rows = [{"messages": [{"role": "x", "content": "a"}]}] * 50 + [{"messages": []}]

        found = checked(tmp_path, rows, declared(SPEECH))

        codes = [code for _, code in said(tuple(found.violations))]
        assert codes.count("turn_role_unknown") == 3
        assert found.violations[-1].code == "dataset_rows_refused"
        assert found.violations[-1].params == {"count": 51, "rows": 51}

    def test_refuses_data_in_which_nothing_is_left(self, tmp_path: Path) -> None:
        found = checked(tmp_path, [{"prompt": "a", "completion": None}], declared(SPEECH))

        assert said(tuple(found.violations)) == [("/dataset", "dataset_nothing_to_learn")]


class TestWarnings:
    @pytest.mark.parametrize(
        ("row", "code"),
        [
            ({"prompt": "a", "completion": None}, "no_answer"),
            ({"text": None}, "no_text"),
            ({"messages": [USER, {**ANSWER, "weight": 0}]}, "all_weights_zero"),
            ({"prompt": "a", "completion": ""}, "answer_empty"),
            ({"prompt": "a", "completion": {"n": None}}, "answer_not_text"),
            ({**SPOKEN, "id": 7}, "column_unused"),
            ({"messages": [USER, {**ANSWER, "mood": "glad"}]}, "key_unused"),
        ],
    )
    def test_counts_rows_with_their_lines(self, tmp_path: Path, row: Any, code: str) -> None:
        found = checked(tmp_path, [SPOKEN, row, row], declared(SPEECH))

        (warning,) = found.warnings
        assert warning.code == code
        assert (warning.params["rows"], warning.params["total"], warning.params["lines"]) == (2, 3, "2, 3")

    def test_tools_that_the_method_learns_are_no_matter(self, tmp_path: Path) -> None:
        found = checked(tmp_path, [CALLED], declared(SPEECH))

        assert (found.violations, found.warnings) == ([], [])
        assert found.survey is not None
        assert found.survey.found["features"] == {"tools": 1}


class TestChoices:
    def test_form_that_the_user_names_decides(self, tmp_path: Path) -> None:
        row = {"instruction": "a", "output": "b", "text": "c"}

        found = checked(tmp_path, [row], declared(SPEECH), data_form="text")

        assert found.violations == []
        assert [(one.code, one.params["column"]) for one in found.warnings] == [
            ("column_unused", "instruction"),
            ("column_unused", "output"),
        ]

    def test_only_the_rows_that_are_used_are_read(self, tmp_path: Path) -> None:
        found = checked(tmp_path, [SPOKEN, {"messages": []}], declared(SPEECH), max_samples=1)

        assert found.violations == []

    def test_kinds_may_depend_on_a_parameter(self, tmp_path: Path) -> None:
        (rules,) = [manifest.data for manifest in load_manifests() if manifest.name == "DPO-Demo"]

        assert rules.kinds({}) == {"preference"}
        assert rules.kinds({"objective": "kto"}) == {"preference", "labelled"}

    def test_nothing_is_said_of_rows_where_nothing_is_declared(self, tmp_path: Path) -> None:
        assert checked(tmp_path, [{"a": 1}], declared([])) == CheckedData(violations=[])


def test_large_files_are_read_by_another_process_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [SPOKEN, CALLED, {"messages": [USER, {**ANSWER, "content": ""}]}, {"messages": []}]
    inline = checked(tmp_path, rows, declared(SPEECH))
    monkeypatch.setattr(row_surveys, "INLINE_BYTES", 0)

    assert checked(tmp_path, rows, declared(SPEECH)) == inline


def test_a_reader_that_takes_too_long_or_dies_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text(json.dumps(SPOKEN))
    monkeypatch.setattr(row_surveys, "PATIENCE_SECONDS", 0)
    with pytest.raises(DatasetUnprocessed, match="more than 0 s"):
        row_surveys.profile_of(jsonl)

    monkeypatch.undo()
    monkeypatch.setattr(row_surveys, "helpers_dir", lambda: tmp_path)  # the reader is not there
    with pytest.raises(DatasetUnprocessed, match="ended with 1"):
        row_surveys.profile_of(jsonl)


class TestTexts:
    def test_kinds_are_those_of_the_reader(self) -> None:
        assert ROW_KINDS == KINDS

    def test_sentences_are_those_of_the_reader(self) -> None:
        """A script says in English what a submit says in every language."""
        texts = {code: entry[DEFAULT_LANGUAGE] for code, entry in catalogue().items() if code in SENTENCES}

        assert len(texts) > 40
        assert {code: sentence for code, sentence in texts.items() if SENTENCES[code] not in sentence} == {}
