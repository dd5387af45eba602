"""Methods over HTTP, on SQLite and on Postgres."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from app.store.session import Database
from tests.api.client import MAX_SCRIPT_BYTES, SOURCE, MethodsApp, definition, methods_app, tag_of

URL = "/api/v1/methods"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home") as running:
        yield running


def codes(body: dict[str, Any]) -> set[tuple[str, str]]:
    return {(entry["pointer"], entry["code"]) for entry in body.get("errors", body.get("violations", []))}


class TestCreateMethod:
    async def test_returns_the_method_with_its_pinned_files(self, app: MethodsApp) -> None:
        app.script("train.py")

        response = await app.client.post(URL, json=definition(description="Ganz neu"))

        body = response.json()
        assert response.status_code == 201
        assert response.headers["location"] == f"{URL}/{body['id']}"
        assert response.headers["etag"] == f'"{body["id"][:8]}.1"'
        assert (body["version"], body["source"], body["read_only"]) == (1, "create", False)
        assert [(file["stage"], file["file"], file["state"]) for file in body["files"]] == [
            ("training", "train.py", "unchanged")
        ]
        assert (await app.client.get(f"{URL}/finance")).json() == body
        assert (await app.client.get(f"{URL}/{body['id']}")).json() == body

    async def test_says_everything_that_is_wrong_at_once(self, app: MethodsApp) -> None:
        app.script("broken.py", b"x = 1\nif x\n")
        stages = {
            "training": {"file": "broken.py", "conda_env": "unheard-of"},
            "saving": {"file": "../../etc/passwd", "conda_env": "base"},
            "inference-customized": {"file": "nowhere", "conda_env": "base"},
            "dreaming": {},
        }

        response = await app.client.post(
            URL, json=definition(stages=stages, lifecycle=["customized", "complete", "online"])
        )

        assert response.status_code == 422
        assert codes(response.json()) == {
            ("/stages/training/file", "invalid_python"),
            ("/stages/training/conda_env", "unknown_environment"),
            ("/stages/saving/file", "file_outside_root"),
            ("/stages/inference-customized", "inference_not_switched_on"),
            ("/stages/inference-customized/file", "file_not_found"),
            ("/stages/dreaming", "unknown_stage"),
            ("/deployment/target", "missing_deploy_target"),
        }
        assert "2" in next(e["detail"] for e in response.json()["errors"] if e["code"] == "invalid_python")
        assert (await app.client.get(URL)).json()["items"] == []

    @pytest.mark.parametrize(
        ("file", "code"),
        [
            ("/etc/passwd", "file_outside_root"),
            ("link.py", "file_outside_root"),
            ("nul.py", "invalid_file_path"),
            ("a\u202eb.py", "invalid_file_path"),
            ("x" * 300, "file_path_too_long"),
            ("folder", "not_a_regular_file"),
            ("big.py", "script_too_large"),
            ("binary.py", "invalid_python"),
        ],
    )
    async def test_refuses_files_that_cannot_be_run(self, app: MethodsApp, file: str, code: str) -> None:
        (app.home.root / "outside.py").write_bytes(SOURCE)
        (app.home.scripts / "link.py").symlink_to(app.home.root / "outside.py")
        (app.home.scripts / "folder.py").mkdir()
        app.script("big.py", b"#" * (MAX_SCRIPT_BYTES + 1))
        app.script("binary.py", b"\x7fELF\x00\xff")

        response = await app.client.post(URL, json=definition(stages={"training": {"file": file, "conda_env": "base"}}))

        assert response.status_code == 422
        assert codes(response.json()) == {("/stages/training/file", code)}

    async def test_takes_a_file_without_its_suffix(self, app: MethodsApp) -> None:
        app.script("linux_code/save_model.py")

        body = await app.create(
            lifecycle=["complete"], stages={"saving": {"file": "linux_code/save_model.py", "conda_env": "base"}}
        )

        assert body["files"][0]["file"] == "linux_code/save_model.py"

    @pytest.mark.parametrize("name", ["finance", "FINANCE", "Finance"])
    async def test_returns_409_if_the_name_is_taken(self, app: MethodsApp, name: str) -> None:
        await app.create()

        response = await app.client.post(URL, json=definition(name=name))

        assert response.status_code == 409
        assert response.json()["code"] == "name_taken"
        assert codes(response.json()) == {("/name", "name_taken")}

    async def test_a_taken_name_stands_beside_other_violations(self, app: MethodsApp) -> None:
        await app.create()

        response = await app.client.post(URL, json=definition(lifecycle=["online"]))

        assert response.status_code == 422
        assert {("/name", "name_taken"), ("/lifecycle", "unknown_lifecycle")} <= codes(response.json())

    async def test_needs_a_licence(self, app: MethodsApp) -> None:
        app.script("train.py")
        app.licence.installed = False

        response = await app.client.post(URL, json=definition())

        assert response.status_code == 403
        assert response.json()["code"] == "commercial_license_required"

    async def test_of_two_at_the_same_instant_one_wins(self, app: MethodsApp) -> None:
        app.script("train.py")

        responses = await asyncio.gather(*(app.client.post(URL, json=definition()) for _ in range(6)))

        assert sorted(response.status_code for response in responses) == [201, 409, 409, 409, 409, 409]
        assert {r.json()["code"] for r in responses if r.status_code == 409} == {"name_taken"}
        assert len((await app.client.get(URL)).json()["items"]) == 1

    async def test_the_same_request_with_the_same_key_creates_once(self, app: MethodsApp) -> None:
        app.script("train.py")
        key = {"Idempotency-Key": "7"}

        first = await app.client.post(URL, json=definition(), headers=key)
        second = await app.client.post(URL, json=definition(), headers=key)

        assert first.json() == second.json()
        assert second.status_code == 201
        assert second.headers["etag"] == first.headers["etag"]

    async def test_a_name_can_be_used_again_and_inherits_nothing(self, app: MethodsApp) -> None:
        first = await app.create()
        etag = tag_of(await app.client.get(f"{URL}/finance"))
        await app.client.delete(f"{URL}/finance", headers=etag)

        second = await app.create()

        assert second["id"] != first["id"]
        assert len((await app.client.get(f"{URL}/finance/versions")).json()["items"]) == 1
        stale = await app.client.patch(f"{URL}/finance", json={"description": "x"}, headers=etag)
        assert stale.status_code == 412

    async def test_refuses_a_body_that_is_no_method(self, app: MethodsApp) -> None:
        response = await app.client.post(URL, json=definition(stages=[]))

        assert response.status_code == 422
        assert codes(response.json()) == {("/stages", "field_type")}


class TestValidateMethod:
    async def test_says_what_a_create_would_say_and_changes_nothing(self, app: MethodsApp) -> None:
        await app.create()
        wanted = definition(lifecycle=["customized", "complete"])

        validated = await app.client.post(f"{URL}:validate", json=wanted)
        created = await app.client.post(URL, json=wanted)

        assert validated.status_code == 200
        assert validated.json()["valid"] is False
        assert codes(validated.json()) == codes(created.json())
        assert len((await app.client.get(URL)).json()["items"]) == 1

    async def test_needs_no_licence(self, app: MethodsApp) -> None:
        app.script("train.py")
        app.licence.installed = False

        body = (await app.client.post(f"{URL}:validate", json=definition())).json()

        assert body["valid"] is True
        assert body["violations"] == []

    async def test_what_is_not_ready_is_no_violation(self, app: MethodsApp) -> None:
        app.script("train.py")

        body = (await app.client.post(f"{URL}:validate", json=definition())).json()

        (stage,) = body["readiness"]["stages"]
        assert body["valid"] is True
        assert (body["readiness"]["ready"], stage["stage"], stage["nodes"]) == (False, "training", [])
        assert [problem["code"] for problem in stage["problems"]] == ["no_node_alive"]

    async def test_a_change_may_keep_its_name(self, app: MethodsApp) -> None:
        await app.create()

        body = (await app.client.post(f"{URL}:validate?method=finance", json=definition())).json()

        assert body["valid"] is True

    async def test_an_empty_object_is_a_method_with_everything_missing(self, app: MethodsApp) -> None:
        response = await app.client.post(f"{URL}:validate", json={})

        assert response.status_code == 200
        assert {code for _, code in codes(response.json())} == {
            "missing_name",
            "missing_training_type",
            "missing_lifecycle",
        }

    async def test_speaks_the_callers_language(self, app: MethodsApp) -> None:
        response = await app.client.post(f"{URL}:validate", json={}, headers={"Accept-Language": "zh-CN"})

        assert "请填写名称。" in [entry["detail"] for entry in response.json()["violations"]]

    async def test_something_that_is_no_object_is_422(self, app: MethodsApp) -> None:
        assert (await app.client.post(f"{URL}:validate", json=[])).status_code == 422


class TestListMethods:
    async def test_filters_and_pages(self, app: MethodsApp) -> None:
        await app.create(name="b", technique="dpo", description="Erzählt 100% Märchen")
        await app.create(name="a", training_type="embedding")
        await app.create(name="Ä")

        async def names(query: str) -> list[str]:
            response = await app.client.get(f"{URL}?{query}")
            assert response.status_code == 200, response.text
            return [item["name"] for item in response.json()["items"]]

        assert await names("sort=name") == ["a", "b", "Ä"]
        assert await names("sort=-created_at") == ["Ä", "a", "b"]
        assert await names("technique=dpo") == ["b"]
        assert await names("training_type=embedding") == ["a"]
        assert await names("lifecycle=customized") == ["a", "b", "Ä"]
        assert await names("lifecycle=customized,complete") == []
        assert await names("q=MäRCHEN") == ["b"]
        assert await names("q=%25") == ["b"]
        assert await names("q=ä") == ["b", "Ä"]

    async def test_pages_see_every_method_once(self, app: MethodsApp) -> None:
        for number in range(5):
            await app.create(name=f"m{number}")
        seen: list[str] = []
        url = f"{URL}?limit=2&sort=-name"

        while url:
            page = (await app.client.get(url)).json()
            seen += [item["name"] for item in page["items"]]
            cursor = page["next_cursor"]
            url = f"{URL}?limit=2&sort=-name&cursor={cursor}" if cursor else ""

        assert seen == ["m4", "m3", "m2", "m1", "m0"]

    @pytest.mark.parametrize("query", ["training_type=tts", "lifecycle=online", "sort=size", "cursor=abc", "limit=0"])
    async def test_refuses_filters_that_mean_nothing(self, app: MethodsApp, query: str) -> None:
        assert (await app.client.get(f"{URL}?{query}")).status_code == 422


class TestChangeMethod:
    async def test_patch_makes_a_new_version_and_keeps_the_old(self, app: MethodsApp) -> None:
        await app.create()
        tag = tag_of(await app.client.get(f"{URL}/finance"))

        response = await app.client.patch(f"{URL}/finance", json={"description": "better"}, headers=tag)

        assert response.status_code == 200
        assert (response.json()["version"], response.json()["source"]) == (2, "edit")
        assert tag_of(response) == tag_of(await app.client.get(f"{URL}/finance"))
        versions = (await app.client.get(f"{URL}/finance/versions")).json()["items"]
        assert [(version["version"], version["description"]) for version in versions] == [(2, "better"), (1, "")]
        assert (await app.client.get(f"{URL}/finance/versions/1")).json()["description"] == ""
        assert (await app.client.get(f"{URL}/finance/versions/3")).json()["code"] == "method_version_not_found"

    async def test_patch_merges_and_null_removes(self, app: MethodsApp) -> None:
        app.script("ask.py")
        stages = {
            "training": {"file": "train.py", "conda_env": "base"},
            "inference-customized": {"file": "ask.py", "conda_env": "base"},
        }
        await app.create(stages=stages, inference={"customized": True})
        tag = tag_of(await app.client.get(f"{URL}/finance"))

        response = await app.client.patch(
            f"{URL}/finance",
            json={"stages": {"inference-customized": None}, "inference": {"customized": False}},
            headers=tag | {"Content-Type": "application/merge-patch+json"},
        )

        assert response.status_code == 200, response.text
        assert set(response.json()["stages"]) == {"training"}

    async def test_a_change_that_changes_nothing_makes_no_version(self, app: MethodsApp) -> None:
        await app.create()
        read = await app.client.get(f"{URL}/finance")

        response = await app.client.put(f"{URL}/finance", json=read.json(), headers=tag_of(read))

        assert response.status_code == 200, response.text
        assert response.json() == read.json()

    async def test_of_two_concurrent_edits_the_later_gets_412(self, app: MethodsApp) -> None:
        await app.create()
        tag = tag_of(await app.client.get(f"{URL}/finance"))

        responses = await asyncio.gather(
            *(app.client.patch(f"{URL}/finance", json={"description": str(n)}, headers=tag) for n in range(5))
        )

        assert sorted(response.status_code for response in responses) == [200, 412, 412, 412, 412]
        (winner,) = [response.json() for response in responses if response.status_code == 200]
        assert (await app.client.get(f"{URL}/finance")).json() == winner
        assert winner["version"] == 2

    @pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
    async def test_returns_428_without_if_match(self, app: MethodsApp, method: str) -> None:
        await app.create()

        body = None if method == "DELETE" else definition()
        response = await app.client.request(method, f"{URL}/finance", json=body)

        assert response.status_code == 428

    async def test_takes_no_licence_to_change_what_is_there(self, app: MethodsApp) -> None:
        await app.create()
        app.licence.installed = False

        tag = tag_of(await app.client.get(f"{URL}/finance"))
        response = await app.client.patch(f"{URL}/finance", json={"name": "Renamed"}, headers=tag)

        assert response.status_code == 200
        assert (await app.client.get(f"{URL}/renamed")).status_code == 200
        assert (await app.client.get(f"{URL}/finance")).status_code == 404

    async def test_a_rename_cannot_take_the_name_of_another(self, app: MethodsApp) -> None:
        await app.create()
        await app.create(name="other")

        tag = tag_of(await app.client.get(f"{URL}/other"))
        response = await app.client.patch(f"{URL}/other", json={"name": "Finance"}, headers=tag)

        assert (response.status_code, response.json()["code"]) == (409, "name_taken")

    async def test_two_renames_to_one_name_at_once(self, app: MethodsApp) -> None:
        for name in ("a", "b", "c"):
            await app.create(name=name)
        tags = {name: tag_of(await app.client.get(f"{URL}/{name}")) for name in ("a", "b", "c")}

        responses = await asyncio.gather(
            *(app.client.patch(f"{URL}/{name}", json={"name": "new"}, headers=tag) for name, tag in tags.items())
        )

        assert sorted(response.status_code for response in responses) == [200, 409, 409]

    async def test_says_all_that_is_wrong(self, app: MethodsApp) -> None:
        await app.create()

        tag = tag_of(await app.client.get(f"{URL}/finance"))
        response = await app.client.patch(
            f"{URL}/finance", json={"lifecycle": ["customized", "complete"], "name": "a/b"}, headers=tag
        )

        assert response.status_code == 422
        assert codes(response.json()) == {
            ("/name", "invalid_name"),
            ("/stages/saving/file", "missing_file"),
            ("/stages/saving/conda_env", "missing_environment"),
        }

    async def test_refuses_a_member_of_the_wrong_type(self, app: MethodsApp) -> None:
        await app.create()

        tag = tag_of(await app.client.get(f"{URL}/finance"))
        response = await app.client.patch(f"{URL}/finance", json={"lifecycle": "customized"}, headers=tag)

        assert codes(response.json()) == {("/lifecycle", "field_type")}


class TestDeleteMethod:
    async def test_it_is_gone_but_its_versions_can_be_read_by_id(self, app: MethodsApp) -> None:
        body = await app.create()

        tag = tag_of(await app.client.get(f"{URL}/finance"))
        response = await app.client.delete(f"{URL}/finance", headers=tag)

        assert response.status_code == 204
        assert (await app.client.get(f"{URL}/finance")).status_code == 404
        assert (await app.client.get(f"{URL}/{body['id']}")).status_code == 404
        assert (await app.client.get(f"{URL}/{body['id']}/versions/1")).json()["name"] == "finance"

    async def test_needs_a_licence(self, app: MethodsApp) -> None:
        await app.create()
        app.licence.installed = False

        tag = tag_of(await app.client.get(f"{URL}/finance"))

        assert (await app.client.delete(f"{URL}/finance", headers=tag)).status_code == 403

    async def test_stale_is_412(self, app: MethodsApp) -> None:
        await app.create()
        tag = tag_of(await app.client.get(f"{URL}/finance"))
        await app.client.patch(f"{URL}/finance", json={"description": "new"}, headers=tag)

        assert (await app.client.delete(f"{URL}/finance", headers=tag)).status_code == 412


class TestLauncher:
    GROUP: ClassVar[dict[str, Any]] = {"kind": "torchrun", "processes": 2}

    async def test_is_kept_patched_copied_and_refused_like_the_rest(self, app: MethodsApp) -> None:
        stages = {"training": {"file": "train.py", "conda_env": "base", "launcher": self.GROUP}}
        made = await app.create(stages=stages)
        url = f"/api/v1/methods/{made['name']}"
        assert made["stages"]["training"]["launcher"] == self.GROUP

        patch = {"stages": {"training": {"launcher": {"processes": 4}}}}
        patched = await app.client.patch(url, json=patch, headers=tag_of(await app.client.get(url)))
        assert patched.json()["stages"]["training"]["launcher"] == {**self.GROUP, "processes": 4}
        assert patched.json()["version"] == 2

        copied = await app.client.post(f"{url}:copy", json={"name": "copy"})
        assert copied.json()["stages"]["training"]["launcher"] == {**self.GROUP, "processes": 4}

        python = {"stages": {"training": {"launcher": {"kind": "python"}}}}
        refused = await app.client.patch(url, json=python, headers=tag_of(patched))
        assert refused.status_code == 422
        (error,) = refused.json()["errors"]
        assert (error["pointer"], error["code"]) == ("/stages/training/launcher/processes", "processes_of_python")

        gone = {"stages": {"training": {"launcher": None}}}
        alone = await app.client.patch(url, json=gone, headers=tag_of(patched))
        assert alone.json()["stages"]["training"]["launcher"] is None
        again = await app.client.put(url, json=alone.json(), headers=tag_of(alone))
        assert (again.status_code, again.json()["version"]) == (200, alone.json()["version"])
