"""Find conda environments by name, as conda itself does, without starting conda.

A service has no shell initialisation, so roots and executables are also looked for where installers put them.
Nothing is cached: a handful of `stat` calls cost less than an answer that is out of date.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from app.domain.names import BASE_ENVIRONMENT
from app.domain.plain_text import storable

EXECUTABLES = ("conda", "mamba", "micromamba")


@dataclass(frozen=True)
class CondaSearch:
    """Where to look: the worker's environment variables and home, and a root that the operator named, if any."""

    environ: Mapping[str, str]
    home: Path
    root: Path | None = None

    @classmethod
    def of(cls, environ: Mapping[str, str], *, root: Path | None = None) -> "CondaSearch":
        """Search with the home that `environ` names."""
        return cls(environ=environ, home=Path(environ.get("HOME") or Path.home()), root=root)


def is_conda_prefix(path: Path) -> bool:
    """Say whether a folder is a conda environment."""
    return (path / "conda-meta").is_dir()


def resolve(name: str, search: CondaSearch) -> Path | None:
    """Return the prefix of the environment that conda calls `name`; an absolute path names itself."""
    if "/" in name:
        path = Path(name)
        return path if path.is_absolute() and is_conda_prefix(path) else None
    if name in {BASE_ENVIRONMENT, "root"}:
        return find_root(search)
    if name in {"", ".", ".."}:
        return None
    return next((folder / name for folder in environment_folders(search) if is_conda_prefix(folder / name)), None)


def list_environments(search: CondaSearch) -> Mapping[str, Path]:
    """Return name → prefix of every environment that `resolve` finds; the first of a name wins."""
    found: dict[str, Path] = {}
    root = find_root(search)
    if root is not None:
        found[BASE_ENVIRONMENT] = root
    for folder in environment_folders(search):
        for prefix in sorted(folder.iterdir()) if folder.is_dir() else ():
            # a job cannot ask for a name that cannot be written
            if is_conda_prefix(prefix) and storable(prefix.name) == prefix.name:
                found.setdefault(prefix.name, prefix)
    return found


def find_root(search: CondaSearch) -> Path | None:
    """Return conda's root prefix (the environment `base`)."""
    return next((root for root in _roots(search) if is_conda_prefix(root)), None)


def find_executable(search: CondaSearch) -> Path | None:
    """Return a conda, mamba or micromamba that can be started: on PATH, named by a variable, or of a known root."""
    path = search.environ.get("PATH", "")
    candidates = [shutil.which(name, path=path) for name in EXECUTABLES]
    candidates += [search.environ.get("CONDA_EXE"), search.environ.get("MAMBA_EXE")]
    for root in _roots(search):
        candidates += [str(root / "condabin" / "conda"), str(root / "bin" / "conda")]
    return next((Path(found) for found in candidates if found and os.access(found, os.X_OK)), None)


def environment_folders(search: CondaSearch) -> Sequence[Path]:
    """Return the folders that hold environments by name, in the order in which conda looks."""
    environ, root = search.environ, find_root(search)
    folders = [
        Path(part)
        for variable in ("CONDA_ENVS_PATH", "CONDA_ENVS_DIRS")
        for part in environ.get(variable, "").split(os.pathsep)
        if part
    ]
    folders += _condarc_folders(search, root)
    personal = search.home / ".conda" / "envs"
    if root is not None and os.access(root, os.W_OK):
        folders += [root / "envs", personal]
    else:
        folders += [personal, *([root / "envs"] if root is not None else [])]
    folders += [mamba / "envs" for mamba in _mamba_roots(search)]
    return list(dict.fromkeys(folder for folder in folders if folder.is_absolute()))


def _roots(search: CondaSearch) -> Iterator[Path]:
    if search.root is not None:
        yield search.root
    if named := search.environ.get("CONDA_ROOT_PREFIX"):
        yield Path(named)
    for rc in _condarcs(search, None):
        if isinstance(named := rc.get("root_prefix"), str):
            yield _expanded(named, search)
    executables = [search.environ.get("CONDA_EXE"), shutil.which("conda", path=search.environ.get("PATH", ""))]
    for executable in executables:
        if executable:
            yield Path(executable).resolve().parent.parent  # <root>/bin/conda or <root>/condabin/conda
    for name in ("miniforge3", "mambaforge", "miniconda3", "anaconda3"):
        yield search.home / name
    yield from (Path("/opt/conda"), Path("/opt/miniconda3"))
    if sys.platform == "darwin":
        for cask in ("miniforge", "miniconda"):
            yield Path("/opt/homebrew/Caskroom") / cask / "base"


def _mamba_roots(search: CondaSearch) -> Iterator[Path]:
    if named := search.environ.get("MAMBA_ROOT_PREFIX"):
        yield Path(named)
        return
    yield search.home / "micromamba"
    yield Path(search.environ.get("XDG_DATA_HOME") or search.home / ".local" / "share") / "mamba"


def _condarc_folders(search: CondaSearch, root: Path | None) -> list[Path]:
    found: list[Path] = []
    for rc in _condarcs(search, root):
        entries = rc.get("envs_dirs", rc.get("envs_path"))
        if isinstance(entries, list):
            found += [_expanded(entry, search) for entry in entries if isinstance(entry, str)]
    return found


def _condarcs(search: CondaSearch, root: Path | None) -> Iterator[Mapping[str, Any]]:
    """Yield the readable condarc files, the strongest first."""
    for path in reversed(list(_condarc_paths(search, root))):
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(content, dict):
            yield content


def _condarc_paths(search: CondaSearch, root: Path | None) -> Iterator[Path]:
    """Yield where condarc files may be, the strongest last."""
    environ, home = search.environ, search.home
    folders = [Path("/etc/conda"), Path("/var/lib/conda"), *([root] if root is not None else [])]
    if xdg := environ.get("XDG_CONFIG_HOME"):
        folders.append(Path(xdg) / "conda")
    folders += [home / ".config" / "conda", home / ".conda"]
    for folder in folders:
        yield from (folder / ".condarc", folder / "condarc")
        yield from sorted((folder / "condarc.d").glob("*.y*ml"))
    yield home / ".condarc"
    if prefix := environ.get("CONDA_PREFIX"):
        yield from (Path(prefix) / ".condarc", Path(prefix) / "condarc")
    for variable in ("CONDARC", "MAMBARC"):
        if named := environ.get(variable):
            yield _expanded(named, search)


def _expanded(text: str, search: CondaSearch) -> Path:
    """Expand `~` and variables with the search's own home and environment."""
    if text == "~" or text.startswith("~/"):
        text = str(search.home) + text[1:]
    for name in sorted(search.environ, key=len, reverse=True):
        text = text.replace(f"${{{name}}}", search.environ[name]).replace(f"${name}", search.environ[name])
    return Path(text)
