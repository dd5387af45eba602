"""Count the rows for a score that a training learns from as well.

As a program it reads two whole files and prints two numbers, so that a service can let another process do it:

    python -m deepe_rows.sharing rows.jsonl validation.jsonl '{"kinds": ["conversation"], "limit": -1}'
"""

import json
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .files import enumerated_rows, keys_of
from .problems import RowProblem
from .reading import Reader
from .survey import wanted_of


def shared_rows(rows: Path, validation: Path, wanted: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many rows of `validation` share a key with a row of `rows` (see `keys_of`), and of how many.

    Without `kinds` nothing is known of what the rows become: then equal rows are counted. Memory grows with the
    validation rows only.
    """
    of_key: dict[Hashable, list[int]] = {}
    total = 0
    for place, keys in enumerate(_keys(validation, wanted, -1)):
        total = place + 1
        for key in keys:
            of_key.setdefault(key, []).append(place)
    found: set[int] = set()
    for keys in _keys(rows, wanted, wanted.get("limit", -1)):
        for key in keys:
            found.update(of_key.pop(key, ()))
    return len(found), total


def _keys(path: Path, wanted: Mapping[str, Any], limit: int) -> Iterator[Sequence[Hashable]]:
    """Yield the keys of each row that something is learned from."""
    rows: Iterable[tuple[int, Any]] = enumerated_rows(path)
    rows = islice(rows, limit) if limit > 0 else rows
    if not wanted["kinds"]:
        for _, raw in rows:
            yield (hash(json.dumps(raw, sort_keys=True)),)
        return
    reader = Reader(wanted_of(wanted), path.name)
    for number, raw in rows:
        try:
            example = reader.read(raw, number)
        except RowProblem:
            continue
        if example is not None:
            yield keys_of(example)


def main() -> None:
    wanted = json.loads(sys.argv[3])
    json.dump({"shared": shared_rows(Path(sys.argv[1]), Path(sys.argv[2]), wanted)}, sys.stdout)


if __name__ == "__main__":
    main()
