"""Runs shipped scripts the way the platform does: in a script root, with the helpers on PYTHONPATH, by argv."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.domain.launchers import Launcher, LauncherKind, Strategy, accelerate_config
from app.executor.attempts.launchers import group_variables, stage_command
from app.presets import catalogue
from tests.fork_server import ForkServer, ForkWithPipes
from tests.servers import free_port

Variables = dict[str, str]
ALONE = Launcher()
# one thread: models this small gain nothing from more, and the tests run side by side
TORCH = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PRELOADED = (
    *("torch", "accelerate", "datasets", "peft", "transformers:Trainer", "transformers:AutoModelForCausalLM"),
    *("transformers:Qwen3ForCausalLM", "trl:SFTTrainer", "trl:DPOTrainer", "trl:GRPOTrainer"),
)


@dataclass(frozen=True)
class Finished:
    """What is left of a stage's process."""

    code: int
    stdout: str
    stderr: str
    events: list[dict[str, Any]]

    @property
    def json_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Log records, as the platform reads them from the output."""
        prefix = "[log_data]: "
        return [json.loads(line.removeprefix(prefix)) for line in self.stdout.splitlines() if line.startswith(prefix)]

    @property
    def answer(self) -> str:
        return "".join(line["text"] for line in self.json_lines if line["status"] == "resp")

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    def score(self, phase: str, name: str = "exact_match") -> float:
        (value,) = [
            event["value"] for event in self.of_type("evaluation") if (event["phase"], event["name"]) == (phase, name)
        ]
        return float(value)

    def exact_match(self, phase: str) -> float:
        return self.score(phase)

    def lowered(self, *names: str) -> None:
        """Assert that scores on the held-out rows are lower after the training, and that the curves end there."""
        for name in names:
            before, after = self.score("before", name), self.score("after", name)
            assert after < before, (name, before, after)
            curve = self.curve(name if name.startswith("eval_") else f"eval_{name}")
            assert curve[max(curve)] == pytest.approx(after, rel=1e-6)

    def curve(self, name: str = "loss") -> dict[int, float]:
        """Return the points of a curve by step."""
        points = [(event["step"], event["values"]) for event in self.of_type("metrics")]
        return {step: values[name] for step, values in points if name in values}


@dataclass(frozen=True)
class Home:
    """A home folder with a script root that holds the shipped scripts."""

    path: Path
    python: Path = field(default=Path(sys.executable))
    forks: ForkServer | None = None

    @property
    def scripts(self) -> Path:
        return self.path / "scripts"

    @property
    def unforked(self) -> "Home":
        """Return the home with scripts that start as users start them."""
        return replace(self, forks=None)

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    def run(
        self,
        script: str,
        *arguments: str,
        environment: Variables | None = None,
        launcher: Launcher = ALONE,
        strategy: Strategy | None = None,
    ) -> Finished:
        """Run to the end. Events of earlier runs are not part of the result."""
        self.events_file.unlink(missing_ok=True)
        process = self.start(script, *arguments, environment=environment, launcher=launcher, strategy=strategy)
        stdout, stderr = process.communicate()
        return Finished(process.wait(), stdout, stderr, self.events())

    def start(
        self,
        script: str,
        *arguments: str,
        environment: Variables | None = None,
        launcher: Launcher = ALONE,
        strategy: Strategy | None = None,
    ) -> "subprocess.Popen[str] | ForkWithPipes":
        processes = launcher.count(0, group=strategy is not None)
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.path),
            "PYTHONPATH": str(catalogue.helpers_dir()),
            "PYTHONDONTWRITEBYTECODE": "1",
            "DEEPE_EVENTS": str(self.events_file),
            **TORCH,
            **(environment or {}),
        }
        if launcher.kind is not LauncherKind.PYTHON:
            variables |= group_variables(variables, processes=processes, grace_seconds=10, cores=processes)
        if self.forks is not None and environment is None and strategy is None:
            environments = [variables] if launcher is ALONE else _ranks(variables, processes)
            return self.forks.start_with_pipes([script, *arguments], cwd=self.scripts, environments=environments)
        command = stage_command(
            launcher,
            python=self.python,
            target=[str(script)],
            arguments=arguments,
            processes=processes,
            ranks=self.path / "ranks",
            config=self._config(strategy, processes),
        )
        return subprocess.Popen(
            command,
            cwd=self.scripts,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _config(self, strategy: Strategy | None, processes: int) -> Path | None:
        """Write the configuration with which the platform starts a group that divides a model."""
        if strategy is None:
            return None
        file = self.path / "accelerate.yaml"
        file.write_text(yaml.safe_dump(dict(accelerate_config(strategy, processes))))
        return file

    def events(self) -> list[dict[str, Any]]:
        if not self.events_file.is_file():
            return []
        return [json.loads(line) for line in self.events_file.read_text().splitlines()]

    def write_rows(self, *lines: str, name: str = "rows.jsonl") -> Path:
        path = self.path / name
        path.write_text("".join(line + "\n" for line in lines))
        return path


def _ranks(variables: Variables, processes: int) -> list[Variables]:
    """Return the environments of a group's processes, as torchrun sets them."""
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [variables | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def make_home(path: Path, python: Path = Path(sys.executable), forks: ForkServer | None = None) -> Home:
    for name in ("logs", "models", "datasets", "images"):
        (path / name).mkdir(parents=True)
    (path / "scripts").mkdir()
    for script in catalogue.stage_scripts().values():
        shutil.copy(script, path / "scripts")
    return Home(path, python, forks)


def dataset(name: str) -> Path:
    (path,) = [sample.path for sample in catalogue.sample_datasets() if sample.name == name]
    return path


def demo_parameters(method: str) -> list[str]:
    """Return the arguments of the method's demo run."""
    (manifest,) = [manifest for manifest in catalogue.load_manifests() if manifest.name == method]
    return [f"--{name}={value}" for name, value in manifest.demo.parameters.items()]
