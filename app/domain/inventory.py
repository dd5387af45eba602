"""What a node says of its machine: a value that its row keeps as JSON and that people see."""

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from app.domain.containment import Containment
from app.domain.values import Value


class Disk(Value):
    """A file system; free space is rounded down, so that a node need not write at every heartbeat."""

    model_config = ConfigDict(frozen=True)

    path: str = Field(description="Folder of the service that lies on it.", examples=["/srv/deepe"])
    total_bytes: int = Field(examples=[1_000_000_000_000])
    free_bytes: int = Field(description="In steps of 256 MiB.", examples=[400_019_161_088])


class Obstacle(StrEnum):
    """Why an accelerator is not leased now, although no job holds it."""

    OCCUPIED = "occupied"  # foreign processes use its memory
    MISSING = "missing"  # the driver does not list it any more


class BlockedAccelerator(Value):
    """An accelerator that the node does not lease now."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(description="Of the accelerator.", examples=["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"])
    obstacle: Obstacle
    used_mib: int | None = Field(
        default=None, description="Memory that others use, in steps of 256 MiB.", examples=[20_480]
    )
    pids: tuple[int, ...] = Field(
        default=(), description="Their processes, as far as the driver names them.", examples=[[4711]]
    )


class Inventory(Value):
    """The machine of a node."""

    model_config = ConfigDict(frozen=True)

    hostname: str = Field(default="", examples=["gpu-1"])
    system: str = Field(default="", examples=["Linux 6.8.0"])
    architecture: str = Field(default="", examples=["x86_64"])
    processor: str = Field(default="", examples=["AMD EPYC 9654 96-Core Processor"])
    python: str = Field(default="", description="Of the worker.", examples=["3.11.9"])
    cpus: int = Field(default=0, description="That the worker may use.", examples=[64])
    memory_bytes: int = Field(default=0, description="Main memory, or the limit of the container.")
    home: Disk | None = None
    node_home: Disk | None = None
    containment: Containment | None = Field(default=None, description="Null: a worker of an earlier release.")
    blocked: Annotated[
        tuple[BlockedAccelerator, ...], Field(description="Accelerators that are not leased now, and why.")
    ] = ()
