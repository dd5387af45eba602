"""Which files a stage runs, and that exactly those run."""

import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.domain.enums import JobKind, VersionSource
from app.domain.errors import InvalidRequest
from app.registry.methods.files import FileState
from app.registry.methods.record import Method
from app.registry.methods.runs import script_to_run
from app.registry.methods.trees import matches
from app.registry.scripts.versions import TreeFile, VersionStore, manifest
from app.store.session import Database
from tests.api.client import MethodsApp, definition, methods_app

URL = "/api/v1/methods"
ENTRY = b"""
import os
import helper
HERE = os.path.dirname(os.path.abspath(__file__))
print(helper.V, open(os.path.join(HERE, "cfg.txt")).read().strip(), "old entry")
"""
ABOVE = b"import os, sys\nsys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))\n"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home") as running:
        yield running


def training(file: str, *include: str) -> dict[str, Any]:
    return {"training": {"file": file, "conda_env": "base", **({"include": list(include)} if include else {})}}


async def pin(app: MethodsApp, method: str = "finance") -> Method:
    async with app.database.writing() as session:
        return await app.services.runs.pin_for_run(session, method)


async def paths(app: MethodsApp, method: str = "finance") -> list[str]:
    """Return the files that the method's training runs."""
    pinned = (await pin(app, method)).files[JobKind.TRAINING]
    return sorted(app.services.files.tree(pinned))


def run(app: MethodsApp, method: Method) -> str:
    """Run the training as a job does, and return what it prints."""
    pinned = method.files[JobKind.TRAINING]
    script = script_to_run(app.services.files, pinned)
    environment = {"PYTHONPATH": ":".join(map(str, script.import_paths))}
    if script.isolated:
        environment["PYTHONSAFEPATH"] = "1"
    target = [str(script.path)] if pinned.module is None else ["-m", pinned.module]
    done = subprocess.run(
        [sys.executable, *target], cwd=app.home.scripts, env=environment, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


class TestWhatIsPinned:
    @pytest.mark.parametrize(
        ("files", "pinned"),
        [
            (
                {"train.py": b"import a.b.c\n", "a/__init__.py": b"", "a/b/c.py": b"", "a/d.py": b""},
                ["a/__init__.py", "a/b/c.py"],
            ),
            (
                {
                    "train.py": b"from a import b\n",
                    "a/__init__.py": b"from .c import d\n",
                    "a/b.py": b"",
                    "a/c.py": b"",
                },
                ["a/__init__.py", "a/b.py", "a/c.py"],
            ),
            (
                {"train.py": b"from a import *\n", "a/__init__.py": b"", "a/b.py": b"from ..x import y\n"},
                ["a/__init__.py", "a/b.py"],
            ),
            (
                {
                    "train.py": b"try:\n    import a\nexcept ImportError:\n    pass\n",
                    "a.py": b"import b\n",
                    "b.py": b"",
                },
                ["a.py", "b.py"],
            ),
            ({"train.py": b"import importlib\nimportlib.import_module('a.b')\n", "a/b.py": b""}, ["a/b.py"]),
            ({"train.py": b"import json, torch, deepe\n", "other.py": b""}, []),
            (
                {
                    "train.py": b"HERE = dirname(__file__)\njoin(HERE, 'x', 'y.json'), 'z.txt'\n",
                    "z.txt": b"",
                    "x/y.json": b"",
                },
                ["x/y.json", "z.txt"],
            ),
            ({"train.py": b"q = 'z.txt'\n", "z.txt": b""}, []),
            (
                {"train.py": b"import train_callback\n", "enums.py": b"", "redis_util.py": b""},
                ["enums.py", "redis_util.py"],
            ),
        ],
    )
    async def test_beside_a_file_of_the_root(self, app: MethodsApp, files: dict[str, bytes], pinned: list[str]) -> None:
        for path, content in files.items():
            app.script(path, content)
        await app.create()

        assert await paths(app) == sorted(["train.py", *pinned])

    async def test_in_a_folder_and_above_if_the_script_looks_there(self, app: MethodsApp) -> None:
        for path in ("helper.py", "sub/helper.py", "enums.py"):
            app.script(path)
        app.script("sub/alone.py", b"import helper, enums\n")
        app.script("sub/above.py", ABOVE + b"import helper, enums\n")
        await app.create(stages=training("sub/alone.py"))
        await app.create(name="above", stages=training("sub/above.py"))

        assert await paths(app) == ["sub/alone.py", "sub/helper.py"]
        assert await paths(app, "above") == ["enums.py", "helper.py", "sub/above.py", "sub/helper.py"]

    @pytest.mark.parametrize(
        ("pattern", "matched"),
        [
            ("configs/*.yaml", {"sub/configs/a.yaml"}),
            ("configs", {"sub/configs/a.yaml", "sub/configs/deep/b.yaml", "sub/configs/deep/c.txt"}),
            ("**/*.yaml", {"sub/configs/a.yaml", "sub/configs/deep/b.yaml"}),
            ("**", {"sub/configs/a.yaml", "sub/configs/deep/b.yaml", "sub/configs/deep/c.txt"}),
            ("/top.txt", {"top.txt"}),
        ],
    )
    async def test_what_include_names(self, app: MethodsApp, pattern: str, matched: set[str]) -> None:
        for path in ("sub/configs/a.yaml", "sub/configs/deep/b.yaml", "sub/configs/deep/c.txt", "top.txt"):
            app.script(path)
        for path in ("sub/.git/config", "sub/__pycache__/x.pyc"):
            app.script(path)
        await app.create(stages=training("sub/train.py", pattern))

        assert set(await paths(app)) == matched | {"sub/train.py"}

    async def test_files_that_cannot_be_pinned_are_refused_with_their_pointers(
        self, app: MethodsApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        app.script("train.py")
        app.script("data/Big.txt")
        app.script("data/big.txt")
        app.script("data/-odd.txt")
        (app.home.scripts / "data/link").symlink_to("/etc/hostname")
        (app.home.scripts / "data").joinpath(b"\xff".decode(errors="surrogateescape")).write_bytes(b"")
        app.script("sitecustomize.py")
        patterns = ["data", "nothing/*", "../x", "sitecustomize.py", "a//b"]
        monkeypatch.setattr("app.registry.methods.trees.MAX_FILES", 1)

        found = (await app.client.post(URL, json=definition(stages=training("train.py", *patterns)))).json()
        monkeypatch.undo()
        small = (await app.client.post(URL, json=definition(stages=training("train.py", *patterns)))).json()

        at = "/stages/training/include"
        assert (at, "tree_too_large") in {(one["pointer"], one["code"]) for one in found["errors"]}
        assert {(one["pointer"], one["code"]) for one in small["errors"]} == {
            (at, "tree_names_collide"),
            (f"{at}/0", "include_is_link"),
            (f"{at}/0", "invalid_file_path"),
            (f"{at}/1", "include_matches_nothing"),
            (f"{at}/2", "include_matches_nothing"),
            (f"{at}/2", "invalid_include"),
            (f"{at}/3", "script_is_interpreter_hook"),
            (f"{at}/4", "include_matches_nothing"),
            (f"{at}/4", "invalid_include"),
        }

    async def test_what_reading_cannot_see_is_said(self, app: MethodsApp) -> None:
        app.script(
            "train.py",
            b"import importlib, sys, os\nsys.path.append(os.getcwd())\nimportlib.import_module(sys.argv[1])\n",
        )
        await app.create()

        (stage,) = (await app.client.get(f"{URL}/finance/parameters")).json()["stages"]

        found = {(one["code"]) for one in stage["remarks"]}
        assert {"unpinned_import", "unpinned_working_directory"} <= found


class TestVersions:
    @pytest.fixture
    def files(self, app: MethodsApp) -> dict[str, Path]:
        return {
            "entry": app.script("sub/entry.py", ENTRY),
            "helper": app.script("sub/helper.py", b"V = 'old helper'\n"),
            "cfg": app.script("sub/cfg.txt", b"old cfg\n"),
        }

    async def test_a_change_of_any_file_makes_a_version_and_the_older_runs_as_it_was(
        self, app: MethodsApp, files: dict[str, Path]
    ) -> None:
        await app.create(stages=training("sub/entry.py"))
        first = await pin(app)
        files["entry"].write_bytes(ENTRY.replace(b"old", b"new"))
        files["helper"].write_text("V = 'new helper'\n")
        queued = run(app, first)
        second = await pin(app)
        files["cfg"].write_text("new cfg\n")
        third = await pin(app)

        assert queued == "old helper old cfg old entry"
        assert run(app, second) == "new helper old cfg new entry"
        assert run(app, third) == "new helper new cfg new entry"
        assert run(app, first) == queued
        assert [(one.version, one.source) for one in (second, third)] == [
            (2, VersionSource.DISK),
            (3, VersionSource.DISK),
        ]

    async def test_are_read_with_every_file_and_its_state(self, app: MethodsApp, files: dict[str, Path]) -> None:
        app.script("sub/one.json", b"{}")
        await app.create(stages=training("sub/entry.py", "*.json"))
        files["helper"].write_text("V = 'new'\n")
        files["cfg"].unlink()
        app.script("sub/two.json", b"{}")

        body = (await app.client.get(f"{URL}/finance")).json()
        version = (await app.client.get(f"{URL}/finance/versions/1")).json()
        old = await app.client.get(f"{URL}/finance/versions/1/files/training?path=sub/helper.py")

        (file,) = body["files"]
        assert body["disk_changed"] is True
        assert (file["file"], file["state"]) == ("sub/entry.py", FileState.UNCHANGED)
        assert {one["path"]: one["state"] for one in file["beside"]} == {
            "sub/cfg.txt": "missing",
            "sub/helper.py": "modified",
            "sub/one.json": "unchanged",
            "sub/two.json": "added",
        }
        assert [one["path"] for one in version["files"][0]["beside"]] == [
            "sub/cfg.txt",
            "sub/helper.py",
            "sub/one.json",
        ]
        assert old.content == b"V = 'old helper'\n"

    async def test_restore_brings_every_file_back(self, app: MethodsApp, files: dict[str, Path]) -> None:
        await app.create(stages=training("sub/entry.py"))
        for name in files:
            files[name].write_bytes(files[name].read_bytes().replace(b"old", b"new"))
        await pin(app)
        files["helper"].write_text("V = 'newest helper'\n")

        restored = await app.client.post(f"{URL}/finance:restore?version=1")

        assert (restored.status_code, restored.json()["version"], restored.json()["disk_changed"]) == (200, 4, False)
        assert run(app, await pin(app)) == "old helper old cfg old entry"
        assert files["helper"].read_bytes() == b"V = 'old helper'\n"
        assert run(app, await app_version(app, 3)) == "newest helper new cfg new entry"

    async def test_a_copy_has_files_of_its_own(self, app: MethodsApp, files: dict[str, Path]) -> None:
        app.script("sub/more/x.json")
        await app.create(stages=training("sub/entry.py", "/sub/more/*"))

        copied = await app.client.post(f"{URL}/finance:copy", json={"name": "Mine"})
        files["helper"].write_text("V = 'new helper'\n")

        assert copied.status_code == 201, copied.text
        assert copied.json()["stages"]["training"]["include"] == ["/mine/sub/more/*"]
        assert run(app, await pin(app, "Mine")) == "old helper old cfg old entry"
        assert await paths(app, "Mine") == [
            f"mine/sub/{name}" for name in ("cfg.txt", "entry.py", "helper.py", "more/x.json")
        ]

    async def test_a_stage_file_that_is_uploaded_is_pinned_with_what_it_imports_then(self, app: MethodsApp) -> None:
        await app.create()
        app.script("helper.py")

        put = await app.client.put(
            f"{URL}/finance/files/training",
            content=b"import helper\n",
            headers={"If-Match": "*", "Content-Type": "text/x-python"},
        )

        assert [one["path"] for one in put.json()["files"][0]["beside"]] == ["helper.py"]
        assert put.json()["disk_changed"] is False

    async def test_an_edit_that_cannot_be_pinned_is_refused_at_submit(self, app: MethodsApp) -> None:
        app.script("a.txt")
        await app.create(stages=training("train.py", "*.txt"))
        (app.home.scripts / "b.txt").symlink_to("/etc/hostname")

        with pytest.raises(InvalidRequest) as refused:
            await pin(app)

        (violation,) = refused.value.violations()
        assert (violation.pointer, violation.code) == ("/method", "include_is_link")

    async def test_modules_of_the_script_root_that_are_not_pinned_are_not_found(self, app: MethodsApp) -> None:
        app.script("train.py", b"import importlib, sys\nprint(importlib.import_module(''.join(['late'])).V)\n")
        app.script("late.py", b"V = 'late'\n")
        await app.create()
        await app.create(name="included", stages=training("train.py", "late.py"))

        assert run(app, await pin(app)) == "ModuleNotFoundError: No module named 'late'"
        assert run(app, await pin(app, "included")) == "late"

    async def test_packages_the_folder_above_and_siblings_of_the_script_root_work(self, app: MethodsApp) -> None:
        app.script("shared.py", b"import pkg.part\nV = pkg.part.V\n")
        app.script("pkg/__init__.py", b"from . import part\n")
        app.script("pkg/part.py", b"from .deep import V\n")
        app.script("pkg/deep/__init__.py", b"from ..base import V\n")
        app.script("pkg/base.py", b"V = 'deep'\n")
        app.script(
            "sub/train.py",
            ABOVE + b"import shared\nroot = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))\n"
            b"print(shared.V, os.path.isdir(root + '/../models'), os.getcwd())\n",
        )
        await app.create(stages=training("sub/train.py"))

        assert run(app, await pin(app)) == f"deep True {app.home.scripts}"


async def app_version(app: MethodsApp, number: int) -> Method:
    async with app.database.reading() as session:
        return await app.services.registry.version(session, "finance", number)


class TestStore:
    def tree(self, store: VersionStore, **files: bytes) -> str:
        tree = {f"{name}.py": TreeFile(store.put(content), len(content)) for name, content in files.items()}
        return store.put(manifest(tree))

    def test_several_workers_make_one_tree_at_once(self, tmp_path: Path) -> None:
        digest = self.tree(VersionStore(tmp_path), **{f"m{number}": b"x" * number for number in range(50)})

        with ThreadPoolExecutor(8) as workers:
            made = list(workers.map(lambda _: VersionStore(tmp_path).materialise_tree(digest), range(8)))

        assert len(set(made)) == 1
        assert sorted(len(file.read_bytes()) for file in made[0].iterdir()) == list(range(50))
        assert [entry.name for entry in made[0].parent.parent.iterdir() if entry.name.startswith(".")] == []

    def test_a_damaged_file_is_replaced_before_it_runs_again(self, tmp_path: Path) -> None:
        store = VersionStore(tmp_path)
        root = store.materialise_tree(self.tree(store, a=b"1", b=b"2"))
        (root / "a.py").chmod(0o644)
        (root / "a.py").write_bytes(b"changed")
        root.chmod(0o755)
        (root / "b.py").unlink()

        again = store.materialise_tree(root.parent.parent.name)

        assert [(again / name).read_bytes() for name in ("a.py", "b.py")] == [b"1", b"2"]
        assert root.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a/b/c", "a/**/c", True),
        ("a/c", "a/**/c", True),
        ("a/b/c", "a/*", False),
        ("a/b/c", "a/b", True),
        ("a", "a/b", False),
        ("a/b", "**/b/**", False),
        ("a", "**", True),
        ("ab", "a?", True),
    ],
)
def test_patterns(path: str, pattern: str, expected: bool) -> None:
    assert matches(path.split("/"), pattern.split("/")) is expected
