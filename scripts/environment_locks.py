"""Resolve the shipped environments into locks (PEP 751) for every platform, or say which lock is not today's.

.venv/bin/python -m scripts.environment_locks [NAME...]            writes app/presets/shared/environments/pylock.*.toml
.venv/bin/python -m scripts.environment_locks --check [NAME...]    resolves, writes nothing; exit 1 names what is stale
.venv/bin/python -m scripts.environment_locks --upgrade [NAME...]  takes newer versions of what no specification pins
.venv/bin/python -m scripts.environment_locks --table              which platform has what to install, from the locks

It needs `uv` on PATH (`pip install uv`) and a package registry; nothing but metadata is downloaded. A lock that exists
is kept wherever it still satisfies its specification, so that a run without --upgrade changes what it must.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.executor.environments.lockfile import Lockfile, Machine, NotForMachine
from app.executor.environments.shipped import is_for_cuda
from app.presets.environments import ShippedEnvironment, shipped_environments
from app.registry.environments.specs import parse_spec, spec_hash

PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = {
    "Linux x86-64": ("linux", "x86_64"),
    "Linux arm64": ("linux", "aarch64"),
    "macOS arm64": ("darwin", "arm64"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="environments; all of them without one")
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--check", action="store_true")
    does.add_argument("--upgrade", action="store_true")
    does.add_argument("--table", action="store_true")
    options = parser.parse_args()
    shipped = shipped_environments()
    chosen = [shipped[name] for name in options.names or shipped]
    if options.table:
        print(table(chosen))
        return 0
    faults = [fault for one in chosen for fault in _renew(one, check=options.check, upgrade=options.upgrade)]
    print("\n".join(faults) or "Every lock is as its specification wants it.")
    return 1 if faults else 0


def _renew(one: ShippedEnvironment, *, check: bool, upgrade: bool) -> Iterator[str]:
    """Write the lock, or say that it is another than the present one."""
    try:
        text = resolved(one, upgrade=upgrade)
    except subprocess.CalledProcessError as error:
        yield f"{one.name}: cannot be resolved:\n{error.stderr.strip()}"
        return
    before = one.lock_file.read_text("utf-8") if one.lock_file.is_file() else ""
    if check:
        if text != before:
            yield f"{one.name}: {one.lock_file.name} is stale; run: python -m scripts.environment_locks {one.name}"
    else:
        one.lock_file.write_text(text, "utf-8")
        print(f"{one.lock_file.name}: {len(Lockfile.parse(text).packages)} packages")
    for where, found in obstacles(Lockfile.parse(text)).items():
        if where not in one.not_on:
            yield f"{one.name} cannot be installed on {where}: {found}; say why in `not_on`"


def resolved(one: ShippedEnvironment, *, upgrade: bool) -> str:
    """Return the text of a new lock; what the present one pins is preferred."""
    spec = parse_spec(one.spec_file.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        wanted, made = Path(folder) / "requirements.in", Path(folder) / one.lock_file.name
        wanted.write_text("\n".join(spec.pip) + "\n", "utf-8")
        if one.lock_file.is_file() and not upgrade:
            shutil.copy(one.lock_file, made)
        command = ["uv", "pip", "compile", "requirements.in", "--universal", "--python-version", PYTHONS[0]]
        command += ["--quiet", "--format", "pylock.toml", "--output-file", str(made)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=_without_pip_options())
        document = tomllib.loads(made.read_text("utf-8"))
    return _text(one, document, digest=spec_hash(spec))


def obstacles(lock: Lockfile) -> Mapping[str, str]:
    """Return what cannot be installed on which platform."""
    found = {}
    for where, (system, machine) in PLATFORMS.items():
        try:
            for python in PYTHONS:
                lock.select(Machine.of(python=python, system=system, machine=machine))
        except NotForMachine as error:
            found[where] = str(error)
    return found


def table(chosen: Sequence[ShippedEnvironment]) -> str:
    """Return a Markdown table: packages and megabytes to download for each platform."""
    lines = ["| environment | " + " | ".join(PLATFORMS) + " |", "|---|" + "---|" * len(PLATFORMS)]
    for one in chosen:
        lock, cells = Lockfile.parse(one.lock_file.read_text("utf-8")), []
        for where, (system, machine) in PLATFORMS.items():
            if where in one.not_on:
                cells.append(f"no: {one.not_on[where]}")
                continue
            chosen_files = lock.select(Machine.of(python=PYTHONS[0], system=system, machine=machine))
            megabytes = sum(file.size for file in chosen_files) / 1e6
            cells.append(f"{len(chosen_files)} packages, {megabytes:,.0f} MB")
        lines.append(f"| `{one.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(one: ShippedEnvironment, document: Mapping[str, Any], *, digest: str) -> str:
    """Write the lock with what some platform of ours can install, and nothing else."""
    lines = ['lock-version = "1.0"', 'created-by = "scripts/environment_locks.py"', 'requires-python = ">=3.11"']
    for package in document["packages"]:
        if "cuda" not in one.runs_on and is_for_cuda(package["name"]):
            continue  # of the registry's torch; the CPU build needs none of it
        wheels = [wheel for wheel in package.get("wheels", ()) if _is_for_us(wheel["url"].rpartition("/")[2])]
        lines += ["", "[[packages]]", f"name = {json.dumps(package['name'])}"]
        lines += [f"version = {json.dumps(package['version'])}"]
        lines += [f"marker = {json.dumps(package['marker'])}"] if "marker" in package else []
        if "sdist" in package and not any(wheel["url"].endswith("-none-any.whl") for wheel in wheels):
            lines.append(f"sdist = {_file(package['sdist'])}")
        if wheels:
            lines += ["wheels = [", *(f"  {_file(wheel)}," for wheel in wheels), "]"]
    return "\n".join([*lines, "", "[tool.deepe]", f"spec-hash = {json.dumps(digest)}", ""])


def _file(file: Mapping[str, Any]) -> str:
    digest = json.dumps(file["hashes"]["sha256"])
    return f"{{ url = {json.dumps(file['url'])}, size = {file['size']}, hashes = {{ sha256 = {digest} }} }}"


def _is_for_us(name: str) -> bool:
    return any(
        Machine.of(python=python, system=system, machine=machine).takes(name)
        for python in PYTHONS
        for system, machine in PLATFORMS.values()
    )


def _without_pip_options() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_INDEX"))}


if __name__ == "__main__":
    sys.exit(main())
