"""Methods whose files are taken from a commit of a repository on this machine."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.domain.enums import JobKind
from app.store.session import Database
from tests.api.client import MethodsApp, definition, methods_app
from tests.registry.test_trees import pin, run, training
from tests.waiting import until

URL = "/api/v1/methods"


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home") as running:
        yield running


class Repository:
    """A repository whose own configuration would run programs, and what they would leave behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trace = folder, folder.parent / "trace"
        folder.mkdir()
        self.git("init", "-q")
        trap = f"touch {self.trace}"
        for name in ("filter.trap.smudge", "filter.trap.process", "core.fsmonitor", "tar.tar.command", "core.pager"):
            self.git("config", name, trap)
        for hook in ("post-checkout", "post-index-change", "reference-transaction"):
            self.write(f".git/hooks/{hook}", f"#!/bin/sh\n{trap}\n").chmod(0o755)

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/")
        return subprocess.check_output(("git", *identity, *arguments), cwd=self.folder, text=True).strip()

    def write(self, path: str, content: str) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return file

    def commit(self) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "x")
        self.trace.unlink(missing_ok=True)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "repository")
    made.write(
        "src/train.py",
        "import pkg\nfrom pathlib import Path\nHERE = Path(__file__).parent\nprint(pkg.V, open(HERE / 'a.txt').read())",
    )
    made.write("src/pkg/__init__.py", "from .part import V\n")
    made.write("src/pkg/part.py", "V = 'part'\n")
    made.write("src/a.txt", "data")
    (made.folder / "src/link.txt").symlink_to("a.txt")
    return made


def wanted(git: str, commit: str, *include: str, file: str = "src/train.py") -> dict[str, Any]:
    return definition(stages=training(file, *include), repository={"git": git, "commit": commit})


async def test_a_commit_runs_whatever_becomes_of_the_repository(app: MethodsApp, repository: Repository) -> None:
    commit = repository.commit()
    app.script("src/train.py", b"raise SystemExit('the script root ran')\n")

    made = await app.client.post(URL, json=wanted(str(repository.folder), commit))
    shutil.rmtree(repository.folder)

    assert made.status_code == 201, made.text
    (file,) = made.json()["files"]
    assert (file["committed"], file["state"], made.json()["disk_changed"]) == (True, "unchanged", False)
    assert [one["path"] for one in file["beside"]] == [
        "src/a.txt",
        "src/link.txt",
        "src/pkg/__init__.py",
        "src/pkg/part.py",
    ]
    method = await pin(app)
    assert (method.version, run(app, method)) == (1, "part data")
    assert not repository.trace.exists()


async def test_a_module_is_one_of_the_commit_before_the_environment(app: MethodsApp, repository: Repository) -> None:
    repository.write("src/__init__.py", "")
    repository.write("src/__main__.py", "from .pkg import V\nprint(__package__, V)\n")
    body = wanted(str(repository.folder), repository.commit(), "pkg/*")
    body["stages"]["training"] |= {"file": None, "module": "src"}
    app.script("src/__init__.py", b"raise SystemExit('the script root ran')\n")

    made = (await app.client.post(URL, json=body)).json()

    (file,) = made["files"]
    assert (file["module"], file["file"], file["committed"]) == ("src", "src/__main__.py", True)
    assert run(app, await pin(app)) == "src part"


async def test_another_commit_is_another_version_and_restore_goes_back(app: MethodsApp, repository: Repository) -> None:
    first = repository.commit()
    repository.write("src/pkg/part.py", "V = 'new'\n")
    second = repository.commit()
    bare = repository.folder / ".git"
    await app.client.post(URL, json=wanted(str(repository.folder), first))

    tag = {"If-Match": (await app.client.get(f"{URL}/finance")).headers["etag"]}
    patched = await app.client.patch(
        f"{URL}/finance", json={"repository": {"git": f"file://{bare}", "commit": second}}, headers=tag
    )
    newer = run(app, await pin(app))
    put = await app.client.put(f"{URL}/finance/files/training", content=b"", headers={"If-Match": "*"})
    restored = await app.client.post(f"{URL}/finance:restore?version=1")
    copied = await app.client.post(f"{URL}/finance:copy", json={"name": "Mine"})

    assert (patched.json()["version"], newer) == (2, "new data")
    assert (put.status_code, put.json()["code"]) == (409, "file_of_commit")
    assert (restored.json()["version"], run(app, await pin(app))) == (3, "part data")
    assert (copied.status_code, copied.json()["repository"]["commit"]) == (201, first)
    assert list(app.home.scripts.iterdir()) == []


async def test_only_what_is_needed_if_the_stage_says_so(app: MethodsApp, repository: Repository) -> None:
    repository.write("big.txt", "x")
    commit = repository.commit()

    await app.client.post(URL, json=wanted(str(repository.folder), commit, "*.txt"))

    tree = app.services.files.tree((await pin(app)).files[JobKind.TRAINING])
    assert "big.txt" not in tree
    assert "src/pkg/part.py" in tree


async def test_what_cannot_be_read_is_refused_with_its_pointer(app: MethodsApp, repository: Repository) -> None:
    (repository.folder / "out.txt").symlink_to("/etc/hostname")
    commit = repository.commit()
    git = str(repository.folder)
    unreadable = ("/repository", "commit_unreadable")
    cases = {
        ("https://example.org/x.git", commit, "train.py"): {("/repository/git", "repository_not_local"), unreadable},
        (git, "main", "src/train.py"): {("/repository/commit", "commit_not_full"), unreadable},
        (git, "0" * 40, "src/train.py"): {unreadable},
        (f"{git}/src", commit, "src/train.py"): {unreadable},
        (git, commit, "src/gone.py"): {("/stages/training/file", "file_not_found")},
        (git, commit, "src/train.py"): {("/stages/training/include/0", "include_is_link")},
    }
    found = {}
    for git_, commit_, file in cases:
        body = (await app.client.post(URL, json=wanted(git_, commit_, file=file))).json()
        found[git_, commit_, file] = {(one["pointer"], one["code"]) for one in body["errors"]}

    assert found == cases


async def test_others_write_while_git_reads(
    app: MethodsApp, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, gate, git = repository.commit(), tmp_path / "gate", tmp_path / "bin" / "git"
    os.mkfifo(gate)
    git.parent.mkdir()
    waits = f"[ -e {tmp_path}/open ] || {{ : > {tmp_path}/started; read _ < {gate}; }}"
    git.write_text(f'#!/bin/sh\n{waits}\nexec {shutil.which("git")} "$@"\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
    first = await app.create()

    added = asyncio.create_task(
        app.client.post(URL, json=wanted(str(repository.folder), commit) | {"name": "from-commit"})
    )
    await until((tmp_path / "started").exists, "git")
    changed = await app.client.patch(f"{URL}/{first['id']}", json={"description": "x"}, headers={"If-Match": "*"})
    (tmp_path / "open").touch()
    await asyncio.to_thread(gate.write_text, "\n")

    assert changed.status_code == 200
    assert (await added).status_code == 201, (await added).text
