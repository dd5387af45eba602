"""What a node says of its environments; kept in `node.environment_states`, one document an environment."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError

from app.domain.values import Value


class EnvironmentState(StrEnum):
    """State of an environment on a node."""

    KNOWN = "known"  # not there; this node can build it and does so when a job needs it
    MISSING = "missing"  # not there, and this node cannot build it
    BUILDING = "building"
    READY = "ready"
    STALE = "stale"  # built from an older specification; built again when a job needs it
    FAILED = "failed"  # not there: the last build made nothing


class Trouble(Value):
    """What prevents a run: the code of its sentence, and the values in it."""

    model_config = ConfigDict(frozen=True)

    code: str
    params: dict[str, Any] = {}


class Probe(Value):
    """What a look into the environment found: `missing` of the `modules` that methods import, accelerators seen.

    Among them is `module:name` for what scripts take from modules.

    `cuda` and `mps` as torch sees them, `mlx` the device that mlx takes; None where the library is not installed.
    `options`: the digest of the description of each configuration class that methods name, by its path;
    `options_trouble`: why there is none.
    """

    model_config = ConfigDict(frozen=True)

    key: str = ""
    modules: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    cuda: int | None = None
    mps: bool | None = None
    mlx: str | None = None
    trouble: str | None = None
    options: dict[str, str] = {}
    options_trouble: dict[str, str] = {}


class EnvironmentReport(Value):
    """One environment of one node. What is unknown is None, such as the size of an environment that was found."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: EnvironmentState
    source: str | None = Field(default=None, description="built, conda or venv")
    prefix: str | None = None
    spec_hash: str | None = None
    builder: str | None = None
    python: str | None = None
    size_bytes: int | None = None
    built_at: datetime | None = None
    used_at: datetime | None = None
    lock: str | None = None
    trouble: Trouble | None = None
    probe: Probe | None = None

    @classmethod
    def read(cls, documents: Sequence[Mapping[str, Any]]) -> Mapping[str, Self]:
        """Return the reports by name; what another version of the worker wrote and we cannot read is left out."""
        reports: dict[str, Self] = {}
        for document in documents:
            try:
                report = cls.model_validate(document)
            except ValidationError:
                continue
            reports[report.name] = report
        return reports

    def document(self) -> dict[str, Any]:
        """Return what the database keeps."""
        return self.model_dump(mode="json", exclude_defaults=True)
