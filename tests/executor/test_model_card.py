"""The card beside the weights."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from app.domain.enums import ModelState, TrainingType
from app.domain.training_types import TYPES
from app.executor.attempts.artifacts import ArtifactKind
from app.executor.attempts.model_card import ModelCard, Score, render, write_model_card

CARD = ModelCard(
    name="Qwen|学习_20260101",
    state=ModelState.CUSTOMIZED,
    training_type=TrainingType.CHAT,
    kind=ArtifactKind.ADAPTER,
    technique="sft",
    base_model="tiny: base",
    method="SFT-Demo",
    method_version=3,
    created_at=datetime(2026, 1, 1, 12, tzinfo=UTC),
    dataset="sample\n---\n# not a heading",
    dataset_digest="abc",
    parameters={"learning_rate": 2e-05, "system": "a|b\nc", "load_in_4bit": False},
    metrics={"loss": 0.12345678},
    scores=[Score("exact_match", 0.0, 0.95, 40), Score("bleu", None, 0.5, 40)],
    lineage={"job": "j-1"},
)


class TestModelCard:
    def test_front_matter_is_yaml_that_hubs_read(self) -> None:
        document = yaml.safe_load(render(CARD).split("---\n")[1])

        assert document == {
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "base_model": "tiny: base",
            "base_model_relation": "adapter",
            "tags": ["deepextension", "sft", "customized"],
        }

    @pytest.mark.parametrize("training_type", TrainingType)
    def test_names_the_task_of_every_type(self, training_type: TrainingType) -> None:
        document = yaml.safe_load(render(replace(CARD, training_type=training_type)).split("---\n")[1])

        assert document["pipeline_tag"] == TYPES[training_type].hub_task

    def test_tells_where_the_model_comes_from_and_how_good_it_is(self) -> None:
        lines = render(CARD).splitlines()

        assert "# Qwen\\|学习_20260101" in lines
        assert "- Data set: sample --- # not a heading (sha256 `abc`)" in lines
        assert "- Created: 2026-01-01 12:00:00 UTC" in lines
        assert "| exact_match | 0 | 0.95 | 40 |" in lines
        assert "| bleu |  | 0.5 | 40 |" in lines
        assert "| loss | 0.123457 |" in lines
        assert "| learning_rate | 2e-05 |" in lines
        assert "| system | a\\|b c |" in lines
        assert "| job | j-1 |" in lines

    def test_leaves_out_what_there_is_not(self) -> None:
        text = render(
            ModelCard(
                name="m",
                state=ModelState.COMPLETE,
                training_type=TrainingType.IMAGE_GENERATION,
                kind=ArtifactKind.PIPELINE,
                technique="sd",
                base_model="b",
                method="m",
                method_version=1,
                created_at=datetime(2026, 1, 1, tzinfo=UTC),
            )
        )

        assert "##" not in text
        assert "Data set" not in text
        assert "base_model_relation: finetune" in text

    def test_keeps_the_card_that_the_script_wrote(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("by the script")

        write_model_card(tmp_path, CARD)
        write_model_card(tmp_path, CARD)

        assert (tmp_path / "README.script.md").read_text() == "by the script"
        assert (tmp_path / "README.md").read_text("utf-8") == render(CARD)
