import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from app.presets import catalogue
from tests.presets.stage import Home, make_home

BASES = Path(__file__).resolve().parents[2] / ".cache" / "bases"

BuildBase = Callable[[str], Path]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "deepe")


@pytest.fixture
def torch_home(training_python: Path, tmp_path: Path) -> Home:
    return make_home(tmp_path / "deepe", training_python)


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
