"""What readings of CUDA cards mean: which are this worker's, and which are used by others."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.domain.inventory import BlockedAccelerator, Obstacle
from app.executor.nodes.nvml import CardProcess, CardReading

STEP_MIB = 256  # what is reported of memory is rounded down to it: not every change is worth a write


def visible_cards(cards: Sequence[CardReading], visible: str | None) -> Sequence[CardReading]:
    """Return the cards that the worker's CUDA_VISIBLE_DEVICES names, all of them without one.

    As CUDA reads it: numbers or beginnings of uuids, and what follows an entry that names nothing does not count.
    Numbers are those of the driver (PCI order); that of a partitioned card names all its MIG devices.
    """
    if visible is None:
        return cards
    chosen: list[CardReading] = []
    for entry in map(str.strip, visible.split(",")):
        named = list(_named(cards, entry))
        if not named:
            break
        chosen += [card for card in named if card not in chosen]
    return chosen


def accelerator_of(card: CardReading) -> Accelerator:
    """Return the card as what a node reports; its uuid stays over reboots."""
    return Accelerator(
        id=card.uuid,
        index=card.index,
        kind=AcceleratorKind.CUDA,
        name=card.name,
        memory_mib=card.memory_mib,
        driver=card.driver,
    )


def blocked_cards(
    ids: Sequence[str], cards: Sequence[CardReading], *, is_owned: Callable[[int], bool], threshold_mib: int
) -> Sequence[BlockedAccelerator]:
    """Return which of the node's cards `ids` cannot be leased: others use more than the threshold, or they are gone."""
    present = {card.uuid: card for card in cards}
    blocked = []
    for card_id in ids:
        card = present.get(card_id)
        if card is None:
            blocked.append(BlockedAccelerator(id=card_id, obstacle=Obstacle.MISSING))
        elif (others := _used_by_others(card, is_owned)).used_mib > threshold_mib:
            used = others.used_mib // STEP_MIB * STEP_MIB
            blocked.append(BlockedAccelerator(id=card_id, obstacle=Obstacle.OCCUPIED, used_mib=used, pids=others.pids))
    return blocked


def _named(cards: Sequence[CardReading], entry: str) -> Iterator[CardReading]:
    if entry.isdecimal():
        yield from (card for card in cards if card.index == int(entry))
    elif entry.startswith(("GPU-", "MIG-")):
        yield from (card for card in cards if card.uuid.startswith(entry))
        yield from (card for card in cards if card.parent is not None and card.parent.startswith(entry))


class _Others(NamedTuple):
    used_mib: int
    pids: tuple[int, ...]


def _used_by_others(card: CardReading, is_owned: Callable[[int], bool]) -> _Others:
    """Count foreign processes. They may be hidden (another container), or their memory may be unknown."""
    owned: list[CardProcess] = []
    others: list[CardProcess] = []
    for process in card.processes:
        (owned if is_owned(process.pid) else others).append(process)
    known = sum(process.memory_mib or 0 for process in others)
    if all(process.memory_mib is not None for process in owned):
        known = max(known, card.used_mib - sum(process.memory_mib or 0 for process in owned))
    return _Others(known, tuple(sorted(process.pid for process in others)))
