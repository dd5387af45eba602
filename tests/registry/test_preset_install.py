"""Shipped methods: installed once, upgraded without touching anybody's work, gone when deleted."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.domain.enums import Platform
from app.presets import catalogue
from app.registry.nodes.platforms import this_machine, wanted_platforms
from app.store import methods as method_store
from app.store.nodes import register_node
from app.store.session import Database
from tests.api.client import MethodsApp, methods_app, tag_of

EDITED = b"print('mine')\n"
URL = "/api/v1/methods"
PYTHON = {"Content-Type": "text/x-python", "If-Match": "*"}
UPLOAD = {"Content-Type": "text/x-python", "If-None-Match": "*"}
BY_DEFAULT = ["Custom01", "Custom02", "GRPO-Demo", "SFT-Demo"]
WITHOUT_SFT = BY_DEFAULT[:-1]


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home") as running:
        yield running


async def install(app: MethodsApp) -> list[str]:
    async with app.database.writing() as session:
        return await app.services.presets.install_presets(session)


async def names(app: MethodsApp) -> list[str]:
    return [method["name"] for method in (await app.client.get(f"{URL}?sort=name")).json()["items"]]


def ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **contents: bytes) -> None:
    """Let the product ship the next version of everything, with other bytes for some files."""
    upgraded = tuple(
        manifest.model_copy(update={"version": manifest.version + 1}) for manifest in catalogue.load_manifests()
    )
    original = catalogue.script_path

    def shipped(name: str) -> Path:
        content = contents.get(name.removesuffix(".py").replace("-", "_"))
        if content is None:
            return original(name)
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    monkeypatch.setattr(catalogue, "load_manifests", lambda: upgraded)
    monkeypatch.setattr(catalogue, "script_path", shipped)


class TestInstallPresets:
    async def test_brings_the_methods_and_their_files(self, app: MethodsApp) -> None:
        assert await install(app) == BY_DEFAULT

        sft = (await app.client.get(f"{URL}/SFT-Demo")).json()
        assert (sft["read_only"], sft["source"], sft["disk_changed"]) == (True, "preset", False)
        assert sft["stages"]["training"]["file"] == "sft-demo.py"
        assert all(file["shipped"] for file in sft["files"])
        in_root = sorted(path.name for path in app.home.scripts.iterdir())
        assert in_root == [
            *("ask_custom01.py", "custom01.py", "custom01_deploy_example.py"),
            *("custom02.py", "custom02_ask_model.py", "save_custom01.py"),
        ]

    async def test_a_second_start_changes_nothing(self, app: MethodsApp) -> None:
        await install(app)
        before = (await app.client.get(URL)).json()

        assert await install(app) == []
        assert (await app.client.get(URL)).json() == before

    async def test_several_processes_may_start_at_once(self, app: MethodsApp) -> None:
        installed = await asyncio.gather(*(install(app) for _ in range(4)))

        assert sorted(map(len, installed)) == [0, 0, 0, len(BY_DEFAULT)]
        assert await names(app) == BY_DEFAULT

    async def test_no_file_is_shared_with_what_everybody_adapts(self, app: MethodsApp) -> None:
        await install(app)
        methods = [(await app.client.get(f"{URL}/{name}")).json() for name in await names(app)]

        adapted = {file["file"] for method in methods if not method["read_only"] for file in method["files"]}
        examples = {file["file"] for method in methods if method["read_only"] for file in method["files"]}

        assert adapted
        assert examples
        assert adapted.isdisjoint(examples)

    async def test_a_file_of_the_users_own_is_neither_touched_nor_claimed(self, app: MethodsApp) -> None:
        for name in ("custom01.py", "sft-demo.py", "save_custom01.py"):
            app.script(name, EDITED)
        app.script("custom01/save_custom01.py", b"if x\n")

        await install(app)

        names = ("custom01.py", "sft-demo.py", "save_custom01.py")
        assert {(app.home.scripts / name).read_bytes() for name in names} == {EDITED}
        custom01, sft = [(await app.client.get(f"{URL}/{name}")).json() for name in ("Custom01", "SFT-Demo")]
        assert (custom01["disk_changed"], sft["disk_changed"]) == (False, False)
        assert custom01["stages"]["training"]["file"] == "custom01/custom01.py"
        assert custom01["stages"]["saving"]["file"] == "custom01-2/save_custom01.py"
        assert custom01["stages"]["inference-customized"]["file"] == "ask_custom01.py"
        written = (await app.client.get(f"{URL}/Custom01/files/training")).content
        assert written == catalogue.script_path("custom01.py").read_bytes()

    async def test_the_same_bytes_that_are_there_are_used(self, app: MethodsApp) -> None:
        app.script("custom01.py", catalogue.script_path("custom01.py").read_bytes())

        await install(app)

        assert (await app.client.get(f"{URL}/Custom01")).json()["stages"]["training"]["file"] == "custom01.py"

    async def test_a_method_of_the_users_own_keeps_its_name(self, app: MethodsApp) -> None:
        mine = await app.create(name="sft-demo")

        assert await install(app) == WITHOUT_SFT
        assert (await app.client.get(f"{URL}/SFT-Demo")).json()["id"] == mine["id"]

    async def test_a_deleted_preset_stays_away_until_it_is_installed_again(self, app: MethodsApp) -> None:
        await install(app)
        tag = tag_of(await app.client.get(f"{URL}/SFT-Demo"))
        assert (await app.client.delete(f"{URL}/SFT-Demo", headers=tag)).status_code == 204

        assert await install(app) == []
        assert await names(app) == WITHOUT_SFT
        shown = {p["name"]: p for p in (await app.client.get("/api/v1/presets")).json()["items"]}
        assert (shown["SFT-Demo"]["installed"], shown["SFT-Demo"]["removed"]) == (False, True)

        response = await app.client.post("/api/v1/presets/SFT-Demo:install")
        assert response.status_code == 200, response.text
        assert await names(app) == BY_DEFAULT
        again = await app.client.post("/api/v1/presets/SFT-Demo:install")
        assert again.json()["id"] == response.json()["id"]

    async def test_what_is_in_the_catalogue_only_comes_by_name(self, app: MethodsApp) -> None:
        await install(app)
        absent = await app.client.get(f"{URL}/PEFT-Demo")

        response = await app.client.post("/api/v1/presets/PEFT-Demo:install")

        assert (absent.status_code, response.status_code) == (404, 200)
        assert await names(app) == sorted([*BY_DEFAULT, "PEFT-Demo"])
        assert await install(app) == []

    async def test_an_unknown_preset_is_404(self, app: MethodsApp) -> None:
        response = await app.client.post("/api/v1/presets/Nothing:install")

        assert (response.status_code, response.json()["code"]) == (404, "preset_not_found")


class TestUpgrade:
    async def test_brings_new_versions_of_read_only_examples(
        self, app: MethodsApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        await install(app)
        before = (await app.client.get(f"{URL}/SFT-Demo")).json()
        ship(monkeypatch, tmp_path, sft_demo=EDITED)

        await install(app)

        body = (await app.client.get(f"{URL}/SFT-Demo")).json()
        assert (body["version"], body["preset_version"]) == (2, before["preset_version"] + 1)
        assert body["disk_changed"] is False
        assert (await app.client.get(f"{URL}/SFT-Demo/files/training")).content == EDITED

    async def test_moves_an_example_of_an_older_product_out_of_the_script_root(
        self, app: MethodsApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Examples lay in the script root, and were born as modified where users had files of these names."""
        await install(app)
        app.script("sft-demo.py", EDITED)
        async with app.database.writing() as session:
            row = await method_store.get(session, "SFT-Demo")
            version = await method_store.get_version(session, row)
            version.files = {stage: {**pin, "shipped": False} for stage, pin in version.files.items()}
            session.add(version)
        before = (await app.client.get(f"{URL}/SFT-Demo")).json()
        ship(monkeypatch, tmp_path)

        await install(app)

        after = (await app.client.get(f"{URL}/SFT-Demo")).json()
        assert (before["disk_changed"], after["disk_changed"]) == (True, False)
        assert after["stages"] == before["stages"]
        assert (app.home.scripts / "sft-demo.py").read_bytes() == EDITED

    async def test_leaves_templates_to_their_users(
        self, app: MethodsApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        await install(app)
        before = (await app.client.get(f"{URL}/Custom01")).json()
        ship(monkeypatch, tmp_path, custom01=EDITED)

        await install(app)

        assert (await app.client.get(f"{URL}/Custom01")).json() == before

    async def test_does_not_bring_a_deleted_preset_back(
        self, app: MethodsApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        await install(app)
        tag = tag_of(await app.client.get(f"{URL}/SFT-Demo"))
        await app.client.delete(f"{URL}/SFT-Demo", headers=tag)
        ship(monkeypatch, tmp_path)

        await install(app)

        assert await names(app) == WITHOUT_SFT


class TestRights:
    async def test_a_read_only_example_refuses_every_change(self, app: MethodsApp) -> None:
        await install(app)
        tag = tag_of(await app.client.get(f"{URL}/SFT-Demo"))
        shipped = catalogue.script_path("sft-demo.py").read_bytes()

        patched = await app.client.patch(f"{URL}/SFT-Demo", json={"description": "x"}, headers=tag)
        upload = await app.client.put(f"{URL}/SFT-Demo/files/training", content=EDITED, headers=PYTHON)

        assert (patched.status_code, patched.json()["code"]) == (403, "preset_read_only")
        assert (upload.status_code, upload.json()["code"]) == (403, "preset_read_only")
        assert (await app.client.get(f"{URL}/SFT-Demo/files/training")).content == shipped

    async def test_a_script_of_a_users_own_may_be_called_as_an_examples(self, app: MethodsApp) -> None:
        await install(app)
        shipped = (await app.client.get(f"{URL}/SFT-Demo/files/training")).content

        uploaded = await app.client.put("/api/v1/scripts/sft-demo.py", content=EDITED, headers=UPLOAD)

        assert uploaded.status_code == 201, uploaded.text
        sft = (await app.client.get(f"{URL}/SFT-Demo")).json()
        assert (sft["version"], sft["disk_changed"]) == (1, False)
        assert (await app.client.get(f"{URL}/SFT-Demo/files/training")).content == shipped
        mine = await app.create(stages={"training": {"file": "sft-demo.py", "conda_env": "base"}})
        assert [file["shipped"] for file in mine["files"]] == [False]

    async def test_everybody_adapts_custom01_and_its_files(self, app: MethodsApp) -> None:
        await install(app)
        app.licence.installed = False

        for stage in ("training", "saving", "inference-complete", "deployment"):
            response = await app.client.put(
                f"{URL}/Custom01/files/{stage}",
                content=EDITED,
                headers={"Content-Type": "text/x-python", "If-Match": "*"},
            )
            assert response.status_code == 200, response.text
        tag = tag_of(await app.client.get(f"{URL}/Custom01"))
        patched = await app.client.patch(f"{URL}/Custom01", json={"description": "Ours"}, headers=tag)

        assert (patched.status_code, patched.json()["description"]) == (200, "Ours")
        assert (await app.client.get(f"{URL}/SFT-Demo")).json()["disk_changed"] is False

    async def test_renaming_a_template_needs_no_licence_and_adds_no_method(self, app: MethodsApp) -> None:
        await install(app)
        app.licence.installed = False
        before = len((await app.client.get(URL)).json()["items"])
        tag = tag_of(await app.client.get(f"{URL}/Custom01"))

        renamed = await app.client.patch(f"{URL}/Custom01", json={"name": "Mine"}, headers=tag)
        await install(app)
        again = await app.client.post("/api/v1/presets/Custom01:install")
        deleted = await app.client.delete(f"{URL}/Mine", headers={"If-Match": "*"})

        assert (renamed.status_code, again.status_code, deleted.status_code) == (200, 200, 403)
        assert again.json()["name"] == "Mine"
        assert len((await app.client.get(URL)).json()["items"]) == before

    async def test_a_copy_of_an_example_can_be_changed(self, app: MethodsApp) -> None:
        await install(app)

        copied = await app.client.post(f"{URL}/SFT-Demo:copy", json={"name": "Mine"})

        assert copied.status_code == 201, copied.text
        assert copied.json()["read_only"] is False
        response = await app.client.put(
            f"{URL}/Mine/files/training",
            content=EDITED,
            headers={"Content-Type": "text/x-python", "If-Match": "*"},
        )
        assert response.status_code == 200
        assert (await app.client.get(f"{URL}/SFT-Demo")).json()["disk_changed"] is False


class TestPlatforms:
    async def test_a_mac_that_joins_brings_the_methods_for_macs(self, app: MethodsApp) -> None:
        app.services.presets._choice = "auto"
        assert await install(app) == BY_DEFAULT

        async with app.database.writing() as session:
            await register_node(
                session,
                name="mac",
                platform=Platform.APPLE,
                accelerators=[],
                environments=[],
                slots=1,
                boot_id="1",
                now=datetime.now(UTC),
            )

        assert await install(app) == ["MLX-Demo"]

    @pytest.mark.parametrize(
        ("platform", "expected"),
        [
            (Platform.CUDA, BY_DEFAULT),
            (Platform.CPU, BY_DEFAULT),
            (Platform.APPLE, ["Custom01", "Custom02", "MLX-Demo"]),
        ],
    )
    def test_what_a_platform_has_from_the_start(self, platform: Platform, expected: list[str]) -> None:
        manifests = catalogue.load_manifests()

        assert [manifest.name for manifest in manifests if platform in manifest.default_platforms] == expected

    def test_the_choice_of_platforms(self) -> None:
        cpu, apple = Platform.CPU, Platform.APPLE

        assert wanted_platforms("auto", machine=cpu, nodes=[apple]) == {cpu, apple}
        assert wanted_platforms("cuda", machine=cpu, nodes=[apple]) == {Platform.CUDA}
        assert wanted_platforms("all", machine=cpu, nodes=[]) == set(Platform)

    @pytest.mark.parametrize(
        ("trace", "platform"),
        [
            ("proc/driver/nvidia/version", Platform.CUDA),
            ("usr/lib/wsl/lib/libcuda.so.1", Platform.CUDA),
            ("etc/passwd", Platform.CPU),
        ],
    )
    def test_knows_this_machine_by_its_driver(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trace: str, platform: Platform
    ) -> None:
        monkeypatch.setattr("sys.platform", "linux")
        monkeypatch.setattr("shutil.which", lambda _: None)
        (tmp_path / trace).parent.mkdir(parents=True)
        (tmp_path / trace).touch()

        assert this_machine(root=tmp_path) is platform

    @pytest.mark.parametrize(("machine", "platform"), [("arm64", Platform.APPLE), ("x86_64", Platform.CPU)])
    def test_knows_apple_silicon(self, monkeypatch: pytest.MonkeyPatch, machine: str, platform: Platform) -> None:
        monkeypatch.setattr("sys.platform", "darwin")
        monkeypatch.setattr("platform.machine", lambda: machine)

        assert this_machine() is platform
