"""The wheel alone, with the dependencies that every platform gets, starts every command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from packaging.utils import NormalizedName

from scripts.check_wheels import PLATFORMS
from tests.ops.dependencies import PROJECT, ROOT, closure, service_modules, targets
from tests.servers import free_port
from tests.waiting import wait_until

# the tests share one environment, so one process builds it
pytestmark = [pytest.mark.xdist_group("wheel")]

HELP_OF_EVERY_COMMAND = """
import click, typer
from typer.testing import CliRunner
from app.cli import app

def paths(command, path=()):
    yield path
    if hasattr(command, "list_commands"):
        context = typer.Context(command)
        for name in command.list_commands(context):
            yield from paths(command.get_command(context, name), (*path, name))

for path in paths(typer.main.get_command(app)):
    result = CliRunner().invoke(app, [*path, "--help"])
    print(" ".join(("deepe", *path)), result.exit_code, result.exception or "")
"""

IMPORT_EVERY_MODULE = """
import importlib, sys

for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(name, type(error).__name__, error)
"""


@dataclass(frozen=True)
class Installed:
    """An environment that holds the wheel and nothing by luck."""

    bin: Path

    def run(self, program: str, *arguments: str, home: Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self.bin / "python", "-I", "-c", program, *arguments],
            env=self.environ(home),
            capture_output=True,
            text=True,
            check=False,
        )

    def environ(self, home: Path, **more: str) -> dict[str, str]:
        path = os.pathsep.join([str(self.bin), "/usr/bin", "/bin"])
        return {"PATH": path, "HOME": str(home), "DEEPE_HOME": str(home / "deepe"), "DEEPE_NODE_NAME": "wheel", **more}

    @contextmanager
    def started(self, *words: str, home: Path, **more: str) -> Iterator["subprocess.Popen[str]"]:
        """Run `deepe WORDS` in the background; it has to end well when it is asked to."""
        with subprocess.Popen(
            [self.bin / "deepe", *words],
            env=self.environ(home, **more),
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate()
        # uvicorn ends by the signal itself once it has closed everything
        assert process.returncode in {0, -signal.SIGTERM}, said


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that no earlier build lends it a file."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("app", "migrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheel beside the dependencies of all platforms: links to those of this environment."""
    prefix = tmp_path_factory.mktemp("installed")
    venv.create(prefix, with_pip=False, symlinks=True)
    python = prefix / "bin" / "python"
    site = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    needed = set.intersection(*(closure(target) for target in targets()))
    for name in needed | of_this_release():
        _link(metadata.distribution(name), site)
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True)
    return Installed(prefix / "bin")


def of_this_release() -> set[NormalizedName]:
    """Return what this interpreter needs and a later release of the same Python does not, such as Debian's 3.11.2."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    markers = PLATFORMS[0].markers(python)
    this, later = (closure({**markers, "python_full_version": f"{python}.{n}"}) for n in (sys.version_info.micro, 99))
    return this - later


class TestWheel:
    def test_leaves_out_what_only_development_installs(self, installed: Installed, tmp_path: Path) -> None:
        program = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"

        names = installed.run(program, home=tmp_path).stdout.split()

        assert PROJECT in names
        assert "fastapi" in names
        assert {"psutil", "setuptools", "pytest"}.isdisjoint(names)

    def test_brings_the_licence(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
            text = archive.read(name)

        assert text == (ROOT / "LICENSE").read_bytes()

    def test_imports_every_module_of_the_service(self, installed: Installed, tmp_path: Path) -> None:
        result = installed.run(IMPORT_EVERY_MODULE, *service_modules(), home=tmp_path)

        assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


class TestCommands:
    def test_help_of_every_command(self, installed: Installed, tmp_path: Path) -> None:
        result = installed.run(HELP_OF_EVERY_COMMAND, home=tmp_path)

        lines = [line.strip() for line in result.stdout.splitlines()]
        assert result.returncode == 0, result.stderr
        assert {"deepe 0", "deepe worker 0", "deepe jobs submit 0"} <= set(lines)
        assert [line for line in lines if not line.endswith(" 0")] == []

    def test_serve_and_worker(self, installed: Installed, tmp_path: Path) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        port = url.rpartition(":")[2]

        with installed.started("serve", "--port", port, home=tmp_path):
            wait_until(lambda: _answers(f"{url}/readyz"), "the API")
            with installed.started("worker", home=tmp_path) as worker:
                nodes = wait_until(lambda: _nodes(url) or worker.poll() is not None, "the node")

        assert nodes == ["wheel"]

    def test_dev(self, installed: Installed, tmp_path: Path) -> None:
        with installed.started("dev", "--port", "0", "--json", home=tmp_path) as process:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            nodes = wait_until(lambda: _nodes(ready["url"]), "the node")
            presets = f"{ready['url']}/api/v1/presets"
            names = [preset["name"] for preset in httpx.get(presets).json()["items"]]
            installed_as = {name: httpx.post(f"{presets}/{name}:install").status_code for name in names}
            samples = {preset["name"]: preset["samples"] for preset in httpx.get(presets).json()["items"]}

        assert ready["event"] == "ready"
        assert nodes == ["wheel"]
        assert set(installed_as.values()) == {200}
        assert [name for name in names if samples[name]["dataset"] is None] == []
        assert samples["Custom01"]["base_model"] == "custom01-base"

    def test_doctor(self, installed: Installed, tmp_path: Path) -> None:
        result = subprocess.run(
            [installed.bin / "deepe", "doctor", "--json"],
            env=installed.environ(tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )

        verdicts = {finding["name"]: finding["verdict"] for finding in json.loads(result.stdout)}
        assert verdicts["packages"] == "ok"
        assert "fail" not in verdicts.values()


def _link(distribution: metadata.Distribution, site: Path) -> None:
    """Link the files of `distribution` into `site`: its modules and its metadata, not its commands."""
    for file in distribution.files or ():
        if ".." not in file.parts:
            link = site / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(str(file.locate()))


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def _nodes(url: str) -> list[str]:
    return [node["name"] for node in httpx.get(f"{url}/api/v1/nodes").json()["items"]]
