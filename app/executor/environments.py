"""Environments of a node: which prefix a name means here, and whether it is ready to run a stage.

A name is looked for in this order: a folder or link of that name that the operator placed among the environments; an
own build of the registered specification; conda's environments. An own build lives in `<name>-<first 12 of the spec's
hash>` and counts only with its marker, which is written last: neither a venv nor a conda prefix can be moved, so a
build happens in its final place.
"""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from app.executor import conda
from app.executor.activation import interpreter
from app.executor.conda import CondaSearch
from app.registry.environment_spec import BASE_SPEC, EnvironmentSpec, parse_spec, spec_hash

MARKER = "deepe-ready.json"
BASE = "base"


class EnvironmentState(StrEnum):
    """Whether a stage can run in it now."""

    READY = "ready"
    MISSING = "missing"
    STALE = "stale"  # built from an older specification


class EnvironmentSource(StrEnum):
    """Where a prefix comes from."""

    BUILT = "built"
    CONDA = "conda"
    VENV = "venv"


@dataclass(frozen=True)
class FoundEnvironment:
    """A name on this node. `prefix` is where it is, or would be built; None if nobody knows how to build it."""

    name: str
    prefix: Path | None
    state: EnvironmentState
    source: EnvironmentSource | None


@dataclass(frozen=True)
class Build:
    """The marker of a finished build."""

    name: str
    spec_hash: str
    builder: str
    python: str
    packages: Sequence[str]
    built_at: float


def find_environment(
    name: str, spec: EnvironmentSpec | None, *, envs_dir: Path, search: CondaSearch
) -> FoundEnvironment:
    """Say what `name` means on this node; `spec` is its registered specification, if it has one."""
    if (placed := _placed(name, envs_dir)) is not None:
        return placed
    if spec is not None and (built := _built(name, spec, envs_dir)) is not None:
        return built
    if (prefix := conda.resolve(name, search)) is not None and interpreter(prefix).exists():
        return FoundEnvironment(name, prefix, EnvironmentState.READY, EnvironmentSource.CONDA)
    if spec is None and name == BASE:
        return find_environment(name, parse_spec(BASE_SPEC), envs_dir=envs_dir, search=search)
    builds = {prefix: build for prefix, build in _builds(envs_dir).items() if build.name == name}
    if builds:
        newest = max(builds, key=lambda prefix: builds[prefix].built_at)
        state = EnvironmentState.READY if spec is None else EnvironmentState.STALE
        return FoundEnvironment(name, newest, state, EnvironmentSource.BUILT)
    planned = planned_prefix(name, spec, envs_dir) if spec is not None else None
    return FoundEnvironment(name, planned, EnvironmentState.MISSING, None)


def list_environments(*, envs_dir: Path, search: CondaSearch) -> Sequence[FoundEnvironment]:
    """Return every environment of this node that is ready without a specification, sorted by name."""
    names = set(conda.list_environments(search)) | {build.name for build in _builds(envs_dir).values()}
    if envs_dir.is_dir():
        names |= {entry.name for entry in envs_dir.iterdir() if _kind(entry) and not _is_own_build(entry)}
    found = (find_environment(name, None, envs_dir=envs_dir, search=search) for name in sorted(names))
    return [environment for environment in found if environment.state is EnvironmentState.READY]


def planned_prefix(name: str, spec: EnvironmentSpec, envs_dir: Path) -> Path:
    """Return where the environment of this specification is built."""
    return envs_dir / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name).lstrip('.')}-{spec_hash(spec)[:12]}"


def read_marker(prefix: Path) -> Build | None:
    """Return what was built in `prefix`; None for a build that did not finish."""
    try:
        record = json.loads((prefix / MARKER).read_text("utf-8"))
        return Build(**{field: record[field] for field in Build.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_marker(prefix: Path, *, name: str, spec: EnvironmentSpec, builder: str, packages: Sequence[str]) -> None:
    """Declare the build finished, atomically and durably."""
    record: Mapping[str, Any] = {
        "name": name,
        "spec_hash": spec_hash(spec),
        "builder": builder,
        "python": str(interpreter(prefix).resolve()),
        "packages": list(packages),
        "built_at": time.time(),
    }
    temporary = prefix / f".{MARKER}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(prefix / MARKER)


def _placed(name: str, envs_dir: Path) -> FoundEnvironment | None:
    if name in {"", ".", ".."} or "\0" in name:
        return None
    if "/" in name and not name.startswith("/"):
        return None
    path = envs_dir / name  # an absolute name stands for itself
    if _is_own_build(path):
        return None
    source = _kind(path)
    return FoundEnvironment(name, path, EnvironmentState.READY, source) if source is not None else None


def _kind(path: Path) -> EnvironmentSource | None:
    if not interpreter(path).exists():
        return None
    if conda.is_conda_prefix(path):
        return EnvironmentSource.CONDA
    return EnvironmentSource.VENV if (path / "pyvenv.cfg").is_file() else None


def _built(name: str, spec: EnvironmentSpec, envs_dir: Path) -> FoundEnvironment | None:
    prefix = planned_prefix(name, spec, envs_dir)
    build = read_marker(prefix)
    if build is None or build.spec_hash != spec_hash(spec) or not interpreter(prefix).exists():
        return None
    return FoundEnvironment(name, prefix, EnvironmentState.READY, EnvironmentSource.BUILT)


def _builds(envs_dir: Path) -> Mapping[Path, Build]:
    if not envs_dir.is_dir():
        return {}
    markers = {entry: read_marker(entry) for entry in envs_dir.iterdir()}
    return {prefix: build for prefix, build in markers.items() if build and interpreter(prefix).exists()}


def _is_own_build(path: Path) -> bool:
    """A folder that a build made or is making: its lock lies beside it."""
    return lock_path(path).exists()


def lock_path(prefix: Path) -> Path:
    """Return the file whose lock a build of `prefix` holds."""
    return prefix.with_name(f".{prefix.name}.lock")
