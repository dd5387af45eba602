"""The audit trail of a process of the API: what its transactions do not record themselves, and what reads the trail.

Changes of rows are recorded where they are committed (`app.store.audit_trail`), launches where nodes claim jobs. Here
are the others: calls that change no row, and refusals.
"""

import asyncio
import getpass
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.audit import Action, AuditKind, Head, Verification, Verifier
from app.store import audit_records
from app.store.audit_records import AuditFilter
from app.store.audit_trail import Entry, append, head_of
from app.store.dump import snapshot
from app.store.session import Database
from app.store.tables import AuditRecordRow

EVERY_SECONDS: Final = 2.0


@dataclass
class _Refused:
    """What one caller was refused again and again."""

    action: Action
    code: str
    first: datetime
    last: datetime
    count: int = 1


def _kind_of(action: Action, code: str) -> tuple[str | None, ...]:
    return (action.principal, action.caller, action.address, action.operation, action.project, code)


class Refusals:
    """Collapses refusals: the first of a kind is due at once, its repeats after a while, in one record.

    A kind is caller, address, operation, project and code. More kinds than `KINDS` at a time share one record, so that
    nobody fills the database by being refused.
    """

    KINDS: Final = 200
    COLLAPSED_SECONDS: Final = 60.0

    def __init__(self, *, now: Callable[[], datetime], clock: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._clock = clock
        self._waiting: OrderedDict[tuple[str | None, ...], _Refused] = OrderedDict()
        self._written: OrderedDict[tuple[str | None, ...], float] = OrderedDict()

    def note(self, action: Action, code: str) -> None:
        """Take note of a refusal."""
        key = _kind_of(action, code)
        if key not in self._waiting and len(self._waiting) >= self.KINDS:
            key, code = ("others",), "others"
            action = Action("unknown", "", "", "others")
        now = self._now()
        known = self._waiting.get(key)
        if known is None:
            self._waiting[key] = _Refused(replace(action, files=[], sent=None), code, first=now, last=now)
        else:
            known.count, known.last = known.count + 1, now

    def take_due(self, *, all_of_them: bool = False) -> list[_Refused]:
        """Return what is to be recorded now, and forget it."""
        now = self._clock()
        due = [
            key
            for key in self._waiting
            if all_of_them or now - self._written.get(key, -self.COLLAPSED_SECONDS) >= self.COLLAPSED_SECONDS
        ]
        for key in due:
            self._written.pop(key, None)
            self._written[key] = now
        while len(self._written) > 10 * self.KINDS:
            self._written.popitem(last=False)
        return [self._waiting.pop(key) for key in due]

    def give_back(self, refused: list[_Refused]) -> None:
        """Take back what could not be recorded."""
        for one in refused:
            key = _kind_of(one.action, one.code)
            self._written.pop(key, None)
            newer = self._waiting.pop(key, None)
            if newer is not None:
                one.count, one.last = one.count + newer.count, newer.last
            self._waiting[key] = one


def command_action(operation: str) -> Action:
    """Return the action of a command that writes to the database itself: who, is the account of the machine."""
    try:
        account = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        account = str(os.getuid())
    return Action("command", account, f"account:{account}", operation)


class AuditTrail:
    """What can be done with the audit trail."""

    def __init__(self, *, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock
        self.refusals = Refusals(now=clock)

    async def record(self, action: Action) -> None:
        """Record a call whose transactions recorded nothing, in a transaction of its own."""
        kind = AuditKind.CHANGE if action.files or action.sent is not None else AuditKind.ACTION
        async with self._database.writing() as session:
            await append(session, [Entry(kind, action, action.details(), action.project)], now=self._clock())
            action.files.clear()
        action.recorded = True

    async def keep_up(self) -> None:
        """Record the refusals that are due."""
        await self._record_refusals(self.refusals.take_due())

    async def finish(self) -> None:
        """Record every refusal, before the process ends."""
        await self._record_refusals(self.refusals.take_due(all_of_them=True))

    async def _record_refusals(self, refused: list[_Refused]) -> None:
        if not refused:
            return
        try:
            async with self._database.writing() as session:
                await append(session, [_refusal(one) for one in refused], now=self._clock())
        except BaseException:
            self.refusals.give_back(refused)
            raise

    async def export(self, wanted: AuditFilter) -> AsyncIterator[AuditRecordRow]:
        """Yield the records in their order; no transaction is open between two batches."""
        after = 0
        while True:
            async with self._database.reading() as session:
                rows = await audit_records.batch(session, after=after, wanted=wanted)
            for row in rows:
                yield row
            if len(rows) < audit_records.AT_ONCE:
                return
            after = rows[-1].number


async def verify(database: Database, *, expected: str | None = None) -> Verification:
    """Compare every record with its hash and with the one before it; `expected` is a hash that has to be there."""
    verifier = Verifier(expected=expected)
    async with snapshot(database) as connection, AsyncSession(connection) as session:
        async for records in audit_records.in_order(session):
            await asyncio.to_thread(verifier.take, records)
        return verifier.finish(await head_of(session) or Head())


def _refusal(refused: _Refused) -> Entry:
    told = {
        "code": refused.code,
        "count": refused.count,
        "first": refused.first.isoformat(),
        "last": refused.last.isoformat(),
    }
    action = refused.action
    return Entry(AuditKind.REFUSAL, action, {"things": action.things(), "refusal": told}, action.project)
