"""Base models over HTTP, on SQLite and on Postgres."""

import asyncio
import json
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.routes import system
from app.domain.enums import JobStatus, ModelState
from app.store.session import Database
from app.store.tables import JobRow
from tests.api.client import MethodsApp, methods_app
from tests.api.jobs_app import SUBMIT, JobsApp, jobs_app
from tests.api.jobs_app import codes as codes_of
from tests.api.resources import ROUTERS, codes, insert_job, insert_model, place_base_model, safetensors
from tests.base_model_folders import model

ANSWER = [{"role": "assistant", "content": "b"}]
URL = "/api/v1/base-models"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home", routers=(*ROUTERS, system.router)) as running:
        yield running


async def create(app: MethodsApp, name: str = "tiny", path: str = "tiny", **values: Any) -> httpx.Response:
    return await app.client.post(URL, json={"name": name, "path": path, **values})


class TestCreate:
    async def test_reads_the_card_from_the_folder(self, app: MethodsApp) -> None:
        folder = place_base_model(
            app.home.models / "tiny",
            hidden_size=4,
            num_hidden_layers=2,
            vocab_size=10,
            max_position_embeddings=128,
            torch_dtype="bfloat16",
        )
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')

        response = await create(app, description="Tiny")

        body = response.json()
        card = body["card"]
        assert response.status_code == 201
        assert response.headers["location"] == f"{URL}/{body['id']}"
        assert (body["path"], body["description"]) == ("models/tiny", "Tiny")
        assert (card["architecture"], card["model_type"], card["dtype"]) == ("LlamaForCausalLM", "llama", "bfloat16")
        assert (card["hidden_size"], card["layers"], card["vocabulary"], card["context_length"]) == (4, 2, 10, 128)
        assert (card["parameters"], card["weights"], card["quantization"]) == (80, "safetensors", None)
        assert (card["tokenizer"], card["chat_template"]) == (True, True)
        assert card["size_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
        assert (await app.client.get(f"{URL}/TINY")).json() == body

    async def test_the_service_answers_while_a_hostile_folder_is_read(self, app: MethodsApp) -> None:
        folder = place_base_model(app.home.models / "tiny")
        tensor = {"dtype": "F32", "shape": [0] * 64, "data_offsets": [0, 0]}
        header = json.dumps({f"t{number}": tensor for number in range(14_000)}).encode()
        for number in range(8):
            (folder / f"{number}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        creation = asyncio.create_task(create(app))

        answered = 0
        while not (await asyncio.wait([creation], timeout=0.01))[0]:
            assert (await app.client.get("/healthz")).status_code == 200
            answered += not creation.done()

        assert (await creation).status_code == 201
        assert answered > 1

    async def test_reads_what_vision_and_quantized_models_say(self, app: MethodsApp) -> None:
        place_base_model(
            app.home.models / "vl",
            text_config={"hidden_size": 8, "num_hidden_layers": 3},
            quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        )

        card = (await create(app, path="vl")).json()["card"]

        assert (card["hidden_size"], card["layers"], card["quantization"]) == (8, 3, "bitsandbytes 4 bit")

    async def test_says_what_follows_for_each_training_type_in_the_callers_language(self, app: MethodsApp) -> None:
        place_base_model(app.home.models / "tiny")

        body = (await create(app)).json()
        chinese = (await app.client.get(f"{URL}/tiny", headers={"Accept-Language": "zh"})).json()

        found = {kind: [(one["severity"], one["code"]) for one in said] for kind, said in body["findings"].items()}
        without_tokenizer = ("error", "base_model_without_tokenizer")
        assert found == {
            "chat": [without_tokenizer],
            "embedding": [without_tokenizer],
            "vision-language": [without_tokenizer, ("error", "base_model_without_processor")],
            "image-generation": [("error", "base_model_needs_pipeline")],
        }
        assert "分词器" in chinese["findings"]["chat"][0]["detail"]

    async def test_reads_an_image_pipeline(self, app: MethodsApp) -> None:
        folder = app.home.models / "sd"
        (folder / "vae").mkdir(parents=True)
        (folder / "vae" / "model.safetensors").write_bytes(safetensors(weight=[3, 3]))
        (folder / "model_index.json").write_text(
            json.dumps({"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderKL"]})
        )

        card = (await create(app, path="sd")).json()["card"]

        assert (card["architecture"], card["components"]) == ("StableDiffusion3Pipeline", ["vae"])
        assert (card["kind"], card["parameters"]) == ("pipeline", 9)

    @pytest.mark.parametrize(
        ("path", "code"),
        [
            ("../scripts", "path_outside_folder"),
            ("/etc", "path_outside_folder"),
            ("link", "path_outside_folder"),
            ("", "invalid_path"),
            ("gone", "path_not_found"),
            ("empty", "base_model_is_empty"),
            ("file.json", "not_a_base_model"),
            ("broken", "base_model_unreadable"),
            ("list", "base_model_unreadable"),
            ("linked-config", "base_model_link_leaves"),
        ],
    )
    async def test_refuses_what_is_no_model_inside_models(
        self, app: MethodsApp, tmp_path: Path, path: str, code: str
    ) -> None:
        root = app.home.models
        outside = place_base_model(tmp_path / "outside")
        (root / "link").symlink_to(outside)
        (root / "file.json").touch()
        for name, config in (("empty", None), ("broken", "{"), ("list", "[]"), ("linked-config", None)):
            (root / name).mkdir()
            if config is not None:
                (root / name / "config.json").write_text(config)
        (root / "linked-config" / "config.json").symlink_to(outside / "config.json")

        response = await create(app, path=path)

        assert (response.status_code, codes(response.json())) == (422, [("/path", code)])

    async def test_of_two_creates_of_one_name_one_wins(self, app: MethodsApp) -> None:
        place_base_model(app.home.models / "tiny")

        responses = await asyncio.gather(*[create(app, name=name) for name in ("tiny", "Tiny", "TINY")])

        assert sorted(response.status_code for response in responses) == [201, 409, 409]

    async def test_says_what_is_wrong_with_name_and_path_at_once(self, app: MethodsApp) -> None:
        response = await create(app, name="a/b", path="nowhere")

        assert codes(response.json()) == [("/name", "invalid_name"), ("/path", "path_not_found")]

    async def test_card_holds_only_text_that_can_be_sent(self, app: MethodsApp) -> None:
        place_base_model(app.home.models / "tiny", model_type="\ud800\x00", torch_dtype="bfloat16")

        response = await create(app)

        assert response.status_code == 201
        assert (await app.client.get(f"{URL}/tiny")).json()["card"]["model_type"] == "\\ud800\\x00"

    async def test_refuses_unknown_fields(self, app: MethodsApp) -> None:
        place_base_model(app.home.models / "tiny")

        assert codes((await create(app, kind="x")).json()) == [("/kind", "field_unknown")]


class TestUnregistered:
    async def test_lists_folders_without_entry(self, app: MethodsApp) -> None:
        for path in ("tiny", "org/big", ".cache/x", os.fsdecode(b"org/\xfc")):
            place_base_model(app.home.models / path)
        (app.home.models / "notes").mkdir()
        await create(app)

        response = await app.client.get(f"{URL}:unregistered")

        assert response.json() == {"items": ["org/\\xfc", "org/big"]}


class TestDelete:
    async def test_deletes_the_entry_and_keeps_the_folder(self, app: MethodsApp) -> None:
        folder = place_base_model(app.home.models / "tiny")
        await create(app)

        response = await app.client.delete(f"{URL}/tiny")

        assert (response.status_code, (folder / "config.json").exists()) == (204, True)
        assert (await app.client.get(f"{URL}/tiny")).json()["code"] == "base_model_not_found"
        assert (await create(app)).status_code == 201

    async def test_removes_the_folder_where_it_is_wanted(self, app: MethodsApp, tmp_path: Path) -> None:
        folder = place_base_model(app.home.models / "org" / "tiny")
        elsewhere = place_base_model(app.home.models / "elsewhere")
        (app.home.models / "link").symlink_to(elsewhere)
        for name, path in (("tiny", "org/tiny"), ("link", "link")):
            await create(app, name, path)

        removed = [await app.client.delete(f"{URL}/{name}?with_files=true") for name in ("tiny", "link")]

        assert [response.status_code for response in removed] == [204, 204]
        assert (folder.exists(), (app.home.models / "org").exists()) == (False, True)
        assert (os.path.lexists(app.home.models / "link"), elsewhere.is_dir()) == (False, True)

    async def test_keeps_a_folder_that_others_need(self, app: MethodsApp) -> None:
        place_base_model(app.home.models / "tiny")
        place_base_model(app.home.models / "tiny" / "inner")
        for name, path in (("tiny", "tiny"), ("inner", "tiny/inner")):
            await create(app, name, path)
        method_id = (await app.create())["id"]
        await insert_model(app.database, method_id=method_id, name="adapter", base_model_path="models/tiny/inner")

        outer = await app.client.delete(f"{URL}/tiny?with_files=true")
        inner = await app.client.delete(f"{URL}/inner?with_files=true")

        assert {(one.status_code, one.json()["code"]) for one in (outer, inner)} == {(409, "base_model_files_needed")}
        assert "adapter" in inner.json()["detail"]
        assert (app.home.models / "tiny" / "inner" / "config.json").is_file()

    async def test_refuses_while_a_job_needs_it(self, app: MethodsApp) -> None:
        place_base_model(app.home.models / "tiny")
        base = (await create(app)).json()["id"]
        await insert_job(app.database, base_model_id=base, status=JobStatus.RUNNING)

        response = await app.client.delete(f"{URL}/{base}")

        assert (response.status_code, response.json()["code"]) == (409, "base_model_in_use")


class TestLoading:
    """Pickles and code of a base model's author run when a developer allowed it, and in scripts of users."""

    @pytest.fixture
    async def jobs(self, database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
        async with jobs_app(database, tmp_path / "home") as running:
            yield running

    async def test_scripts_of_the_platform_refuse_until_it_is_allowed(self, jobs: JobsApp) -> None:
        await jobs.post("/presets/SFT-Demo:install")
        folder = model(jobs.services.home.models / "pickled", auto_map={"AutoModel": "modeling.Own"})
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
        await jobs.post("/base-models", {"name": "pickled", "path": "pickled"}, 201)
        await jobs.register_data("talk", [{"messages": [{"role": "user", "content": "a"}, *ANSWER]}] * 4)
        body = {"method": "SFT-Demo", "base_model": "pickled", "dataset": "talk", "through": "customized", "wait": True}

        refused = await jobs.post("/jobs", body, 422)
        half = await jobs.post("/base-models/pickled:allow-loading", {"pickled_weights": True})
        refused_still = await jobs.post("/jobs", body, 422)
        await jobs.post("/base-models/pickled:allow-loading", {"pickled_weights": True, "custom_code": True})
        taken = await jobs.post("/jobs", body, 201)
        forbidden = await jobs.post("/base-models/pickled:allow-loading", {})

        at = "/base_model"
        assert codes_of(refused) == [(at, "base_model_pickled"), (at, "base_model_has_custom_code")]
        assert (half["loading_permission"]["allowed_by"], half["loading_permission"]["custom_code"]) == ("local", False)
        assert codes_of(refused_still) == [(at, "base_model_has_custom_code")]
        assert (await self._launch(jobs, taken))["permits"] == ["pickled_weights", "custom_code"]
        assert forbidden["loading_permission"] is None
        assert codes_of(await jobs.post("/jobs", body, 422)) == codes_of(refused)

    async def test_a_script_of_a_user_is_only_told(self, jobs: JobsApp) -> None:
        script = jobs.services.home.scripts / "custom01.py"
        script.write_text(script.read_text() + "\n# mine\n")
        model(jobs.services.home.models / "own", auto_map={"AutoModel": "modeling.Own"})
        await jobs.post("/base-models", {"name": "own", "path": "own"}, 201)

        told = await jobs.post("/jobs:validate", {**SUBMIT, "base_model": "own", "through": "customized"})
        made = await jobs.submit(base_model="own", through="customized")

        assert "base_model_has_custom_code" in [one["code"] for one in told["warnings"]]
        assert "permits" not in await self._launch(jobs, made)

    async def test_models_made_from_it_are_looked_at_as_well(self, jobs: JobsApp) -> None:
        files = {
            "adapter_config.json": "{}",
            "adapter_model.bin": "x",
            "tokenizer_config.json": '{"auto_map": {"a": "b"}}',
        }
        await jobs.add_model("taught", ModelState.CUSTOMIZED, kind="adapter", files=files)
        body = {"method": "Custom01", "stage": "saving", "model": "taught"}

        refused = await jobs.post("/jobs", body, 422)
        allowed = {"pickled_weights": True, "custom_code": True}
        await jobs.post("/base-models/custom01-base:allow-loading", allowed)

        assert codes_of(refused) == [("/model", "model_pickled"), ("/model", "model_has_custom_code")]
        await jobs.post("/jobs", body, 201)

    async def _launch(self, jobs: JobsApp, made: dict[str, Any]) -> dict[str, Any]:
        async with jobs.database.reading() as session:
            job = await session.get(JobRow, made["id"])
        assert job is not None
        return job.launch
