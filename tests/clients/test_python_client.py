"""A Python client generated from the live OpenAPI document does the whole main job against a real service."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from app.presets.catalogue import ROOM
from tests.clients.document import write_document
from tests.e2e.installation import Installation
from tests.fork_server import ForkServer
from tests.training_environment import ROOT
from tests.worker.harness import make_base

pytestmark = [pytest.mark.xdist_group("python-client")]

HERE = Path(__file__).parent
PACKAGE = "deepe_client"
UPLOAD_KIND = re.compile(
    r"Unsupported content type "
    r"(text/(x-python|csv|tab-separated-values)|application/(jsonl|x-ndjson|vnd\..+|gzip|zip|x-tar))"
)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate the client; return the folder that its package lies in."""
    folder = tmp_path_factory.mktemp("python-client")
    document = write_document(folder)
    result = subprocess.run(
        [
            sys.executable, "-m", "openapi_python_client", "generate", "--config", str(HERE / "python-client.yml"),
            "--path", str(document), "--output-path", str(folder / "client"),
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    # bytes can be sent under several names, of which the generator knows one
    warnings = re.findall(r"WARNING.*\n\n?(.*)", said)
    assert [line for line in warnings if not UPLOAD_KIND.fullmatch(line.strip())] == [], said
    return folder / "client"


@pytest.fixture
def walk_through(generated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the program of a user of the client."""
    monkeypatch.syspath_prepend(str(generated))
    yield importlib.import_module("tests.clients.walk_through")
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE or name.endswith(".walk_through")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def site(worker_forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Yield a service with its worker, whose home holds a base model."""
    (base,) = make_base(tmp_path_factory.mktemp("envs") / "base")
    installation = Installation(tmp_path_factory.mktemp("site"), {"base": base}, forks=worker_forks)
    try:
        installation.start()
        shutil.copytree(ROOM / "custom01" / "custom01-base", installation.home / "models" / "bike-base")
        yield installation
    finally:
        installation.close()


class TestGeneratedClient:
    def test_has_a_function_for_every_operation(self, generated: Path) -> None:
        functions = {path.stem for path in (generated / PACKAGE / "api").rglob("*.py")}

        assert {"submit_job", "list_methods", "chat_with_model", "upload_dataset", "build_environment"} <= functions

    def test_a_users_program_is_fully_typed(self, generated: Path, tmp_path: Path) -> None:
        result = subprocess.run(
            [
                sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "--explicit-package-bases",
                str(HERE / "walk_through.py"),
            ],
            cwd=tmp_path,
            env={**os.environ, "MYPYPATH": f"{generated}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
        )  # fmt: skip

        assert result.returncode == 0, result.stdout + result.stderr

    def test_does_the_main_job(self, walk_through: ModuleType, site: Installation) -> None:
        rows = (ROOM / "custom01" / "custom01.jsonl").read_bytes()

        with walk_through.connect(site.url) as client:
            walk_through.fail_without_a_licence(client)
            site.install_licence()
            answer = walk_through.walk_through(client, rows)

        assert answer in {json.loads(line)["answer"] for line in rows.splitlines()}
