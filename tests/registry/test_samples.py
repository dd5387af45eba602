"""Samples of the presets: there after the first start, never forced on anybody, never somebody else's file."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.api.routes import base_models, datasets
from app.presets import catalogue
from app.presets.catalogue import sample_base_model, sample_dataset
from app.store.session import Database
from tests.api.client import MethodsApp, methods_app

API = "/api/v1"
DATASETS = ["custom01", "grpo-demo", "sft-demo"]
MINE = b'{"question": "mine", "answer": "yes"}\n'


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(
        database, tmp_path / "home", routers=(datasets.router, base_models.router), samples=True
    ) as running:
        yield running


async def start(app: MethodsApp) -> None:
    """Do what every API process does with presets when it starts."""
    async with app.database.writing() as session:
        await app.services.presets.install_presets(session)


async def get(app: MethodsApp, path: str, **headers: str) -> Any:
    response = await app.client.get(API + path, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


async def names(app: MethodsApp, collection: str) -> list[str]:
    return [entry["name"] for entry in (await get(app, f"/{collection}"))["items"]]


async def delete(app: MethodsApp, path: str) -> None:
    response = await app.client.delete(API + path)
    assert response.status_code == 204, response.text


async def install(app: MethodsApp, preset: str) -> None:
    response = await app.client.post(f"{API}/presets/{preset}:install")
    assert response.status_code == 200, response.text


def files(folder: Path) -> Sequence[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def ship_other_rows(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> bytes:
    """Let the product ship another version of a data set; return its bytes."""
    content = sample_dataset(name).path.read_bytes().splitlines(keepends=True)[:10]
    (folder / "new.jsonl").write_bytes(b"".join(content))
    shipped = [
        one.model_copy(update={"path": folder / "new.jsonl"}) if one.name == name else one
        for one in catalogue.sample_datasets()
    ]
    monkeypatch.setattr(catalogue, "sample_datasets", lambda: tuple(shipped))
    return b"".join(content)


class TestFirstStart:
    async def test_brings_the_data_sets_and_base_models_of_the_installed_presets(self, app: MethodsApp) -> None:
        await start(app)

        assert await names(app, "datasets") == DATASETS
        assert "custom01-base" in await names(app, "base-models")
        rows = await get(app, "/datasets/custom01")
        base = await get(app, "/base-models/custom01-base")
        assert (rows["rows"], rows["columns"]) == (144, ["question", "answer"])
        assert rows["digest"] == sample_dataset("custom01").digest
        assert (app.home.root / rows["path"]).read_bytes() == sample_dataset("custom01").path.read_bytes()
        assert (app.home.root / base["path"] / "config.json").is_file()
        preview = await get(app, "/datasets/custom01/preview?limit=1")
        assert "question" in preview["items"][0]

    async def test_presets_say_what_suits_them(self, app: MethodsApp) -> None:
        before = await get(app, "/presets/Custom01")
        await start(app)

        after = {preset["name"]: preset for preset in (await get(app, "/presets"))["items"]}
        chinese = await get(app, "/presets/Custom01", **{"Accept-Language": "zh"})
        assert (before["samples"]["dataset"], before["samples"]["base_model"]) == (None, None)
        assert "Custom01" in before["samples"]["detail"]
        samples = after["Custom01"]["samples"]
        assert (samples["dataset"], samples["base_model"]) == ("custom01", "custom01-base")
        assert samples["parameters"] == {"epochs": 20, "batch_size": 8, "learning_rate": 0.5}
        assert samples["through"] == "customized"
        assert len(samples["questions"]) == 3
        assert "custom01-base" in samples["detail"]
        assert chinese["samples"]["detail"].startswith("已配置完毕，并附带示例数据集")
        assert after["VL-Demo"]["samples"]["dataset"] is None
        assert (await get(app, "/methods/Custom01/parameters"))["samples"] == samples
        mine = await app.create(name="Mine")
        assert (await get(app, f"/methods/{mine['id']}/parameters"))["samples"] is None

    async def test_a_second_start_changes_nothing(self, app: MethodsApp) -> None:
        await start(app)
        before = [await get(app, f"/{kind}") for kind in ("datasets", "base-models")]
        on_disk = files(app.home.root)

        await start(app)

        assert [await get(app, f"/{kind}") for kind in ("datasets", "base-models")] == before
        assert files(app.home.root) == on_disk

    async def test_several_processes_may_start_at_once(self, app: MethodsApp) -> None:
        await asyncio.gather(*(start(app) for _ in range(4)))

        assert await names(app, "datasets") == DATASETS
        assert len(set(await names(app, "base-models"))) == len(await names(app, "base-models"))

    async def test_an_operator_may_want_none(self, database: Database, tmp_path: Path) -> None:
        routers = (datasets.router, base_models.router)
        async with methods_app(database, tmp_path / "home", routers=routers, samples=False) as app:
            await start(app)

            assert await names(app, "datasets") == []
            assert (await get(app, "/presets/Custom01"))["samples"]["dataset"] is None

    async def test_a_disk_that_refuses_the_files_keeps_no_service_from_starting(self, app: MethodsApp) -> None:
        (app.home.datasets / "samples").write_bytes(MINE)

        await start(app)
        samples = (await get(app, "/presets/Custom01"))["samples"]
        (app.home.datasets / "samples").unlink()
        await start(app)

        assert (samples["dataset"], samples["base_model"]) == (None, "custom01-base")
        assert await names(app, "datasets") == DATASETS


class TestInstall:
    async def test_a_preset_from_the_catalogue_brings_its_pictures(self, app: MethodsApp) -> None:
        await start(app)
        await install(app, "VL-Demo")

        samples = (await get(app, "/presets/VL-Demo"))["samples"]
        rows = await get(app, f"/datasets/{samples['dataset']}")
        folder = app.home.root / rows["path"]
        shown = [json.loads(line) for line in (folder / "vl-demo.jsonl").read_text().splitlines()]
        assert rows["rows"] == len(shown) == 400
        named = {image["imageId"] for row in shown for image in row["images"]}
        assert named == {path.name for path in (folder / "images").iterdir()}

    async def test_a_deleted_sample_stays_away_until_its_preset_is_installed_again(self, app: MethodsApp) -> None:
        await start(app)
        await delete(app, "/datasets/custom01?with_file=true")
        await delete(app, "/base-models/custom01-base")

        await start(app)
        without = (await get(app, "/presets/Custom01"))["samples"]
        gone = await names(app, "datasets")
        await install(app, "Custom01")

        assert (without["dataset"], without["base_model"]) == (None, None)
        assert gone == ["grpo-demo", "sft-demo"]
        samples = (await get(app, "/presets/Custom01"))["samples"]
        assert (samples["dataset"], samples["base_model"]) == ("custom01", "custom01-base")
        assert (await get(app, "/datasets/custom01/preview?limit=1"))["total"] == 144


class TestWhatAPersonPlaced:
    async def test_a_name_that_is_taken_is_neither_touched_nor_claimed(self, app: MethodsApp) -> None:
        (app.home.datasets / "custom01.jsonl").write_bytes(MINE)
        (app.home.models / "custom01-base").mkdir()
        (app.home.models / "custom01-base" / "config.json").write_text("{}")
        for collection, body in (
            ("datasets", {"name": "custom01", "path": "custom01.jsonl"}),
            ("base-models", {"name": "Custom01-Base", "path": "custom01-base"}),
        ):
            assert (await app.client.post(f"{API}/{collection}", json=body)).status_code == 201

        await start(app)

        samples = (await get(app, "/presets/Custom01"))["samples"]
        assert (samples["dataset"], samples["base_model"]) == ("custom01-2", "custom01-base-2")
        assert (await get(app, "/datasets/custom01"))["rows"] == 1
        assert (app.home.datasets / "custom01.jsonl").read_bytes() == MINE
        assert files(app.home.models / "custom01-base") == ["config.json"]

    async def test_the_same_rows_uploaded_by_hand_are_the_sample(self, app: MethodsApp) -> None:
        content = sample_dataset("custom01").path.read_bytes()
        response = await app.client.put(f"{API}/datasets/custom01/file", content=content)
        assert response.status_code == 201, response.text

        await start(app)

        assert await names(app, "datasets") == DATASETS
        assert (await get(app, "/datasets/custom01"))["id"] == response.json()["id"]

    async def test_a_changed_file_is_not_written_over_when_the_sample_comes_back(self, app: MethodsApp) -> None:
        await start(app)
        changed = app.home.root / (await get(app, "/datasets/custom01"))["path"]
        changed.write_bytes(MINE)
        await delete(app, "/datasets/custom01")

        await install(app, "Custom01")

        assert changed.read_bytes() == MINE
        assert (await get(app, "/datasets/custom01"))["rows"] == 144


class TestUpgrade:
    async def test_brings_a_new_version_and_leaves_the_one_that_jobs_used(
        self, app: MethodsApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        await start(app)
        before = await get(app, "/datasets/custom01")
        shipped = ship_other_rows(monkeypatch, tmp_path, "custom01")

        await start(app)
        await start(app)

        assert await get(app, "/datasets/custom01") == before
        assert (app.home.root / before["path"]).read_bytes() != shipped
        samples = (await get(app, "/presets/Custom01"))["samples"]
        assert samples["dataset"] == "custom01-2"
        assert (app.home.root / (await get(app, "/datasets/custom01-2"))["path"]).read_bytes() == shipped
        assert await names(app, "datasets") == ["custom01", "custom01-2", "grpo-demo", "sft-demo"]

    async def test_brings_nothing_back_that_was_deleted(
        self, app: MethodsApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        await start(app)
        await delete(app, "/datasets/custom01")
        ship_other_rows(monkeypatch, tmp_path, "custom01")

        await start(app)

        assert await names(app, "datasets") == ["grpo-demo", "sft-demo"]


def test_a_program_that_is_called_otherwise_makes_another_version() -> None:
    tiny, styles = sample_base_model("tiny-base"), sample_base_model("tiny-styles")

    assert len({tiny.digest, styles.digest, tiny.model_copy(update={"version": 2}).digest}) == 3
