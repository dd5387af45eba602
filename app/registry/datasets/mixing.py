"""Write rows of several JSONL files to one, each part as often as wanted, in an order that a seed decides.

Only the places of rows are held in memory: eight bytes for each row that is written. The rows themselves are read when
their turn comes. `answer` reads a task from standard input, so that a service can let another process do it.
"""

import json
import os
import random
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Final

from app.registry.datasets.mixed_pictures import MixedPictures, NamesAFile

_BOM: Final = b"\xef\xbb\xbf"
_OFFSET_BITS: Final = 48
_OFFSET: Final = (1 << _OFFSET_BITS) - 1
_BUFFER: Final = 1024 * 1024


def mix(task: Mapping[str, Any]) -> dict[str, Any]:
    """Write the file of the task; return for each part how many rows it has and how many were taken.

    A task has `parts` (`path`, `weight`, `max_rows`, `alone`: in a folder of its own), `seed`, `target`, `limit`, the
    most bytes to write, and `images`, the folder to link pictures into; None leaves rows as they are. Beyond the limit,
    when a part changes meanwhile or a row names a file that is no picture, only that is returned.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(Path(part["path"]).open("rb")) for part in task["parts"]]
        before = [_key(file) for file in files]
        places = array("Q")
        counts = []
        expected = 0.0
        for number, (file, part) in enumerate(zip(files, task["parts"], strict=True)):
            offsets = _offsets(file)
            rows = len(offsets)
            wanted = part["weight"] * min(rows, part["max_rows"] or rows)
            expected += wanted * before[number][0] / (rows or 1)
            if expected > task["limit"]:  # before memory is taken for places without end
                return {"too_large": True}
            chance = random.Random(f"{task['seed']}/{number}")  # noqa: S311 (a sample, no secret)
            taken = _taken(offsets, part["weight"], part["max_rows"], chance)
            counts.append({"rows": rows, "taken": len(taken)})
            places.extend(number << _OFFSET_BITS | offset for offset in taken)
        random.Random(task["seed"]).shuffle(places)  # noqa: S311 (an order, no secret)
        pictures = None if task["images"] is None else _pictures(task)
        with Path(task["target"]).open("xb", buffering=_BUFFER) as target:
            size = 0
            for number, row in _rows(files, places):
                try:
                    size += target.write((row if pictures is None else pictures.renamed(number, row)) + b"\n")
                except NamesAFile as found:
                    return {"names_file": {"part": found.part, "name": found.name, "column": found.column}}
                if size + (0 if pictures is None else pictures.copied_bytes) > task["limit"]:
                    return {"too_large": True}
            target.flush()
            os.fsync(target.fileno())
        if [_key(file) for file in files] != before:
            return {"changing": True}
    return {"parts": counts, "pictures": None if pictures is None else pictures.count}


def _pictures(task: Mapping[str, Any]) -> MixedPictures:
    parts = task["parts"]
    rows = [Path(part["path"]) for part in parts]
    return MixedPictures(Path(task["images"]), rows, alone=[part["alone"] for part in parts])


def _key(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _offsets(file: IO[bytes]) -> "array[int]":
    """Return where rows begin; blank lines are none."""
    offsets = array("Q")
    offset = 0
    for line in file:
        if line.strip():
            offsets.append(offset)
        offset += len(line)
    return offsets


def _taken(offsets: "array[int]", weight: float, max_rows: int | None, chance: random.Random) -> "array[int]":
    """Return the rows of a part, as often as they are wanted: a sample of `max_rows`, `weight` times."""
    chance.shuffle(offsets)
    if max_rows is not None:
        del offsets[max_rows:]
    whole, rest = divmod(int(weight * len(offsets) + 0.5), len(offsets) or 1)
    return offsets * whole + offsets[:rest]


def _rows(files: Sequence[IO[bytes]], places: "array[int]") -> Iterator[tuple[int, bytes]]:
    """Yield rows with the numbers of their parts."""
    for place in places:
        number, offset = place >> _OFFSET_BITS, place & _OFFSET
        files[number].seek(offset)
        line = files[number].readline()
        yield number, (line if offset else line.removeprefix(_BOM)).strip()


def answer() -> None:
    """Do the task that the parent gives. Runs in the child."""
    json.dump(mix(json.load(sys.stdin)), sys.stdout)
