"""How many tokens the rows of a data set have for a method and a base model, as previews measured it.

Only the environment of a method has the base model's tokenizer, so nothing is measured at submit: what a preview has
measured is remembered until the service restarts, and a submission with the same rows, base model and script uses it.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any, Final

from app.domain.errors import Violation
from app.domain.kinds import Stage
from app.domain.pointers import pointer
from app.executor.jobs.data_check import data_rules, rows_wanted
from app.presets.shared.helpers.deepe_rows.lengths import LIMITS, Lengths
from app.presets.shared.helpers.deepe_rows.preview import PARAMETERS
from app.registry.methods.record import Method

_REMEMBERED: Final = 64


class TokenLengths:
    """Remembers lengths; the least recently used ones make way."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._by_key: OrderedDict[str, Lengths] = OrderedDict()

    def find(self, key: str) -> Lengths | None:
        """Return the lengths of this key. None: they are not remembered."""
        with self._lock:
            if key in self._by_key:
                self._by_key.move_to_end(key)
            return self._by_key.get(key)

    def keep(self, key: str, lengths: Lengths) -> None:
        """Remember lengths."""
        with self._lock:
            self._by_key[key] = lengths
            while len(self._by_key) > _REMEMBERED:
                self._by_key.popitem(last=False)


def lengths_key(method: Method, stage: Stage, base_model: Path, digest: str | None, values: Mapping[str, Any]) -> str:
    """Return the digest of everything that lengths are made of: not of limits, which they are compared with. Blocks."""
    pinned = method.files.get(stage)
    stats = [(file.name, file.stat()) for file in sorted(base_model.iterdir())]
    parts = [
        digest,
        asdict(rows_wanted(data_rules(method, stage), values)),
        {name: values.get(name) for name in PARAMETERS if name not in LIMITS},
        None if pinned is None else pinned.sha256,
        method.environment(stage),
        str(base_model),
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def length_warnings(lengths: Lengths, values: Mapping[str, Any]) -> Sequence[Violation]:
    """Return what is worth knowing about the rows that were measured."""
    found = []
    measured = {"measured": lengths.measured, "total": lengths.total}
    for name, rows in lengths.beyond(values).items():
        params = {**measured, "rows": rows, "parameter": name, "value": values[name]}
        found.append(Violation(pointer("parameters", name), "measured_rows_too_long", params))
    if lengths.refused:
        lines = ", ".join(map(str, lengths.refused_lines)) + (
            ", ..." if lengths.refused > len(lengths.refused_lines) else ""
        )
        found.append(
            Violation("/dataset", "measured_rows_refused", {**measured, "rows": lengths.refused, "lines": lines})
        )
    if lengths.pictures:
        found.append(Violation("/dataset", "measured_without_pictures", {**measured, "rows": lengths.pictures}))
    return found
