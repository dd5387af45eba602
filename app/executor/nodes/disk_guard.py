"""A node stops taking jobs before a disk of its is full, and goes on by itself when there is room again."""

import asyncio
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

logger = logging.getLogger(__name__)

ROOM_AGAIN: Final = 1.25  # times the limit; else a node at the limit would change its mind at every look
_MIB: Final = 2**20


def free_bytes(folder: Path) -> int:
    """Return the free space of the disk that the folder lies on."""
    return shutil.disk_usage(folder).free


class DiskGuard:
    """Looks at the disks that jobs write to; `places` are shown to people by their names."""

    def __init__(
        self, places: Mapping[str, Path], *, min_free_bytes: int, free: Callable[[Path], int] = free_bytes
    ) -> None:
        self._places = places
        self._min_free_bytes = min_free_bytes
        self._free = free
        self._low: frozenset[str] = frozenset()

    async def refusal(self) -> dict[str, Any] | None:
        """Return code and params of why the node should take no jobs now; None when there is room."""
        free = await asyncio.to_thread(self._look)
        low = frozenset(place for place, left in free.items() if left < self._limit(place))
        if low != self._low:
            logger.warning("disk_low" if low else "disk_has_room_again", extra={"places": sorted(low), "free": free})
        self._low = low
        if not low:
            return None
        place = min(low, key=lambda name: free[name])
        params = {"place": place, "free_mib": free[place] // _MIB, "needed_mib": self._min_free_bytes // _MIB}
        return {"code": "node_disk_low", "params": params}

    async def require(self) -> None:
        """Raise when a disk is low; a check of readiness."""
        if (refusal := await self.refusal()) is not None:
            raise OSError(f"{refusal['params']['place']} has {refusal['params']['free_mib']} MiB left")

    def _limit(self, place: str) -> float:
        return self._min_free_bytes * (ROOM_AGAIN if place in self._low else 1)

    def _look(self) -> dict[str, int]:
        found = {}
        for place, folder in self._places.items():
            try:
                found[place] = self._free(folder)
            except OSError as error:  # a missing folder is reported elsewhere
                logger.warning("disk_not_measured", extra={"place": place, "error": str(error)})
        return found
