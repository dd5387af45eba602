"""The script root over HTTP: names that hide modules, deleting, and the way back to what was."""

import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.domain.enums import Platform
from app.presets.catalogue import script_path
from app.store.nodes import heartbeat, register_node
from app.store.session import Database
from tests.api.client import SOURCE, MethodsApp, definition, methods_app, tag_of

URL = "/api/v1/methods"
SCRIPTS = "/api/v1/scripts"
NEW = {"Content-Type": "text/x-python", "If-None-Match": "*"}
ANY = {"Content-Type": "text/x-python", "If-Match": "*"}
MINE = b"print('mine')\n"
BETTER = b"print('better')\n"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home") as running:
        yield running


async def install(app: MethodsApp) -> None:
    async with app.database.writing() as session:
        await app.services.presets.install_presets(session)


async def upload(app: MethodsApp, path: str) -> str:
    """Upload a new file; return the code of what is wrong with it, an empty text if nothing is."""
    response = await app.client.put(f"{SCRIPTS}/{path}", content=MINE, headers=NEW)
    if response.status_code == 201:
        return ""
    (entry,) = response.json()["errors"]
    assert (response.status_code, entry["pointer"]) == (422, "")
    assert not (app.home.scripts / path).exists()
    return str(entry["code"])


def stage(file: str, environment: str = "base") -> dict[str, Any]:
    return {"training": {"file": file, "conda_env": environment}}


async def problems(app: MethodsApp, method: str) -> set[str]:
    """Return the codes of what the readiness says of the method's files."""
    body = (await app.client.get(f"{URL}/{method}/readiness")).json()
    found = {problem["code"] for stage in body["stages"] for problem in stage["problems"]}
    return {code for code in found if code.startswith("script_")}


async def sources(app: MethodsApp, method: str) -> list[tuple[int, str]]:
    versions = (await app.client.get(f"{URL}/{method}/versions?sort=number")).json()["items"]
    return [(version["version"], version["source"]) for version in versions]


async def bytes_of(app: MethodsApp, method: str, number: int, stage: str = "training") -> bytes:
    response = await app.client.get(f"{URL}/{method}/versions/{number}/files/{stage}")
    assert response.headers["etag"] == f'"{hashlib.sha256(response.content).hexdigest()}"'
    return response.content


class TestUploadedNames:
    @pytest.mark.parametrize(
        ("path", "code"),
        [
            ("json.py", "script_hides_standard_module"),
            ("json/__init__.py", "script_hides_standard_module"),
            ("_json", "script_hides_standard_module"),
            ("sitecustomize.py", "script_is_interpreter_hook"),
            ("usercustomize.py", "script_is_interpreter_hook"),
            ("site.pth", "script_is_interpreter_hook"),
            ("sitecustomize.pyc", "script_is_interpreter_hook"),
            ("json.cpython-311-x86_64-linux-gnu.so", "script_hides_standard_module"),
            ("json.yaml", ""),
            ("deepe.py", "script_hides_helper"),
            ("deepe_rows.py", "script_hides_helper"),
            ("enums.py", ""),
            ("train_callback.py", ""),
            ("json_rows.py", ""),
            ("json/rows.py", ""),
            ("mine/json.py", ""),
            ("torch.py", ""),
        ],
    )
    async def test_in_the_root(self, app: MethodsApp, path: str, code: str) -> None:
        assert await upload(app, path) == code

    async def test_of_files_of_other_types_are_kept(self, app: MethodsApp) -> None:
        content = b"rate: 1\n\xff"
        url = f"{SCRIPTS}/multi/config.yaml"

        put = await app.client.put(url, content=content, headers=NEW | {"Content-Type": "application/yaml"})
        read = await app.client.get(url)
        listed = [(await app.client.get(SCRIPTS + query)).json()["items"] for query in ("", "?every_type=true")]
        deleted = await app.client.delete(url, headers={"If-Match": read.headers["etag"]})

        assert (put.status_code, put.json()["path"]) == (201, "multi/config.yaml")
        assert (read.content, read.headers["content-type"]) == (content, "application/octet-stream")
        assert [[one["path"] for one in items] for items in listed] == [[], ["multi/config.yaml"]]
        assert (deleted.status_code, list((app.home.scripts / "multi").iterdir())) == (204, [])

    async def test_in_a_folder_where_a_method_runs(self, app: MethodsApp) -> None:
        await app.create(stages=stage("mine/train.py"))

        found = [await upload(app, path) for path in ("mine/json.py", "mine/deeper/json.py", "mine/json/__init__.py")]

        assert found == ["script_hides_standard_module", "", "script_hides_standard_module"]

    async def test_of_a_package_of_the_environment_that_scripts_beside_it_run_in(self, app: MethodsApp) -> None:
        await install(app)  # Custom02 runs in `trl`

        found = [await upload(app, path) for path in ("torch.py", "trl/__init__.py", "mine/torch.py", "mlx.py")]

        assert found == ["script_hides_package", "script_hides_package", "", ""]

    async def test_of_a_module_that_a_node_found_in_an_environment_without_specification(self, app: MethodsApp) -> None:
        probe = {"modules": ["vision_lib", "still_to_write"], "missing": ["still_to_write"]}
        state = {"name": "vision", "state": "ready", "probe": probe}
        async with app.database.writing() as session:
            node = await register_node(
                session,
                name="gpu-1",
                platform=Platform.CUDA,
                accelerators=[],
                environments=["vision"],
                slots=1,
                boot_id="1",
                now=datetime.now(UTC),
            )
            await heartbeat(session, node.id, now=datetime.now(UTC), environment_states=[state])
        app.script("train.py", b"import vision_lib, still_to_write\n")
        await app.create(stages=stage("train.py", "vision"))

        found = [await upload(app, path) for path in ("vision_lib.py", "still_to_write.py")]

        assert found == ["script_hides_package", ""]

    async def test_says_the_way_out_in_the_callers_language(self, app: MethodsApp) -> None:
        said = []
        for language in ("en", "zh", "de"):
            headers = NEW | {"Accept-Language": language}
            response = await app.client.put(f"{SCRIPTS}/json.py", content=MINE, headers=headers)
            said.append(response.json()["errors"][0]["detail"])

        assert ["folder of its own" in said[0], "文件夹" in said[1], "eigenen Ordner" in said[2]] == [True] * 3


class TestNamesPutThereByHand:
    async def test_are_told_to_the_methods_beside_them_and_to_no_others(self, app: MethodsApp) -> None:
        await install(app)
        app.script("train.py", b"import json, deepe, torch, enums\n")
        app.script("mine/train.py", b"import json, deepe, torch, enums\n")
        app.script("quiet.py")
        await app.create(name="beside")
        await app.create(name="quiet", stages=stage("quiet.py"))
        await app.create(name="elsewhere", stages=stage("mine/train.py"))
        for name in ("json.py", "sitecustomize.py", "deepe.py", "torch/__init__.py", "enums.py"):
            app.script(name)

        found = {name: await problems(app, name) for name in ("beside", "Custom02", "quiet", "elsewhere", "SFT-Demo")}

        always = {"script_hides_standard_module", "script_hides_helper"}
        assert found == {
            "beside": always,
            "Custom02": {"script_hides_helper", "script_hides_package"},
            "quiet": set(),
            "elsewhere": set(),
            "SFT-Demo": set(),
        }

    async def test_are_told_before_a_method_is_registered(self, app: MethodsApp) -> None:
        app.script("train.py", b"import json\n")
        app.script("json.py")

        body = (await app.client.post(f"{URL}:validate", json=definition())).json()

        (ready,) = body["readiness"]["stages"]
        assert body["valid"] is True
        assert "script_hides_standard_module" in {problem["code"] for problem in ready["problems"]}

    async def test_are_refused_as_the_file_of_a_stage(self, app: MethodsApp) -> None:
        app.script("json.py")

        response = await app.client.post(URL, json=definition(stages=stage("json.py")))

        (entry,) = response.json()["errors"]
        assert response.status_code == 422
        assert (entry["pointer"], entry["code"]) == ("/stages/training/file", "script_hides_standard_module")

    async def test_of_a_method_that_runs_such_a_file_already_are_let_be(
        self, app: MethodsApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as before:
            before.setattr("app.registry.methods.files.hidden", lambda *_, **__: None)
            await app.create(stages=stage("queue.py"))
        app.script("queue.py", BETTER)

        tag = tag_of(await app.client.get(f"{URL}/finance"))
        patched = await app.client.patch(f"{URL}/finance", json={"description": "ours"}, headers=tag)
        replaced = await app.client.put(f"{URL}/finance/files/training", content=MINE, headers=ANY)

        assert (patched.status_code, replaced.status_code) == (200, 200)
        assert await problems(app, "finance") == {"script_hides_standard_module"}


class TestDeleteScript:
    async def delete(self, app: MethodsApp, path: str, **headers: str) -> httpx.Response:
        return await app.client.delete(
            f"{SCRIPTS}/{path}", headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    async def test_needs_the_bytes_that_were_read_and_keeps_them(self, app: MethodsApp) -> None:
        file = app.script("old.py", MINE)
        etag = (await app.client.get(f"{SCRIPTS}/old.py")).headers["etag"]

        refused = [await self.delete(app, "old.py"), await self.delete(app, "old.py", If_Match='"other"')]
        unread = [file.exists(), (await self.delete(app, "old.py", If_Match=etag)).status_code, file.exists()]

        assert [response.status_code for response in refused] == [428, 412]
        assert unread == [True, 204, False]
        assert (await self.delete(app, "old.py", If_Match="*")).json()["code"] == "script_not_found"
        assert app.services.files.versions.get(hashlib.sha256(MINE).hexdigest()) == MINE

    async def test_of_a_file_that_methods_run_or_import_names_them(self, app: MethodsApp) -> None:
        app.script("train.py", b"import tools\n")
        app.script("tools.py", b"import parts.numbers\n")
        app.script("parts/numbers.py")
        app.script("mine/train.py", b"import sys\nsys.path.append('..')\nfrom tools import *\n")
        app.script("tolerant.py", b"try:\n    import optional\nexcept ImportError:\n    pass\n")
        app.script("optional.py")
        await app.create(name="first")
        await app.create(name="second", stages=stage("mine/train.py"))
        await app.create(name="third", stages=stage("tolerant.py"))

        users = {}
        for path in ("train.py", "tools.py", "parts/numbers.py", "mine/train.py", "optional.py"):
            response = await self.delete(app, path, If_Match="*")
            users[path] = response.json()["detail"].split(". ")[0] if response.status_code == 409 else ""

        assert users == {
            "train.py": '"train.py" is used by: first',
            "tools.py": '"tools.py" is used by: first, second',
            "parts/numbers.py": '"parts/numbers.py" is used by: first, second',
            "mine/train.py": '"mine/train.py" is used by: second',
            "optional.py": '"optional.py" is used by: third',
        }

    async def test_of_a_deleted_methods_file_and_of_one_that_only_an_example_is_called_after(
        self, app: MethodsApp
    ) -> None:
        await install(app)
        await app.create()
        tag = tag_of(await app.client.get(f"{URL}/finance"))
        app.script("sft-demo.py", MINE)

        in_use = await self.delete(app, "train.py", If_Match="*")
        await app.client.delete(f"{URL}/finance", headers=tag)
        deleted = [await self.delete(app, path, If_Match="*") for path in ("train.py", "sft-demo.py")]

        assert (in_use.status_code, in_use.json()["code"]) == (409, "script_in_use")
        assert [response.status_code for response in deleted] == [204, 204]

    async def test_of_a_link_leaves_what_it_leads_to(self, app: MethodsApp) -> None:
        await app.create()
        (app.home.scripts / "alias.py").symlink_to("train.py")
        (app.home.scripts / "out.py").symlink_to("/etc/hostname")

        statuses = [(await self.delete(app, path, If_Match="*")).status_code for path in ("alias.py", "out.py")]

        assert statuses == [204, 422]
        assert sorted(path.name for path in app.home.scripts.iterdir()) == ["out.py", "train.py"]

    async def test_outside_the_root_is_422(self, app: MethodsApp) -> None:
        response = await self.delete(app, "..%2Fdeepe.db", If_Match="*")

        assert (response.status_code, response.json()["code"]) == (422, "file_outside_root")


class TestRestore:
    async def test_brings_any_version_back_and_keeps_what_it_overwrites(self, app: MethodsApp) -> None:
        await app.create(description="first")
        await app.client.put(f"{URL}/finance/files/training", content=BETTER, headers=ANY)
        app.script("train.py", b"no python (")

        response = await app.client.post(f"{URL}/finance:restore?version=1")

        body = response.json()
        assert (response.status_code, body["version"], body["disk_changed"]) == (200, 4, False)
        assert (app.home.scripts / "train.py").read_bytes() == SOURCE
        assert await sources(app, "finance") == [(1, "create"), (2, "upload"), (3, "disk"), (4, "restore")]
        contents = [await bytes_of(app, "finance", number) for number in (1, 2, 3, 4)]
        assert contents == [SOURCE, BETTER, b"no python (", SOURCE]

    async def test_of_the_newest_version_makes_versions_only_of_what_it_overwrites(self, app: MethodsApp) -> None:
        await app.create()
        (app.home.scripts / "train.py").unlink()

        missing = (await app.client.post(f"{URL}/finance:restore")).json()
        app.script("train.py", BETTER)
        edited = (await app.client.post(f"{URL}/finance:restore")).json()

        assert (missing["version"], edited["version"], edited["disk_changed"]) == (1, 3, False)
        assert await bytes_of(app, "finance", 2) == BETTER
        assert (app.home.scripts / "train.py").read_bytes() == SOURCE

    async def test_goes_back_to_older_files_but_not_over_others(self, app: MethodsApp) -> None:
        await app.create()
        app.script("other.py", BETTER)
        tag = tag_of(await app.client.get(f"{URL}/finance"))
        await app.client.patch(f"{URL}/finance", json={"stages": stage("other.py"), "name": "renamed"}, headers=tag)
        app.script("train.py", MINE)

        refused = await app.client.post(f"{URL}/renamed:restore?version=1")
        kept = (app.home.scripts / "train.py").read_bytes()
        app.script("train.py", SOURCE)
        restored = (await app.client.post(f"{URL}/renamed:restore?version=1")).json()

        assert (refused.status_code, refused.json()["code"], kept) == (409, "file_in_the_way", MINE)
        assert (restored["name"], restored["stages"]["training"]["file"]) == ("renamed", "train.py")
        assert (app.home.scripts / "other.py").read_bytes() == BETTER

    async def test_refuses_what_would_not_be_valid_any_more(self, app: MethodsApp) -> None:
        await install(app)
        app.script("train.py")
        await app.create()

        responses = [
            await app.client.post(url)
            for url in (
                f"{URL}/nothing:restore",
                f"{URL}/finance:restore?version=9",
                f"{URL}/finance:restore?version=0",
                f"{URL}/SFT-Demo:restore?version=1",
                f"{URL}/SFT-Demo:restore",
            )
        ]

        assert [response.status_code for response in responses] == [404, 404, 422, 403, 200]

    async def test_bytes_of_versions_are_those_of_deleted_methods_too(self, app: MethodsApp) -> None:
        made = await app.create()
        tag = tag_of(await app.client.get(f"{URL}/finance"))
        await app.client.delete(f"{URL}/finance", headers=tag)

        assert await bytes_of(app, made["id"], 1) == SOURCE
        for path, code in (("2/files/training", "method_version_not_found"), ("1/files/saving", "stage_without_file")):
            missing = await app.client.get(f"{URL}/{made['id']}/versions/{path}")
            assert (missing.status_code, missing.json()["code"]) == (404, code)


class TestReset:
    async def test_brings_back_what_was_shipped_and_keeps_what_was_adapted(self, app: MethodsApp) -> None:
        await install(app)
        shipped = (await app.client.get(f"{URL}/Custom01")).json()
        app.script("mine.py", MINE)
        await app.client.put(f"{URL}/Custom01/files/saving", content=BETTER, headers=ANY)
        tag = tag_of(await app.client.get(f"{URL}/Custom01"))
        changes = {"description": "ours", "stages": {"training": {"file": "mine.py"}}}
        await app.client.patch(f"{URL}/Custom01", json=changes, headers=tag)
        app.script("save_custom01.py", MINE)
        app.licence.installed = False

        body = (await app.client.post(f"{URL}/Custom01:reset")).json()

        assert (body["version"], body["source"], body["disk_changed"]) == (5, "reset", False)
        for member in ("description", "stages", "lifecycle", "deployment", "files"):
            assert body[member] == shipped[member], member
        assert (app.home.scripts / "save_custom01.py").read_bytes() == script_path("save_custom01.py").read_bytes()
        assert (app.home.scripts / "mine.py").read_bytes() == MINE
        assert await bytes_of(app, "Custom01", 2, "saving") == BETTER
        assert await bytes_of(app, "Custom01", 4, "saving") == MINE
        assert (await app.client.post(f"{URL}/Custom01:reset")).json()["version"] == 5

    async def test_finds_its_files_where_they_were_installed(self, app: MethodsApp) -> None:
        app.script("custom01.py", MINE)
        await install(app)
        app.script("custom01/custom01.py", BETTER)

        body = (await app.client.post(f"{URL}/Custom01:reset")).json()

        assert body["stages"]["training"]["file"] == "custom01/custom01.py"
        assert (app.home.scripts / "custom01" / "custom01.py").read_bytes() == script_path("custom01.py").read_bytes()
        assert (app.home.scripts / "custom01.py").read_bytes() == MINE

    async def test_of_an_example_changes_nothing_and_of_ones_own_method_is_refused(self, app: MethodsApp) -> None:
        await install(app)
        await app.create()

        example = await app.client.post(f"{URL}/SFT-Demo:reset")
        own = await app.client.post(f"{URL}/finance:reset")

        assert (example.status_code, example.json()["version"]) == (200, 1)
        assert (own.status_code, own.json()["code"]) == (409, "not_a_template")


class TestUseOfAShippedScript:
    async def test_replacing_it_makes_a_file_of_the_root_unless_one_is_in_the_way(self, app: MethodsApp) -> None:
        app.script("train.py")
        stages = stage("train.py") | {"saving": {"file": "save_model.py", "conda_env": "base"}}
        made = await app.client.post(URL, json=definition(lifecycle=["customized", "complete"], stages=stages))
        file = app.script("save_model.py", MINE)

        refused = await app.client.put(f"{URL}/finance/files/saving", content=BETTER, headers=ANY)
        kept = file.read_bytes()
        file.unlink()
        replaced = await app.client.put(f"{URL}/finance/files/saving", content=BETTER, headers=ANY)

        assert made.status_code == 201, made.text
        assert (refused.status_code, refused.json()["code"], kept) == (409, "file_in_the_way", MINE)
        assert (replaced.status_code, file.read_bytes()) == (200, BETTER)
        assert [file["shipped"] for file in replaced.json()["files"]] == [False, False]
