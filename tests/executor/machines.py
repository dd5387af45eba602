"""Machines as tests need them: cards that a test describes, no driver."""

from collections.abc import Callable, Sequence
from pathlib import Path

from app.domain.accelerators import Accelerator
from app.executor.nodes.inventory import Hardware
from app.executor.nodes.nvml import CardReading, CardsUnreadable


class Cards:
    """Stands for the driver: lists what the test put there; None is a driver in trouble."""

    def __init__(self, *cards: CardReading) -> None:
        self.cards: Sequence[CardReading] | None = cards

    def read(self) -> Sequence[CardReading]:
        if self.cards is None:
            raise CardsUnreadable("Driver/library version mismatch")
        return self.cards


def machine_with(
    root: Path,
    *accelerators: Accelerator,
    cards: Cards | None = None,
    is_owned: Callable[[int], bool] = lambda pid: False,
    foreign_memory_mib: int = 1024,
    monotonic: Callable[[], float] | None = None,
) -> Hardware:
    """Return a machine with these accelerators; every look is a new one unless `monotonic` says how time goes by."""
    ticks = iter(range(0, 10**9, 60))
    return Hardware(
        accelerators=accelerators,
        cards=cards or Cards(),
        is_owned=is_owned,
        foreign_memory_mib=foreign_memory_mib,
        home=root,
        node_home=root,
        monotonic=monotonic or (lambda: float(next(ticks))),
    )
