"""The environments and base models of the tests that train, built by our own builder on first use (some minutes).

    python -m tests.training_environment                     # what `make test` needs
    python -m tests.training_environment trl simpletuner     # what `make simpletuner` needs

`make test` does it before pytest starts, so that no test's time limit has to hold an installation. They are kept in
`.cache/` between runs; `DEEPE_TEST_PYTHON`, `DEEPE_TEST_MLX_PYTHON` and `DEEPE_TEST_SIMPLETUNER_PYTHON` name ready
interpreters instead.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.executor.environments.activation import interpreter
from app.executor.environments.environments import planned_prefix, read_marker
from app.executor.environments.shipped import NO_SOURCE, plan, shipped_as
from app.presets.catalogue import environment_specs, sample_base_models
from app.presets.environments import Device
from app.registry.environments.specs import parse_spec

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".cache" / "envs"
BASES = ROOT / ".cache" / "bases"
GIVEN = {"trl": "DEEPE_TEST_PYTHON", "mlx": "DEEPE_TEST_MLX_PYTHON", "simpletuner": "DEEPE_TEST_SIMPLETUNER_PYTHON"}
USUAL = ("trl", "mlx")


def ready(name: str = "trl") -> Path:
    """Return its interpreter; builds what is missing."""
    if given := os.environ.get(GIVEN[name]):
        return Path(given)
    spec_file = environment_specs()[name]
    subprocess.run(
        [
            sys.executable, "-m", "app.executor.environments.build_environment",
            "--name", name, "--envs", str(ENVIRONMENTS), "--spec", str(spec_file), "--builder", "venv",
            *(option for device in devices() for option in ("--accelerator", device)),
        ],
        cwd=ROOT,
        check=True,
    )  # fmt: skip
    return interpreter(_prefix(name))


def base_model(name: str) -> Path:
    """Return the folder of a sample base model; it is kept in `.cache/` until the program that makes it changes."""
    (sample,) = [model for model in sample_base_models() if model.name == name]
    assert sample.program is not None
    folder = BASES / f"{name}-{hashlib.sha256(sample.program.read_bytes()).hexdigest()[:12]}"
    BASES.mkdir(parents=True, exist_ok=True)
    with (BASES / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            draft = folder.with_suffix(".draft")
            shutil.rmtree(draft, ignore_errors=True)
            command = [str(ready()), str(sample.program), *sample.arguments, "--output", str(draft)]
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
            draft.rename(folder)
    return folder


def is_built(name: str) -> bool:
    """Whether `ready` has nothing to do."""
    return bool(os.environ.get(GIVEN[name])) or read_marker(_prefix(name)) is not None


def devices() -> frozenset[Device]:
    """Return what decides here which build of torch is taken."""
    return frozenset({"cuda", "cpu"} if shutil.which("nvidia-smi") else {"cpu"})


def _prefix(name: str) -> Path:
    spec = parse_spec(environment_specs()[name].read_text("utf-8"))
    shipped = shipped_as(spec)
    assert shipped is not None
    cpu_torch = plan(shipped, devices(), NO_SOURCE).cpu_build
    return planned_prefix(name, spec, ENVIRONMENTS, cpu_torch=cpu_torch)


if __name__ == "__main__":
    for each in sys.argv[1:] or USUAL:
        ready(each)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(base_model, (model.name for model in sample_base_models() if model.program)))
