"""Both deployment scripts by their command line. Ollama is a local stand-in, see `ollama_stand_in`."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ollama_stand_in import OllamaStandIn, ollama_stand_in
from tests.presets.stage import Finished, Home

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"tokens"}


@pytest.fixture
def folder(home: Home) -> Path:
    path = home.path / "models" / "complete"
    path.mkdir()
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    (path / "subfolder").mkdir()
    return path


@pytest.fixture
def server() -> Iterator[OllamaStandIn]:
    with ollama_stand_in() as seen:
        yield seen


def deploy(home: Home, script: str, folder: Path, url: str, **more: str) -> Finished:
    values = {"trainId": "job-3", "seq": "3", "folderPath": str(folder), "serverUrl": url, "modelName": "shop"}
    values |= {"quantize": "", "template": "", "basePath": "../models/base", "actualPath": "../models/complete"} | more
    return home.run(script, *(word for name, value in values.items() for word in (f"--{name}", value)))


class TestOllama:
    def test_uploads_every_file_by_digest_and_then_creates_the_model(
        self, home: Home, folder: Path, server: OllamaStandIn
    ) -> None:
        more = {"quantize": "q4_K_M", "template": "{{ .Prompt }}", "system": "Be brief.", "parameters": '{"top_k": 5}'}

        run = deploy(home, "deploy_ollama.py", folder, server.url + "/", **more)

        assert run.code == 0, run.stderr
        assert run.json_lines[-1]["status"] == "success"
        assert server.calls == ["GET /", *["POST blob"] * 3, "POST /api/create"]
        assert server.created == {
            "model": "shop",
            "template": "{{ .Prompt }}",
            "system": "Be brief.",
            "parameters": {"top_k": 5},
            "quantize": "q4_K_M",
            "files": {name: "sha256:" + hashlib.sha256(content).hexdigest() for name, content in FILES.items()},
        }

    @pytest.mark.parametrize("quantize", ["", "None", "no_quantization"])
    def test_no_quantization_and_no_template_are_left_out_with_a_warning(
        self, home: Home, folder: Path, server: OllamaStandIn, quantize: str
    ) -> None:
        run = deploy(home, "deploy_ollama.py", folder, server.url, quantize=quantize)

        assert run.code == 0
        assert server.created is not None
        assert set(server.created) == {"model", "files"}
        assert any("no template is given" in note["message"] for note in run.of_type("note"))
        assert any(record["msg"] == 120002 and record["level"] == "warning" for record in run.records)

    def test_known_files_are_no_error(self, home: Home, folder: Path, server: OllamaStandIn) -> None:
        deploy(home, "deploy_ollama.py", folder, server.url)

        run = deploy(home, "deploy_ollama.py", folder, server.url)

        assert run.code == 0
        assert [record["msg"] for record in run.records].count(600007) == 3

    def test_a_server_that_may_not_be_called_gets_nothing(
        self, home: Home, folder: Path, server: OllamaStandIn
    ) -> None:
        values = {"folderPath": str(folder), "serverUrl": server.url, "modelName": "shop"}
        arguments = [word for name, value in values.items() for word in (f"--{name}", value)]

        run = home.run("deploy_ollama.py", *arguments, environment={"DEEPE_TARGET_ADDRESSES": "public"})

        assert run.code == 1
        assert "leads to 127.0.0.1, where nothing may be sent" in run.json_lines[-1]["message"]
        assert server.calls == []

    def test_error_in_the_stream_is_a_failure_although_the_answer_was_200(
        self, home: Home, folder: Path, server: OllamaStandIn
    ) -> None:
        server.create_lines = [{"status": "parsing"}, {"error": "unsupported architecture"}]

        run = deploy(home, "deploy_ollama.py", folder, server.url)

        self.assert_failed(run, "unsupported architecture", 600023)

    def test_stream_that_ends_early_is_a_failure(self, home: Home, folder: Path, server: OllamaStandIn) -> None:
        server.create_lines = [{"status": "parsing"}]

        run = deploy(home, "deploy_ollama.py", folder, server.url)

        self.assert_failed(run, "stopped before it was done", 600027)

    def test_refused_create(self, home: Home, folder: Path, server: OllamaStandIn) -> None:
        server.create_status = 500

        run = deploy(home, "deploy_ollama.py", folder, server.url)

        self.assert_failed(run, "500", 600023)

    def test_server_that_is_not_there(self, home: Home, folder: Path) -> None:
        run = deploy(home, "deploy_ollama.py", folder, "http://127.0.0.1:1")

        self.assert_failed(run, "cannot be reached", 600029)

    @pytest.mark.parametrize("parameters", ["{", "[1]"])
    def test_parameters_that_are_no_object_stop_before_any_upload(
        self, home: Home, folder: Path, server: OllamaStandIn, parameters: str
    ) -> None:
        run = deploy(home, "deploy_ollama.py", folder, server.url, parameters=parameters)

        self.assert_failed(run, "parameters", 600026)
        assert server.calls == []

    def assert_failed(self, run: Finished, sentence: str, code: int) -> None:
        assert run.code == 1
        assert run.json_lines[-1]["status"] == "failed"
        assert sentence in run.json_lines[-1]["message"]
        assert run.records[-1]["msg"] == code


class TestExample:
    def test_publishes_the_files_with_their_digests(self, home: Home, folder: Path) -> None:
        run = deploy(home, "deploy_example.py", folder, "", template="{{ .Prompt }}")

        assert run.code == 0, run.stderr
        registration = self.registration(run)
        assert registration["model"] == "shop"
        assert registration["template"] == "{{ .Prompt }}"
        assert registration["sha256"] == {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
        for name, content in FILES.items():
            assert (home.path / "serving" / "shop" / name).read_bytes() == content

    def test_second_deployment_replaces_the_first(self, home: Home, folder: Path) -> None:
        deploy(home, "deploy_example.py", folder, "")
        (folder / "model.safetensors").write_bytes(b"better")
        (folder / "tokenizer.json").unlink()

        run = deploy(home, "deploy_example.py", folder, "")

        assert set(self.registration(run)["sha256"]) == {"config.json", "model.safetensors"}
        assert not (home.path / "serving" / "shop" / "tokenizer.json").exists()

    def test_file_address_names_the_serving_folder(self, home: Home, folder: Path) -> None:
        run = deploy(home, "deploy_example.py", folder, (home.path / "my serving").as_uri())

        assert run.code == 0
        assert (home.path / "my serving" / "shop" / "registration.json").is_file()

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            ({"folderPath": "None"}, "there is no model folder None"),
            ({"quantize": "q8_0"}, "cannot quantize"),
            ({"modelName": "../evil"}, "cannot be the name of a folder"),
        ],
    )
    def test_refuses_with_a_sentence(self, home: Home, folder: Path, more: dict[str, str], sentence: str) -> None:
        run = deploy(home, "deploy_example.py", folder, "", **more)

        assert run.code == 1
        assert run.json_lines[-1]["status"] == "failed"
        assert sentence in run.json_lines[-1]["message"]
        assert not (home.path / "serving").exists()

    def registration(self, run: Finished) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(Path(run.json_lines[-1]["registration"]).read_text())
        return content
