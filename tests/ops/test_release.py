"""`scripts/release.sh` in a small repository of its own."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ops.dependencies import ROOT

DIGEST = "59bb03251907983d1603d27c3087ddb1e93299ea2163adcdba37899a4fb12ffb"
PACKAGE_DATA = """[tool.setuptools]
packages = ["app"]
[tool.setuptools.package-data]
app = ["sbom.cdx.json"]
"""
CHANGELOG = "# Changelog\n\n## [0.9.0] - 2030-01-31\n"


class Repository:
    """A product of one file with the release script of ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "release.sh", folder / "scripts")
        (folder / "app").mkdir()
        (folder / "app" / "__init__.py").write_text("")
        (folder / "CHANGELOG.md").write_text(CHANGELOG)
        (folder / ".gitignore").write_text("dist/\n")
        (folder / "pyproject.toml").write_text('[project]\nname = "deepextension"\nversion = "0.9.0"\n' + PACKAGE_DATA)
        (folder / "requirements.lock").write_text(f"anyio==4.16.0 \\\n    --hash=sha256:{DIGEST}\n")
        self.git("init", "--quiet")
        self.commit()

    def git(self, *words: str) -> None:
        identity = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
        subprocess.run(["git", *identity, *words], cwd=self.folder, check=True)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "A change")

    def release(self, *words: str) -> "subprocess.CompletedProcess[str]":
        environ = {**os.environ, "PYTHON": sys.executable, "DOCKER_HOST": "tcp://127.0.0.1:9"}
        command = ["bash", "scripts/release.sh", *words]
        return subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True, check=False)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


def test_builds_the_wheel_of_the_tag_and_says_that_no_engine_builds_the_image(repository: Repository) -> None:
    repository.git("tag", "v0.9.0")

    result = repository.release()

    assert result.returncode == 0, result.stderr
    assert "no container engine" in result.stdout
    assert sorted(path.name for path in (repository.folder / "dist").iterdir()) == [
        "SHA256SUMS",
        "deepextension-0.9.0-py3-none-any.whl",
        "sbom.cdx.json",
    ]
    with zipfile.ZipFile(repository.folder / "dist" / "deepextension-0.9.0-py3-none-any.whl") as wheel:
        document = json.loads(wheel.read("app/sbom.cdx.json"))
    assert (document["bomFormat"], document["metadata"]["component"]["version"]) == ("CycloneDX", "0.9.0")
    (part,) = document["components"]
    assert (part["name"], part["version"]) == ("anyio", "4.16.0")
    assert DIGEST in json.dumps(part)


@pytest.mark.parametrize(
    ("prepare", "words", "said"),
    [
        (lambda repository: None, (), "has no tag"),
        (lambda repository: repository.git("tag", "v0.8.0"), (), "does not match the version 0.9.0"),
        (lambda repository: None, ("v0.9.0",), "there is no tag v0.9.0"),
    ],
    ids=["no tag", "tag of another version", "unknown tag"],
)
def test_refuses_a_commit_that_is_not_the_release(
    repository: Repository, prepare: Callable[[Repository], None], words: tuple[str, ...], said: str
) -> None:
    prepare(repository)

    result = repository.release(*words)

    assert result.returncode == 1
    assert said in result.stderr
    assert not (repository.folder / "dist").exists()


def test_refuses_a_tree_with_changes(repository: Repository) -> None:
    repository.git("tag", "v0.9.0")
    (repository.folder / "app" / "new.py").write_text("")

    result = repository.release()

    assert result.returncode == 1
    assert "app/new.py" in result.stderr


def test_refuses_the_tag_of_an_older_commit(repository: Repository) -> None:
    repository.git("tag", "v0.9.0")
    (repository.folder / "app" / "new.py").write_text("")
    repository.commit()

    result = repository.release("v0.9.0")

    assert result.returncode == 1
    assert "git checkout v0.9.0" in result.stderr


def test_refuses_a_version_that_the_changelog_does_not_know(repository: Repository) -> None:
    (repository.folder / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    repository.commit()
    repository.git("tag", "v0.9.0")

    result = repository.release()

    assert result.returncode == 1
    assert "CHANGELOG.md" in result.stderr
