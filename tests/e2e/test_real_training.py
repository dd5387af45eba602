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


class TestBaseModel:
    def test_was_made_once_by_a_job_before_the_first_training(self, trained: Trained) -> None:
        (build,) = trained.site.get("/jobs", params={"stage": "base-model"})["items"]
        run = trained.site.get(f"/jobs/{build['id']}")
        log = trained.site.get(f"/jobs/{build['id']}/logs", params={"limit": 2**20})["text"]
        base = trained.site.get("/base-models/tiny-base")

        assert (run["status"], run["environment"], run["base_model"]["name"]) == ("succeeded", "trl", "tiny-base")
        assert run["finished_at"] <= trained.training["started_at"]
        assert run["progress"]["step"] == run["progress"]["total"] == 400
        assert "right sums" in log
        assert not base["made_on_first_use"]
        assert (base["card"]["weights"], base["card"]["dtype"]) == ("safetensors", "float32")
        assert base["card"]["parameters"] > 50_000

    def test_its_precision_is_that_of_the_saved_model(self, trained: Trained) -> None:
        """It was not known when the chain was submitted."""
        complete = trained.site.get(f"/models/{trained.saving['result_model']}")
        config = json.loads((trained.site.home / complete["path"] / "config.json").read_text("utf-8"))

        assert config["dtype"] == "float32"


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
