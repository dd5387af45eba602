"""What this machine has: accelerators, processor, memory, disks; and which accelerators no foreign process uses now.

A worker takes stock once. While it runs it looks at the cards again before it leases one: another process may use them.
A driver that stops answering makes all of them unusable; no job starts on an unchecked card.
"""

import asyncio
import functools
import logging
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.domain.containment import Containment
from app.domain.enums import Platform
from app.domain.inventory import BlockedAccelerator, Disk, Inventory, Obstacle
from app.domain.plain_text import MAX_PATH_LENGTH, shown
from app.executor.nodes.apple import find_apple_accelerator
from app.executor.nodes.cards import accelerator_of, blocked_cards, visible_cards
from app.executor.nodes.nvml import CardReading, CardsUnreadable, NvmlCards
from app.registry.nodes.platforms import this_machine
from app.store.home import NodeHome

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
PATIENCE_SECONDS = 5.0
DISK_STEP = 256 * 1024 * 1024
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class CardReader(Protocol):
    """Reads the CUDA cards of a machine: an empty list without cards, `CardsUnreadable` if the driver fails."""

    def read(self) -> Sequence[CardReading]: ...


class Hardware:
    """The machine of one worker."""

    def __init__(
        self,
        *,
        accelerators: Sequence[Accelerator],
        cards: CardReader,
        is_owned: Callable[[int], bool],
        foreign_memory_mib: int,
        home: Path,
        node_home: Path,
        containment: Containment | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._containment = containment
        self.accelerators = tuple(accelerators)
        self._cards = cards
        self._is_ours = is_owned
        self._foreign_memory_mib = foreign_memory_mib
        self._home, self._node_home = home, node_home
        self._monotonic = monotonic
        self._blocked: Sequence[BlockedAccelerator] = ()
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()
        self._reading: asyncio.Task[Sequence[BlockedAccelerator]] | None = None

    async def usable(self) -> Sequence[Accelerator]:
        """Return the accelerators that are free or used by this worker's jobs, leased ones included."""
        blocked = {entry.id for entry in await self.blocked()}
        return [accelerator for accelerator in self.accelerators if accelerator.id not in blocked]

    async def blocked(self) -> Sequence[BlockedAccelerator]:
        """Return what must not be leased now; the answer is at most `LOOK_SECONDS` old."""
        async with self._looking:
            if self._monotonic() - self._looked_at >= LOOK_SECONDS:
                before, self._blocked = self._blocked, await self._look()
                self._looked_at = self._monotonic()
                self._tell(before)
        return self._blocked

    async def inventory(self) -> Inventory:
        """Return what the node says of its machine."""
        disks = await asyncio.to_thread(lambda: (disk(self._home), disk(self._node_home)))
        return machine().model_copy(
            update={
                "home": disks[0],
                "node_home": disks[1],
                "containment": self._containment,
                "blocked": tuple(await self.blocked()),
            }
        )

    async def _look(self) -> Sequence[BlockedAccelerator]:
        ids = [one.id for one in self.accelerators if one.kind is AcceleratorKind.CUDA]
        if not ids:
            return ()
        try:
            return await self._read(ids)
        except (CardsUnreadable, TimeoutError) as error:
            logger.warning("cards_unreadable", extra={"error": str(error)})
            return [BlockedAccelerator(id=card_id, obstacle=Obstacle.MISSING) for card_id in ids]

    async def _read(self, ids: Sequence[str]) -> Sequence[BlockedAccelerator]:
        """Ask the driver. A call that hangs keeps its thread for ever, so there is never a second one beside it."""
        patience = PATIENCE_SECONDS
        if self._reading is None:
            self._reading = asyncio.create_task(asyncio.to_thread(self._judge, ids))
        else:
            patience = 0.0
        await asyncio.wait([self._reading], timeout=patience)
        if not self._reading.done():
            raise TimeoutError("the driver does not answer")
        reading, self._reading = self._reading, None
        return reading.result()

    def _judge(self, ids: Sequence[str]) -> Sequence[BlockedAccelerator]:
        return blocked_cards(ids, self._cards.read(), is_owned=self._is_ours, threshold_mib=self._foreign_memory_mib)

    def _tell(self, before: Sequence[BlockedAccelerator]) -> None:
        known, now = {entry.id for entry in before}, {entry.id: entry for entry in self._blocked}
        for card_id in sorted(now.keys() - known):
            logger.warning("accelerator_blocked", extra=now[card_id].model_dump(mode="json"))
        for card_id in sorted(known - now.keys()):
            logger.info("accelerator_usable_again", extra={"id": card_id})


def find_accelerators(cards: CardReader, environ: Mapping[str, str], *, simulated: str = "") -> tuple[Accelerator, ...]:
    """Return the accelerators that this machine gives to the worker; blocks, on a Mac for a second or two."""
    if simulated:
        return simulated_accelerators(simulated)
    if this_machine() is Platform.APPLE:
        return (find_apple_accelerator(),)
    try:
        found = cards.read()
    except CardsUnreadable as error:
        logger.warning("cards_unreadable", extra={"error": str(error)})
        return ()
    return tuple(map(accelerator_of, visible_cards(found, environ.get("CUDA_VISIBLE_DEVICES"))))


def this_hardware(
    environ: Mapping[str, str],
    *,
    home: Path,
    node_home: NodeHome,
    simulated: str,
    foreign_memory_mib: int,
    containment: Containment | None = None,
) -> Hardware:
    """Take stock of this machine for a worker."""
    cards = NvmlCards()
    return Hardware(
        accelerators=find_accelerators(cards, environ, simulated=simulated),
        cards=cards,
        is_owned=functools.partial(belongs_to_attempt, node_home.attempts),
        foreign_memory_mib=foreign_memory_mib,
        home=home,
        node_home=node_home.root,
        containment=containment,
    )


def simulated_accelerators(text: str) -> tuple[Accelerator, ...]:
    """Return what `COUNT` or `COUNTxMIB` describes, for tests of many cards on a machine without any."""
    count, _, memory = text.partition("x")
    return tuple(
        Accelerator(
            id=f"simulated-{index}",
            index=index,
            kind=AcceleratorKind.SIMULATED,
            name="simulated",
            memory_mib=int(memory) if memory else None,
        )
        for index in range(int(count))
    )


def belongs_to_attempt(attempts: Path, pid: int) -> bool:
    """Say whether the process carries the mark of an attempt of this node; one that cannot be looked at is foreign."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    names = (entry.removeprefix(b"DEEPE_ATTEMPT=") for entry in variables if entry.startswith(b"DEEPE_ATTEMPT="))
    name = next(names, b"").decode(errors="replace")
    return bool(name) and "/" not in name and (attempts / name).is_dir()


@functools.cache
def machine() -> Inventory:
    """Return what does not change while the machine runs."""
    return Inventory(
        hostname=shown(socket.gethostname(), limit=255),
        system=shown(f"{platform.system()} {platform.release()}"),
        architecture=shown(platform.machine()),
        processor=shown(_processor()),
        python=platform.python_version(),
        cpus=_cpus(),
        memory_bytes=_memory_bytes(),
    )


def disk(folder: Path) -> Disk | None:
    """Return the file system of the folder, None if it cannot be asked."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return Disk(
        path=shown(str(folder), limit=MAX_PATH_LENGTH),
        total_bytes=usage.total,
        free_bytes=usage.free // DISK_STEP * DISK_STEP,
    )


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    """Return the main memory, or the limit of the container when that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in map(Path, _MEMORY_LIMITS):
        try:
            limit = file.read_text("ascii").strip()
        except OSError:
            continue
        if limit.isdecimal():
            total = min(total, int(limit))
    return total


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
