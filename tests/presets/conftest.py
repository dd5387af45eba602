import os
from pathlib import Path

import pytest

from tests.presets.stage import Home, make_home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "deepe")


@pytest.fixture(scope="session")
def training_python() -> Path:
    """Return the interpreter of a ready `trl` environment."""
    python = os.environ.get("DEEPE_TEST_PYTHON")
    if not python:
        pytest.skip("DEEPE_TEST_PYTHON does not name the interpreter of a trl environment")
    return Path(python)
