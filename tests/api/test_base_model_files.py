"""Files of base models and of models over HTTP: uploaded in parts, registered, read in parts and as a tar."""

import asyncio
import io
import json
import os
import tarfile
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.registry.base_models.uploads import ABANDONED_DAYS, BaseModelUploads, Part, UploadTooLarge
from app.store.home import Home
from app.store.session import Database
from tests.api.client import MethodsApp, methods_app
from tests.api.resources import ROUTERS, codes, insert_model, place_base_model, safetensors

URL = "/api/v1/base-models"
CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).encode()
WEIGHTS = safetensors(embedding=[10, 4], head=[4, 10])


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home", routers=ROUTERS) as running:
        yield running


async def put(app: MethodsApp, path: str, content: Any, *, name: str = "tiny", **headers: str) -> httpx.Response:
    given = {key.replace("_", "-"): value for key, value in headers.items()}
    return await app.client.put(f"{URL}/{name}/files/{path}", content=content, headers=given)


async def part(app: MethodsApp, start: int, end: int, *, path: str = "model.safetensors") -> httpx.Response:
    return await put(app, path, WEIGHTS[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(WEIGHTS)}")


async def register(app: MethodsApp, **headers: str) -> httpx.Response:
    return await app.client.post(URL, json={"name": "tiny"}, headers=headers)


def uploaded(app: MethodsApp) -> list[Path]:
    return [path for path in (app.home.models / ".uploads").rglob("*") if path.is_file()]


class TestUpload:
    async def test_files_become_a_base_model_and_come_back_as_they_were(self, app: MethodsApp) -> None:
        assert (await put(app, "config.json", CONFIG)).json() == {
            "path": "config.json", "size_bytes": len(CONFIG), "complete": True,
        }  # fmt: skip
        await put(app, "model.safetensors", WEIGHTS)
        await put(app, "extra/notes.txt", b"n")

        made = await register(app)
        listed = (await app.client.get(f"{URL}/tiny/files")).json()
        read = await app.client.get(f"{URL}/tiny/files/model.safetensors")

        assert (made.status_code, made.json()["path"], made.json()["card"]["parameters"]) == (201, "models/tiny", 80)
        assert [file["path"] for file in listed["items"]] == ["config.json", "extra/notes.txt", "model.safetensors"]
        assert (listed["registered"], listed["size_bytes"]) == (True, made.json()["card"]["size_bytes"])
        assert read.content == WEIGHTS
        assert uploaded(app) == []

    async def test_goes_on_where_it_broke_off(self, app: MethodsApp) -> None:
        first = await part(app, 0, 50)
        head = await app.client.head(f"{URL}/tiny/files/model.safetensors")
        listed = (await app.client.get(f"{URL}/tiny/files")).json()
        second = await part(app, 50, len(WEIGHTS))

        assert (first.json()["size_bytes"], first.json()["complete"]) == (50, False)
        assert (head.headers["upload-offset"], head.headers["upload-complete"]) == ("50", "?0")
        assert (listed["registered"], listed["items"][0]["complete"]) == (False, False)
        assert (second.json()["size_bytes"], second.headers["upload-complete"]) == (len(WEIGHTS), "?1")
        assert (await app.client.get(f"{URL}/tiny/files/model.safetensors")).content == WEIGHTS

    async def test_what_came_before_the_connection_broke_is_kept(self, app: MethodsApp) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield WEIGHTS[:70]
            raise ConnectionResetError

        await put(app, "model.safetensors", body(), Content_Length=str(len(WEIGHTS)))  # nobody hears the answer

        head = await app.client.head(f"{URL}/tiny/files/model.safetensors")
        assert head.headers["upload-offset"] == "70"
        assert (await part(app, 70, len(WEIGHTS))).json()["complete"]

    async def test_begins_again_from_nothing(self, app: MethodsApp) -> None:
        await part(app, 0, 50)

        again = await put(app, "model.safetensors", WEIGHTS)

        assert again.json()["complete"]
        assert (await app.client.get(f"{URL}/tiny/files/model.safetensors")).content == WEIGHTS

    @pytest.mark.parametrize(
        ("content_range", "status", "code"),
        [
            ("bytes 60-69/100", 409, "upload_offset_wrong"),
            ("bytes 40-49/100", 409, "upload_offset_wrong"),
            ("bytes 50-59/55", 400, "content_range_unreadable"),
            ("bytes 50-59/*", 400, "content_range_unreadable"),
            ("50-59/100", 400, "content_range_unreadable"),
            ("bytes 50-54/55", 422, "upload_part_wrong"),
        ],
    )
    async def test_refuses_a_part_that_does_not_fit(
        self, app: MethodsApp, content_range: str, status: int, code: str
    ) -> None:
        await part(app, 0, 50)

        refused = await put(app, "model.safetensors", b"x" * 10, Content_Range=content_range)

        assert (refused.status_code, refused.json()["code"]) == (status, code)
        assert (await app.client.head(f"{URL}/tiny/files/model.safetensors")).headers["upload-offset"] == "50"

    async def test_a_refused_first_part_leaves_nothing(self, app: MethodsApp) -> None:
        assert (await part(app, 10, 20)).json()["code"] == "upload_offset_wrong"

        assert uploaded(app) == []
        assert (await app.client.head(f"{URL}/tiny/files/model.safetensors")).status_code == 404

    @pytest.mark.parametrize(
        ("path", "code"),
        [
            ("%2e%2e/%2e%2e/deepe.db", "path_outside_folder"),
            ("a/%2e%2e/%2e%2e/b", "path_outside_folder"),
            ("%2Fetc%2Fpasswd", "path_outside_folder"),
            (".git/config", "invalid_path"),
            ("a//b", "invalid_path"),
            ("a%5Cb", "invalid_path"),
            ("x.incomplete", "invalid_path"),
            ("checkpoint-5/x", "invalid_path"),
            ("a" * 300, "invalid_path"),
            ("config.json/x", "invalid_path"),
            ("extra", "invalid_path"),
        ],
    )
    async def test_a_path_stays_in_its_folder(self, app: MethodsApp, path: str, code: str) -> None:
        await put(app, "config.json", CONFIG)
        await put(app, "extra/notes.txt", b"n")

        refused = await put(app, path, b"x")

        assert (refused.status_code, refused.json()["code"]) == (422, code)
        assert sorted(path.name for path in uploaded(app)) == ["config.json", "notes.txt"]

    async def test_of_two_at_once_one_is_refused(self, app: MethodsApp) -> None:
        begun, going_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            begun.set()  # the file is open once its first bytes are asked for
            await going_on.wait()
            yield WEIGHTS

        first = asyncio.create_task(put(app, "model.safetensors", slow()))
        await begun.wait()
        second = await put(app, "model.safetensors", WEIGHTS)
        going_on.set()

        assert (second.status_code, second.json()["code"]) == (409, "upload_busy")
        assert (await first).json()["complete"]

    async def test_all_files_together_are_bounded(self, tmp_path: Path) -> None:
        uploads = BaseModelUploads(home=Home(tmp_path), max_bytes=100)

        async def chunks(size: int) -> AsyncIterator[bytes]:
            yield bytes(size)

        await uploads.receive("tiny", "a", chunks(60), Part(start=0, total=60))
        with pytest.raises(UploadTooLarge):
            await uploads.receive("tiny", "b", chunks(60), Part(start=0, total=60))
        assert (await uploads.receive("tiny", "a", chunks(100), Part(start=0, total=100))).complete

    async def test_a_registered_name_takes_no_files(self, app: MethodsApp) -> None:
        place_base_model(app.home.models / "tiny")
        await app.client.post(URL, json={"name": "tiny", "path": "tiny"})

        refused = await put(app, "config.json", CONFIG, name="TINY")

        assert (refused.status_code, refused.json()["code"]) == (409, "name_taken")
        assert (await app.client.delete(f"{URL}/tiny/files")).status_code == 409


def packed(kind: str, files: dict[str, bytes], *, link: str | None = None) -> bytes:
    """Return an archive with these files."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w:gz" if kind == "gz" else "w:") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link is not None:
            member = tarfile.TarInfo("config.json")
            member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member)
    return out.getvalue()


class TestArchive:
    async def put(self, app: MethodsApp, content: bytes, **headers: str) -> httpx.Response:
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        return await app.client.put(f"{URL}/tiny/archive", content=content, headers=given)

    @pytest.mark.parametrize("kind", ["", "gz", "zip"])
    @pytest.mark.parametrize("folder", ["", "tiny-1.0/"])
    async def test_its_files_become_a_base_model(self, app: MethodsApp, kind: str, folder: str) -> None:
        await put(app, "old.txt", b"of an earlier upload")
        files = {f"{folder}config.json": CONFIG, f"{folder}model.safetensors": WEIGHTS, f"{folder}1_Pooling/x": b"x"}
        content = packed(kind, files)

        first = await self.put(app, content[:100], Content_Range=f"bytes 0-99/{len(content)}")
        offset = (await app.client.get(f"{URL}/tiny/files")).json()["archive_offset"]
        rest = await self.put(app, content[100:], Content_Range=f"bytes 100-{len(content) - 1}/{len(content)}")
        made = await register(app)

        assert (first.json()["complete"], offset, rest.json()["complete"]) == (False, 100, True)
        assert made.status_code == 201, made.text
        listed = (await app.client.get(f"{URL}/tiny/files")).json()
        assert [file["path"] for file in listed["items"]] == ["1_Pooling/x", "config.json", "model.safetensors"]
        assert uploaded(app) == []

    @pytest.mark.parametrize(
        ("content", "code"),
        [
            (packed("", {"../out": b"x"}), "archive_odd_name"),
            (packed("", {"/etc/out": b"x"}), "archive_odd_name"),
            (packed("zip", {"a\\b": b"x"}), "archive_odd_name"),
            (packed("", {}, link="/etc/passwd"), "archive_odd_file"),
            (packed("", {"a": b"x", "A": b"y"}), "archive_name_twice"),
            (packed("gz", {"zeros": bytes(80 * 2**20)}), "archive_bomb"),
            (b"no archive", "archive_broken"),
            (packed("gz", {"a": b"x" * 9999})[:60], "archive_broken"),
            (packed("zip", {"a": b"x"})[:-9], "archive_broken"),
        ],
        ids=["up", "absolute", "backslash", "link", "twice", "bomb", "text", "cut", "cut-zip"],
    )
    async def test_what_leaves_the_folder_or_is_broken_is_refused(
        self, app: MethodsApp, content: bytes, code: str
    ) -> None:
        await put(app, "config.json", CONFIG)

        refused = await self.put(app, content)

        assert (refused.status_code, codes(refused.json())) == (422, [("/archive", code)])
        assert [path.name for path in uploaded(app)] == ["config.json"]


class TestRegister:
    async def test_nothing_uploaded_and_unfinished_files_are_named(self, app: MethodsApp) -> None:
        nothing = await register(app)
        await put(app, "config.json", CONFIG)
        await part(app, 0, 50)
        unfinished = await register(app)

        assert (nothing.status_code, codes(nothing.json())) == (422, [("/path", "nothing_uploaded")])
        assert (unfinished.status_code, unfinished.json()["code"]) == (409, "upload_unfinished")
        assert "model.safetensors" in unfinished.json()["detail"]

    async def test_what_is_no_whole_model_stays_uploaded(self, app: MethodsApp) -> None:
        await put(app, "config.json", CONFIG)
        await put(app, "model.safetensors", WEIGHTS[:-1])

        refused = await register(app)
        await put(app, "model.safetensors", WEIGHTS)

        assert codes(refused.json()) == [("/path", "tensor_file_wrong_size")]
        assert (await register(app)).status_code == 201

    async def test_repeated_with_its_key_it_is_answered_as_the_first_time(self, app: MethodsApp) -> None:
        await put(app, "config.json", CONFIG)
        await put(app, "model.safetensors", WEIGHTS)

        first = await register(app, **{"Idempotency-Key": "k"})
        second = await register(app, **{"Idempotency-Key": "k"})

        assert (first.status_code, second.status_code) == (201, 201)
        assert first.json() == second.json()

    async def test_a_folder_that_is_there_is_not_replaced(self, app: MethodsApp) -> None:
        other = place_base_model(app.home.models / "tiny")
        await put(app, "config.json", CONFIG)
        await put(app, "model.safetensors", WEIGHTS)

        assert (await register(app)).json()["path"] == "models/tiny-2"
        assert other.is_dir()

    async def test_an_upload_can_be_discarded_and_old_ones_go_by_themselves(self, app: MethodsApp) -> None:
        await put(app, "config.json", CONFIG)
        await put(app, "config.json", CONFIG, name="old")
        uploads = BaseModelUploads(home=app.home, max_bytes=1)
        long_ago = uploaded(app)[0].stat().st_mtime - (ABANDONED_DAYS + 1) * 24 * 3600
        for path in (uploads.folder("old"), uploads.folder("old") / "config.json"):
            os.utime(path, (long_ago, long_ago))

        assert uploads.remove_abandoned() == 1
        assert (await app.client.delete(f"{URL}/tiny/files")).status_code == 204
        assert uploaded(app) == []
        assert (await app.client.get(f"{URL}/tiny/files")).json()["code"] == "base_model_not_found"


class TestDownload:
    async def test_reads_parts(self, app: MethodsApp) -> None:
        place_base_model(app.home.models / "tiny")
        await app.client.post(URL, json={"name": "tiny", "path": "tiny"})
        address = f"{URL}/tiny/files/model.safetensors"

        some = await app.client.get(address, headers={"Range": "bytes=10-19"})
        rest = await app.client.get(address, headers={"Range": "bytes=100-"})
        wrong = ("bytes=100000-", "bytes=9-5", "bytes=-0", "lines=1-2", "bytes=x", "bytes=0-1,100000-")
        refused = [await app.client.get(address, headers={"Range": given}) for given in wrong]

        assert (some.status_code, some.content) == (206, WEIGHTS[10:20])
        assert rest.content == WEIGHTS[100:]
        assert {(one.status_code, one.json()["code"]) for one in refused} == {(416, "range_not_satisfiable")}
        assert (some.headers["content-type"], some.headers["x-content-type-options"]) == (
            "application/octet-stream", "nosniff",
        )  # fmt: skip
        assert "attachment" in some.headers["content-disposition"]

    @pytest.mark.parametrize(
        "path",
        ["%2e%2e/tiny/config.json", "%2e%2e%2f%2e%2e%2fdeepe.db", "/etc/passwd", "out.json", "gone", "", "folder/x"],
    )
    async def test_only_what_the_list_names_is_read(self, app: MethodsApp, tmp_path: Path, path: str) -> None:
        folder = place_base_model(app.home.models / "tiny")
        await app.client.post(URL, json={"name": "tiny", "path": "tiny"})
        secret = tmp_path / "secret"
        secret.mkdir()
        (secret / "x").write_text("secret")
        (folder / "out.json").symlink_to(secret / "x")
        (folder / "folder").symlink_to(secret)

        answered = await app.client.get(f"{URL}/tiny/files/{path}")

        assert (answered.status_code, answered.json()["code"]) == (404, "model_file_not_found")

    async def test_a_models_files_come_one_by_one_and_as_a_tar(self, app: MethodsApp) -> None:
        method_id = (await app.create())["id"]
        model = await insert_model(app.database, method_id=method_id, path="runs/j/1/output", name="mine")
        folder = app.home.runs / "j/1/output"
        (folder / "saved").mkdir(parents=True)
        contents = {
            "a.bin": bytes(range(256)) * 3, "empty": b"", "exact": bytes(1024), "saved/c.json": b"{}",
            "ü" * 80 + ".txt": b"u", "\\xfc.json": b"odd",
        }  # fmt: skip
        for name, content in contents.items():
            (folder / os.fsdecode(b"\xfc.json") if content == b"odd" else folder / name).write_bytes(content)
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "x").write_bytes(b"x")

        listed = (await app.client.get(f"/api/v1/models/{model}/files")).json()
        tar = await app.client.get(f"/api/v1/models/{model}/archive")
        head = await app.client.head(f"/api/v1/models/{model}/archive")

        assert {file["path"]: file["size_bytes"] for file in listed["items"]} == {
            name: len(content) for name, content in contents.items()
        }
        for name, content in contents.items():
            one = await app.client.get(f"/api/v1/models/{model}/files/{name}")
            assert (one.status_code, one.content) == (200, content), name
        assert int(head.headers["content-length"]) == int(tar.headers["content-length"]) == len(tar.content)
        assert 'filename="mine.tar"' in tar.headers["content-disposition"]
        with tarfile.open(fileobj=io.BytesIO(tar.content)) as opened:
            found = {os.fsencode(member.name): opened.extractfile(member) for member in opened.getmembers()}
        names = {os.fsencode("mine/" + name) for name in contents if name != "\\xfc.json"} | {b"mine/\xfc.json"}
        assert set(found) == names

    async def test_an_online_model_has_no_files(self, app: MethodsApp) -> None:
        method_id = (await app.create())["id"]
        model = await insert_model(app.database, method_id=method_id, path=None)

        for address in ("files/x", "archive"):
            answered = await app.client.get(f"/api/v1/models/{model}/{address}")
            assert (answered.status_code, answered.json()["code"]) == (404, "model_file_not_found")

    async def test_a_base_model_is_read_with_what_its_links_lead_to(self, app: MethodsApp) -> None:
        folder = place_base_model(app.home.models / "cache" / "snapshots" / "x")
        blob = (folder / "model.safetensors").rename(app.home.models / "cache" / "blob")
        (folder / "model.safetensors").symlink_to(blob)
        await app.client.post(URL, json={"name": "tiny", "path": "cache/snapshots/x"})

        tar = await app.client.get(f"{URL}/tiny/archive")

        with tarfile.open(fileobj=io.BytesIO(tar.content)) as opened:
            member = opened.extractfile("tiny/model.safetensors")
            assert member is not None
            assert member.read() == WEIGHTS
