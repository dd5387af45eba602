"""The audit trail: who acts, what a record says, and how records hold together.

Each record has the number after that of the record before it, and the hash of that one. The hash of a record is the
SHA-256 of everything it says, as canonical JSON; so a record that was changed, removed, inserted or moved breaks the
chain. A chain that was cut at its end is whole in itself: that is found by the head, the number and hash of the newest
record, which the installation keeps, and which an operator can keep elsewhere.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from app.domain.access import Caller
from app.domain.plain_text import storable, storable_document

NOTHING: Final = "0" * 64
"""What the first record names as the hash of the one before."""
MAX_VALUE: Final = 1000
"""Characters of a value that a record holds whole; of a longer one it holds digest and size."""
MAX_DETAILED: Final = 50
MAX_THINGS: Final = 1000
MAX_PROBLEMS: Final = 100
HIDDEN: Final = "(hidden)"
_SECRET_NAME: Final = re.compile(
    r"(?i)(token|secret|passw(or)?d|passphrase|credentials?|api[_-]?key|access[_-]?key|private[_-]?key|authorization)$"
)
# each looks at a character a bounded number of times: a user's text must not hold up the service
_IN_TEXT: Final = (
    (re.compile(r"(://)[^/@\s]+@"), r"\1" + HIDDEN + "@"),
    (re.compile(r"(https?://(?:(?!://)[^\s?#\"'])*)\?[^\s\"']+"), r"\1?" + HIDDEN),
    (re.compile(r"\b(?:deepe|hf)_[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"(?i)((?:token|secret|passw(?:or)?d|api_?key)\s*[:=]\s*)[^\s,}]+"), r"\1" + HIDDEN),
)


class AuditKind(StrEnum):
    """What a record is about."""

    CHANGE = "change"
    """Rows or files were changed."""
    ACTION = "action"
    """A call that may change something succeeded and left nothing changed that is recorded."""
    LAUNCH = "launch"
    """A node took a job, to start its code."""
    REFUSAL = "refusal"
    """A change was not permitted, or a token was wrong; repeats are collapsed into one record."""
    REMOVAL = "removal"
    """The oldest records were removed because of their age."""


@dataclass
class Action:
    """Somebody's call while it runs: who, from where, and what was written down of it so far."""

    caller_kind: str
    caller: str
    principal: str
    operation: str
    address: str | None = None
    request_id: str | None = None
    project: str | None = None
    """The project that the call was about."""
    subject: Mapping[str, str] = field(default_factory=dict)
    """What the address of the route names: kind → id or name."""
    files: list[Mapping[str, Any]] = field(default_factory=list)
    """Files that were written or removed and stand in no record yet."""
    sent: Mapping[str, Any] | None = None
    """SHA-256 and size of a body that is a file."""
    recorded: bool = False

    def note_file(self, path: str, *, before: str | None, after: str | None) -> None:
        """Note that a file on disk was changed: SHA-256 before and after, None where it is not there."""
        self.files.append({"path": storable(path), "before": before, "after": after})

    def note_body(self, sha256: str, size: int) -> None:
        """Note that the body is a file, and which."""
        self.sent = {"sha256": sha256, "bytes": size}

    def details(self, things: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Return what a record says of the action: the things that changed, else what its address names; files."""
        found: dict[str, Any] = {"things": list(things) or self.things()}
        if self.files:
            found["files"] = list(self.files)
        if self.sent is not None:
            found["sent"] = dict(self.sent)
        return found

    def things(self) -> list[dict[str, Any]]:
        """Return what the address names, as a record lists it."""
        return [{"kind": kind, "id": storable(ref)[:300], "name": None} for kind, ref in self.subject.items()]


current_action: Final[ContextVar[Action | None]] = ContextVar("action", default=None)
"""Whose call runs; None: the service works by itself, and nothing is recorded."""


def action_of(caller: Caller, *, operation: str, address: str | None, request_id: str | None) -> Action:
    """Return the action of a request before anything of it ran."""
    return Action(
        caller.kind.value,
        caller.name,
        caller.principal,
        operation,
        address=address,
        request_id=request_id,
        project=caller.project,
    )


@contextmanager
def acting(action: Action | None) -> Iterator[None]:
    """Let what runs inside be recorded as this action."""
    token = current_action.set(action)
    try:
        yield
    finally:
        current_action.reset(token)


def note_file(path: str, *, before: str | None, after: str | None) -> None:
    """Note a changed file for the record of whose call runs."""
    action = current_action.get()
    if action is not None and before != after:
        action.note_file(path, before=before, after=after)


# ---- values ---------------------------------------------------------------------------------------------------------


def canonical(document: Any) -> str:
    """Return the one JSON text of a document: ASCII, sorted, without spaces."""
    return json.dumps(storable_document(document), sort_keys=True, separators=(",", ":"), allow_nan=False)


def recordable(value: Any) -> Any:
    """Return a value as a record may hold it: without secrets, and short, else its digest and size."""
    cleaned = _cleaned(value)
    text = canonical(cleaned)
    return cleaned if len(text) <= MAX_VALUE else digest_of(cleaned)


def digest_of(value: Any) -> dict[str, Any]:
    """Return digest and size of a value without its secrets."""
    return _digest(canonical(_cleaned(value)))


def _digest(text: str) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "bytes": len(text)}


def _cleaned(value: Any) -> Any:
    match value:
        case StrEnum():
            return value.value
        case str() if len(value) > MAX_VALUE:
            return _digest(canonical(value))
        case str():
            for pattern, replacement in _IN_TEXT:
                value = pattern.sub(replacement, value)
            return value
        case datetime():
            return value.astimezone(UTC).isoformat()
        case dict():
            return {
                name: HIDDEN if _SECRET_NAME.search(str(name)) and isinstance(entry, str) else _cleaned(entry)
                for name, entry in value.items()
            }
        case list() | tuple():
            return [_cleaned(entry) for entry in value]
        case _:
            return value


# ---- the chain ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuditRecord:
    """One record. `details` is canonical JSON: what was done to which things."""

    number: int
    at: datetime
    kind: AuditKind
    caller_kind: str
    caller: str
    principal: str
    address: str | None
    request_id: str | None
    operation: str
    project_id: str | None
    details: str
    previous: str

    def hash(self) -> str:
        """Return the SHA-256 of everything that the record says."""
        said = {name: getattr(self, name) for name in self.__dataclass_fields__}
        said |= {"at": self.at.astimezone(UTC).isoformat(), "kind": self.kind.value}
        return hashlib.sha256(canonical(said).encode()).hexdigest()


@dataclass(frozen=True)
class KeptRecord:
    """A record as it is stored: with the hash and the index of its things that were written with it."""

    record: AuditRecord
    hash: str
    things: str | None = None
    """None where the index is not at hand, as in an export."""


@dataclass(frozen=True)
class Head:
    """Number and hash of the newest record."""

    number: int = 0
    hash: str = NOTHING


@dataclass(frozen=True)
class Problem:
    """What is wrong with the trail, at which number."""

    number: int
    code: str


@dataclass(frozen=True)
class Verification:
    """What was found: the records from `first` to the head, and everything that is wrong."""

    first: int
    head: Head
    records: int
    problems: Sequence[Problem]
    problem_count: int

    @property
    def sound(self) -> bool:
        """Say whether nothing is wrong."""
        return self.problem_count == 0


def index_of(details: Mapping[str, Any]) -> str:
    """Return the text by which the things of a record are found: a line each, kind, id and name between tabs."""
    lines = (_index_line(thing) for thing in details.get("things", ()))
    return "".join(dict.fromkeys(lines))


def _index_line(thing: Mapping[str, Any]) -> str:
    return "\n" + "".join(f"\t{_one_line(thing.get(member))}" for member in ("kind", "id", "name")) + "\t"


def _one_line(text: Any) -> str:
    return re.sub(r"[\t\n]", " ", str(text or ""))


class Verifier:
    """Follows a chain record by record, in the order of their numbers."""

    def __init__(self, *, expected: str | None = None) -> None:
        self._expected = expected
        self._head = Head()
        self._first: AuditRecord | None = None
        self._count = 0
        self._problems: list[Problem] = []
        self._problem_count = 0
        self._newest: Problem | None = None
        self._removed: dict[int, str] = {}
        self._expected_found = expected is None

    def unreadable(self) -> None:
        """Note that what follows is no record."""
        self._found(self._head.number + 1, "audit_record_unreadable")

    def take(self, kept: Iterable[KeptRecord]) -> None:
        """Compare the next records with those before."""
        for one in kept:
            self._take(one)

    def _take(self, kept: KeptRecord) -> None:
        record = kept.record
        if self._first is None:
            self._first = record
        elif record.number != self._head.number + 1:
            missing = record.number > self._head.number
            self._found(
                self._head.number + 1 if missing else record.number,
                "audit_record_missing" if missing else "audit_record_out_of_order",
            )
        elif record.previous != self._head.hash:
            self._found(record.number, "audit_chain_broken")
        if kept.hash != record.hash():
            self._found(record.number, "audit_record_changed")
        try:
            details = json.loads(record.details)
            things = index_of(details)
            if record.kind is AuditKind.REMOVAL:
                self._removed[details["removed"]["last"]] = details["removed"]["hash"]
        except (ValueError, TypeError, AttributeError, KeyError):  # whoever changed it may have written anything
            self._found(record.number, "audit_record_changed")
        else:
            if kept.things is not None and kept.things != things:
                self._found(record.number, "audit_record_changed")
        self._expected_found = self._expected_found or kept.hash == self._expected
        self._head = Head(record.number, kept.hash)
        self._count += 1

    def finish(self, kept_head: Head | None) -> Verification:
        """Return what was found; `kept_head` is what the installation keeps apart from the records."""
        first = self._first.number if self._first else 0
        if self._first is not None and self._first.previous != self._removed.get(
            first - 1, NOTHING if first == 1 else ""
        ):
            self._found(first, "audit_beginning_removed")
        if kept_head is not None and kept_head != self._head:
            cut = kept_head.number > self._head.number
            self._found(
                self._head.number + 1 if cut else self._head.number,
                "audit_end_removed" if cut else "audit_head_differs",
            )
        if not self._expected_found and self._expected not in self._removed.values():
            self._found(self._head.number, "audit_expected_missing")
        return Verification(first, self._head, self._count, self._problems, self._problem_count)

    def _found(self, number: int, code: str) -> None:
        problem = Problem(number, code)
        if problem == self._newest:
            return
        self._newest = problem
        self._problem_count += 1
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(problem)
