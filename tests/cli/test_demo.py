"""`deepe demo` with the method that needs nothing but Python: every step for real, twice."""

import contextlib
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console

from app.access import licence as licences
from app.access.guard import LicenceGuard, LicenseState
from app.cli.client import Api
from app.cli.command import CliFailure
from app.cli.demo import Demo, Times, for_this_machine, shipped
from app.cli.demo_samples import borrowed_licence
from app.cli.demo_screen import outcome_of
from app.domain.enums import Platform
from app.presets import catalogue
from app.settings import load_settings


def run_demo(home: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "app.cli", "demo", "Custom01", "--home", str(home), "--no-redis", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | variables)


def test_shows_a_training_twice_without_terminal_or_input(tmp_path: Path) -> None:
    home = tmp_path / "home"

    first = run_demo(home)
    second = run_demo(home, "--base-model", str(catalogue.ROOM / "custom01" / "custom01-base"))

    for run in (first, second):
        assert run.returncode == 0, run.stdout + run.stderr
        scores = re.findall(r"exact_match ([\d.]+) → ([\d.]+)", run.stdout)
        assert scores
        assert float(scores[-1][0]) < 0.5 < float(scores[-1][1])
        assert run.stdout.count("    → ") == 6
        assert re.search(r"first training step [\d.]+ s after the submit", run.stdout)
    assert "Building the environment base" in first.stdout
    assert "Building the environment" not in second.stdout
    assert "Registered: My Custom01 2" in second.stdout
    assert (home / "models" / "custom01-base-2" / "config.json").is_file()
    assert not (home / "license.json").exists()
    assert _processes_of(home) == []


def test_ends_with_1_and_says_why_when_a_job_fails(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "scripts").mkdir(parents=True)
    # Custom01 lies beside it, and so imports it instead of the standard library's
    (home / "scripts" / "argparse.py").write_text("raise SystemExit('the disk is made of cheese')\n")
    prefix = home / "nodes" / "one" / "envs" / "base"  # what the first test builds
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)

    run = run_demo(home, DEEPE_NODE_NAME="one")

    assert run.returncode == 1
    assert "the disk is made of cheese" in run.stdout
    assert "exit_code" in run.stdout
    assert "deepe jobs logs" in run.stdout
    assert _processes_of(home) == []


def test_says_when_an_operator_left_the_samples_out(tmp_path: Path) -> None:
    run = run_demo(tmp_path / "home", DEEPE_SAMPLES="false")

    assert run.returncode != 0
    assert "DEEPE_SAMPLES" in run.stderr
    assert _processes_of(tmp_path / "home") == []


def test_names_what_is_shipped_when_asked_for_something_else() -> None:
    with pytest.raises(CliFailure) as failure:
        shipped("No-Such-Demo")

    assert "Custom01" in failure.value.notes[0]


def test_all_shows_the_methods_for_this_machine() -> None:
    assert {"Custom01", "SFT-Demo", "PEFT-Demo", "GRPO-Demo", "DPO-Demo", "PPO-Demo"} <= {
        manifest.name for manifest in for_this_machine()
    }


@pytest.mark.parametrize(
    ("machine", "built"), [(Platform.CPU, ["trl"]), (Platform.CUDA, ["trl", "simpletuner"])], ids=["cpu", "cuda"]
)
def test_takes_a_lighter_environment_where_there_is_no_cuda(
    monkeypatch: pytest.MonkeyPatch, machine: Platform, built: list[str]
) -> None:
    monkeypatch.setattr("app.cli.demo.this_machine", lambda: machine)
    api = SimpleNamespace(items=lambda _: [{"heartbeat_age_seconds": -1.0}], get=lambda _: {"nodes": []})

    demo = Demo(cast(Api, api), shipped("SD-Demo"), load_settings(), Times(), Console())

    assert demo._environments("trl") == built


def test_an_outcome_tells_scores_and_what_was_made() -> None:
    score = {"name": "exact_match", "before": 0.1, "after": 0.9, "samples": 40}
    answers = {
        "/jobs/1": {"id": "1", "evaluations": [score], "result_model": "m"},
        "/jobs/2": {"id": "2", "evaluations": [], "result_model": None},
        "/models/m": {"path": "models/m"},
    }

    outcome = outcome_of(
        cast(Api, SimpleNamespace(get=answers.__getitem__)), "X", [{"id": "1"}, {"id": "2"}], seconds=2
    )

    assert outcome.scores == ("exact_match 0.1 → 0.9 (held-out samples: 40)",)
    assert outcome.artefacts == ("models/m",)


class TestBorrowedLicence:
    def test_is_there_only_inside(self, tmp_path: Path) -> None:
        settings = load_settings(home=tmp_path)

        with borrowed_licence(settings, say=lambda _: None) as environment:
            public_key = Path(environment["DEEPE_LICENSE_PUBLIC_KEY"])
            guard = LicenceGuard(
                tmp_path / "license.json", licences.load_public_key(public_key), lambda: datetime.now(UTC)
            )
            inside = guard.status().state
            keys = [path.name for path in tmp_path.rglob("*private*")]

        assert inside is LicenseState.VALID
        assert keys == []
        assert list(tmp_path.iterdir()) == []

    def test_puts_back_what_was_there(self, tmp_path: Path) -> None:
        (tmp_path / "license.json").write_text("an old one")

        with borrowed_licence(load_settings(home=tmp_path), say=lambda _: None):
            assert json.loads((tmp_path / "license.json").read_text())

        assert (tmp_path / "license.json").read_text() == "an old one"
        assert len(list(tmp_path.iterdir())) == 1

    def test_uses_a_licence_that_counts(self, tmp_path: Path) -> None:
        private_key, public_key = licences.keygen(tmp_path / "keys")
        text = licences.issue(licences.load_private_key(private_key), licensee="A", issued_at=datetime.now(UTC))
        (tmp_path / "license.json").write_text(text)
        settings = load_settings(home=tmp_path, license_public_key=public_key)

        with borrowed_licence(settings, say=lambda _: None) as environment:
            pass

        assert environment == {}
        assert (tmp_path / "license.json").read_text() == text

    def test_cleans_up_after_a_demo_that_was_killed(self, tmp_path: Path) -> None:
        (tmp_path / "demo-licence").mkdir()
        (tmp_path / "license.json").write_text("of the demo")
        (tmp_path / "license.json.put-aside").write_text("the person's own")

        with borrowed_licence(load_settings(home=tmp_path), say=lambda _: None):
            pass

        assert (tmp_path / "license.json").read_text() == "the person's own"


def _processes_of(home: Path) -> list[str]:
    """Return the command lines of processes that still work with this home, or in it."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        with contextlib.suppress(psutil.Error):
            command += f" in {process.cwd()}"
        if str(home) in command and process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found
