"""Environments built by the real program, one specification in a folder of its own."""

import subprocess
import sys
import zipfile
from pathlib import Path

from app.domain.environment_reports import EnvironmentState
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environments import find_environment, planned_prefix
from app.registry.environments.specs import parse_spec

PROGRAM = [sys.executable, "-u", "-m", "app.executor.environments.build_environment"]
TINY = "dependencies: [python, pip, {pip: [tinypkg]}]\nvariables: {GREETING: hello}\n"


class Build:
    """One specification, built in a folder of its own."""

    def __init__(self, root: Path, environment: dict[str, str], text: str) -> None:
        self.text = text
        self.spec_file = root / "environment.yml"
        self.spec_file.write_text(text)
        self.envs = root / "envs"
        self.events = root / "events.jsonl"
        self.environment = {**environment, "DEEPE_EVENTS": str(self.events)}

    @property
    def prefix(self) -> Path:
        return planned_prefix("demo", parse_spec(self.text), self.envs)

    @property
    def command(self) -> list[str]:
        return [*PROGRAM, "--name", "demo", "--envs", str(self.envs), "--spec", str(self.spec_file)]

    def run(self, *options: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self.command, *options], env=self.environment, capture_output=True, text=True, check=False
        )

    def popen(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def state(self) -> EnvironmentState:
        search = CondaSearch(environ={"PATH": ""}, home=self.envs)
        return find_environment("demo", parse_spec(self.text), envs_dir=self.envs, search=search).state


def make_wheel(folder: Path) -> None:
    """Put the tiny package `tinypkg` into a folder."""
    folder.mkdir(exist_ok=True)
    info = "tinypkg-1.0.dist-info"
    with zipfile.ZipFile(folder / "tinypkg-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinypkg.py", "VALUE = 42\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
