import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import training_environment
from tests.fork_server import ForkServer
from tests.presets.stage import PRELOADED, TORCH, Home, make_home

NewHome = Callable[[str], Home]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "deepe")


@pytest.fixture(scope="session")
def forks(training_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Start what scripts of the `trl` environment are forked from."""
    folder = tmp_path_factory.mktemp("forks")
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **TORCH}
    with ForkServer(training_python, PRELOADED, environment) as server:
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
def tiny_base() -> Path:
    return training_environment.base_model("tiny-base")


@pytest.fixture(scope="session")
def styles_base() -> Path:
    return training_environment.base_model("tiny-styles")
