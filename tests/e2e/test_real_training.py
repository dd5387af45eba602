"""SFT-Demo and Custom02 for real, over HTTP: what they learn, what they answer, what they leave behind."""

import json
from typing import Any

import pytest

from tests.e2e.conftest import Trained

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("e2e-training")]

QUESTIONS = {"Which is larger, 3 or 8?": "8", "Tell me the maximum of 9 and 4.": "9"}
ANSWERING = {"max_tokens": 16, "temperature": 0}


class TestSftDemo:
    def test_learns_what_the_base_model_does_not_know(self, trained: Trained) -> None:
        score = score_of(trained.training)

        print(f"SFT-Demo: exact match {score['before']:.3f} -> {score['after']:.3f}, chain {trained.seconds:.1f} s")
        assert score["before"] < 0.4
        assert score["after"] >= 0.9
        assert score["samples"] > 50

    def test_loss_falls_in_a_curve_without_holes(self, trained: Trained) -> None:
        curve = trained.site.curve(trained.training["id"])
        steps = [step for step, _ in curve]

        assert steps[-1] == trained.training["progress"]["step"] == 120
        assert len(steps) == len(set(steps))
        assert steps == sorted(steps)
        assert curve[-1][1] < curve[0][1] / 4

    @pytest.mark.parametrize("stage", ["training", "saving"])
    def test_model_answers_right(self, trained: Trained, stage: str) -> None:
        model = getattr(trained, stage)["result_model"]
        question, answer = next(iter(QUESTIONS.items()))

        pieces, done = trained.site.ask(model, question, **ANSWERING)

        assert "".join(pieces).strip() == answer
        assert done["finish_reason"] == "stop"

    def test_chain_ends_online_with_the_whole_lineage(self, trained: Trained) -> None:
        online = trained.site.get(f"/models/{trained.deployment['result_model']}")
        registration = trained.site.home / "serving" / online["name"] / "registration.json"

        assert [parent["state"] for parent in online["parents"]] == ["complete", "customized"]
        assert "model.safetensors" in json.loads(registration.read_text("utf-8"))["sha256"]

    def test_card_shows_what_was_learned(self, trained: Trained) -> None:
        model = trained.site.get(f"/models/{trained.training['result_model']}")
        card = (trained.site.home / model["path"] / "README.md").read_text("utf-8")

        assert "exact_match" in card
        assert "| max_steps | 120 |" in card


class TestCustom02:
    def test_makes_a_complete_model_that_answers_right(self, trained: Trained) -> None:
        submitted = trained.submit_demo("Custom02", through="complete")

        job = trained.site.succeed(submitted["id"])
        pieces, _ = trained.site.ask(job["result_model"], list(QUESTIONS)[1], **ANSWERING)

        score = score_of(job)
        print(f"Custom02: exact match {score['before']:.3f} -> {score['after']:.3f}")
        assert [link["stage"] for link in submitted["chain"]] == ["saving"]
        assert score["before"] < 0.4
        assert score["after"] >= 0.9
        assert "".join(pieces).strip() == "9"


def score_of(job: Any) -> Any:
    (score,) = job["evaluations"]
    assert score["name"] == "exact_match"
    return score
