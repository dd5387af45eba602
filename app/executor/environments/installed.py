"""Read from a prefix what is installed in it: conda's records, pip's list, and where pip's packages came from."""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.domain.environment_locks import CondaPackage, EnvironmentLock, PipPackage
from app.executor.environments.activation import interpreter
from app.executor.environments.builders import Pip
from app.executor.environments.environment_archive import this_platform

PIP_REPORTS = "deepe-pip-report*.json"
_FROZEN = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:==(?P<version>\S+)| @ (?P<url>\S+))$")


def lock_of(prefix: Path, *, environment: str, spec_hash: str, node: str, builder: str) -> EnvironmentLock:
    """Return the lock of what stands in `prefix`; the report that pip left there adds the digests."""
    conda = conda_packages_of(prefix)
    of_conda = {normal(package.name) for package in conda}
    reported = _reported(prefix)
    others = [one for line in frozen(prefix) if (one := _frozen(line)) and one.name not in {*of_conda, *reported}]
    # without a report, what came with the Python and what was installed cannot be distinguished
    pip = [*reported.values(), *(others if conda or not reported else ())]
    bundled = [] if conda or not reported else [f"{one.name}=={one.version}" for one in others]
    return EnvironmentLock(
        environment=environment,
        spec_hash=spec_hash,
        node=node,
        platform=this_platform(),
        python=python_version(prefix),
        builder=builder,
        conda=tuple(conda),
        pip=tuple(sorted(pip, key=lambda one: one.name)),
        bundled=tuple(bundled),
        created_at=datetime.now(UTC),
    )


def conda_packages_of(prefix: Path) -> Sequence[CondaPackage]:
    """Return conda's packages, each behind those that it needs."""
    records: dict[str, Mapping[str, Any]] = {}
    for path in sorted((prefix / "conda-meta").glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        records[record["name"]] = record
    return [
        CondaPackage(
            name=record["name"],
            version=record["version"],
            build=record.get("build") or record.get("build_string") or "",
            url=record.get("url") or "",
            sha256=record.get("sha256"),
            md5=record.get("md5"),
        )
        for record in _needed_first(records)
    ]


def frozen(prefix: Path) -> Sequence[str]:
    """Return pip's own list; empty where there is no pip."""
    command = [str(interpreter(prefix)), "-m", "pip", "freeze", "--all", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def python_version(prefix: Path) -> str:
    """Ask the environment's Python for its version."""
    command = [str(interpreter(prefix)), "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def pip_of(prefix: Path) -> Pip:
    """Return the pip that installs into the prefix. For a venv it is ours: Pythons come with old ones."""
    own = [str(interpreter(prefix)), "-m", "pip"]
    if (prefix / "pyvenv.cfg").is_file():
        argv = (sys.executable, "-P", "-m", "pip", "--python", str(interpreter(prefix)))
        return Pip(argv, _pip_version(f"pip {importlib.metadata.version('pip')}"))
    done = subprocess.run([*own, "--version"], capture_output=True, text=True, check=False)
    return Pip(tuple(own), _pip_version(done.stdout))


def _pip_version(text: str) -> tuple[int, int]:
    match = re.match(r"pip (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def normal(name: str) -> str:
    """Return the one spelling of a Python package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _reported(prefix: Path) -> Mapping[str, PipPackage]:
    """Return what pip wrote down of its runs, by name."""
    found: dict[str, PipPackage] = {}
    for path in sorted(prefix.glob(PIP_REPORTS)):
        for item in json.loads(path.read_text("utf-8"))["install"]:
            metadata, origin = item["metadata"], item.get("download_info", {})
            name = normal(metadata["name"])
            found[name] = PipPackage(
                name=name,
                version=metadata["version"],
                url=_address(origin) if item.get("is_direct") else None,
                sha256=_digest(origin.get("archive_info", {})),
            )
    return found


def _digest(archive: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 digest of an archive; pip before 23.1, such as Debian's, has one text for kind and digest."""
    kind, _, digest = str(archive.get("hash", "")).partition("=")
    found = archive.get("hashes", {kind: digest}).get("sha256")
    return str(found) if found else None


def _frozen(line: str) -> PipPackage | None:
    match = _FROZEN.match(line)
    return PipPackage(name=normal(match["name"]), version=match["version"] or "", url=match["url"]) if match else None


def _address(origin: Mapping[str, Any]) -> str:
    """Return what pip installs this from again: an address, with the commit of a repository."""
    vcs = origin.get("vcs_info")
    return f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else str(origin["url"])


def _needed_first(records: Mapping[str, Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    done: set[str] = set()
    for start in records:
        stack = [(start, False)]
        while stack:
            name, ready = stack.pop()
            if ready:
                yield records[name]
            elif name in records and name not in done:  # circles exist: python and pip need one another
                done.add(name)
                stack.append((name, True))
                needs = (
                    re.split(r"[\s=<>!~\[]", str(need), maxsplit=1)[0] for need in records[name].get("depends", ())
                )
                stack += [(need, False) for need in needs]
