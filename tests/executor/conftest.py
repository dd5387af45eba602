"""What the tests of environments share: packages without any network."""

from pathlib import Path

import pytest

from app.executor.environments.activation import builder_environment
from tests.executor.building import make_wheel


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one tiny package."""
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel(folder)
    return folder


@pytest.fixture
def environment(wheels: Path, tmp_path: Path) -> dict[str, str]:
    return local_environment(wheels, tmp_path)


def local_environment(wheels: Path, home: Path) -> dict[str, str]:
    """Return a builder's environment that reaches the local packages only."""
    base = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    return {**builder_environment(base), "RATTLER_CACHE_DIR": str(home / "cache")}
