"""What is installed in an environment, exactly: enough to install the same again, here or on another node."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

from pydantic import ConfigDict, Field

from app.domain.values import Value

_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


class CondaPackage(Value):
    """A conda package as it was linked."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(examples=["python"])
    version: str = Field(examples=["3.11.7"])
    build: str = Field(examples=["h955ad1f_0"])
    url: str = ""
    sha256: str | None = None
    md5: str | None = None

    @property
    def spec(self) -> str:
        """Return the match specification of exactly this package."""
        digest = f"[sha256={self.sha256}]" if self.sha256 else f"[md5={self.md5}]" if self.md5 else ""
        return f"{self.name} =={self.version} {self.build}{digest}"


class PipPackage(Value):
    """A package that pip installed. `sha256`: of the archive that it came from; null if pip did not say."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(examples=["trl"])
    version: str = Field(examples=["1.16.0"])
    url: str | None = Field(default=None, description="Where it came from, if the spec named an address.")
    sha256: str | None = Field(default=None, examples=[_SHA256])

    @property
    def requirement(self) -> str:
        """Return the line of a requirements file that installs exactly this."""
        what = f"{self.name} @ {self.url}" if self.url else f"{self.name}=={self.version}"
        return f"{what} --hash=sha256:{self.sha256}" if self.sha256 else what


@dataclass(frozen=True)
class LockedFile:
    """A wheel or source archive that a package is installed from."""

    package: str
    version: str
    name: str
    size: int
    sha256: str

    @property
    def requirement(self) -> str:
        """Return the line of a requirements file that installs exactly this file."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"


class EnvironmentLock(Value):
    """Everything in an environment of one node. `bundled` came with the Python itself and is not installed again."""

    model_config = ConfigDict(frozen=True)

    version: int = 1
    environment: str = Field(examples=["trl"])
    spec_hash: str = Field(description="Digest of the spec that it was built from.", examples=[_SHA256])
    node: str = Field(examples=["laptop"])
    platform: str = Field(description="System and machine that it runs on.", examples=["linux-x86_64"])
    python: str = Field(examples=["3.11.7"])
    builder: str = Field(examples=["venv"])
    conda: tuple[CondaPackage, ...] = Field(description="In an order in which nothing comes before what it needs.")
    pip: tuple[PipPackage, ...]
    bundled: tuple[str, ...] = Field(default=(), examples=[["pip==23.2.1"]])
    created_at: datetime

    @property
    def digest(self) -> str:
        """Return what is equal where the same is installed. Of a venv's Python, which is the machine's, 3.11 counts."""
        content: dict[str, Any] = {
            "platform": self.platform,
            "python": ".".join(self.python.split(".")[:2]),
            "conda": sorted([one.name, one.version, one.build, one.sha256 or one.md5 or ""] for one in self.conda),
            "pip": sorted([one.name, one.version, one.sha256 or one.url or ""] for one in self.pip),
        }
        return sha256(json.dumps(content).encode()).hexdigest()

    @property
    def has_cpu_torch(self) -> bool:
        """Return whether torch is a build without CUDA."""
        return any(one.name == "torch" and one.version.endswith("+cpu") for one in self.pip)

    @property
    def explicit(self) -> str:
        """Return the explicit list that conda, mamba and micromamba install without solving."""
        lines = (one.url + (f"#{one.md5}" if one.md5 else "") for one in self.conda)
        return "\n".join(["@EXPLICIT", *lines]) + "\n"


def differences(wanted: EnvironmentLock, got: EnvironmentLock) -> Sequence[str]:
    """Return what is not as wanted, a line a package."""
    want, have = _packages(wanted), _packages(got)
    return [
        f"{name}: {want.get(name, 'not wanted')} wanted, {have.get(name, 'nothing')} installed"
        for name in sorted(want.keys() | have.keys())
        if want.get(name) != have.get(name)
    ]


def _packages(lock: EnvironmentLock) -> dict[str, str]:
    conda = {f"conda {one.name}": f"{one.version} {one.build} {one.sha256 or one.md5 or ''}" for one in lock.conda}
    return conda | {one.name: f"{one.version} {one.sha256 or one.url or ''}" for one in lock.pip}
