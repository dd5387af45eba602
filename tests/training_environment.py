"""The torch environment of the tests that train, built by our own builder on first use (some minutes).

    python -m tests.training_environment

`make test` does it before pytest starts, so that no test's time limit has to hold an installation. It is kept in
`.cache/` between runs; `DEEPE_TEST_PYTHON` names a ready interpreter instead.
"""

import os
import subprocess
import sys
from pathlib import Path

from app.executor.attempts.activation import interpreter
from app.executor.environments.environments import planned_prefix
from app.presets.catalogue import environment_specs
from app.registry.environment_spec import parse_spec

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".cache" / "envs"
NAME = "trl"


def ready() -> Path:
    """Return its interpreter; builds what is missing."""
    if given := os.environ.get("DEEPE_TEST_PYTHON"):
        return Path(given)
    spec_file = environment_specs()[NAME]
    subprocess.run(
        [
            sys.executable, "-m", "app.executor.environments.build_environment",
            "--name", NAME, "--envs", str(ENVIRONMENTS), "--spec", str(spec_file), "--builder", "venv",
        ],
        cwd=ROOT,
        check=True,
    )  # fmt: skip
    return interpreter(planned_prefix(NAME, parse_spec(spec_file.read_text("utf-8")), ENVIRONMENTS))


if __name__ == "__main__":
    ready()
