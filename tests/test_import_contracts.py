"""The contracts of imports refuse what they are there for."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# an import that breaks a contract: where it stands, and which contract refuses it
WRONG = {
    "app/domain/names.py": ("import httpx", "the domain imports the standard library and pydantic only"),
    "app/executor/supervisor/program.py": ("import psutil", "the supervisor imports the standard library only"),
    "app/argspec/report.py": ("import pydantic", "the reading of scripts imports the standard library only"),
    "app/formats/base.py": (
        "from app.domain import names",
        "the reading of files imports the libraries of its formats only",
    ),
    "app/store/claims.py": ("from app.registry import methods", "imports point down"),
    "app/registry/models/check.py": (
        "from app.registry.base_models import card",
        "imports of the registry point down",
    ),
    "app/executor/attempts/pinning.py": (
        "def f():\n    from app.executor.nodes.agent import NodeAgent",
        "imports of the executor point down",
    ),
    "app/executor/nodes/orphans.py": (
        "from app.executor.supervisor.client import observe",
        "an attempt's place and processes are known to engines only",
    ),
    "app/access/guard.py": (
        "from app.settings import Settings",
        "settings are read by the composition roots and the command only",
    ),
}


def contracts(root: Path) -> dict[str, str]:
    """Return what import-linter says of each contract of the tree under `root`: KEPT or BROKEN."""
    said = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=root, capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    return dict(re.findall(r"^(.+?) (KEPT|BROKEN)$", said, re.MULTILINE))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return the root of a copy of what import-linter reads."""
    shutil.copytree(ROOT / "app", tmp_path / "app", ignore=shutil.ignore_patterns("data", "static", "__pycache__"))
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/__init__.py", "tests/import_contracts.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_each_contract_refuses_the_import_it_is_there_for(tree: Path) -> None:
    for file, (line, _) in WRONG.items():
        path = tree / file
        path.write_text(f"{path.read_text()}\n\n{line}\n")

    assert contracts(tree) == dict.fromkeys((contract for _, contract in WRONG.values()), "BROKEN")


def test_a_room_that_no_layer_names_is_refused(tree: Path) -> None:
    for package in ("app", "app/executor", "app/registry"):
        (tree / package / "novelty.py").write_text("")

    broken = {name for name, verdict in contracts(tree).items() if verdict == "BROKEN"}

    assert broken == {
        "imports point down",
        "imports of the executor point down",
        "imports of the registry point down",
    }
