"""Models over HTTP, on SQLite and on Postgres."""

import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.domain.enums import JobStatus, ModelState
from app.registry.models.service import Models
from app.store.models import find_model
from app.store.session import Database
from tests.api.client import MethodsApp, methods_app, utc_now
from tests.api.resources import ROUTERS, codes, insert_job, insert_model, place_base_model, safetensors

URL = "/api/v1/models"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home", routers=ROUTERS) as running:
        yield running


@pytest.fixture
async def method_id(app: MethodsApp) -> str:
    method: str = (await app.create())["id"]
    return method


def weights(app: MethodsApp, path: str, *names: str) -> Path:
    folder = app.home.absolute(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("adapter_model.safetensors",):
        (folder / name).write_bytes(b"123")
    return folder


@dataclass
class Unloader:
    """A stand-in for the part of Ollama that deletes models."""

    url: str
    status: int = 200
    asked: list[Any] = field(default_factory=list)


@contextmanager
def unloader() -> Iterator[Unloader]:
    class Handler(BaseHTTPRequestHandler):
        def do_DELETE(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.asked.append((self.path, body))
            self.send_response(seen.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen = Unloader(url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class TestRead:
    async def test_shows_lineage_both_ways(self, app: MethodsApp, method_id: str) -> None:
        adapter = await insert_model(
            app.database,
            method_id=method_id,
            name="adapter",
            dataset_id="d",
            dataset_name="faq",
            dataset_digest="0" * 64,
            parameters={"max_steps": 10},
        )
        complete = await insert_model(
            app.database, method_id=method_id, name="complete", state=ModelState.COMPLETE, parent_id=adapter
        )
        online = await insert_model(
            app.database, method_id=method_id, name="online", state=ModelState.ONLINE, parent_id=complete, path=None
        )

        first = (await app.client.get(f"{URL}/adapter")).json()
        middle = (await app.client.get(f"{URL}/{complete}")).json()
        last = (await app.client.get(f"{URL}/{online}")).json()

        assert [model["name"] for model in first["children"]] == ["complete"]
        assert first["dataset"] == {"id": "d", "name": "faq", "digest": "0" * 64}
        assert first["base_model"] == {"id": "base-id", "name": "tiny", "path": "models/tiny"}
        assert first["method"] == {"id": method_id, "name": "finance", "version": 1, "deleted": False}
        assert first["parameters"] == {"max_steps": 10}
        assert [[m["name"] for m in middle[side]] for side in ("parents", "children")] == [["adapter"], ["online"]]
        assert [model["name"] for model in last["parents"]] == ["complete", "adapter"]
        assert last["dataset"] is None

    async def test_a_name_that_two_models_have_needs_the_id(self, app: MethodsApp, method_id: str) -> None:
        for _ in range(2):
            await insert_model(app.database, method_id=method_id, name="twin")

        response = await app.client.get(f"{URL}/twin")

        assert (response.status_code, response.json()["code"]) == (409, "model_name_ambiguous")
        assert (await app.client.get(f"{URL}/nobody")).json()["code"] == "model_not_found"

    async def test_warns_of_answers_that_are_those_of_the_base_model(self, app: MethodsApp, method_id: str) -> None:
        compared = {"script": "a" * 64, "file": "ask.py", "job": "x", "tries": 1}
        told = await insert_model(
            app.database, method_id=method_id, details={"comparison": {**compared, "alike": True}}
        )
        other = await insert_model(
            app.database, method_id=method_id, name="other", details={"comparison": {**compared, "alike": None}}
        )

        (warning,) = (await app.client.get(f"{URL}/{told}", headers={"Accept-Language": "de"})).json()["warnings"]

        assert (warning["code"], "ask.py" in warning["detail"]) == ("answers_as_base_model", True)
        assert "Basismodell" in warning["detail"]
        assert (await app.client.get(f"{URL}/{other}")).json()["warnings"] == []

    async def test_lists_files(self, app: MethodsApp, method_id: str) -> None:
        model = await insert_model(app.database, method_id=method_id, path="runs/j/1/output")
        weights(app, "runs/j/1/output", "b.json", "a.json")
        weights(app, "runs/j/1/output/saved", "c.json")
        weights(app, "runs/j/1/output", os.fsdecode(b"\xfc.json"))  # of a person who wrote in Latin-1
        online = await insert_model(app.database, method_id=method_id, path=None, state=ModelState.ONLINE)

        body = (await app.client.get(f"{URL}/{model}/files")).json()

        assert [file["path"] for file in body["items"]] == ["\\xfc.json", "a.json", "b.json", "saved/c.json"]
        assert body["size_bytes"] == 12
        assert (await app.client.get(f"{URL}/{online}/files")).json() == {"items": [], "size_bytes": 0}


class TestList:
    async def test_filters_sorts_and_pages(self, app: MethodsApp, method_id: str) -> None:
        other = (await app.create(name="other"))["id"]
        for number, (method, state) in enumerate(
            [(method_id, ModelState.CUSTOMIZED), (method_id, ModelState.COMPLETE), (other, ModelState.CUSTOMIZED)]
        ):
            await insert_model(
                app.database, method_id=method, name=f"Model{number}", state=state, dataset_id="d", dataset_name="faq"
            )

        async def names(**params: Any) -> list[str]:
            body = (await app.client.get(URL, params=params)).json()
            return [item["name"] for item in body["items"]]

        listed = (await app.client.get(URL, params={"q": "Model0"})).json()["items"][0]
        read = (await app.client.get(f"{URL}/{listed['id']}")).json()
        assert {name: listed[name] for name in ("base_model", "dataset")} == {
            name: read[name] for name in ("base_model", "dataset")
        }
        assert await names(sort="name") == ["Model0", "Model1", "Model2"]
        assert await names(state="complete") == ["Model1"]
        assert await names(method="other") == await names(method=other) == ["Model2"]
        assert await names(method="nobody") == []
        assert await names(q="mODEL2") == ["Model2"]
        assert await names(q="%") == []
        assert len(await names(base_model="tiny", dataset="faq", training_type="chat")) == 3
        assert await names(dataset="x") == []
        page = (await app.client.get(URL, params={"limit": 2})).json()
        assert await names(limit=2, cursor=page["next_cursor"]) == ["Model0"]
        assert (await app.client.get(URL, params={"state": "base"})).status_code == 422


class TestDelete:
    async def test_removes_the_folder_and_keeps_what_was_made_from_it(self, app: MethodsApp, method_id: str) -> None:
        adapter = await insert_model(app.database, method_id=method_id, path="runs/a/1/output")
        complete = await insert_model(
            app.database, method_id=method_id, path="runs/b/1/output", parent_id=adapter, state=ModelState.COMPLETE
        )
        gone, kept = weights(app, "runs/a/1/output"), weights(app, "runs/b/1/output")
        (app.home.runs / "a" / "1" / "output.log").write_text("log")

        response = await app.client.delete(f"{URL}/{adapter}")

        assert (response.status_code, gone.exists(), kept.exists()) == (204, False, True)
        assert (app.home.runs / "a" / "1" / "output.log").exists()
        assert (await app.client.get(f"{URL}/{adapter}")).status_code == 404
        parents = (await app.client.get(f"{URL}/{complete}")).json()["parents"]
        assert [(parent["id"], parent["deleted"]) for parent in parents] == [(adapter, True)]
        assert (await app.client.delete(f"{URL}/{adapter}")).json()["code"] == "model_not_found"

    async def test_spares_a_complete_model_inside_the_adapters_folder(self, app: MethodsApp, method_id: str) -> None:
        adapter = await insert_model(app.database, method_id=method_id, path="runs/a/1/output")
        await insert_model(app.database, method_id=method_id, path="runs/a/1/output/x/saved", state=ModelState.COMPLETE)
        folder = weights(app, "runs/a/1/output")
        weights(app, "runs/a/1/output/x", "beside.json")
        saved = weights(app, "runs/a/1/output/x/saved", "model.safetensors")

        await app.client.delete(f"{URL}/{adapter}")

        left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        assert left == ["x/saved/model.safetensors"]
        assert saved.exists()

    async def test_spares_a_folder_that_another_model_has_as_well(self, app: MethodsApp, method_id: str) -> None:
        first = await insert_model(app.database, method_id=method_id, path="runs/a/1/output")
        await insert_model(app.database, method_id=method_id, path="runs/a/1/output")
        folder = weights(app, "runs/a/1/output")

        assert (await app.client.delete(f"{URL}/{first}")).status_code == 204
        assert folder.exists()

    @pytest.mark.parametrize("path", ["models/tiny", "runs/../models/tiny", "runs", "scripts"])
    async def test_never_removes_anything_but_folders_of_runs(self, app: MethodsApp, method_id: str, path: str) -> None:
        model = await insert_model(app.database, method_id=method_id, path=path)
        folder = weights(app, path)

        response = await app.client.delete(f"{URL}/{model}")

        assert (response.status_code, folder.exists()) == (204, True)

    async def test_refuses_while_a_job_works_on_it(self, app: MethodsApp, method_id: str) -> None:
        model = await insert_model(app.database, method_id=method_id, path="runs/a/1/output")
        folder = weights(app, "runs/a/1/output")
        await insert_job(app.database, model_id=model, status=JobStatus.RUNNING)

        response = await app.client.delete(f"{URL}/{model}")

        assert (response.status_code, response.json()["code"]) == (409, "model_in_use")
        assert folder.exists()

    async def test_finishes_at_start_what_a_crash_interrupted(self, app: MethodsApp, method_id: str) -> None:
        model = await insert_model(app.database, method_id=method_id, path="runs/a/1/output")
        other = await insert_model(app.database, method_id=method_id, path="runs/b/1/output")
        folder, kept = weights(app, "runs/a/1/output"), weights(app, "runs/b/1/output")
        async with app.database.writing() as session:
            row = await find_model(session, model)
            assert row is not None
            row.deleted_at = utc_now()

        removed = await Models(database=app.database, home=app.home, clock=utc_now).finish_deletions()

        assert (removed, folder.exists(), kept.exists()) == (1, False, True)
        assert (await app.client.get(f"{URL}/{other}")).status_code == 200


class TestDeleteOnline:
    async def online(self, app: MethodsApp, method_id: str, url: str) -> str:
        return await insert_model(
            app.database,
            method_id=method_id,
            name="faq_d_1234_q8_0",
            state=ModelState.ONLINE,
            path=None,
            details={"deployment": {"target": "box", "url": url}},
        )

    @pytest.mark.parametrize("status", [200, 404])
    async def test_asks_the_tool_to_unload(self, app: MethodsApp, method_id: str, status: int) -> None:
        with unloader() as tool:
            tool.status = status
            model = await self.online(app, method_id, tool.url)

            response = await app.client.delete(f"{URL}/{model}")

        assert response.status_code == 204
        assert tool.asked == [("/api/delete", {"model": "faq_d_1234_q8_0"})]
        assert (await app.client.get(f"{URL}/{model}")).status_code == 404

    async def test_keeps_the_entry_if_the_tool_refuses_or_is_away(self, app: MethodsApp, method_id: str) -> None:
        with unloader() as tool:
            tool.status = 500
            model = await self.online(app, method_id, tool.url)
            refused = await app.client.delete(f"{URL}/{model}")
        away = await app.client.delete(f"{URL}/{model}")
        kept = await app.client.get(f"{URL}/{model}")
        forced = await app.client.delete(f"{URL}/{model}", params={"without_unloading": "true"})

        assert [answer.status_code for answer in (refused, away, kept, forced)] == [503, 503, 200, 204]
        assert refused.json()["code"] == "deploy_target_unreachable"

    async def test_a_custom_deployment_has_nobody_to_ask(self, app: MethodsApp, method_id: str) -> None:
        model = await self.online(app, method_id, "")

        assert (await app.client.delete(f"{URL}/{model}")).status_code == 204


class TestRegister:
    @pytest.fixture
    async def base(self, app: MethodsApp) -> None:
        place_base_model(app.home.absolute("models/tiny"))
        made = await app.client.post("/api/v1/base-models", json={"name": "tiny", "path": "tiny"})
        assert made.status_code == 201

    @pytest.mark.usefixtures("base", "method_id")
    async def test_enters_a_line_of_models_whose_files_stay(self, app: MethodsApp) -> None:
        adapter = weights(app, "models/moved/adapter", "adapter_config.json")
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapter_model.safetensors").write_bytes(safetensors(a=[1]))
        place_base_model(app.home.absolute("models/moved/merged"))
        common = {"base_model": "tiny", "method": "finance"}
        bodies = [
            {"name": "a", "state": "customized", "path": "moved/adapter", "made_at": "2025-07-01T00:00:00Z",
             "parameters": {"lora_rank": 8}, "origin": {"task": "x"}, **common},
            {"name": "b", "state": "complete", "path": "moved/merged", "parent": "a", **common},
            {"name": "c", "state": "online", "url": "http://box:11434/", "parent": "b", **common},
        ]  # fmt: skip
        checked = [(await app.client.post(f"{URL}:validate", json=body)).json() for body in bodies[:1]]
        made = [await app.client.post(URL, json=body) for body in bodies]

        assert checked == [{"valid": True, "kind": "adapter", "violations": []}]
        assert [answer.status_code for answer in made] == [201, 201, 201]
        first, last = (await app.client.get(f"{URL}/a")).json(), (await app.client.get(f"{URL}/c")).json()
        assert (first["job"], first["path"], first["created_at"]) == (
            None,
            "models/moved/adapter",
            "2025-07-01T00:00:00Z",
        )
        assert first["parameters"] == {"lora_rank": 8}
        assert first["details"]["origin"] == {"task": "x"}
        assert [parent["name"] for parent in last["parents"]] == ["b", "a"]
        assert last["details"]["deployment"]["url"] == "http://box:11434"
        assert (await app.client.get(URL)).json()["items"][0]["job_id"] is None
        assert (await app.client.delete(f"{URL}/a")).status_code == 204
        assert (adapter / "adapter_config.json").exists()

    @pytest.mark.usefixtures("base", "method_id")
    async def test_says_all_that_is_wrong_at_once(self, app: MethodsApp) -> None:
        weights(app, "models/empty", "notes.txt")
        wrong = {
            "name": " ", "state": "complete", "path": "../outside", "url": "http://x", "base_model": "gone",
            "method": "gone", "parent": "gone", "dataset": "gone",
        }  # fmt: skip
        usual = {"name": "x", "base_model": "tiny", "method": "finance"}
        answers = [
            await app.client.post(URL, json=body)
            for body in (
                wrong,
                {**usual, "state": "customized", "path": "empty"},
                {**usual, "state": "online", "path": "empty"},
                {**usual, "state": "complete"},
            )
        ]

        assert [answer.status_code for answer in answers] == [422] * 4
        assert [codes(answer.json()) for answer in answers] == [
            [
                ("/name", "missing_name"), ("/url", "model_takes_no_url"), ("/path", "path_outside_folder"),
                ("/base_model", "base_model_not_found"), ("/method", "method_not_found"),
                ("/parent", "model_not_found"), ("/dataset", "dataset_not_found"),
            ],
            [("/path", "no_model_in_folder")],
            [("/path", "online_model_takes_no_path"), ("/url", "model_needs_url")],
            [("/path", "model_needs_path")],
        ]  # fmt: skip
        assert (await app.client.get(URL)).json()["items"] == []
