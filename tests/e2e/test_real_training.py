"""SFT-Demo and Custom02 for real, over HTTP: what they learn, what they answer, what they leave behind."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.e2e.conftest import Trained
from tests.waiting import wait_until

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("e2e-training")]

QUESTIONS = {"Which is larger, 3 or 8?": "8", "Tell me the maximum of 9 and 4.": "9"}
ANSWERING = {"max_tokens": 16, "temperature": 0}


class TestSftDemo:
    def test_learns_what_the_base_model_does_not_know(self, trained: Trained) -> None:
        score = score_of(trained.training)
        loss = score_of(trained.training, "eval_loss")

        print(f"SFT-Demo: exact match {score['before']:.3f} -> {score['after']:.3f}, chain {trained.seconds:.1f} s")
        assert score["before"] < 0.4
        assert score["after"] >= 0.9
        assert loss["after"] < loss["before"]
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


class TestWhatPeopleBring:
    """A table as Excel saves it in Germany and an export of chats with tool calls, uploaded as they are and learned."""

    STEPS: ClassVar = {"max_steps": 2, "batch_size": 4, "eval_samples": 2}

    def test_table_is_learned_by_the_names_of_its_columns(self, trained: Trained) -> None:
        table = "\ufeffFrage;Antwort\r\n" + "".join(f'"Was ist {i} + 1?";{i + 1}\r\n' for i in range(40))
        self.upload(trained, "tabelle", table.encode(), "text/csv")
        named = {"input_train_name": "Frage", "output_train_name": "Antwort"}

        job, plan = self.train(trained, "tabelle", **named)

        assert plan["rows"] == {
            "read": 40, "used": 40, "held_out": 2, "sequences": 40, "forms": {"named columns": 40}, "features": {},
        }  # fmt: skip
        assert plan["steps"] == job["progress"]["step"] == 2
        assert score_of(job)["samples"] == 2

    def test_chats_with_tool_calls_are_learned_turn_by_turn(self, trained: Trained) -> None:
        function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
        chats = [
            {
                "tools": [{"type": "function", "function": function}],
                "messages": [
                    {"role": "user", "content": f"Weather in Bonn on day {day}?"},
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "1", "content": f"{day} degrees"},
                    {"role": "assistant", "content": f"{day} degrees."},
                ],
            }
            for day in range(20)
        ]
        self.upload(trained, "chats", json.dumps(chats, indent=1).encode(), "application/json")

        job, plan = self.train(trained, "chats")

        assert (plan["rows"]["sequences"], plan["rows"]["features"]) == (40, {"tools": 20})
        assert score_of(job)["samples"] == 4  # two conversations with two answers each

    def upload(self, trained: Trained, name: str, content: bytes, media_type: str) -> None:
        headers = {"Content-Type": media_type}
        trained.site.call("PUT", f"/datasets/{name}/file", status=201, content=content, headers=headers)

    def train(self, trained: Trained, dataset: str, **parameters: Any) -> tuple[Any, Any]:
        wanted = {
            "method": "SFT-Demo", "base_model": "tiny-base", "dataset": dataset, "through": "customized",
            "parameters": {**self.STEPS, **parameters},
        }  # fmt: skip
        found = trained.site.post("/jobs:validate", wanted, status=200)
        assert (found["valid"], found["violations"]) == (True, [])
        assert [warning for warning in found["warnings"] if warning["pointer"] == "/dataset"] == []
        submitted = trained.site.post("/jobs", wanted)
        return trained.site.succeed(submitted["id"]), found["plan"]


class TestWhatIsTrained:
    """Beyond a new adapter: one that learns on, and the weights themselves."""

    def test_adapter_learns_on_from_where_it_ended(self, trained: Trained) -> None:
        first = trained.site.get(f"/models/{trained.training['result_model']}")

        training, complete = self.train(trained, {"eval_fraction": 0.2}, adapter_name_or_path=first["name"])

        assert score_of(training)["before"] == score_of(trained.training)["after"]
        assert [parent["id"] for parent in complete["parents"]] == [training["result_model"], first["id"]]

    def test_whole_weights_are_checked_and_saved_like_an_adapter(self, trained: Trained) -> None:
        training, complete = self.train(trained, {"finetuning_type": "full", "eval_samples": 4})

        customized = trained.site.get(f"/models/{training['result_model']}")
        assert (customized["state"], complete["state"]) == ("customized", "complete")
        assert (trained.site.home / customized["path"] / "model.safetensors").is_file()
        pieces, _done = trained.site.ask(customized["id"], "Which is larger, 3 or 8?", **ANSWERING)
        assert "".join(pieces)

    def train(self, trained: Trained, parameters: dict[str, Any], **more: Any) -> tuple[Any, Any]:
        """Return the training and the complete model."""
        samples = trained.site.get("/presets/SFT-Demo")["samples"]
        wanted = {"method": "SFT-Demo", "through": "complete", **more}
        wanted["parameters"] = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-6, **parameters}
        submitted = trained.site.post("/jobs", wanted | {name: samples[name] for name in ("base_model", "dataset")})
        training, saving = (trained.site.succeed(link["id"]) for link in submitted["chain"])
        return training, trained.site.get(f"/models/{saving['result_model']}")


class TestOptionsOfLibraries:
    """What no script declares, and the installed TRL and PEFT take: described by the node, checked, learned with."""

    def test_reach_what_is_trained(self, trained: Trained) -> None:
        options = {"use_rslora": True, "modules_to_save": ["lm_head"], "lr_scheduler_kwargs": {}, "adam_beta2": 0.95}
        best = {"eval_on_start": True, "load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2}
        small = {"max_steps": 4, "per_device_train_batch_size": 4, "eval_samples": 4, "eval_max_new_tokens": 4}
        samples = trained.site.get("/presets/SFT-Demo")["samples"]
        wanted = {"method": "SFT-Demo", "through": "customized", "parameters": {**options, **best, **small}}

        submitted = trained.site.post(
            "/jobs", {**wanted, "base_model": samples["base_model"], "dataset": samples["dataset"]}
        )
        job = trained.site.succeed(submitted["id"])

        model = trained.site.home / trained.site.get(f"/models/{job['result_model']}")["path"]
        config = json.loads((model / "adapter_config.json").read_text("utf-8"))
        (state,) = model.glob("checkpoint-4/trainer_state.json")
        found = json.loads(state.read_text("utf-8"))
        assert (config["use_rslora"], config["modules_to_save"]) == (True, ["lm_head"])
        assert (found["train_batch_size"], found["max_steps"]) == (4, 4)
        assert [entry["step"] for entry in found["log_history"] if "eval_loss" in entry] == [0, 2, 4]
        assert Path(found["best_model_checkpoint"]).name in ("checkpoint-2", "checkpoint-4")

    def test_are_in_the_form_and_checked_when_the_node_has_looked(self, trained: Trained) -> None:
        form = wait_until(lambda: self.described(trained), "what the libraries take")
        values = {"adam_beta2": "high", "neftune_alpha": 5, "run_name": "mine", "max_length": 9, "epsilon_high": 0.3}
        samples = trained.site.get("/presets/SFT-Demo")["samples"]
        wanted = {name: samples[name] for name in ("base_model", "dataset")} | {"parameters": values}

        found = trained.site.post(
            "/jobs:validate", {"method": "SFT-Demo", "through": "customized", **wanted}, status=200
        )

        assert {one["pointer"].rpartition("/")[2]: one["code"] for one in found["violations"]} == {
            "adam_beta2": "parameter_wrong_type",
            "neftune_alpha": "unknown_option",
            "run_name": "option_of_platform",
            "max_length": "option_of_script_instead",
            "epsilon_high": "unknown_option",
        }
        paths = [one["path"] for one in form["option_classes"]]
        assert paths[:2] == ["trl.SFTConfig", "peft.LoraConfig"]
        assert {path.partition(".")[0] for path in paths[2:]} == {"peft"}  # the other kinds of adapters
        properties = form["schema"]["properties"]
        options = {name for name, entry in properties.items() if "x-classes" in entry}
        assert len(options) > 100
        assert {"neftune_noise_alpha", "use_rslora", "weight_decay"} <= options
        assert properties["weight_decay"]["title"] == "Weight decay"
        assert "x-advanced" not in properties["weight_decay"]
        assert properties["neftune_noise_alpha"]["x-advanced"] is True

    def described(self, trained: Trained) -> Any:
        """Return the form of the training once a node has described the libraries."""
        stage = trained.site.get("/methods/SFT-Demo/parameters")["stages"][0]
        return stage if all(one["version"] for one in stage["option_classes"]) else None


class TestCustom02:
    def test_makes_a_complete_model_that_answers_right(self, trained: Trained) -> None:
        submitted = trained.submit_demo("Custom02", through="complete")

        job = trained.site.succeed(submitted["id"])
        pieces, _ = trained.site.ask(job["result_model"], list(QUESTIONS)[1], **ANSWERING)

        score, loss = score_of(job), score_of(job, "eval_loss")
        print(f"Custom02: exact match {score['before']:.3f} -> {score['after']:.3f}")
        assert [link["stage"] for link in submitted["chain"]] == ["saving"]
        assert score["before"] < 0.4
        assert score["after"] >= 0.9
        assert loss["after"] < loss["before"]
        assert "".join(pieces).strip() == "9"


def score_of(job: Any, name: str = "exact_match") -> Any:
    (score,) = [score for score in job["evaluations"] if score["name"] == name]
    return score
