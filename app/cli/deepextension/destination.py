"""The service that an import writes to: a thing is made unless one of its name is there; a dry run makes none."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from app.cli.client import Api, ServiceFailed, ServiceRefused, segment
from app.cli.deepextension.documents import Wanted
from app.cli.deepextension.mapping import KINDS, ImportMap
from app.cli.deepextension.report import Entry, Outcome, Report


class Destination:
    """Makes things, and writes into the report what became of each."""

    def __init__(self, api: Api, mapping: ImportMap, report: Report) -> None:
        self._api = api
        self._mapping = mapping
        self._report = report
        self.planned: dict[str, set[str]] = {kind: set() for kind in KINDS}
        """What a dry run would have made."""

    def entry(self, kind: str, wanted: Wanted) -> Entry:
        """Add a thing to the report."""
        entry = Entry(
            kind, wanted.source, wanted.name, changed=wanted.changed, assumed=wanted.assumed, problems=wanted.problems
        )
        self._report.entries.append(entry)
        return entry

    def is_wanted(self, entry: Entry) -> bool:
        """Return whether a thing is to be taken; the map may leave it out, and what is not understood is not."""
        if entry.name in self._mapping.leave_out.get(entry.kind, ()):
            entry.outcome = Outcome.LEFT_OUT
            entry.changed.append("by the map")
            entry.problems = []
            return False
        return not entry.problems

    def there(self, path: str, name: str) -> Any:
        """Return what has this name; None if nothing has."""
        try:
            return self._api.get(f"{path}/{segment(name)}")
        except ServiceRefused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    def put(
        self,
        entry: Entry,
        path: str,
        document: Mapping[str, Any],
        *,
        compared: Sequence[str],
        as_read: Mapping[str, Any] | None = None,
        problems: Sequence[str] = (),
        check: Callable[[], list[str]] | None = None,
        create: Callable[[], Any] | None = None,
    ) -> None:
        """Make the thing unless one of its name is there.

        `problems` stand against a new one; `check` says, in a dry run, what the service would.
        """
        with said_in(entry):
            if not self.is_wanted(entry):
                return
            if (there := self.there(path, entry.name)) is not None:
                entry.id = there["id"]
                differing = _differences(as_read or document, there, compared)
                entry.outcome = Outcome.KEPT if differing else Outcome.PRESENT
                entry.changed += [f"{name} differs there and here" for name in differing]
                return
            if entry.name in self.planned[entry.kind]:
                entry.problems.append("another one of this name comes before it")
                return
            entry.problems += problems
            if self._report.dry_run and check is not None and not entry.problems:
                entry.problems += check()
            if not entry.problems:
                self.make(entry, create or (lambda: self._api.post(path, document)))

    def make(self, entry: Entry, create: Callable[[], Any]) -> None:
        """Make the thing; what the service refuses is said with its own words."""
        if self._report.dry_run:
            entry.outcome = Outcome.TAKEN
            self.planned[entry.kind].add(entry.name)
            return
        with said_in(entry):
            made = create()
            entry.outcome, entry.id = Outcome.TAKEN, made.get("id") or entry.name


@contextmanager
def said_in(entry: Entry) -> Iterator[None]:
    """Let what the service refuses be a problem of the one thing; a service that fails ends the import."""
    try:
        yield
    except ServiceFailed:
        raise
    except ServiceRefused as refused:
        if refused.status == HTTPStatus.UNAUTHORIZED:
            raise
        entry.problems += refused.notes or (refused.message,)


def _differences(wanted: Mapping[str, Any], there: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return the members that say another thing; what is there may say more than what was wanted."""
    return [name for name in names if not _contains(there.get(name), wanted.get(name))]


def _contains(there: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict) and isinstance(there, dict):
        return all(_contains(there.get(key), value) for key, value in wanted.items())
    return (wanted is None and there in (None, {})) or there == wanted
