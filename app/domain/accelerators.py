"""Accelerators of a node as values: what a node reports, a claim leases and a launch pins."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self


class AcceleratorKind(StrEnum):
    """What it is programmed with. `simulated` exists for tests: it is leased like a real one and pins nothing."""

    CUDA = "cuda"
    APPLE = "apple"
    SIMULATED = "simulated"


@dataclass(frozen=True)
class Accelerator:
    """One card. `id` is unique on its node and stays over reboots (a CUDA card's uuid); memory in MiB."""

    id: str
    index: int
    kind: AcceleratorKind
    name: str
    memory_mib: int | None = None
    driver: str | None = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Read what `document` wrote; names that a newer node added are ignored."""
        known = {name: value for name, value in document.items() if name in cls.__dataclass_fields__}
        return cls(**{**known, "kind": AcceleratorKind(known["kind"])})

    def document(self) -> dict[str, Any]:
        """Return the JSON that a node's row keeps."""
        return asdict(self)
