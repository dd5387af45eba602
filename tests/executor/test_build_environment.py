"""Environments built for real, without any network: a venv, and a conda prefix from a channel made by hand."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.domain.environment_reports import EnvironmentState
from app.executor.environments.activation import interpreter, stage_environment
from app.executor.environments.environments import (
    lock_path,
    read_marker,
)
from app.executor.supervisor import client
from app.executor.supervisor.client import ExitWhy, LaunchSpec
from app.registry.environments.specs import BASE_SPEC
from tests.executor.attempts import Attempt, attempts
from tests.executor.building import TINY, Build
from tests.executor.channel import make_channel
from tests.executor.conftest import local_environment
from tests.waiting import wait_until


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Attempt]:
    for make in attempts(tmp_path):
        yield make()


@dataclass(frozen=True)
class Built:
    """A build that has come to its end, with what it told, and what the environment was before."""

    build: Build
    done: "subprocess.CompletedProcess[str]"
    events: Sequence[Mapping[str, Any]]
    before: EnvironmentState


@pytest.fixture(scope="module")
def built(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build an environment with a package that pip does not compile."""
    root = tmp_path_factory.mktemp("built")
    build = Build(root, {**local_environment(wheels, root), "PIP_COMPILE": "0"}, TINY)
    before, done = build.state(), build.run()
    return Built(build, done, [json.loads(line) for line in build.events.read_text().splitlines()], before)


@pytest.mark.xdist_group("built")
class TestBuilt:
    def test_pip_list_is_installed_and_found_ready(self, built: Built) -> None:
        build = built.build

        assert built.done.returncode == 0, built.done.stdout + built.done.stderr
        assert (built.before, build.state()) == (EnvironmentState.KNOWN, EnvironmentState.READY)
        marker = read_marker(build.prefix)
        assert marker is not None
        assert (marker.name, marker.builder) == ("demo", "venv")
        assert "tinypkg==1.0" in marker.packages
        env = stage_environment({"PATH": "/usr/bin:/bin"}, build.prefix, {})
        script = "import os, sys, tinypkg; print(tinypkg.VALUE, os.environ['GREETING'], sys.prefix)"
        said = subprocess.run([interpreter(build.prefix), "-c", script], env=env, capture_output=True, text=True)
        assert said.stdout == f"42 hello {build.prefix}\n"

    def test_steps_are_told_as_events(self, built: Built) -> None:
        steps = [event["step"] for event in built.events]

        assert {event["type"] for event in built.events} == {"progress"}
        assert steps == sorted(steps)
        assert (steps[0], steps[-1], {event["total"] for event in built.events}) == (0, 3, {3})
        assert any("tinypkg" in event["message"] for event in built.events)

    def test_what_its_builder_did_not_compile_is_compiled(self, built: Built) -> None:
        assert list(built.build.prefix.glob("lib/python3*/site-packages/__pycache__/tinypkg.*.pyc"))

    def test_next_run_waits_for_children_of_a_killed_build_and_finds_it_ready(self, built: Built) -> None:
        build = built.build
        marker = read_marker(build.prefix)
        with lock_path(build.prefix).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
        try:
            waiting = build.popen()
            assert waiting.stdout is not None
            first = waiting.stdout.readline()
        finally:
            child.kill()
            child.wait()
        rest, _ = waiting.communicate()

        assert "Another build" in first
        assert (waiting.returncode, "is ready" in rest) == (0, True)
        assert read_marker(build.prefix) == marker


class TestVenv:
    def test_two_builds_at_once_remove_what_did_not_finish_and_make_one(
        self, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        build = Build(tmp_path, environment, BASE_SPEC)
        (build.prefix / "lib").mkdir(parents=True)
        (build.prefix / "lib" / "half").touch()

        builds = [build.popen() for _ in range(2)]
        said = [process.communicate()[0] for process in builds]

        assert [process.returncode for process in builds] == [0, 0]
        assert sum("Removing a build that did not finish" in text for text in said) == 1
        assert sum("Creating a virtual environment" in text for text in said) == 1
        assert sum("Another build of this environment is under way" in text for text in said) == 1
        assert all("is ready" in text for text in said)
        assert not (build.prefix / "lib" / "half").exists()
        assert build.state() is EnvironmentState.READY

    def test_leaves_nothing_if_a_package_is_not_found(self, tmp_path: Path, environment: dict[str, str]) -> None:
        build = Build(tmp_path, environment, "dependencies: [python, {pip: [no-such-package-anywhere]}]")

        done = build.run()

        assert done.returncode == 1
        assert "No matching distribution found for no-such-package-anywhere" in done.stdout
        assert "failed (exit 1)" in done.stdout
        assert not build.prefix.exists()

    def test_stop_removes_what_was_begun(self, tmp_path: Path, environment: dict[str, str], attempt: Attempt) -> None:
        (tmp_path / "slow").mkdir()
        (tmp_path / "slow" / "setup.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
        build = Build(tmp_path, environment, "dependencies: [python, {pip: [./slow]}]")
        attempt.start("", argv=tuple(build.command), env=build.environment)
        wait_until(lambda: build.prefix.exists(), "the prefix")

        client.request_stop(attempt.folder, "cancel")
        record = attempt.wait_for_end()

        assert (record.why, record.code) == (ExitWhy.STOPPED, 128 + signal.SIGTERM)
        assert not build.prefix.exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("dependencies: [python, ffmpeg]", "Without conda"),
            ("dependencies: ['python>=3.99']", "asks for python>=3.99"),
            ("dependencies: [", "not valid YAML"),
            ("dependencies:\n  - =1\n", 'Line 2: "=1" is not a conda dependency'),
        ],
    )
    def test_says_what_to_do_and_builds_nothing(
        self, tmp_path: Path, environment: dict[str, str], text: str, says: str
    ) -> None:
        build = Build(tmp_path, environment, text)

        done = build.run("--builder", "venv")

        assert (done.returncode, done.stderr) == (2, "")
        assert says in done.stdout
        assert not build.envs.exists()


class TestRattler:
    def test_variable_of_a_conda_package_arrives_in_a_supervised_script(
        self, tmp_path: Path, environment: dict[str, str], attempt: Attempt
    ) -> None:
        channel = make_channel(tmp_path / "channel")
        build = Build(tmp_path, environment, f"channels: ['{channel}']\ndependencies: [python, greeter=1.0]")

        done = build.run("--builder", "rattler")
        assert done.returncode == 0, done.stdout + done.stderr
        marker = read_marker(build.prefix)
        env = stage_environment({"PATH": "/usr/bin:/bin"}, build.prefix, {})
        script = tmp_path / "stage.py"
        script.write_text("import os\nprint(os.environ['GREETING'])\nprint(os.environ['CONDA_PREFIX'])\n")
        client.prepare(
            attempt.folder,
            LaunchSpec(
                attempt_id=attempt.id,
                argv=(str(interpreter(build.prefix)), "-u", str(script)),
                cwd=tmp_path,
                env=env,
                output=attempt.output,
            ),
        )
        client.start(attempt.folder)
        record = attempt.wait_for_end()

        assert record.code == 0, attempt.output.read_text()
        assert attempt.output.read_text() == f"hello from {build.prefix}\n{build.prefix}\n"
        assert env["PATH"].split(":")[:2] == [f"{build.prefix}/greeter", f"{build.prefix}/bin"]
        assert marker is not None
        assert (marker.builder, "greeter-1.0-0" in marker.packages) == ("rattler", True)

    def test_unsolvable_specification_fails_with_the_solvers_words(
        self, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        channel = make_channel(tmp_path / "channel")
        build = Build(tmp_path, environment, f"channels: ['{channel}']\ndependencies: [python, greeter=2.0]")

        done = build.run("--builder", "rattler")

        assert done.returncode == 1
        assert "greeter" in done.stdout
        assert not build.prefix.exists()

    def test_venv_stands_in_if_no_channel_answers(self, tmp_path: Path, environment: dict[str, str]) -> None:
        build = Build(tmp_path, environment, f"channels: ['{(tmp_path / 'gone').as_uri()}']\ndependencies: [python]")

        done = build.run()

        assert done.returncode == 0, done.stdout + done.stderr
        assert "No answer from the channels" in done.stdout
        marker = read_marker(build.prefix)
        assert marker is not None
        assert marker.builder == "venv"


def test_fake_conda_is_called_with_the_specification(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "bin").mkdir()
    conda = tmp_path / "bin" / "conda"
    conda.write_text(f'#!/bin/sh\necho "conda $@"\nexec "{sys.executable}" -m venv --without-pip "$4"\n')
    conda.chmod(0o755)
    build = Build(tmp_path, {**environment, "PATH": f"{tmp_path}/bin:{os.defpath}"}, "dependencies: [python=3.11]")

    done = build.run()

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"conda create --yes --prefix {build.prefix} python=3.11" in done.stdout
    marker = read_marker(build.prefix)
    assert marker is not None
    assert marker.builder == "conda"
