"""The accelerator of an Apple machine: one, which shares the main memory."""

import contextlib
import json
import subprocess
from collections.abc import Mapping
from typing import Any

from app.domain.accelerators import Accelerator, AcceleratorKind

ID = "apple-0"  # a machine has one, which goes wherever the machine goes
MIB = 1024 * 1024
_TIMEOUT_SECONDS = 20
_DISPLAYS = ("/usr/sbin/system_profiler", "SPDisplaysDataType", "-json")
_SYSCTL = ("/usr/sbin/sysctl", "-n")


def find_apple_accelerator() -> Accelerator:
    """Ask the system what its chip is called and how much memory it has; blocks for up to a second or two."""
    try:
        displays = json.loads(_output(*_DISPLAYS) or "{}")
    except ValueError:
        displays = {}
    return apple_accelerator(
        displays,
        memory_bytes=_number(_output(*_SYSCTL, "hw.memsize")),
        chip=_output(*_SYSCTL, "machdep.cpu.brand_string"),
    )


def apple_accelerator(displays: Mapping[str, Any], *, memory_bytes: int | None, chip: str) -> Accelerator:
    """Read what `system_profiler` says of displays; `chip` is the name where it says nothing of an Apple GPU."""
    found = displays.get("SPDisplaysDataType")
    gpus = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    gpu = next((entry for entry in gpus if "apple" in str(entry.get("spdisplays_vendor", "")).lower()), {})
    cores = str(gpu.get("sppci_cores", ""))
    name = str(gpu.get("sppci_model") or chip or "Apple silicon")
    return Accelerator(
        id=ID,
        index=0,
        kind=AcceleratorKind.APPLE,
        name=f"{name}, {cores} GPU cores" if cores.isdecimal() else name,
        memory_mib=memory_bytes // MIB if memory_bytes is not None else None,
        driver=_metal(gpu),
    )


def _metal(gpu: Mapping[str, Any]) -> str | None:
    support = str(gpu.get("spdisplays_mtlgpufamilysupport", "")).removeprefix("spdisplays_metal")
    return f"Metal {support}" if support.isdecimal() else None


def _output(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
        return done.stdout.strip()
    return ""


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
