from pathlib import Path

import pytest

from tests.presets.stage import Home, make_home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "deepe")
