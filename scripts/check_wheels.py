"""Ask the package index whether every dependency has a wheel for every supported platform and Python.

    .venv/bin/python -m scripts.check_wheels

pip resolves the plain dependencies of `pyproject.toml`, and theirs, once for each platform and Python. It installs
nothing, but an old pip downloads the wheels to read their metadata. pip evaluates the markers of indirect dependencies
for the Python that runs it, so an indirect dependency that only another platform has is not looked for.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


@dataclass(frozen=True)
class Platform:
    """A platform in the words of environment markers and of wheel names."""

    name: str
    sys_platform: str
    system: str
    machine: str
    tags: tuple[str, ...]

    def markers(self, python: str) -> dict[str, str]:
        """Return the values that environment markers have there."""
        return {
            "implementation_name": "cpython",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_system": self.system,
            "python_full_version": f"{python}.0",
            "python_version": python,
            "sys_platform": self.sys_platform,
        }


def _manylinux(machine: str) -> tuple[str, ...]:
    # glibc 2.28 is that of RHEL 8 and Debian 10
    return tuple(f"manylinux_2_{minor}_{machine}" for minor in range(28, 16, -1))


PLATFORMS = (
    Platform("Linux x86-64", "linux", "Linux", "x86_64", _manylinux("x86_64")),
    Platform("Linux arm64", "linux", "Linux", "aarch64", _manylinux("aarch64")),
    Platform("macOS arm64", "darwin", "Darwin", "arm64", ("macosx_11_0_arm64",)),
)


def main() -> int:
    failures = 0
    for platform in PLATFORMS:
        for python in PYTHONS:
            problem, count = resolve(platform, python)
            failures += problem is not None
            print(f"{platform.name}, Python {python}: {problem or f'{count} wheels'}", flush=True)
    return 1 if failures else 0


def resolve(platform: Platform, python: str) -> tuple[str | None, int]:
    """Return pip's last error, or None, and how many wheels it would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--dry-run", "--ignore-installed", "--only-binary=:all:", "--target", folder, "--report", str(report)),
            *("--implementation", "cp", "--python-version", python),
            *(word for tag in platform.tags for word in ("--platform", tag)),
            *requirements(platform.markers(python)),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            return (lines or [result.stderr.strip()])[-1], 0
        return None, len(json.loads(report.read_text("utf-8"))["install"])


def requirements(markers: dict[str, str]) -> Iterator[str]:
    """Yield the plain dependencies that are installed where `markers` hold, without their markers."""
    for line in tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]["dependencies"]:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(markers):
            requirement.marker = None
            yield str(requirement)


if __name__ == "__main__":
    raise SystemExit(main())
