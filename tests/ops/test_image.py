"""What can be said of the Docker image without a Docker engine."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer

from app.cli import app as command
from app.settings import Settings
from tests.ops.dockerfile import Instruction, find, read_stages

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stages() -> list[list[Instruction]]:
    return read_stages(ROOT / "Dockerfile")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def subcommands() -> set[str]:
    """Return the names that `deepe` takes."""
    commands: set[str] = set(getattr(typer.main.get_command(command), "commands"))  # noqa: B009 - typer hides its type
    return commands


def ignored_by_docker(path: Path) -> bool:
    """Return whether `.dockerignore` keeps a path of the repository's top level away; the last match decides."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    ignored = False
    for pattern in (line.strip() for line in lines if line.strip() and not line.startswith("#")):
        if fnmatch(path.name, pattern.removeprefix("!")):
            ignored = not pattern.startswith("!")
    return ignored


class TestBuild:
    def test_copies_only_what_exists_and_reaches_the_build(self, stages: list[list[Instruction]]) -> None:
        sources = [ROOT / word for copy in find(stages[0], "COPY") for word in copy.words[:-1]]

        assert sources
        assert [path for path in sources if not path.exists() or ignored_by_docker(path)] == []

    def test_keeps_everything_else_out_of_the_build(self) -> None:
        reaching = {path.name for path in ROOT.iterdir() if not ignored_by_docker(path)}

        assert reaching == {"app", "migrations", "pyproject.toml", "requirements.lock", "README.md", "LICENSE"}

    def test_installs_the_project_and_nothing_besides(self, stages: list[list[Instruction]]) -> None:
        installs = [run.value for stage in stages for run in find(stage, "RUN") if "pip install" in run.value]

        packages = [
            [word for word in install.partition("pip install")[2].split() if not word.startswith("--")]
            for install in installs
        ]
        assert packages == [[], ["'.[parquet]'"]]
        assert "--require-hashes --requirement=requirements.lock" in installs[0]
        assert "--no-deps --no-build-isolation" in installs[1]

    def test_installs_no_framework_of_the_stages(self, project: dict[str, Any]) -> None:
        names = {requirement.split(">")[0].split("[")[0] for requirement in project["project"]["dependencies"]}

        assert names.isdisjoint({"torch", "transformers", "trl", "peft", "accelerate", "datasets", "mlx-lm"})

    def test_the_project_packs_every_file_that_is_no_python(self, project: dict[str, Any]) -> None:
        patterns = project["tool"]["setuptools"]["package-data"]
        packed = {
            path
            for package, globs in patterns.items()
            for glob in globs
            for path in (ROOT / package.replace(".", "/")).glob(glob)
        }
        files = [path for room in ("app", "migrations") for path in (ROOT / room).rglob("*") if path.is_file()]
        data = [path for path in files if path.suffix not in {".py", ".pyc"} and "__pycache__" not in path.parts]

        assert data
        assert [str(path.relative_to(ROOT)) for path in data if path not in packed] == []


class TestRunning:
    def test_is_not_root(self, stages: list[list[Instruction]]) -> None:
        users = find(stages[-1], "USER")

        assert users[-1].value not in {"root", "0", ""}
        assert f"useradd --uid 10001 --create-home --shell /usr/sbin/nologin {users[-1].value}" in " ".join(
            run.value for run in find(stages[-1], "RUN")
        )

    def test_starts_a_command_that_the_project_installs(
        self, stages: list[list[Instruction]], project: dict[str, Any]
    ) -> None:
        entry, default = find(stages[-1], "ENTRYPOINT")[-1].words, find(stages[-1], "CMD")[-1].words

        assert entry == ["tini", "--", "deepe"]
        assert project["project"]["scripts"][entry[-1]] == "app.cli:app"
        assert default[0] in subcommands()

    def test_sets_only_variables_that_the_service_reads(self, stages: list[list[Instruction]]) -> None:
        pairs = [word.partition("=") for env in find(stages[-1], "ENV") for word in env.words]
        ours = {name.removeprefix("DEEPE_").lower() for name, _, _ in pairs if name.startswith("DEEPE_")}

        assert ours
        assert ours <= set(Settings.model_fields)

    def test_holds_no_secret(self, stages: list[list[Instruction]]) -> None:
        text = " ".join(instruction.value for stage in stages for instruction in stage).upper()

        assert "TOKEN" not in text
        assert "PASSWORD" not in text

    def test_asks_the_service_whether_it_is_ready(self, stages: list[list[Instruction]]) -> None:
        check = find(stages[-1], "HEALTHCHECK")[-1].value

        assert "/readyz" in check
        compile(check.partition('"-c", "')[2].rpartition('"]')[0], "healthcheck", "exec")
