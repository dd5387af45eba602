"""Read a lock file (PEP 751) and choose what one machine installs of it."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self
from urllib.parse import unquote

from packaging import tags
from packaging.markers import Marker, default_environment
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from app.domain.environment_locks import LockedFile

_NEWEST_MANYLINUX = 39
_NEWEST_MACOS = (15, 0)


class NotForMachine(Exception):
    """Packages of the lock have no file that the machine takes."""

    def __init__(self, packages: Sequence[str]) -> None:
        super().__init__(", ".join(packages))


@dataclass(frozen=True)
class Machine:
    """What decides which files fit: tags, the best first, and the values of markers."""

    tags: Mapping[tags.Tag, int]
    markers: Mapping[str, str]

    @classmethod
    def here(cls, python: str) -> Self:
        """Return this machine with a Python of version `python`."""
        return cls._of(python, tuple(tags.platform_tags()), {})

    @classmethod
    def of(cls, *, python: str, system: str, machine: str) -> Self:
        """Return a machine with a recent system of that kind."""
        names = {"linux": "Linux", "darwin": "Darwin"}
        said = {"sys_platform": system, "platform_system": names[system], "platform_machine": machine}
        return cls._of(python, _platforms(system, machine), said)

    @classmethod
    def _of(cls, python: str, platforms: tuple[str, ...], said: Mapping[str, str]) -> Self:
        short = tuple(int(part) for part in python.split(".")[:2])
        full = python if python.count(".") == 2 else f"{python}.9"
        default = {name: str(value) for name, value in default_environment().items()}
        of_python = {"python_version": ".".join(map(str, short)), "python_full_version": full}
        return cls(_tags(short, platforms), {**default, **said, **of_python})

    def takes(self, name: str) -> bool:
        """Return whether a wheel of this name can be installed."""
        return self.rank(name) is not None

    def rank(self, name: str) -> int | None:
        """Return how well a wheel fits, 0 is best. None: not at all."""
        try:
            ranks = [self.tags[tag] for tag in parse_wheel_filename(name)[3] if tag in self.tags]
        except InvalidWheelFilename:
            return None
        return min(ranks, default=None)


@dataclass(frozen=True)
class Lockfile:
    """What a lock file says."""

    spec_hash: str
    packages: Sequence[Mapping[str, Any]]

    @classmethod
    def parse(cls, text: str) -> Self:
        document = tomllib.loads(text)
        return cls(document["tool"]["deepe"]["spec-hash"], document["packages"])

    def select(self, machine: Machine) -> Sequence[LockedFile]:
        """Return what the machine installs; raise `NotForMachine` with all that it cannot."""
        wanted = [one for one in self.packages if "marker" not in one or _marker(one["marker"], machine)]
        found = {one["name"]: _file_of(one, machine) for one in wanted}
        if missing := sorted(name for name, file in found.items() if file is None):
            raise NotForMachine(missing)
        return [file for file in found.values() if file is not None]


def _file_of(package: Mapping[str, Any], machine: Machine) -> LockedFile | None:
    """Return the wheel that fits best, else the source archive. None: there is neither."""
    ranked = [(rank, file) for file in package.get("wheels", ()) if (rank := machine.rank(_name(file))) is not None]
    best = min(ranked, key=lambda one: one[0])[1] if ranked else package.get("sdist")
    if best is None:
        return None
    return LockedFile(package["name"], package["version"], _name(best), best["size"], best["hashes"]["sha256"])


def _name(file: Mapping[str, Any]) -> str:
    return unquote(str(file["url"]).rpartition("/")[2])


def _marker(text: str, machine: Machine) -> bool:
    return Marker(text).evaluate(dict(machine.markers))


@cache
def _tags(python: tuple[int, ...], platforms: tuple[str, ...]) -> Mapping[tags.Tag, int]:
    interpreter = "cp" + "".join(map(str, python))
    ordered = [
        *tags.cpython_tags(python, [interpreter], platforms),
        *tags.compatible_tags(python, interpreter, platforms),
    ]
    return {tag: rank for rank, tag in reversed(list(enumerate(ordered)))}


def _platforms(system: str, machine: str) -> tuple[str, ...]:
    if system == "darwin":
        return tuple(tags.mac_platforms(_NEWEST_MACOS, machine))
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    found = []
    for minor in range(_NEWEST_MANYLINUX, 4, -1):
        found.append(f"manylinux_2_{minor}_{machine}")
        found += [f"{legacy[minor]}_{machine}"] if minor in legacy else []
    return (*found, f"linux_{machine}")
