"""Which accelerators this machine has, as far as can be told without a driver library."""

import shutil
import subprocess

from app.domain.enums import Platform
from app.registry.platforms import this_machine

_FIELDS = ("uuid", "name", "memory.total", "driver_version")
_TIMEOUT_SECONDS = 10


def find_accelerators() -> tuple[dict[str, object], ...]:
    """Return the CUDA cards that `nvidia-smi` lists, or the chip of an Apple machine; blocks, at most 10 s."""
    match this_machine():
        case Platform.CUDA:
            return _cuda_cards()
        case Platform.APPLE:
            return ({"kind": Platform.APPLE, "name": "Apple silicon"},)
        case Platform.CPU:
            return ()


def _cuda_cards() -> tuple[dict[str, object], ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ({"kind": Platform.CUDA},)
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ({"kind": Platform.CUDA},)
    return tuple(_card(line) for line in listed.splitlines() if line.strip())


def _card(line: str) -> dict[str, object]:
    uuid, name, memory, driver = (field.strip() for field in line.split(",", maxsplit=3))
    return {
        "kind": Platform.CUDA,
        "uuid": uuid,
        "name": name,
        "memory_mib": int(memory) if memory.isdecimal() else None,
        "driver": driver,
    }
