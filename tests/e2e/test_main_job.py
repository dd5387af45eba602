"""The main job as users do it, over HTTP with real processes: register, train, save, deploy, ask, repeat, delete.

On SQLite without any Redis, on SQLite with one, and on Postgres with one.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cli.client import StreamEvent
from app.presets.catalogue import script_path
from tests.e2e.adapted import adapted_custom01
from tests.e2e.installation import Installation

METHOD = "自行车 FAQ"
QUESTION = "How can I give the bike back?"
PARAMETERS = {"epochs": 15, "batch_size": 8, "learning_rate": 0.5, "logging_steps": 1, "pause": 0.005}
STEPS = 15 * 15  # 116 of 144 rows are trained on, 8 a step


def definition(name: str, **members: Any) -> dict[str, Any]:
    return {
        "name": name,
        "description": "answers the questions of a bicycle hire",
        "training_type": "chat",
        "technique": "sft",
        "lifecycle": ["customized", "complete", "online"],
        "stages": {
            "training": {"file": "hire/train.py", "conda_env": "base"},
            "saving": {"file": "save_custom01.py", "conda_env": "base"},
            "inference-customized": {"file": "ask_custom01.py", "conda_env": "base"},
            "inference-complete": {"file": "ask_custom01.py", "conda_env": "base"},
        },
        "inference": {"customized": True, "complete": True},
        "deployment": {"target": "custom", "file": "deploy_example.py", "conda_env": "base"},
    } | members


@dataclass(frozen=True)
class Chain:
    """A finished chain: what the submit said, what was streamed until a cut and after it, and the jobs."""

    submitted: Any
    before_cut: list[StreamEvent]
    after_cut: list[StreamEvent]
    training: Any
    saving: Any
    deployment: Any

    @property
    def customized(self) -> str:
        return str(self.training["result_model"])

    @property
    def complete(self) -> str:
        return str(self.saving["result_model"])

    @property
    def online(self) -> str:
        return str(self.deployment["result_model"])


@pytest.fixture(scope="module")
def own_method(site: Installation) -> Any:
    """Register a method of our own on an uploaded script."""
    site.put_script("hire/train.py", adapted_custom01())
    assert site.post("/methods:validate", definition(METHOD), status=200)["violations"] == []
    return site.post("/methods", definition(METHOD))


@pytest.fixture(scope="module")
def chain(site: Installation, own_method: Any) -> Chain:
    """Train, save and deploy, and follow the training with a connection that breaks in the middle."""
    submitted = site.submit(own_method["name"], through="online", parameters=PARAMETERS, name="hire helper")
    before: list[StreamEvent] = []
    with site.events(submitted["id"]) as events:
        for event in events:
            before.append(event)
            if event.event == "metrics" and event.data["step"] >= 20:
                break
    with site.events(submitted["id"], after=before[-1].id) as events:
        after = list(events)
    training, saving, deployment = (site.succeed(link["id"]) for link in submitted["chain"])
    return Chain(submitted, before, after, training, saving, deployment)


class TestChain:
    def test_submit_answers_with_the_whole_chain(self, chain: Chain) -> None:
        stages = [link["stage"] for link in chain.submitted["chain"]]

        assert stages == ["training", "saving", "deployment"]
        assert chain.submitted["id"] == chain.submitted["chain"][0]["id"]
        assert chain.submitted["status"] == "queued"

    def test_stream_goes_on_where_it_broke(self, chain: Chain, site: Installation) -> None:
        events = [*chain.before_cut, *chain.after_cut]
        texts = [event.data["text"] for event in events if event.event == "log"]
        whole = site.get(f"/jobs/{chain.training['id']}/logs", params={"limit": 2**20})

        assert [event.data["status"] for event in events if event.event == "state"] == [
            "queued", "launching", "running", "succeeded",
        ]  # fmt: skip
        assert "".join(texts) == whole["text"]
        assert (whole["end"], whole["next_offset"]) == (True, whole["size"])
        assert events[-1].event == "end"
        assert [event.event for event in events].count("end") == 1
        assert events[-1].data == {"status": "succeeded"}

    def test_stream_brought_every_point_of_the_curve(self, chain: Chain, site: Installation) -> None:
        points = [event.data for event in (*chain.before_cut, *chain.after_cut) if event.event == "metrics"]
        streamed = {point["step"]: point["values"]["loss"] for point in points}

        assert sorted(streamed) == list(range(1, STEPS + 1))
        assert site.curve(chain.training["id"]) == [[step, streamed[step]] for step in range(1, STEPS + 1)]

    def test_training_learned(self, chain: Chain) -> None:
        (score,) = chain.training["evaluations"]

        assert score["before"] < 0.4 < 0.7 < score["after"]
        assert chain.training["progress"]["percent"] == 100
        assert chain.training["attempts"] == 1
        assert chain.training["method"]["version"] == 1

    def test_curve_for_a_chart_is_short_and_keeps_its_ends(self, chain: Chain, site: Installation) -> None:
        found = site.get(f"/jobs/{chain.training['id']}/metrics", params={"points": 50, "names": "loss"})
        (series,) = found["series"]

        assert 2 <= len(series["points"]) <= 50
        assert (series["points"][0][0], series["points"][-1][0]) == (1, STEPS)

    def test_jobs_can_be_found(self, chain: Chain, site: Installation, own_method: Any) -> None:
        of_chain = site.get("/jobs", params={"chain": chain.training["id"], "sort": "created_at"})["items"]
        trainings = site.get("/jobs", params={"method": own_method["id"], "stage": "training", "q": "hire helper"})

        assert {job["id"] for job in of_chain} == {link["id"] for link in chain.submitted["chain"]}
        assert chain.training["id"] in {job["id"] for job in trainings["items"]}


class TestSeveralDatasets:
    def test_training_learns_from_all_of_them_and_is_scored_on_another(self, site: Installation) -> None:
        more = {"question": "Do you hire tandems?", "answer": "Yes, two of them."}
        content = "".join(json.dumps(more | {"question": f"{more['question']} {number}"}) + "\n" for number in range(9))
        site.call("PUT", "/datasets/tandems/file", status=201, content=content.encode())
        scored = json.dumps(more | {"question": "Do you have a tandem?"}).encode() * 7
        site.call("PUT", "/datasets/asked/file", status=201, content=scored.replace(b"}{", b"}\n{"))
        parts = [{"dataset": "bike-hire", "max_rows": 20}, {"dataset": "tandems", "weight": 2}]

        made = site.submit(dataset=None, datasets=parts, validation_dataset="asked", parameters={"max_steps": 2})

        job = site.wait(made["id"], "succeeded")
        assert "38 rows -> 2 steps" in job["notes"]
        assert job["dataset"]["name"] == "mix of bike-hire 20 rows and tandems x2"
        assert [entry["samples"] for entry in job["evaluations"]] == [7]
        model = site.get(f"/models/{job['result_model']}")
        assert model["dataset"]["id"] == job["dataset"]["id"]


class TestModels:
    def test_lineage_leads_both_ways(self, chain: Chain, site: Installation, own_method: Any) -> None:
        customized, complete, online = (
            site.get(f"/models/{model}") for model in (chain.customized, chain.complete, chain.online)
        )
        digest = site.get("/datasets/bike-hire")["digest"]

        assert [model["state"] for model in (customized, complete, online)] == ["customized", "complete", "online"]
        assert [parent["id"] for parent in online["parents"]] == [chain.complete, chain.customized]
        assert [child["id"] for child in customized["children"]] == [chain.complete]
        assert [child["id"] for child in complete["children"]] == [chain.online]
        for model, job in ((customized, chain.training), (complete, chain.saving), (online, chain.deployment)):
            assert model["job"]["id"] == job["id"]
            assert model["method"] == {"id": own_method["id"], "name": METHOD, "version": 1, "deleted": False}
            assert (model["dataset"]["name"], model["dataset"]["digest"]) == ("bike-hire", digest)
            assert model["base_model"]["name"] == "bike-base"
        assert customized["parameters"]["epochs"] == 15
        assert customized["name"].startswith("bike-base_hire-helper_")

    def test_model_card_lies_beside_the_weights(self, chain: Chain, site: Installation) -> None:
        for model, weights in ((chain.customized, "adapter_model.safetensors"), (chain.complete, "model.safetensors")):
            read = site.get(f"/models/{model}")
            files = {file["path"] for file in site.get(f"/models/{model}/files")["items"]}
            card = (site.home / read["path"] / "README.md").read_text("utf-8")

            assert {"README.md", weights} <= files
            for fact in (read["name"], METHOD, read["dataset"]["digest"], chain.training["method"]["id"], model):
                assert fact in card

    def test_deployment_published_the_model(self, chain: Chain, site: Installation) -> None:
        online = site.get(f"/models/{chain.online}")
        registration = json.loads((site.home / "serving" / online["name"] / "registration.json").read_text("utf-8"))
        copy = site.home / "serving" / online["name"] / "model.safetensors"

        assert registration["model"] == online["name"]
        assert copy.read_bytes() == weights_of(site, chain.complete).read_bytes()
        assert online["path"] is None

    @pytest.mark.parametrize("state", ["customized", "complete"])
    def test_model_answers_piece_by_piece(self, chain: Chain, site: Installation, state: str) -> None:
        pieces, done = site.ask(getattr(chain, state), QUESTION)

        assert "".join(pieces) in answers_of(site)
        assert len(pieces) > 1
        assert (done["finish_reason"], done["error"]) == ("stop", None)
        assert site.get(f"/jobs/{done['job']}")["stage"] == f"inference-{state}"

    def test_answer_changes_with_the_weights_on_disk(self, chain: Chain, site: Installation) -> None:
        weights = weights_of(site, chain.complete)
        original = weights.read_bytes()
        before, _ = site.ask(chain.complete, QUESTION)

        wanted = next(answer for answer in answers_of(site) if answer != "".join(before))
        prefer(weights, answers_of(site).index(wanted))
        after, _ = site.ask(chain.complete, QUESTION)
        weights.write_bytes(original)
        again, _ = site.ask(chain.complete, QUESTION)

        assert "".join(after) == wanted
        assert again == before

    def test_whole_answer_comes_as_one_document_on_demand(self, chain: Chain, site: Installation) -> None:
        body = {"messages": [{"role": "user", "content": QUESTION}], "stream": False}

        answer = site.call("POST", f"/models/{chain.customized}/chat", json=body)

        assert answer["text"] in answers_of(site)

    def test_online_model_is_asked_where_it_is_served(self, chain: Chain, site: Installation) -> None:
        body = {"messages": [{"role": "user", "content": QUESTION}]}

        problem = site.call("POST", f"/models/{chain.online}/chat", status=409, json=body)

        assert problem["code"] == "online_model_not_asked"


class TestAgain:
    def test_copy_with_another_rate_is_compared(self, chain: Chain, site: Installation) -> None:
        copied = site.post(f"/jobs/{chain.training['id']}:copy", {"parameters": {"learning_rate": 0.1, "pause": 0}})
        other = site.succeed(copied["id"])

        compared = site.get("/jobs:compare", params={"ids": f"{chain.training['id']},{other['id']}"})

        assert other["copied_from"] == chain.training["id"]
        assert [link["stage"] for link in copied["chain"]] == ["training", "saving", "deployment"]
        differences = {row["name"]: row["values"] for row in compared["differences"]}
        assert differences == {"learning_rate": [0.5, 0.1], "pause": [0.005, 0]}
        (losses,) = [curve["series"] for curve in compared["curves"] if curve["name"] == "loss"]
        fast, slow = (series["points"][-1][1] for series in losses)
        assert fast < slow
        assert [job["status"] for job in compared["jobs"]] == ["succeeded", "succeeded"]
        for link in copied["chain"]:
            site.succeed(link["id"])

    def test_failed_job_says_why_and_its_retry_runs_the_rest_of_the_chain(
        self, site: Installation, own_method: Any
    ) -> None:
        missing = site.root / "wanted.txt"
        submitted = site.submit(
            own_method["name"], through="complete", parameters={"needs": str(missing), "max_steps": 10}
        )
        failed = site.wait(submitted["id"])
        waiting = site.wait(submitted["chain"][1]["id"])
        missing.touch()

        retried = site.post(f"/jobs/{failed['id']}:retry")
        ended = [site.succeed(link["id"]) for link in retried["chain"]]

        assert (failed["status"], failed["reason"]) == ("failed", "exit_code")
        assert any("wanted.txt is missing" in line for line in failed["log_tail"])
        assert (waiting["status"], waiting["reason"]) == ("cancelled", "predecessor_failed")
        assert [job["stage"] for job in ended] == ["training", "saving"]
        assert ended[0]["retry_of"] == failed["id"]
        assert site.get(f"/jobs/{failed['id']}")["status"] == "failed"

    def test_cancelled_job_leaves_no_process(self, site: Installation, own_method: Any) -> None:
        submitted = site.submit(own_method["name"], parameters=PARAMETERS | {"pause": 0.5})
        site.wait_for_step(submitted["id"], 1)
        pids = site.stage_pids(submitted["id"])

        asked = site.post(f"/jobs/{submitted['id']}:cancel", status=200)
        ended = site.wait(submitted["id"])

        assert len(pids) == 1
        assert asked["cancel_requested"]
        assert (ended["status"], ended["reason"]) == ("cancelled", "cancelled")
        assert site.stage_pids(submitted["id"]) == []
        assert ended["result_model"] is None

    def test_edited_script_becomes_a_new_version_at_the_next_submit(self, site: Installation) -> None:
        site.put_script("versions.py", adapted_custom01())
        stages = definition("")["stages"] | {"training": {"file": "versions.py", "conda_env": "base"}}
        method = site.post("/methods", definition("Edited", stages=stages))
        (site.home / "scripts" / "versions.py").write_text(adapted_custom01() + "# edited by hand\n")

        job = site.succeed(site.submit("Edited", parameters={"max_steps": 10})["id"])
        versions = site.get(f"/methods/{method['id']}/versions")["items"]

        assert job["method"] == {"id": method["id"], "name": "Edited", "version": 2}
        assert [(version["version"], version["source"]) for version in versions] == [(2, "disk"), (1, "create")]


class TestDeletion:
    def test_method_with_live_jobs_is_deleted_only_with_a_choice(self, site: Installation, own_method: Any) -> None:
        method = site.post("/methods", definition("Short-lived"))
        ended = site.succeed(site.submit("Short-lived", parameters={"max_steps": 10})["id"])
        live = site.submit("Short-lived", parameters=PARAMETERS | {"pause": 0.5}, through="complete")
        site.wait_for_step(live["id"], 1)

        problem = site.delete_method("Short-lived", status=409)
        still = site.get(f"/jobs/{live['id']}")
        site.delete_method("Short-lived", jobs="cancel")
        stopped = [site.wait(link["id"]) for link in live["chain"]]

        assert problem["code"] == "method_has_live_jobs"
        assert still["status"] == "running"
        assert [job["status"] for job in stopped] == ["cancelled", "cancelled"]
        assert site.request("GET", "/methods/Short-lived").status_code == 404
        self.history_is_kept(site, method, ended)
        self.name_can_be_used_again(site, method)

    def history_is_kept(self, site: Installation, method: Any, ended: Any) -> None:
        again = site.get(f"/jobs/{ended['id']}")
        model = site.get(f"/models/{ended['result_model']}")
        listed = site.get("/jobs", params={"method": method["id"]})["items"]

        assert (again["method"]["id"], again["method"]["name"]) == (method["id"], "Short-lived")
        assert "step 10/10" in site.get(f"/jobs/{ended['id']}/logs")["text"]
        assert len(site.curve(ended["id"])) > 1
        assert model["method"] == {"id": method["id"], "name": "Short-lived", "version": 1, "deleted": True}
        assert len(listed) == 3
        assert site.get(f"/methods/{method['id']}/versions/1")["name"] == "Short-lived"

    def name_can_be_used_again(self, site: Installation, method: Any) -> None:
        newer = site.post("/methods", definition("Short-lived"))

        assert newer["id"] != method["id"]
        assert newer["version"] == 1
        assert site.get("/jobs", params={"method": "Short-lived"})["items"] == []

    def test_deleted_model_is_gone_and_its_descendants_stay(self, chain: Chain, site: Installation) -> None:
        job = site.succeed(site.submit("Custom01", through="complete", parameters={"max_steps": 10})["id"])
        saved = site.succeed(job["chain"][1]["id"])
        folder = site.home / site.get(f"/models/{job['result_model']}")["path"]

        site.call("DELETE", f"/models/{job['result_model']}", status=204)

        child = site.get(f"/models/{saved['result_model']}")
        assert [(parent["id"], parent["deleted"]) for parent in child["parents"]] == [(job["result_model"], True)]
        assert site.request("GET", f"/models/{job['result_model']}").status_code == 404
        assert not (folder / "adapter_model.safetensors").exists()


class TestService:
    def test_says_what_it_runs_on(self, site: Installation) -> None:
        (node,) = site.get("/nodes")["items"]

        assert httpx.get(f"{site.url}/readyz").json() == {"status": "ready", "degraded": []}
        assert node["state"] == "ready"
        assert "base" in node["environments"]

    def test_one_key_makes_one_job(self, site: Installation, own_method: Any) -> None:
        body = {"method": own_method["name"], "base_model": "bike-base", "dataset": "bike-hire"}
        body |= {"through": "customized", "parameters": {"max_steps": 10}, "name": "once"}

        answers = [site.call("POST", "/jobs", status=201, json=body, headers=ONE_KEY) for _ in range(2)]

        assert answers[0]["id"] == answers[1]["id"]
        assert len(site.get("/jobs", params={"q": "once"})["items"]) == 1
        site.succeed(answers[0]["id"])


ONE_KEY = {"Idempotency-Key": "e2e-once"}


def answers_of(site: Installation) -> list[str]:
    """Return the answers of the data set in the order of the model's rows."""
    lines = script_path("custom01.py").with_name("custom01.jsonl")
    return sorted({json.loads(line)["answer"] for line in lines.read_text("utf-8").splitlines()})


def weights_of(site: Installation, model: str) -> Path:
    return site.home / str(site.get(f"/models/{model}")["path"]) / "model.safetensors"


def prefer(weights: Path, answer: int) -> None:
    """Change the bias of one answer so far that the model always gives it."""
    content = bytearray(weights.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    start, _ = json.loads(content[8 : 8 + length])["bias"]["data_offsets"]
    struct.pack_into("<f", content, 8 + length + start + 4 * answer, 1e6)
    weights.write_bytes(content)
