import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.presets import catalogue
from tests.presets.fork_server import ForkServer
from tests.presets.stage import PRELOADED, TORCH, Home, make_home

BASES = Path(__file__).resolve().parents[2] / ".cache" / "bases"

BuildBase = Callable[[str], Path]
NewHome = Callable[[str], Home]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "deepe")


@pytest.fixture(scope="session")
def forks(training_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Start what scripts of the `trl` environment are forked from."""
    folder = tmp_path_factory.mktemp("forks")
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **TORCH}
    with ForkServer(training_python, folder, PRELOADED, environment) as server:
        yield server


@pytest.fixture(scope="session")
def new_home(training_python: Path, forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> NewHome:
    """Return what makes a home that several tests share."""
    return lambda name: make_home(tmp_path_factory.mktemp(name) / "deepe", training_python, forks)


@pytest.fixture
def torch_home(training_python: Path, forks: ForkServer, tmp_path: Path) -> Home:
    """Return a home whose scripts run in forks."""
    return make_home(tmp_path / "deepe", training_python, forks)


@pytest.fixture(scope="session")
def build_base(training_python: Path) -> BuildBase:
    """Return what gives the folder of a sample base model; it is kept in `.cache/` until its program changes."""

    def build(name: str) -> Path:
        (sample,) = [model for model in catalogue.sample_base_models() if model.name == name]
        assert sample.program is not None
        digest = hashlib.sha256(sample.program.read_bytes()).hexdigest()[:12]
        folder = BASES / f"{name}-{digest}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            command = [str(training_python), str(sample.program), *sample.arguments, "--output", str(folder)]
            subprocess.run(command, check=True, capture_output=True)
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_base(build_base: BuildBase) -> Path:
    return build_base("tiny-base")


@pytest.fixture(scope="session")
def styles_base(build_base: BuildBase) -> Path:
    return build_base("tiny-styles")
