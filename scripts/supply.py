"""What the service is made of: a lock with digests, licences, and a look for known holes.

.venv/bin/python -m scripts.supply lock [--upgrade]  writes requirements.lock, which the image is built from
.venv/bin/python -m scripts.supply licences          writes docs/licences.md from what is installed
.venv/bin/python -m scripts.supply audit             asks a vulnerability database about every lock that we ship

`lock` needs `uv` on PATH and a package registry, `audit` a vulnerability database. `audit` ends with 1 for a known hole
and with 2 where it could not look everything up: no answer is not a good answer. `scripts/release.sh` makes the bill of
materials of the lock.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.executor.environments.lockfile import Lockfile
from app.presets.environments import shipped_environments

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
LICENCES = ROOT / "docs" / "licences.md"
PYTHON = "3.11"
FOUND, UNKNOWN = 1, 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    lock = commands.add_parser("lock")
    lock.add_argument("--upgrade", action="store_true", help="take newer versions of what is locked")
    commands.add_parser("licences")
    commands.add_parser("audit")
    options = parser.parse_args()
    match options.command:
        case "lock":
            write_lock(upgrade=options.upgrade)
        case "licences":
            LICENCES.write_text(licence_page(), "utf-8")
        case _:
            return audit()
    return 0


def write_lock(*, upgrade: bool) -> None:
    """Resolve the service, its extra `parquet` and its build system for every platform and Python."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "build.in"
        wanted.write_text("\n".join(build) + "\n", "utf-8")
        command = ["uv", "pip", "compile", "pyproject.toml", str(wanted), "--extra", "parquet", "--universal"]
        command += ["--python-version", PYTHON, "--generate-hashes", "--no-emit-index-url", "--no-header", "--quiet"]
        command += ["--no-annotate", "--output-file", str(LOCK), *(["--upgrade"] if upgrade else [])]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_INDEX"))}
        subprocess.run(command, cwd=ROOT, check=True, env=environ)


def locked(path: Path = LOCK) -> Iterator[tuple[Requirement, list[str]]]:
    """Yield what a lock pins, with the SHA-256 of every file that may be installed for it."""
    text = path.read_text("utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
            yield Requirement(requirement.strip()), [digest.strip() for digest in hashes]


def licence_page() -> str:
    """Return a page with the licence of each locked package, as its own metadata says it."""
    lines = [
        "# Licences of what the service installs",
        "",
        "Written by `python -m scripts.supply licences` from the metadata of the packages in `requirements.lock`.",
        "Environments of stages are installed by users from their own locks; SimpleTuner's is AGPL-3.0",
        "([0008](decisions/0008-simpletuner.md)).",
        "",
        "| package | licence |",
        "|---|---|",
    ]
    names = sorted({canonicalize_name(requirement.name) for requirement, _ in locked()})
    return "\n".join([*lines, *(f"| {name} | {licence_of(name)} |" for name in names), ""])


def licence_of(name: str) -> str:
    """Return the licence that an installed package names."""
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return "only on other platforms or Pythons"
    trove = [one.rpartition(" :: ")[2] for one in found.get_all("Classifier", []) if one.startswith("License :: ")]
    named = [*found.get_all("License-Expression", []), ", ".join(sorted(set(trove) - {"OSI Approved"}))]
    said = [text for text in (*named, *found.get_all("License", [])) if text]
    return said[0].splitlines()[0].replace("|", "/") if said else "not named"


def audit() -> int:
    """Print what is known of each locked package; return 0, `FOUND` or `UNKNOWN`."""
    pins = {"service": {f"{pin.name}{pin.specifier}" for pin, _ in locked()}}
    for name, one in shipped_environments().items():
        lock = Lockfile.parse(one.lock_file.read_text("utf-8"))
        pins[name] = {f"{package['name']}=={package['version']}" for package in lock.packages}
    results = [judged(name, _looked_up(lines), wanted=len(lines)) for name, lines in pins.items()]
    if FOUND in results:
        return FOUND
    return UNKNOWN if UNKNOWN in results else 0


def _looked_up(pins: Collection[str]) -> list[dict[str, Any]]:
    """Return what pip-audit knows of the pins; those that it has no answer for are missing or hold no `vulns`."""
    found, left = [], sorted(pins)
    while left:  # a lock may hold several versions of a package, one list of requirements may not
        round_ = {pin.partition("==")[0]: pin for pin in left}
        left = [pin for pin in left if pin not in round_.values()]
        with tempfile.TemporaryDirectory() as folder:
            wanted = Path(folder) / "requirements.txt"
            wanted.write_text("\n".join(round_.values()) + "\n", "utf-8")
            command = [sys.executable, "-m", "pip_audit", "--requirement", str(wanted), "--disable-pip", "--no-deps"]
            command += ["--format", "json", "--progress-spinner", "off"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            found += json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError, TypeError):
            print("pip-audit: " + (done.stderr.strip().splitlines() or ["no answer"])[-1])
    return found


def judged(name: str, found: Sequence[dict[str, Any]], *, wanted: int) -> int:
    """Print what a look at `wanted` packages found, and return the exit status for it."""
    holes = [one for one in found if one.get("vulns")]
    for one in holes:
        ids = ", ".join(hole["id"] for hole in one["vulns"])
        print(f"{name}: {one['name']} {one['version']}: {ids}")
    looked_up = sum("vulns" in one for one in found)
    if looked_up < wanted:
        print(f"{name}: NOT CHECKED: no vulnerability database knows {wanted - looked_up} of {wanted} packages here")
    elif not holes:
        print(f"{name}: {wanted} packages, no known vulnerability")
    return FOUND if holes else UNKNOWN if looked_up < wanted else 0


if __name__ == "__main__":
    sys.exit(main())
