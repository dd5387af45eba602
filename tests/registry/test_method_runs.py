"""Which bytes a job runs, whatever happens to the files on disk."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.domain.enums import JobKind, VersionSource
from app.domain.errors import InvalidRequest
from app.presets.catalogue import script_path as shipped_script
from app.registry.methods.record import Method
from app.registry.methods.runs import script_to_run
from app.store.session import Database
from tests.api.client import SOURCE, MethodsApp, definition, methods_app

EDITED = b"print('edited')\n"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home") as running:
        yield running


async def pin(app: MethodsApp, method: str) -> Method:
    async with app.database.writing() as session:
        return await app.services.runs.pin_for_run(session, method)


class TestPinForRun:
    async def test_an_unchanged_method_runs_its_newest_version(self, app: MethodsApp) -> None:
        await app.create()

        assert (await pin(app, "finance")).version == 1

    async def test_an_edit_on_disk_becomes_a_version_once(self, app: MethodsApp) -> None:
        await app.create()
        app.script("train.py", EDITED)

        first, second = await pin(app, "finance"), await pin(app, "finance")

        assert (first.version, first.source) == (2, VersionSource.DISK)
        assert second == first
        assert app.services.files.versions.get(first.files[JobKind.TRAINING].sha256) == EDITED

    async def test_an_edit_that_is_not_python_is_refused_with_its_line(self, app: MethodsApp) -> None:
        await app.create()
        app.script("train.py", b"x = 1\nif x\n")

        with pytest.raises(InvalidRequest) as refused:
            await pin(app, "finance")

        (violation,) = refused.value.violations()
        assert (violation.pointer, violation.code) == ("/method", "invalid_python")
        assert violation.params["line"] == 2

    async def test_a_missing_file_is_no_edit(self, app: MethodsApp) -> None:
        await app.create()
        (app.home.scripts / "train.py").unlink()

        assert (await pin(app, "finance")).version == 1

    async def test_an_example_runs_what_was_shipped_whatever_the_root_holds(self, app: MethodsApp) -> None:
        async with app.database.writing() as session:
            await app.services.presets.install_presets(session)
        app.script("sft-demo.py", EDITED)

        method = await pin(app, "SFT-Demo")

        assert method.version == 1
        script = script_to_run(app.services.files, method.files[JobKind.TRAINING])
        assert (script.path, script.isolated) == (shipped_script("sft-demo.py"), True)
        assert script.import_paths == ()

    async def test_a_name_that_only_the_product_has_means_the_shipped_script(self, app: MethodsApp) -> None:
        app.script("train.py")
        files = {"training": "train.py", "saving": "save_model"}
        stages = {stage: {"file": file, "conda_env": "base"} for stage, file in files.items()}
        wanted = definition(lifecycle=["customized", "complete"], stages=stages)

        created = await app.client.post("/api/v1/methods", json=wanted)

        assert created.status_code == 201, created.text
        assert [(file["file"], file["shipped"]) for file in created.json()["files"]] == [
            ("train.py", False),
            ("save_model.py", True),
        ]
        app.script("save_model.py", EDITED)
        assert (await pin(app, "finance")).version == 1


class TestScriptToRun:
    @pytest.mark.parametrize("present", [SOURCE, EDITED, None])
    async def test_runs_the_stored_tree_whatever_the_root_holds(self, app: MethodsApp, present: bytes | None) -> None:
        await app.create(stages={"training": {"file": "deep/train.py", "conda_env": "base"}})
        pinned = (await pin(app, "finance")).files[JobKind.TRAINING]
        if present is None:
            (app.home.scripts / "deep/train.py").unlink()
        else:
            app.script("deep/train.py", present)

        script = script_to_run(app.services.files, pinned)

        assert script.path.parts[-3:] == ("scripts", "deep", "train.py")
        assert script.path.read_bytes() == SOURCE
        assert script.import_paths == (script.path.parent,)
        assert not script.path.is_relative_to(app.home.scripts)

    @pytest.mark.parametrize("present", [SOURCE, EDITED])
    async def test_a_job_of_an_earlier_release_runs_in_place_while_the_root_holds_the_bytes(
        self, app: MethodsApp, present: bytes
    ) -> None:
        await app.create()
        pinned = replace((await pin(app, "finance")).files[JobKind.TRAINING], tree=None)
        app.script("train.py", present)

        script = script_to_run(app.services.files, pinned)

        assert script.path.read_bytes() == SOURCE
        assert (script.path == app.home.scripts / "train.py") is (present == SOURCE)
        assert script.import_paths == (app.home.scripts,)
