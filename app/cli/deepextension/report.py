"""What became of each thing that an import found: printed as it is, and the same for a dry run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """What became of one thing."""

    TAKEN = "taken"
    PRESENT = "present"
    """The same is there already."""
    KEPT = "kept"
    """Another thing has the name; it was left as it is."""
    LEFT_OUT = "left out"
    NOT_TAKEN = "not taken"


@dataclass
class Entry:
    """One thing of the source: `source` is where it stands there, `name` what it is called here."""

    kind: str
    source: str
    name: str
    outcome: Outcome = Outcome.NOT_TAKEN
    id: str | None = None
    changed: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything that an import has to say."""

    release: str
    dry_run: bool
    tenant: str | None
    missing_tables: Sequence[str]
    missing_columns: Mapping[str, Sequence[str]]
    values: dict[str, dict[str, Any]]
    entries: list[Entry] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all that was found was understood and is here now, or was left out on purpose."""
        missing = (Outcome.NOT_TAKEN, Outcome.KEPT)
        return all(entry.outcome not in missing and not entry.problems for entry in self.entries)

    def document(self) -> dict[str, Any]:
        """Return the report as JSON."""
        counts = Counter((entry.kind, entry.outcome.value) for entry in self.entries)
        return {
            "release": self.release,
            "dry_run": self.dry_run,
            "tenant": self.tenant,
            "complete": self.complete,
            "counts": [{"kind": kind, "outcome": outcome, "count": count} for (kind, outcome), count in counts.items()],
            "missing_tables": list(self.missing_tables),
            "missing_columns": {table: list(names) for table, names in self.missing_columns.items()},
            "values": {name: dict(found) for name, found in self.values.items()},
            "items": [{**vars(entry), "outcome": entry.outcome.value} for entry in self.entries],
        }
