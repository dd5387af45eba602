"""Environments that the product ships: a specification each, and a lock of all that it installs on every platform."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import ConfigDict

from app.domain.values import Value

Device = Literal["cuda", "apple", "cpu"]
FOLDER = Path(__file__).parent / "shared" / "environments"


class ShippedEnvironment(Value):
    """What `environments.toml` says of an environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    folder: Path = FOLDER
    runs_on: tuple[Device, ...]
    """A node needs one of them to build it."""
    without_cuda: str | None = None
    """Whose lock a Linux node without an NVIDIA GPU installs under this name."""
    torch_source: bool = True
    """Whether torch may come from another source than the lock's."""
    not_on: dict[str, str] = {}
    """Why it cannot exist on a platform."""

    @property
    def spec_file(self) -> Path:
        return self.folder / f"{self.name}.yml"

    @property
    def has_torch(self) -> bool:
        return "- torch==" in self.spec_file.read_text("utf-8")

    @property
    def lock_file(self) -> Path:
        return self.folder / f"pylock.{self.name}.toml"


@cache
def shipped_environments() -> Mapping[str, ShippedEnvironment]:
    """Return the shipped environments by name."""
    document = tomllib.loads((FOLDER / "environments.toml").read_text("utf-8"))
    return MappingProxyType({name: ShippedEnvironment(name=name, **said) for name, said in document.items()})
