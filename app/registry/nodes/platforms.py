"""Which accelerator family a machine belongs to, and whose presets an installation has."""

import platform
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from app.domain.enums import Platform

PlatformChoice = Literal["auto", "cuda", "apple", "cpu", "all"]

# a driver's traces; the last ones are those of WSL, where the card is reached through Windows
_NVIDIA_TRACES = ("proc/driver/nvidia/version", "dev/nvidia0", "dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1")


def this_machine(*, root: Path = Path("/")) -> Platform:
    """Return the platform of this machine; starts no program and asks no driver."""
    if sys.platform == "darwin":
        return Platform.APPLE if platform.machine() == "arm64" else Platform.CPU
    if any((root / trace).exists() for trace in _NVIDIA_TRACES) or shutil.which("nvidia-smi"):
        return Platform.CUDA
    return Platform.CPU


def wanted_platforms(choice: PlatformChoice, *, machine: Platform, nodes: Collection[Platform]) -> frozenset[Platform]:
    """Return the platforms whose presets are installed; `auto` is this machine and all registered nodes."""
    match choice:
        case "all":
            return frozenset(Platform)
        case "auto":
            return frozenset({machine, *nodes})
        case _:
            return frozenset({Platform(choice)})
