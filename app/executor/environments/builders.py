"""Who can build an environment on this node, and with which commands. Decisions only; nothing runs here.

In order: a conda-family executable; py-rattler if it is installed (its program says when no channel can be reached);
venv + pip, which needs nothing but Python and so takes specifications with python and pip as only conda packages.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from app.domain.environment_locks import EnvironmentLock, PipPackage
from app.domain.errors import Invalid
from app.executor.environments.activation import interpreter
from app.executor.environments.conda import CondaSearch, find_executable
from app.executor.environments.shipped import CPU_BUILDS, NO_SOURCE, TorchSource
from app.presets.environments import Device
from app.registry.environments.specs import EnvironmentSpec, version_matches

REQUIREMENTS = "deepe-requirements.txt"
CHANNELS_UNREACHABLE = os.EX_UNAVAILABLE  # exit status of the rattler program: another builder may try
RATTLER_PROGRAM = Path(__file__).with_name("rattler_builder.py")


class Builder(StrEnum):
    """Ways to make a prefix."""

    CONDA = "conda"
    RATTLER = "rattler"
    VENV = "venv"


class EnvironmentNeedsConda(Invalid):
    """The specification has conda packages that only conda can install."""

    code = "environment_needs_conda"


class EnvironmentNeedsOtherPython(Invalid):
    """The specification excludes the only Python that venv can offer."""

    code = "environment_needs_other_python"


class EnvironmentNeedsPack(Invalid):
    """The node has no network, and there is no pack of the environment for it."""

    code = "environment_needs_pack"


class EnvironmentLockUnfit(Invalid):
    """What was locked on another machine cannot run on this one."""

    code = "environment_lock_unfit"


class EnvironmentBuilderMissing(Invalid):
    """The builder that was asked for is not on this node."""

    code = "environment_builder_missing"


@dataclass(frozen=True)
class BuildRules:
    """How this node builds: what the operator says, and the accelerators that decide what can run here."""

    builder: str = "auto"
    channels: tuple[str, ...] = ()  # for specifications that name none
    offline: bool = False
    archive: Path | None = None  # where nodes share packs
    torch: TorchSource = NO_SOURCE
    devices: frozenset[Device] = frozenset({"cpu"})


@dataclass(frozen=True)
class Tools:
    """What this node builds with."""

    conda: Path | None
    rattler: bool
    python_version: str

    @classmethod
    def found(cls, search: CondaSearch) -> "Tools":
        """Look at this machine."""
        return cls(
            conda=find_executable(search),
            rattler=importlib.util.find_spec("rattler") is not None,
            python_version=platform.python_version(),
        )


@dataclass(frozen=True)
class Step:
    """One command of a build. `activated`: it runs inside the environment that earlier steps made."""

    message: str
    argv: tuple[str, ...]
    activated: bool = False


@dataclass(frozen=True)
class Pip:
    """The pip that installs into a prefix."""

    argv: tuple[str, ...]
    version: tuple[int, int]

    @property
    def reports(self) -> bool:
        """It can write down what it installs."""
        return self.version >= (22, 2)

    @property
    def counts(self) -> bool:
        """It can say how many bytes it has, line by line."""
        return self.version >= (24, 1)

    def install(self, prefix: Path, part: str = "") -> tuple[str, ...]:
        """Return the beginning of a command that installs, and writes down what it did."""
        bar = ("--progress-bar", "raw") if self.counts else ()
        report = ("--report", str(prefix / f"deepe-pip-report{part}.json")) if self.reports else ()
        return (*self.argv, "install", *_PIP_OPTIONS, *bar, *report)


_PIP_OPTIONS = ("--disable-pip-version-check", "--no-input")


def choose_builders(
    spec: EnvironmentSpec, tools: Tools, *, wanted: Builder | None = None, channels: Sequence[str] = ()
) -> Sequence[Builder]:
    """Return the builders to try in order, never empty; raise an `Invalid` that says what is in the way.

    `channels` serve a specification that names none.
    """
    if wanted is not None:
        return [_available(wanted, spec, tools)]
    if tools.conda is not None:
        return [Builder.CONDA]
    refusal = venv_refusal(spec, tools.python_version)
    rattler = [Builder.RATTLER] if tools.rattler and (spec.channels or channels) else []
    if refusal is not None and not rattler:
        raise refusal
    return rattler if refusal is not None else [*rattler, Builder.VENV]


def venv_refusal(spec: EnvironmentSpec, python_version: str) -> Invalid | None:
    """Say why venv + pip cannot make this environment; None if they can."""
    foreign = [d.text for d in spec.dependencies if d.name not in {"python", "pip"}]
    if foreign:
        return EnvironmentNeedsConda(packages=", ".join(foreign))
    python = spec.needs("python")
    if python is not None and not version_matches(python.version, python_version):
        return EnvironmentNeedsOtherPython(constraint=python.version, version=python_version)
    return None


def create_step(
    builder: Builder, spec: EnvironmentSpec, prefix: Path, tools: Tools, *, channels: Sequence[str] = ()
) -> Step:
    """Return the command that makes the prefix with its conda packages; `channels` if the specification names none."""
    packages = conda_packages(spec)
    options = _channel_options(spec, channels)
    match builder:
        case Builder.CONDA:
            assert tools.conda is not None
            override = ["--override-channels"] if "nodefaults" in spec.channels else []
            command = [str(tools.conda), "create", "--yes", "--prefix", str(prefix), *override, *options, *packages]
        case Builder.RATTLER:
            program = [sys.executable, "-P", "-u", str(RATTLER_PROGRAM)]
            command = [*program, "--prefix", str(prefix), *options, *packages]
        case Builder.VENV:
            return Step("Creating a virtual environment", (sys.executable, "-m", "venv", str(prefix)))
    return Step(f"Installing {len(packages)} conda packages and what they need", tuple(command))


def pip_step(spec: EnvironmentSpec, prefix: Path, pip: Pip) -> Step | None:
    """Return the command that installs the `pip:` list, as conda does it."""
    if not spec.pip:
        return None
    command = (*pip.install(prefix), "--exists-action=b", "-U", "-r", str(prefix / REQUIREMENTS))
    return Step(f"Installing {len(spec.pip)} packages with pip", command, activated=True)


def torch_step(requirements: Sequence[str], source: TorchSource, prefix: Path, pip: Pip, *, alone: bool) -> Step:
    """Return the command that installs torch from its source; `alone`: without what it needs, which comes later."""
    options = (*source.options, *(("--no-deps",) if alone else ()))
    command = (*pip.install(prefix, "-source"), *options, *requirements)
    return Step(f"Installing {', '.join(requirements)} from {source}", command, activated=True)


# ---- from a lock ----------------------------------------------------------------------------------------------------


def locked_builder(lock: EnvironmentLock, tools: Tools, *, platform: str) -> Builder:
    """Return the builder that can install exactly the lock. Raise an `Invalid` if this node has none."""
    if lock.platform != platform:
        raise EnvironmentLockUnfit(wanted=lock.platform, found=platform, node=lock.node)
    if not lock.conda:
        if lock.python.split(".")[:2] != tools.python_version.split(".")[:2]:
            wanted, found = f"Python {lock.python}", f"Python {tools.python_version}"
            raise EnvironmentLockUnfit(wanted=wanted, found=found, node=lock.node)
        return Builder.VENV
    if tools.conda is not None:
        return Builder.CONDA
    if not tools.rattler:
        raise EnvironmentNeedsConda(packages=", ".join(package.name for package in lock.conda))
    return Builder.RATTLER


def locked_create_step(
    builder: Builder,
    lock: EnvironmentLock,
    spec: EnvironmentSpec,
    prefix: Path,
    tools: Tools,
    *,
    channels: Sequence[str],
) -> Step:
    """Return the command that makes the prefix with the very conda packages of the lock."""
    said = f"Installing {len(lock.conda)} conda packages of the lock"
    match builder:
        case Builder.VENV:
            return create_step(builder, spec, prefix, tools)
        case Builder.CONDA:
            command = (
                str(tools.conda),
                "create",
                "--yes",
                "--prefix",
                str(prefix),
                "--file",
                str(explicit_file(prefix)),
            )
            return Step(said, command)
        case Builder.RATTLER:
            program = (sys.executable, "-P", "-u", str(RATTLER_PROGRAM), "--prefix", str(prefix))
            packages = tuple(package.spec for package in lock.conda)
            return Step(said, (*program, *_channel_options(spec, channels), *packages))


@dataclass(frozen=True)
class LockedPart:
    """Packages of a lock that one run of pip installs: digests are demanded of all lines of a file or of none."""

    name: str
    packages: Sequence[PipPackage]
    options: Sequence[str]

    @property
    def lines(self) -> str:
        """Return the requirements file."""
        return "".join(f"{package.requirement}\n" for package in self.packages)


def locked_parts(packages: Sequence[PipPackage], torch: TorchSource) -> Sequence[LockedPart]:
    """Return the packages with a digest and the others, none of them empty; `torch` has the builds of torch that no
    registry has, whose versions say so (2.13.0+cpu)."""
    hashed = [package for package in packages if package.sha256 is not None]
    strict = ("--no-deps", "--require-hashes")
    parts = (
        LockedPart("torch", [one for one in hashed if "+" in one.version], (*strict, *(torch or CPU_BUILDS).options)),
        LockedPart("hashed", [one for one in hashed if "+" not in one.version], strict),
        LockedPart("other", [one for one in packages if one.sha256 is None], ("--no-deps",)),
    )
    return [part for part in parts if part.packages]


def locked_pip_step(part: LockedPart, prefix: Path, pip: Pip) -> Step:
    """Return the command that installs the part, whose lines stand in `requirements_of`."""
    command = (*pip.install(prefix, f"-{part.name}"), *part.options, "-r", str(requirements_of(part, prefix)))
    return Step(f"Installing {len(part.packages)} packages of the lock with pip", command, activated=True)


def requirements_of(part: LockedPart, prefix: Path) -> Path:
    """Return where the part's requirements file stands."""
    return prefix / f"deepe-{part.name}.txt"


def explicit_file(prefix: Path) -> Path:
    """Return where conda's explicit list stands; beside the prefix, which is not there yet."""
    return prefix.with_name(f".{prefix.name}.explicit.txt")


# ---- from a pack ----------------------------------------------------------------------------------------------------


def wheels_step(prefix: Path, wheels: Path) -> Step:
    """Return the command that installs a folder of wheels and nothing else."""
    pip = Pip((str(interpreter(prefix)), "-m", "pip"), (22, 2))
    hashed = ("--no-deps", "--require-hashes", "--no-index", "--find-links", str(wheels))
    command = (*pip.install(prefix), *hashed, "-r", str(wheels / "requirements.txt"))
    return Step("Installing the packed wheels with pip", command, activated=True)


def needs_network(spec: EnvironmentSpec) -> bool:
    """Say whether building takes more than a Python of this machine."""
    return bool(spec.pip) or any(dependency.name not in {"python", "pip"} for dependency in spec.dependencies)


def _channel_options(spec: EnvironmentSpec, default: Sequence[str]) -> Sequence[str]:
    """Return the channels as options; `default` if the specification names none."""
    channels = [channel for channel in spec.channels or default if channel != "nodefaults"]
    return [option for channel in channels for option in ("--channel", channel)]


def conda_packages(spec: EnvironmentSpec) -> Sequence[str]:
    """Return the conda packages to ask for: a stage needs a Python, a `pip:` list needs pip."""
    packages = [dependency.text for dependency in spec.dependencies]
    if spec.needs("python") is None:
        packages.append("python")
    if spec.pip and spec.needs("pip") is None:
        packages.append("pip")
    return packages


def _available(wanted: Builder, spec: EnvironmentSpec, tools: Tools) -> Builder:
    missing = (wanted is Builder.CONDA and tools.conda is None) or (wanted is Builder.RATTLER and not tools.rattler)
    if missing:
        raise EnvironmentBuilderMissing(builder=wanted.value)
    if wanted is Builder.VENV and (refusal := venv_refusal(spec, tools.python_version)) is not None:
        raise refusal
    return wanted
