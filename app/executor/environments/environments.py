"""Environments of a node: which prefix a name means here, and whether it is ready to run a stage.

A name is looked for in this order: a folder or link of that name that the operator placed among the environments; an
own build of the registered specification; conda's environments. An own build lives in `<name>-<first 12 of the spec's
hash>`, one from a lock has the first 8 of the lock's digest behind that; it counts only with its marker, which is
written last: neither a venv nor a conda prefix can be moved, so a build happens in its final place.

Workers look every few seconds: `EnvironmentFinder` reads again only what changed on disk.
"""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any

from app.domain.environment_reports import EnvironmentState
from app.domain.names import BASE_ENVIRONMENT
from app.executor.environments import conda
from app.executor.environments.activation import interpreter
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environment_archive import folder_name
from app.registry.environments.specs import BASE_SPEC, EnvironmentSpec, parse_spec, spec_hash

MARKER = "deepe-ready.json"
LOCK = "deepe-lock.json"  # what is installed, exactly
USES = ".used"  # folder of files whose times say when a stage was last started in a prefix
_BASE = parse_spec(BASE_SPEC)
_CONDA_PYTHON = re.compile(r"^python-(\d[^-]*)-[^-]+\.json$")
_SUFFIX = re.compile(r"(-cpu|-[0-9a-z]{1,8})?")
_VENV_PYTHON = re.compile(r"^version(?:_info)?\s*=\s*(\d+(?:\.\d+)*)", re.MULTILINE)


class EnvironmentSource(StrEnum):
    """Where a prefix comes from."""

    BUILT = "built"
    CONDA = "conda"
    VENV = "venv"


@dataclass(frozen=True)
class Build:
    """The marker of a finished build."""

    name: str
    spec_hash: str
    builder: str
    python: str
    packages: Sequence[str]
    built_at: float
    python_version: str = ""
    size_bytes: int | None = None
    lock: str = ""  # digest of what was installed
    cpu_torch: bool = False  # torch's CPU build stands for what the specification names


@dataclass(frozen=True)
class FoundEnvironment:
    """A name on this node. `prefix` is where it is, or would be built; None if no builder can build it."""

    name: str
    prefix: Path | None
    state: EnvironmentState
    source: EnvironmentSource | None
    build: Build | None = None


@dataclass(frozen=True)
class Scan:
    """What stood on this node's disk at one moment."""

    envs_dir: Path
    search: CondaSearch
    builds: Mapping[str, Sequence[tuple[Path, Build]]]  # by name, the newest first
    placed: Mapping[str, EnvironmentSource]
    conda: Mapping[str, Path]
    cuda: bool = False  # the node has an NVIDIA GPU, which a CPU build of torch would leave idle

    def find(self, name: str, spec: EnvironmentSpec | None) -> FoundEnvironment:
        """Say what `name` means; `spec` is its registered specification, if it has one."""
        if (placed := self._placed(name)) is not None:
            return placed
        builds = self.builds.get(name, ())
        if spec is not None:
            wanted = spec_hash(spec)
            for prefix, build in builds:
                if build.spec_hash == wanted and not (self.cuda and build.cpu_torch):
                    return _built(name, prefix, build, EnvironmentState.READY)
        if (prefix_of_conda := self._of_conda(name)) is not None:
            return FoundEnvironment(name, prefix_of_conda, EnvironmentState.READY, EnvironmentSource.CONDA)
        if spec is None and name == BASE_ENVIRONMENT:
            return self.find(name, _BASE)
        if builds:
            state = EnvironmentState.READY if spec is None else EnvironmentState.STALE
            return _built(name, *builds[0], state)
        if spec is None:
            return FoundEnvironment(name, None, EnvironmentState.MISSING, None)
        return FoundEnvironment(name, planned_prefix(name, spec, self.envs_dir), EnvironmentState.KNOWN, None)

    def ready(self) -> Sequence[FoundEnvironment]:
        """Return every environment that is ready without a specification, sorted by name."""
        names = {*self.builds, *self.placed, *self.conda}
        found = (self.find(name, None) for name in sorted(names))
        return [environment for environment in found if environment.state is EnvironmentState.READY]

    def _placed(self, name: str) -> FoundEnvironment | None:
        path = self.envs_dir / name  # an absolute name stands for itself
        if name.startswith("/") and "\0" not in name:
            source = None if _is_own_build(path) else _kind(path)
        else:
            source = self.placed.get(name)
        return FoundEnvironment(name, path, EnvironmentState.READY, source) if source is not None else None

    def _of_conda(self, name: str) -> Path | None:
        if name == "root":
            return self.conda.get(BASE_ENVIRONMENT)
        if "/" not in name:
            return self.conda.get(name)
        prefix = conda.resolve(name, self.search)
        return prefix if prefix is not None and interpreter(prefix).exists() else None


class EnvironmentFinder:
    """Looks at this node's environments again and again."""

    def __init__(self, *, envs_dir: Path, search: CondaSearch, cuda: bool = False) -> None:
        self._envs_dir = envs_dir
        self._search = search
        self._cuda = cuda
        self._markers: dict[Path, tuple[object, Build | None]] = {}
        self._versions: dict[Path, tuple[object, str | None]] = {}

    def scan(self) -> Scan:
        """Look at everything; blocks."""
        builds: dict[str, list[tuple[Path, Build]]] = {}
        placed: dict[str, EnvironmentSource] = {}
        known, self._markers = self._markers, {}
        entries = {entry.name for entry in self._envs_dir.iterdir()} if self._envs_dir.is_dir() else set()
        for name in sorted(entries):
            path = self._envs_dir / name
            if name == USES or (name.startswith(".") and name.endswith(".lock")):
                continue
            if lock_path(path).name not in entries and (source := _kind(path)) is not None:
                placed[name] = source
            build = self._marker(path, known)
            # a copy of a build has its marker, and is no build
            if build is not None and _is_place_of(path, build) and interpreter(path).exists():
                builds.setdefault(build.name, []).append((path, build))
        for of_name in builds.values():
            of_name.sort(key=lambda one: one[1].built_at, reverse=True)
        found = conda.list_environments(self._search)
        usable = {name: prefix for name, prefix in found.items() if interpreter(prefix).exists()}
        return Scan(self._envs_dir, self._search, builds, placed, usable, self._cuda)

    def python_version(self, prefix: Path) -> str | None:
        """Return the version of the Python in a foreign prefix, read from its files."""
        meta = prefix / "conda-meta"
        source = meta if meta.is_dir() else prefix / "pyvenv.cfg"
        stamp = _stamp(source)
        known = self._versions.get(prefix)
        if known is None or known[0] != stamp:
            known = self._versions[prefix] = (stamp, _python_version(source))
        return known[1]

    def _marker(self, prefix: Path, known: Mapping[Path, tuple[object, Build | None]]) -> Build | None:
        stamp = _stamp(prefix / MARKER)
        if stamp is None:
            return None
        before = known.get(prefix)
        if before is None or before[0] != stamp:
            before = (stamp, read_marker(prefix))
        self._markers[prefix] = before
        return before[1]


def find_environment(
    name: str, spec: EnvironmentSpec | None, *, envs_dir: Path, search: CondaSearch
) -> FoundEnvironment:
    """Say what `name` means on this node; who asks again and again keeps an `EnvironmentFinder`."""
    return EnvironmentFinder(envs_dir=envs_dir, search=search).scan().find(name, spec)


def planned_prefix(
    name: str, spec: EnvironmentSpec, envs_dir: Path, *, lock: str = "", cpu_torch: bool = False
) -> Path:
    """Return where the environment of this specification is built, or of a lock of it with this digest."""
    suffix = f"-{lock[:8]}" if lock else "-cpu" if cpu_torch else ""
    return envs_dir / (folder_name(name, spec_hash(spec)) + suffix)


def read_marker(prefix: Path) -> Build | None:
    """Return what was built in `prefix`; None for a build that did not finish."""
    try:
        record = json.loads((prefix / MARKER).read_text("utf-8"))
        # markers of older builds lack what was added since
        there = (field.name for field in fields(Build) if field.name in record or field.default is MISSING)
        return Build(**{name: record[name] for name in there})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_marker(
    prefix: Path,
    *,
    name: str,
    spec: EnvironmentSpec,
    builder: str,
    packages: Sequence[str],
    python_version: str = "",
    lock: str = "",
    cpu_torch: bool = False,
) -> None:
    """Declare the build finished, atomically and durably."""
    record: Mapping[str, Any] = {
        "name": name,
        "spec_hash": spec_hash(spec),
        "builder": builder,
        "python": str(interpreter(prefix).resolve()),
        "packages": list(packages),
        "built_at": time.time(),
        "python_version": python_version,
        "size_bytes": size_of(prefix),
        "lock": lock,
        "cpu_torch": cpu_torch,
    }
    temporary = prefix / f".{MARKER}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(prefix / MARKER)


def size_of(folder: Path) -> int:
    """Return the bytes of the files below; those that conda shares with its cache count, too."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118 - tens of thousands of files
            except OSError:
                continue
    return total


def lock_path(prefix: Path) -> Path:
    """Return the file whose lock a build of `prefix` holds."""
    return prefix.with_name(f".{prefix.name}.lock")


def mark_used(envs_dir: Path, prefix: Path) -> None:
    """Record that a stage was started in `prefix`, which may be read-only for the service."""
    path = _use_path(envs_dir, prefix)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{prefix}\n", "utf-8")


def last_use(envs_dir: Path, prefix: Path) -> float | None:
    """Return when a stage was last started in `prefix`; None if never, as far as we know."""
    try:
        return _use_path(envs_dir, prefix).stat().st_mtime
    except OSError:
        return None


def forget_use(envs_dir: Path, prefix: Path) -> None:
    """Drop what is remembered of a prefix that is gone."""
    _use_path(envs_dir, prefix).unlink(missing_ok=True)


def _use_path(envs_dir: Path, prefix: Path) -> Path:
    return envs_dir / USES / sha256(os.fsencode(prefix)).hexdigest()[:32]


def _built(name: str, prefix: Path, build: Build, state: EnvironmentState) -> FoundEnvironment:
    return FoundEnvironment(name, prefix, state, EnvironmentSource.BUILT, build)


def _kind(path: Path) -> EnvironmentSource | None:
    if not interpreter(path).exists():
        return None
    if conda.is_conda_prefix(path):
        return EnvironmentSource.CONDA
    return EnvironmentSource.VENV if (path / "pyvenv.cfg").is_file() else None


def _is_place_of(path: Path, build: Build) -> bool:
    """Say whether the folder has a name that `planned_prefix` gives to such a build."""
    suffix = path.name.removeprefix(folder_name(build.name, build.spec_hash))
    return suffix != path.name and _SUFFIX.fullmatch(suffix) is not None


def _is_own_build(path: Path) -> bool:
    """A folder that a build made or is making: its lock lies beside it."""
    return lock_path(path).exists()


def _python_version(source: Path) -> str | None:
    try:
        if source.is_dir():
            found = [_CONDA_PYTHON.match(entry.name) for entry in source.iterdir()]
            return next((match[1] for match in found if match), None)
        match = _VENV_PYTHON.search(source.read_text("utf-8", "replace"))
        return match[1] if match else None
    except OSError:
        return None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
