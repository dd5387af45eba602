"""What NVIDIA's management library (NVML) says of the cards, as plain values.

The library comes with the driver; `pynvml` (nvidia-ml-py) binds it and is imported when first asked. Without library,
driver or card there is nothing to read, which is no error. Only this module talks to it; what its answers mean stands
in `app.executor.nodes.cards`.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

MIB = 1024 * 1024


@dataclass(frozen=True)
class CardProcess:
    """A process on a card; the driver does not always tell how much memory it uses."""

    pid: int
    memory_mib: int | None


@dataclass(frozen=True)
class CardReading:
    """A card, or one MIG device of a card (`parent` is that card's uuid). `memory_mib` is None if it has no own."""

    uuid: str
    index: int
    name: str
    memory_mib: int | None
    used_mib: int
    driver: str
    processes: tuple[CardProcess, ...] = ()
    parent: str | None = None


class CardsUnreadable(Exception):
    """The driver does not answer."""


class NvmlCards:
    """Reads the cards of this machine; NVML stays open between reads, a failure closes it."""

    def __init__(self) -> None:
        self._nvml: Any = None

    def read(self) -> Sequence[CardReading]:
        """Return every card in the driver's order, a partitioned one as its MIG devices; blocks for milliseconds.

        A machine without driver or library has none. A card that fell off the bus is left out.
        """
        nvml = self._opened()
        if nvml is None:
            return ()
        try:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            return tuple(_read_cards(nvml, driver))
        except nvml.NVMLError as error:
            self._nvml = None  # opened anew: the driver may have been replaced
            raise CardsUnreadable(str(error)) from error

    def _opened(self) -> Any:
        if self._nvml is not None:
            return self._nvml
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
        except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
            return None
        except pynvml.NVMLError as error:
            raise CardsUnreadable(str(error)) from error
        self._nvml = pynvml
        return pynvml


def _read_cards(nvml: Any, driver: str) -> Iterator[CardReading]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            card = nvml.nvmlDeviceGetHandleByIndex(index)
            devices = list(_mig_devices(nvml, card))
            if not devices:
                yield _read(nvml, card, index=index, driver=driver)
            parent = _text(nvml.nvmlDeviceGetUUID(card))
            for device in devices:
                yield _read(nvml, device, index=index, driver=driver, parent=parent)
        except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_NoPermission, nvml.NVMLError_NotFound) as error:
            logger.warning("card_unreadable", extra={"index": index, "error": str(error)})


def _mig_devices(nvml: Any, card: Any) -> Iterator[Any]:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(card)
    except nvml.NVMLError_NotSupported:
        return
    if current != nvml.NVML_DEVICE_MIG_ENABLE:
        return
    for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, place)
        except nvml.NVMLError_NotFound:  # places need not be filled
            continue


def _read(nvml: Any, device: Any, *, index: int, driver: str, parent: str | None = None) -> CardReading:
    total, used = _memory(nvml, device)
    return CardReading(
        uuid=_text(nvml.nvmlDeviceGetUUID(device)),
        index=index,
        name=_text(nvml.nvmlDeviceGetName(device)),
        memory_mib=total,
        used_mib=used,
        driver=driver,
        processes=tuple(_processes(nvml, device)),
        parent=parent,
    )


def _memory(nvml: Any, device: Any) -> tuple[int | None, int]:
    """Return total and used MiB. The second version leaves out of `used` what the driver keeps for itself."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(device, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(device)
        except nvml.NVMLError_NotSupported:  # memory shared with the processor, as on GB10
            return None, 0
    return memory.total // MIB, memory.used // MIB


def _processes(nvml: Any, device: Any) -> Iterator[CardProcess]:
    try:
        found = nvml.nvmlDeviceGetComputeRunningProcesses(device)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
        return
    for process in found:
        used = process.usedGpuMemory
        yield CardProcess(pid=process.pid, memory_mib=None if used is None else used // MIB)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
