"""What the product declares to need, and what its modules import."""

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from scripts.check_wheels import PLATFORMS, PYTHONS

ROOT = Path(__file__).parents[2]
PROJECT = "deepextension"

Target = Mapping[str, str]
"""Values of environment markers: a platform with a Python."""

# modules that only run where an extra is installed
MODULES_OF_EXTRAS = {"app/executor/environments/rattler_builder.py": "conda", "app/formats/columnar.py": "parquet"}


@dataclass(frozen=True)
class Import:
    """One import statement of a third party's package."""

    place: str
    package: str


def targets() -> list[Target]:
    """Return the marker values of every supported platform and Python."""
    return [platform.markers(python) for platform in PLATFORMS for python in PYTHONS]


def declared(target: Target, *, extra: str = "") -> set[NormalizedName]:
    """Return the distributions that `target` installs for the product, with the packages of `extra`."""
    return {canonicalize_name(found.name) for found in _requirements(PROJECT, target, {extra})}


def closure(target: Target) -> set[NormalizedName]:
    """Return every distribution that `target` installs with the product, dependencies of dependencies included."""
    found: set[NormalizedName] = set()
    open_ = [(canonicalize_name(PROJECT), frozenset[str]())]
    seen = set(open_)
    while open_:
        name, extras = open_.pop()
        found.add(name)
        for requirement in _requirements(name, target, {"", *extras}):
            item = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if item not in seen:
                seen.add(item)
                open_.append(item)
    return found - {canonicalize_name(PROJECT)}


def imports() -> Iterator[Import]:
    """Yield each import of a third party's package by a module of the service.

    Helpers of stage scripts import each other by name where a stage calls them; the service does not call those parts.
    """
    ours = {"app", "migrations", *(path.stem for path in (ROOT / "app/presets/shared/helpers").iterdir())}
    for path, names in _service_files().items():
        for name in names:
            package = name.partition(".")[0]
            if package not in sys.stdlib_module_names and package not in ours:
                yield Import(path.relative_to(ROOT).as_posix(), package)


def service_modules() -> list[str]:
    """Return the modules of `app` that can be imported without any extra."""
    files = [path for path in _service_files() if path.relative_to(ROOT).as_posix() not in MODULES_OF_EXTRAS]
    return [_module(path) for path in files if path.is_relative_to(ROOT / "app") and path.name != "__main__.py"]


def providers(package: str, distributions: Mapping[str, list[str]]) -> set[NormalizedName]:
    """Return the installed distributions that bring `package`."""
    return {canonicalize_name(name) for name in distributions.get(package, ())}


@cache
def _service_files() -> Mapping[Path, Sequence[str]]:
    """Return what each module imports that runs in the service's own environment."""
    files = [path for room in ("app", "migrations") for path in sorted((ROOT / room).rglob("*.py"))]
    names = {path: list(_imported(ast.parse(path.read_text("utf-8")))) for path in files}
    ours = {name for found in names.values() for name in found}
    # scripts run in the environment of their method, and nothing of the service imports them
    presets = ROOT / "app/presets"
    return {path: found for path, found in names.items() if not path.is_relative_to(presets) or _module(path) in ours}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yield every absolute name in an import statement, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _requirements(name: str, target: Target, extras: set[str]) -> Iterator[Requirement]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return  # its marker leaves it out on this machine
    for requirement in map(Requirement, lines):
        if requirement.marker is None or any(requirement.marker.evaluate({**target, "extra": e}) for e in extras):
            yield requirement
