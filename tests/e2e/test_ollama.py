"""Deployment to a configured Ollama, over HTTP from the submit to the model's end.

The server is a local stand-in (`tests.ollama_stand_in`) that checks digests and the order of calls. What is proven is
that the service speaks Ollama's HTTP API as documented, not that a real server accepts these models.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.installation import Installation
from tests.fork_server import ForkServer
from tests.ollama_stand_in import OllamaStandIn, ollama_stand_in
from tests.servers import free_port

pytestmark = [pytest.mark.xdist_group("e2e-ollama")]

SHORT = {"max_steps": 10}
OPTIONS = {"template": "{{ .Prompt }}", "system": "Be brief.", "parameters": {"top_k": 5}, "quantize": "q8_0"}


@pytest.fixture(scope="module")
def site(base: Path, worker_forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    site = Installation(tmp_path_factory.mktemp("ollama"), {"base": base}, forks=worker_forks)
    try:
        site.start()
        site.add_samples()
        yield site
    finally:
        site.close()


@pytest.fixture
def server(site: Installation) -> Iterator[OllamaStandIn]:
    """Run a stand-in, configure it as a deploy target, and have Custom01 deploy to it."""
    with ollama_stand_in() as server:
        deploy_to(site, f"ollama-{free_port()}", server.url)
        yield server


def deploy_to(site: Installation, target: str, url: str) -> None:
    """Configure a deploy target and let Custom01, which everybody may adapt, deploy there."""
    site.post("/deploy-targets", {"name": target, "kind": "ollama", "url": url})
    tag = site.request("GET", "/methods/Custom01").headers["ETag"]
    deployment = {"target": target, "file": None, "conda_env": None}
    site.call("PATCH", "/methods/Custom01", json={"deployment": deployment}, headers={"If-Match": tag})


def deploy(site: Installation, **members: Any) -> tuple[Any, Any]:
    """Train, save and deploy; return the ended jobs of saving and deployment."""
    _, saving, deployment = site.submit(through="online", parameters=SHORT, **members)["chain"]
    return site.succeed(saving["id"]), site.wait(deployment["id"])


class TestDeployment:
    def test_uploads_the_complete_model_by_digest_and_then_creates_it(
        self, site: Installation, server: OllamaStandIn
    ) -> None:
        saving, deployment = deploy(site, deployment=OPTIONS)

        complete = site.get(f"/models/{saving['result_model']}")
        online = site.get(f"/models/{deployment['result_model']}")
        folder = site.home / complete["path"]
        files = {path.name: path for path in folder.iterdir() if path.is_file()}
        assert server.calls == ["GET /", *["POST blob"] * len(files), "POST /api/create"]
        assert server.created == {
            "model": online["name"],
            "files": {name: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in files.items()},
            **OPTIONS,
        }
        assert {"config.json", "model.safetensors"} <= set(files)
        assert online["name"].endswith("_q8_0")
        assert online["parents"][0]["id"] == complete["id"]

    def test_deletion_of_the_online_model_unloads_it(self, site: Installation, server: OllamaStandIn) -> None:
        _, deployment = deploy(site)
        online = site.get(f"/models/{deployment['result_model']}")
        loaded = set(server.models)

        site.call("DELETE", f"/models/{online['id']}", status=204)

        assert loaded == {online["name"]}
        assert server.models == set()
        assert server.calls[-1] == "DELETE /api/delete"
        assert site.request("GET", f"/models/{online['id']}").status_code == 404

    def test_one_that_the_server_forgot_can_be_deleted(self, site: Installation, server: OllamaStandIn) -> None:
        _, deployment = deploy(site)
        server.models.clear()

        site.call("DELETE", f"/models/{deployment['result_model']}", status=204)

    def test_refusal_of_the_server_is_the_reason_of_the_job(self, site: Installation, server: OllamaStandIn) -> None:
        server.create_lines = [{"status": "parsing"}, {"error": "unsupported architecture BagOfWords"}]

        _, deployment = deploy(site)

        assert (deployment["status"], deployment["reason"]) == ("failed", "exit_code")
        assert "unsupported architecture BagOfWords" in "".join(deployment["log_tail"])
        assert deployment["result_model"] is None

    def test_server_that_came_back_gets_the_model_by_a_retry(self, site: Installation) -> None:
        with ollama_stand_in() as server:
            server.create_status = 500
            deploy_to(site, f"ollama-{free_port()}", server.url)
            _, failed = deploy(site)
            server.create_status = 200

            retried = site.post(f"/jobs/{failed['id']}:retry")
            again = site.succeed(retried["id"])

            assert failed["status"] == "failed"
            assert [link["stage"] for link in retried["chain"]] == ["deployment"]
            assert server.models == {site.get(f"/models/{again['result_model']}")["name"]}

    def test_unreachable_server_keeps_the_online_model_until_told_otherwise(self, site: Installation) -> None:
        with ollama_stand_in() as server:
            deploy_to(site, f"ollama-{free_port()}", server.url)
            _, deployment = deploy(site)
        model = deployment["result_model"]

        refused = site.request("DELETE", f"/models/{model}")
        kept = site.get(f"/models/{model}")
        site.call("DELETE", f"/models/{model}", status=204, params={"without_unloading": "true"})

        assert (refused.status_code, refused.json()["code"]) == (503, "deploy_target_unreachable")
        assert kept["id"] == model
