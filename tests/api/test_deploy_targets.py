"""Deploy targets over HTTP, on SQLite and on Postgres."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.domain.enums import ModelState
from app.executor.attempts.stage_arguments import Folders, Inputs, call_stage
from app.executor.runs.job_spec import JobSpec
from app.store import jobs
from app.store.session import Database
from tests.api.client import MethodsApp, methods_app
from tests.api.jobs_app import JobsApp, jobs_app
from tests.api.resources import ROUTERS, codes
from tests.ollama_stand_in import ollama_stand_in
from tests.servers import free_port

URL = "/api/v1/deploy-targets"
SERVER = {"name": "server", "kind": "custom", "url": "http://box/api", "port": 8080}


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home", routers=ROUTERS) as running:
        yield running


async def create(
    app: MethodsApp, name: str = "gpu-box", url: str = "http://gpu-box:11434/", kind: str = "ollama"
) -> httpx.Response:
    return await app.client.post(URL, json={"name": name, "kind": kind, "url": url})


class TestCreate:
    async def test_configures_a_target(self, app: MethodsApp) -> None:
        response = await create(app)

        body = response.json()
        assert response.status_code == 201
        assert (body["name"], body["kind"], body["url"]) == ("gpu-box", "ollama", "http://gpu-box:11434")
        assert (await app.client.get(f"{URL}/GPU-Box")).json() == body
        assert (await app.client.get(URL)).json()["items"] == [body]

    @pytest.mark.parametrize(
        ("url", "code"),
        [
            ("", "invalid_url"),
            ("gpu-box:11434", "invalid_url"),
            ("ftp://gpu-box", "invalid_url"),
            ("file:///etc/passwd", "invalid_url"),
            ("http://", "invalid_url"),
            ("http://:80", "invalid_url"),
            ("http://box:99999", "invalid_url"),
            ("http://box:x", "invalid_url"),
            ("http://[::1", "invalid_url"),
            ("http://a b", "invalid_url"),
            ("http://box/?x=1", "invalid_url"),
            ("http://box/#x", "invalid_url"),
            ("http://box\n", None),
            ("http://bo\tx", "invalid_url"),
            ("http://user:secret@box", "url_with_credentials"),
            ("http://user@box", "url_with_credentials"),
            ("http://169.254.169.254/latest", "target_address_refused"),
            ("http://0xa9fea9fe:11434", "target_address_refused"),
            ("http://[::ffff:169.254.169.254]", "target_address_refused"),
            ("http://[64:ff9b:1::169.254.169.254]:11434", "target_address_refused"),
            ("http://" + "x" * 3000, "invalid_url"),
            ("https://[::1]:11434/ollama", None),
        ],
    )
    async def test_checks_the_address(self, app: MethodsApp, url: str, code: str | None) -> None:
        response = await create(app, url=url)

        assert codes(response.json()) == ([] if code is None else [("/url", code)])
        assert response.status_code == (201 if code is None else 422)

    async def test_reports_name_and_address_at_once(self, app: MethodsApp) -> None:
        response = await create(app, name="Custom", url="x")

        assert codes(response.json()) == [("/name", "name_reserved"), ("/url", "invalid_url")]

    @pytest.mark.parametrize(
        ("members", "found"),
        [
            ({"url": "http://box:1/", "port": 2}, [("/port", "port_named_twice")]),
            ({"settings": {"serverUrl": "x"}}, [("/settings/serverUrl", "setting_reserved")]),
            ({"settings": {"a b": 1}}, [("/settings/a b", "invalid_setting_name")]),
            ({"settings": {"a": "x" * 10_000}}, [("/settings", "settings_too_long")]),
            (
                {"kind": "ollama", "settings": {"a": 1}, "file": "push.py"},
                [("/settings", "target_member_not_custom"), ("/file", "target_member_not_custom")],
            ),
        ],
    )
    async def test_refuses_what_does_not_fit(
        self, app: MethodsApp, members: dict[str, Any], found: list[tuple[str, str]]
    ) -> None:
        assert codes((await app.client.post(URL, json={**SERVER, **members})).json()) == found

    async def test_refuses_unknown_kinds(self, app: MethodsApp) -> None:
        assert codes((await create(app, kind="vllm")).json()) == [("/kind", "field_choice")]

    async def test_of_two_creates_of_one_name_one_wins(self, app: MethodsApp) -> None:
        responses = await asyncio.gather(*[create(app, name=name) for name in ("box", "Box", "BOX")])

        assert sorted(response.status_code for response in responses) == [201, 409, 409]


class TestChange:
    async def test_changes_what_is_named_and_keeps_the_rest(self, app: MethodsApp) -> None:
        settings = {"replicas": 2, "old": 1, "limits": {"cpu": 1, "gpu": 2}}
        members = {**SERVER, "settings": settings, "file": "push.py", "conda_env": "base"}
        made = (await app.client.post(URL, json=members)).json()

        async def changed(**changes: Any) -> dict[str, Any]:
            response = await app.client.patch(f"{URL}/Server", json=changes)
            assert response.status_code == 200, response.text
            body: dict[str, Any] = response.json()
            assert (await app.client.get(f"{URL}/{made['id']}")).json() == body
            return body

        assert await changed() == made
        merged = {"replicas": 3, "limits": {"cpu": 1}}
        assert await changed(settings={"replicas": 3, "old": None, "limits": {"gpu": None}}) == {
            **made, "settings": merged
        }  # fmt: skip
        assert [
            (await changed(**changes))["url"]
            for changes in ({"port": 9090}, {"port": None}, {"url": "http://new/", "port": 1}, {"url": "http://new:2"})
        ] == ["http://box:9090/api", "http://box/api", "http://new:1", "http://new:2"]
        bare = await changed(settings=None, file=None, conda_env=None)
        assert (bare["settings"], bare["file"], bare["conda_env"], bare["url"]) == ({}, None, None, "http://new:2")

    @pytest.mark.parametrize(
        ("kind", "changes", "found"),
        [
            ("ollama", {"url": "ftp://box"}, [("/url", "invalid_url")]),
            ("ollama", {"url": None}, [("/url", "field_type")]),
            ("ollama", {"url": "http://box:1", "port": 2}, [("/port", "port_named_twice")]),
            ("ollama", {"settings": {"a": 1}}, [("/settings", "target_member_not_custom")]),
            ("custom", {"settings": {"serverUrl": "x"}}, [("/settings/serverUrl", "setting_reserved")]),
            ("custom", {"name": "other", "kind": "ollama"}, [("/name", "field_unknown"), ("/kind", "field_unknown")]),
        ],
    )
    async def test_refuses_what_a_create_refuses(
        self, app: MethodsApp, kind: str, changes: dict[str, Any], found: list[tuple[str, str]]
    ) -> None:
        made = (await create(app, kind=kind)).json()

        refused = await app.client.patch(f"{URL}/gpu-box", json=changes)

        assert codes(refused.json()) == found
        assert (await app.client.get(f"{URL}/gpu-box")).json() == made
        assert (await app.client.patch(f"{URL}/none", json={})).json()["code"] == "deploy_target_not_found"

    async def test_changes_at_once_lose_nothing(self, app: MethodsApp) -> None:
        await create(app, kind="custom")

        await asyncio.gather(
            *[app.client.patch(f"{URL}/gpu-box", json={"settings": {f"s{number}": number}}) for number in range(5)]
        )

        settings = (await app.client.get(f"{URL}/gpu-box")).json()["settings"]
        assert settings == {f"s{number}": number for number in range(5)}


class TestDelete:
    async def test_deletes(self, app: MethodsApp) -> None:
        await create(app)

        assert (await app.client.delete(f"{URL}/gpu-box")).status_code == 204
        assert (await app.client.delete(f"{URL}/gpu-box")).json()["code"] == "deploy_target_not_found"

    async def test_refuses_while_a_method_names_it(self, app: MethodsApp) -> None:
        await create(app)
        method = await app.create(
            name="deployer",
            lifecycle=["customized", "online"],
            deployment={"target": "gpu-box"},
        )

        refused = await app.client.delete(f"{URL}/gpu-box")
        gone = await app.client.delete(f"/api/v1/methods/{method['id']}", headers={"If-Match": "*"})
        deleted = await app.client.delete(f"{URL}/gpu-box")

        assert (refused.status_code, refused.json()["code"]) == (409, "deploy_target_in_use")
        assert "deployer" in refused.json()["detail"]
        assert (gone.status_code, deleted.status_code) == (204, 204)


class TestAnswer:
    @pytest.mark.parametrize("kind", ["ollama", "custom"])
    async def test_says_whether_the_server_answers(self, app: MethodsApp, kind: str) -> None:
        with ollama_stand_in() as server:
            await create(app, "here", server.url, kind)
            await create(app, "gone", f"http://127.0.0.1:{free_port()}", kind)

            here = (await app.client.post(f"{URL}/here:test")).json()
            gone = (await app.client.post(f"{URL}/gone:test")).json()

        assert (here["usable"], here["status"]) == (True, 200)
        assert (gone["usable"], gone["status"]) == (False, None)
        assert "could not be reached" in gone["detail"]

    async def test_calls_no_metadata_service_that_a_name_leads_to(
        self, app: MethodsApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def lead_astray(*_: Any, **__: Any) -> Any:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]

        await create(app, "astray", "http://innocent.example")
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lead_astray)

        answer = (await app.client.post(f"{URL}/astray:test")).json()

        assert (answer["usable"], answer["status"]) == (False, None)
        assert "169.254.169.254, where nothing may be sent" in answer["detail"]


SCRIPT = """
import argparse
parser = argparse.ArgumentParser()
for name in ("trainId", "seq", "folderPath", "serverUrl", "modelName", "quantize", "template"):
    parser.add_argument(f"--{name}")
parser.add_argument("--system", type=str)
parser.add_argument("--parameters", type=str, help="dictionary")
parser.add_argument("--replicas", type=int)
parser.parse_known_args()
"""


class TestCustom:
    """A target of the kind `custom` has an address, settings and, for methods that bring none, a script."""

    @pytest.fixture
    async def app(self, database: Database, tmp_path: Path) -> AsyncIterator[JobsApp]:
        async with jobs_app(database, tmp_path / "home") as running:
            (running.services.home.scripts / "push.py").write_text(SCRIPT)
            yield running

    async def target(self, app: JobsApp, **members: Any) -> httpx.Response:
        return await app.client.post(URL, json={**SERVER, **members})

    async def deploy_there(self, app: JobsApp, **members: Any) -> httpx.Response:
        deployment = {"target": "server", "file": None, "conda_env": None, **members}
        headers = {"If-Match": "*"}
        return await app.client.patch("/api/v1/methods/Custom01", json={"deployment": deployment}, headers=headers)

    async def arguments(self, app: JobsApp, **deployment: Any) -> list[str]:
        await app.add_model("whole", ModelState.COMPLETE, kind="model")
        made = await app.post(
            "/jobs", {"method": "Custom01", "stage": "deployment", "model": "whole", "deployment": deployment}, 201
        )
        async with app.database.reading() as session:
            job = await jobs.get(session, made["id"])
        home = app.services.home
        inputs = Inputs(home.models, None, home.runs / "model", "whole", home.runs / "out")
        return list(call_stage(job, JobSpec.of(job), inputs, Folders(home.scripts, home.runs, home.scripts)).arguments)

    async def test_script_gets_the_address_and_the_settings(self, app: JobsApp) -> None:
        assert (await self.target(app, settings={"replicas": 2})).json()["url"] == "http://box:8080/api"
        assert (await self.deploy_there(app, file="push.py", conda_env="base")).status_code == 200

        argv = await self.arguments(app, system="Be brief.")

        assert argv[argv.index("--serverUrl") + 1] == "http://box:8080/api"
        assert argv[argv.index("--replicas") + 1] == "2"
        assert argv[argv.index("--system") + 1] == "Be brief."
        assert "--parameters" not in argv

    async def test_a_new_address_holds_for_the_next_job_while_methods_name_the_target(self, app: JobsApp) -> None:
        await self.target(app, file="push.py", conda_env="base", settings={"replicas": 2})
        assert (await self.deploy_there(app)).status_code == 200

        changes = {"url": "http://new", "settings": {"replicas": 3}, "file": "other.py"}
        assert (await app.client.patch(f"{URL}/server", json=changes)).status_code == 200

        argv = await self.arguments(app)
        assert argv[argv.index("--serverUrl") + 1] == "http://new"
        assert argv[argv.index("--replicas") + 1] == "3"
        method = (await app.client.get("/api/v1/methods/Custom01")).json()
        assert method["deployment"]["file"] == "push.py"

    async def test_script_of_the_target_is_for_methods_that_name_none(self, app: JobsApp) -> None:
        await self.target(app, file="push.py", conda_env="base")

        method = (await self.deploy_there(app)).json()

        assert {name: value for name, value in method["deployment"].items() if value is not None} == {
            "file": "push.py", "conda_env": "base", "target": "server",
        }  # fmt: skip

    async def test_without_any_script_it_is_incomplete(self, app: JobsApp) -> None:
        await self.target(app)

        refused = await self.deploy_there(app)

        assert codes(refused.json()) == [
            ("/deployment/file", "incomplete_custom_deployment"),
            ("/deployment/conda_env", "incomplete_custom_deployment"),
        ]

    async def test_an_object_is_not_passed_to_a_script_that_takes_a_text(self, app: JobsApp) -> None:
        await self.target(app)
        await self.deploy_there(app, file="push.py", conda_env="base")
        await app.add_model("whole", ModelState.COMPLETE, kind="model")
        deployment = {"method": "Custom01", "stage": "deployment", "model": "whole"}

        refused = await app.post("/jobs", {**deployment, "deployment": {"parameters": {"top_k": 5}}}, 422)
        (app.services.home.scripts / "push.py").write_text(SCRIPT.replace("dictionary", "JSON object"))
        await app.post("/jobs", {**deployment, "deployment": {"parameters": {"top_k": 5}}}, 201)

        assert codes(refused) == [("/deployment/parameters", "object_taken_as_text")]
