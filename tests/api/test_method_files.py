"""Stage files, copies, and what happens to a method when somebody edits its files on disk."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from app.store.session import Database
from tests.api.client import MAX_SCRIPT_BYTES, SOURCE, MethodsApp, methods_app, tag_of

URL = "/api/v1/methods/finance"
FILE = f"{URL}/files/training"
PYTHON = {"Content-Type": "text/x-python"}
BETTER = b"print('better')\n"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home") as running:
        yield running


async def put(app: MethodsApp, url: str, content: bytes, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await app.client.put(url, content=content, headers=PYTHON | names)


class TestReadFiles:
    async def test_gives_the_bytes_and_their_digest(self, app: MethodsApp) -> None:
        await app.create()

        response = await app.client.get(FILE)

        assert response.content == SOURCE
        assert response.headers["etag"] == f'"{hashlib.sha256(SOURCE).hexdigest()}"'
        assert response.headers["content-type"].startswith("text/x-python")

    async def test_notices_an_edit_on_disk(self, app: MethodsApp) -> None:
        await app.create()
        before = (await app.client.get(URL)).json()
        app.script("train.py", BETTER)

        body = (await app.client.get(URL)).json()

        assert (before["disk_changed"], body["disk_changed"]) == (False, True)
        assert body["files"][0]["state"] == "modified"
        assert body["version"] == 1
        assert (await app.client.get(FILE)).content == BETTER

    async def test_a_file_that_is_gone_is_still_there(self, app: MethodsApp) -> None:
        await app.create()
        (app.home.scripts / "train.py").unlink()

        listed = (await app.client.get(f"{URL}/files")).json()["items"]

        assert [file["state"] for file in listed] == ["missing"]
        assert (await app.client.get(FILE)).content == SOURCE

    async def test_restore_brings_the_pinned_bytes_back(self, app: MethodsApp) -> None:
        await app.create()
        app.script("train.py", b"no python (")

        response = await app.client.post(f"{URL}:restore")

        assert response.json()["disk_changed"] is False
        assert (app.home.scripts / "train.py").read_bytes() == SOURCE

    async def test_unknown_stages_and_stages_without_file(self, app: MethodsApp) -> None:
        await app.create()

        assert (await app.client.get(f"{URL}/files/saving")).json()["code"] == "stage_without_file"
        assert (await app.client.get(f"{URL}/files/dreaming")).status_code == 422


class TestReplaceFile:
    async def test_makes_a_new_version_that_pins_the_bytes(self, app: MethodsApp) -> None:
        await app.create()
        etag = (await app.client.get(FILE)).headers["etag"]

        response = await put(app, FILE, BETTER, If_Match=etag)

        body = response.json()
        assert response.status_code == 200, response.text
        assert (body["version"], body["source"], body["disk_changed"]) == (2, "upload", False)
        assert body["files"][0]["sha256"] == hashlib.sha256(BETTER).hexdigest()
        assert (app.home.scripts / "train.py").read_bytes() == BETTER
        old = (await app.client.get(f"{URL}/versions/1")).json()
        assert old["files"][0]["sha256"] == hashlib.sha256(SOURCE).hexdigest()

    async def test_of_two_concurrent_uploads_one_wins(self, app: MethodsApp) -> None:
        await app.create()
        etag = (await app.client.get(FILE)).headers["etag"]
        contents = [f"n = {n}\n".encode() for n in range(4)]

        responses = await asyncio.gather(*(put(app, FILE, content, If_Match=etag) for content in contents))

        assert sorted(response.status_code for response in responses) == [200, 412, 412, 412]
        (winner,) = [c for c, response in zip(contents, responses, strict=True) if response.status_code == 200]
        assert (await app.client.get(FILE)).content == winner

    async def test_an_unread_edit_on_disk_is_not_overwritten(self, app: MethodsApp) -> None:
        await app.create()
        etag = (await app.client.get(FILE)).headers["etag"]
        app.script("train.py", b"n = 1\n")

        response = await put(app, FILE, BETTER, If_Match=etag)

        assert response.status_code == 412
        assert (app.home.scripts / "train.py").read_bytes() == b"n = 1\n"

    async def test_without_if_match_is_428(self, app: MethodsApp) -> None:
        await app.create()

        assert (await put(app, FILE, BETTER)).status_code == 428

    async def test_refuses_what_is_not_python_with_line_and_column(self, app: MethodsApp) -> None:
        await app.create()

        response = await put(app, FILE, b"x = 1\nif x\n", If_Match="*")

        (entry,) = response.json()["errors"]
        assert (response.status_code, entry["code"]) == (422, "invalid_python")
        assert "2" in entry["detail"]
        assert "5" in entry["detail"]
        assert (app.home.scripts / "train.py").read_bytes() == SOURCE

    async def test_reads_the_coding_line(self, app: MethodsApp) -> None:
        await app.create()

        latin = "# -*- coding: latin-1 -*-\nname = 'Größe'\n".encode("latin-1")

        assert (await put(app, FILE, latin, If_Match="*")).status_code == 200

    async def test_too_large_is_413(self, app: MethodsApp) -> None:
        await app.create()

        assert (await put(app, FILE, b"#" * (MAX_SCRIPT_BYTES + 1), If_Match="*")).status_code == 413

    async def test_wrong_content_type_is_415(self, app: MethodsApp) -> None:
        await app.create()

        response = await put(app, FILE, BETTER, If_Match="*", Content_Type="application/json")

        assert response.status_code == 415

    async def test_a_file_that_serves_two_stages_changes_for_both(self, app: MethodsApp) -> None:
        both = {
            "training": {"file": "both.py", "conda_env": "base"},
            "saving": {"file": "both", "conda_env": "base"},
        }
        await app.create(lifecycle=["customized", "complete"], stages=both)

        body = (await put(app, FILE, BETTER, If_Match="*")).json()

        assert {file["sha256"] for file in body["files"]} == {hashlib.sha256(BETTER).hexdigest()}


class TestScripts:
    async def test_upload_then_use(self, app: MethodsApp) -> None:
        created = await put(app, "/api/v1/scripts/new/train.py", SOURCE)
        listed = (await app.client.get("/api/v1/scripts")).json()["items"]
        read = await app.client.get("/api/v1/scripts/new/train.py")

        assert created.status_code == 201
        assert created.json()["path"] == "new/train.py"
        assert [(script["path"], script["size_bytes"]) for script in listed] == [("new/train.py", len(SOURCE))]
        assert read.content == SOURCE
        assert tag_of(read) == tag_of(created)

    async def test_are_listed_by_pages(self, app: MethodsApp) -> None:
        for name in ("b.py", "a.py", "c/d.py"):
            await put(app, f"/api/v1/scripts/{name}", SOURCE)

        first = (await app.client.get("/api/v1/scripts", params={"limit": 2})).json()
        rest = (await app.client.get("/api/v1/scripts", params={"cursor": first["next_cursor"]})).json()

        assert [[script["path"] for script in page["items"]] for page in (first, rest)] == [
            ["a.py", "b.py"],
            ["c/d.py"],
        ]
        assert rest["next_cursor"] is None

    async def test_nothing_is_overwritten_unread(self, app: MethodsApp) -> None:
        created = await put(app, "/api/v1/scripts/train.py", SOURCE)

        unread = await put(app, "/api/v1/scripts/train.py", BETTER)
        only_new = await put(app, "/api/v1/scripts/train.py", BETTER, If_None_Match="*")
        stale = await put(app, "/api/v1/scripts/train.py", BETTER, If_Match='"abc"')
        vanished = await put(app, "/api/v1/scripts/other.py", BETTER, If_Match=created.headers["etag"])
        read = await put(app, "/api/v1/scripts/train.py", BETTER, If_Match=created.headers["etag"])

        assert (unread.status_code, only_new.status_code, stale.status_code) == (428, 412, 412)
        assert vanished.status_code == 412
        assert read.status_code == 200
        assert not (app.home.scripts / "other.py").exists()

    @pytest.mark.parametrize("path", ["..%2f..%2fx.py", "a/%2e%2e/%2e%2e/x.py", "%00.py", "con.py", "a%5cb.py"])
    async def test_refuses_paths_that_leave_or_mislead(self, app: MethodsApp, path: str) -> None:
        response = await put(app, f"/api/v1/scripts/{path}", SOURCE)

        assert response.status_code == 422, response.text
        assert not (app.home.root / "x.py").exists()

    async def test_absent_is_404(self, app: MethodsApp) -> None:
        response = await app.client.get("/api/v1/scripts/nowhere.py")

        assert (response.status_code, response.json()["code"]) == (404, "script_not_found")

    async def test_methods_notice_at_their_next_read(self, app: MethodsApp) -> None:
        await app.create()
        etag = (await app.client.get("/api/v1/scripts/train.py")).headers["etag"]

        await put(app, "/api/v1/scripts/train.py", BETTER, If_Match=etag)

        assert (await app.client.get(URL)).json()["disk_changed"] is True


class TestCopyMethod:
    async def test_the_copy_has_scripts_of_its_own(self, app: MethodsApp) -> None:
        original = await app.create(stages={"training": {"file": "deep/train", "conda_env": "base"}})

        response = await app.client.post(f"{URL}:copy", json={"name": "Größe 2"})

        body = response.json()
        assert response.status_code == 201, response.text
        assert body["stages"]["training"]["file"] == "deep/größe-2_train.py"
        assert (body["source"], body["files"][0]["state"]) == ("copy", "unchanged")
        assert body["id"] != original["id"]
        etag = (await app.client.get(f"/api/v1/methods/{body['id']}/files/training")).headers["etag"]
        await put(app, f"/api/v1/methods/{body['id']}/files/training", BETTER, If_Match=etag)
        assert (await app.client.get(FILE)).content == SOURCE

    async def test_a_file_in_the_way_is_not_overwritten(self, app: MethodsApp) -> None:
        await app.create()
        app.script("new_train.py", BETTER)

        body = (await app.client.post(f"{URL}:copy", json={"name": "new"})).json()

        assert body["stages"]["training"]["file"] == "new_train_2.py"
        assert (app.home.scripts / "new_train.py").read_bytes() == BETTER

    @pytest.mark.parametrize(("name", "status"), [("Finance", 409), ("a/b", 422), ("", 422)])
    async def test_a_refused_copy_leaves_no_files(self, app: MethodsApp, name: str, status: int) -> None:
        await app.create()

        response = await app.client.post(f"{URL}:copy", json={"name": name})

        assert response.status_code == status
        assert [file.name for file in app.home.scripts.iterdir()] == ["train.py"]

    async def test_needs_a_licence(self, app: MethodsApp) -> None:
        await app.create()
        app.licence.installed = False

        assert (await app.client.post(f"{URL}:copy", json={"name": "new"})).status_code == 403

    async def test_takes_an_edit_on_disk_along(self, app: MethodsApp) -> None:
        await app.create()
        app.script("train.py", BETTER)

        await app.client.post(f"{URL}:copy", json={"name": "new"})

        assert (await app.client.get("/api/v1/methods/new/files/training")).content == BETTER
