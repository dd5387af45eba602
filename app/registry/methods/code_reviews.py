"""Approval of code by a second person: what is approved, who changed it, and decisions on it.

What the product ships, unmodified and called as it calls it, counts as approved. Everything else that a stage runs is
approved by its digest (`app.domain.code_review`): by somebody who may and who changed none of it. A change counts from
the newest approved version of the stage on. What was changed by hand on disk has no known author.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Final, Literal

from sqlmodel.ext.asyncio.session import AsyncSession

from app.argspec.differences import Difference
from app.domain.access import Caller, CallerKind, Role
from app.domain.code_review import Author, Code, CodeApproval, ReviewState
from app.domain.definition import MethodDefinition
from app.domain.enums import VersionSource
from app.domain.errors import Conflict, NotAllowed
from app.domain.kinds import STAGES, Stage
from app.domain.stage_calls import StageCall, stage_call
from app.presets import catalogue
from app.registry.methods.files import MethodFiles
from app.registry.methods.pins import PinnedFile
from app.registry.methods.record import Method, method_of
from app.registry.scripts.names import SUFFIX
from app.registry.scripts.versions import Tree, TreeFile, VersionLost
from app.store import code_reviews as store
from app.store import methods as method_store
from app.store.clock import database_now
from app.store.paging import PageRequest, Slice
from app.store.tables import CodeDecisionRow, CodeReviewRow, MethodRow, MethodVersionRow

PRODUCT: Final = Caller(CallerKind.LOCAL, Role.VIEWER, "deepextension")
"""Decides on what an earlier release of the product shipped."""
_OF_PRODUCT: Final = frozenset({VersionSource.PRESET, VersionSource.RESET})
_EXAMINED_SECONDS: Final = 20.0
_MAX_DIFFERENCES: Final = 100
_MAX_SIZE: Final = 1_000_000
_MAX_NOTES: Final = 1000
_MAX_FILE_BYTES: Final = 4 * 2**20
_MAY_FOLLOW: Mapping[ReviewState, frozenset[ReviewState]] = {
    ReviewState.WAITING: frozenset({ReviewState.APPROVED, ReviewState.REJECTED}),
    ReviewState.APPROVED: frozenset({ReviewState.WITHDRAWN}),
    ReviewState.REJECTED: frozenset({ReviewState.APPROVED}),
    ReviewState.WITHDRAWN: frozenset({ReviewState.APPROVED}),
}


class OwnCode(NotAllowed):
    """The caller changed the code that it wants to approve."""

    code = "own_code"


class ReviewStateConflict(Conflict):
    """A review in this state cannot be decided so."""

    code = "review_state_conflict"


class CodeUnpinned(Conflict):
    """An earlier release pinned the file without what it imports, so that nobody knows what would run."""

    code = "code_unpinned"


@dataclass(frozen=True)
class Base:
    """The newest approved version of the same stage: what it ran, and since when."""

    version: int
    code: Code
    tree: Tree
    since: datetime


@dataclass(frozen=True)
class Review:
    """A review with what it is judged by. `unknown`: somebody changed a part of it outside of the API."""

    row: CodeReviewRow
    code: Code
    tree: Tree
    base: Base | None
    authors: frozenset[Author]
    unknown: bool
    decisions: Sequence[CodeDecisionRow] = ()


Change = Literal["added", "changed", "removed"]


@dataclass(frozen=True)
class FileDifference:
    """How a file differs from the approved one; empty path: how the method calls the stage.

    `executable`: it has become a program. `stopped`: the files are too different to be compared within the limits.
    """

    path: str
    change: Change
    difference: Difference
    executable: bool = False
    stopped: bool = False


@dataclass(frozen=True)
class Note:
    """Something to look at in a file: a kind of `app.argspec.risks`, `executable`, `unreadable` or `more`."""

    path: str
    line: int
    kind: str
    name: str
    quoted: str


@dataclass
class Examination:
    """Help for who reviews code; files are counted that were not compared, or not read."""

    differences: list[FileDifference] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    not_compared: int = 0
    not_read: int = 0

    @property
    def size(self) -> int:
        """Return how many characters the differences have."""
        return sum(len(one.difference.text) for one in self.differences)


class CodeReviews:
    """Reviews of the code that stages run."""

    def __init__(self, files: MethodFiles) -> None:
        self._files = files

    async def is_required(self, session: AsyncSession) -> bool:
        """Say whether stages start only with approved code."""
        return await store.policy_of(session) is CodeApproval.REQUIRED

    async def page(self, session: AsyncSession, wanted: PageRequest, state: ReviewState | None) -> Slice[CodeReviewRow]:
        """Return one page of the reviews."""
        return await store.page(session, wanted, state=state)

    async def get(self, session: AsyncSession, digest: str) -> Review:
        """Return a review with its authors, the approved code before it, and the decisions on it."""
        return await self.judged(session, await store.get(session, digest))

    async def judged(self, session: AsyncSession, row: CodeReviewRow) -> Review:
        """Return a review with what it is judged by."""
        code = Code.of(row.code)
        tree = await asyncio.to_thread(self._tree, code)
        base = await self._base(session, row)
        before: Tree = base.tree if base is not None else {}
        new = {path: file for path, file in tree.items() if before.get(path) != file}
        gone = before.keys() - tree.keys()
        places = {store.place_of_file(path) for path in (*new, *gone)}
        if row.method_id is not None:
            places.add(store.place_of_stage(row.method_id, row.stage))
        # an empty file says nothing of who brought it
        contents = {file.sha256 for file in new.values() if file.size}
        looked = await store.changes(
            session, digests={*contents, row.digest}, places=places, since=base.since if base is not None else None
        )
        # what is approved is no change there, though it is noted a moment after its version
        approved = {(store.place_of_file(path), file.sha256) for path, file in before.items()}
        if base is not None and row.method_id is not None:
            approved.add((store.place_of_stage(row.method_id, row.stage), base.code.digest))
        found = [change for change in looked if (change.place, change.digest) not in approved]
        known = {change.digest for change in found} | {change.place for change in found if not change.digest}
        lost = {store.place_of_file(path) for path in gone}
        return Review(
            row=row,
            code=code,
            tree=tree,
            base=base,
            authors=frozenset(Author(change.principal, change.name) for change in found),
            unknown=not found or not contents | lost <= known,
            decisions=await store.decisions(session, row.digest),
        )

    def examine(self, review: Review) -> Examination:
        """Return what changed since the approved version before it, and what to look at in the code; blocks.

        What was changed is read first. After a while nothing more is read, and what is left is counted.
        """
        before: Tree = review.base.tree if review.base is not None else {}
        new = [path for path in sorted(review.tree) if before.get(path) != review.tree[path]]
        rest = [path for path in sorted(review.tree) if path not in new]
        gone = sorted(before.keys() - review.tree.keys())
        deadline = time.monotonic() + _EXAMINED_SECONDS
        found = Examination()
        for path in [*new, *gone]:
            if len(found.differences) >= _MAX_DIFFERENCES or found.size > _MAX_SIZE or time.monotonic() > deadline:
                found.not_compared += 1
            else:
                found.differences.append(self._difference(path, before.get(path), review.tree.get(path)))
        if (call := self._call_difference(review)) is not None:
            found.differences.insert(0, call)
        for path in [*new, *rest]:
            if len(found.notes) >= _MAX_NOTES or time.monotonic() > deadline:
                found.not_read += 1
            else:
                self._note(path, review.tree[path], found)
        return found

    def _difference(self, path: str, before: TreeFile | None, after: TreeFile | None) -> FileDifference:
        change: Change = "added" if before is None else "removed" if after is None else "changed"
        if any(file is not None and file.size > _MAX_FILE_BYTES for file in (before, after)):
            return FileDifference(path, change, Difference(), stopped=True)
        contents = [b"" if file is None else self._files.versions.get(file.sha256) for file in (before, after)]
        reading = self._files.reader.difference(*contents)
        made = after is not None and after.executable and (before is None or not before.executable)
        return FileDifference(path, change, reading.difference, executable=made, stopped=reading.stopped is not None)

    def _call_difference(self, review: Review) -> FileDifference | None:
        """Return how the call changed; None if it has not."""
        members = ("file", "module", "call")
        old, new = (
            json.dumps({name: document[name] for name in members if name in document}, indent=2, ensure_ascii=False)
            for document in ((review.base.code.document() if review.base is not None else {}), review.code.document())
        )
        if old == new:
            return None
        change: Change = "added" if review.base is None else "changed"
        reading = self._files.reader.difference(old.encode(), new.encode())
        return FileDifference("", change, reading.difference, stopped=reading.stopped is not None)

    def _note(self, path: str, file: TreeFile, found: Examination) -> None:
        if not path.endswith(SUFFIX):
            if file.executable:
                found.notes.append(Note(path, 1, "executable", path, ""))
            return
        if file.sha256 in catalogue.shipped_digests():
            return
        if file.size > _MAX_FILE_BYTES:
            found.notes.append(Note(path, 1, "unreadable", f"> {_MAX_FILE_BYTES // 2**20} MiB", ""))
            return
        content = self._files.versions.get(file.sha256)
        reading = self._files.reader.risks(content)
        if reading.stopped is not None:
            found.notes.append(Note(path, 1, "unreadable", reading.stopped.limit, ""))
        elif reading.problem is not None:
            found.notes.append(Note(path, reading.problem.line, "unreadable", reading.problem.message, ""))
        found.notes += [Note(path, risk.line, risk.kind, risk.name, risk.quoted) for risk in reading.risks.found]
        if reading.risks.more:
            found.notes.append(Note(path, 1, "more", str(reading.risks.more), ""))

    async def approve(self, session: AsyncSession, digest: str, *, by: Caller, note: str) -> Review:
        """Approve code that `by` has not changed. Raises `OwnCode`, `ReviewStateConflict`, `CodeUnpinned`."""
        row = await self._locked(session, digest, ReviewState.APPROVED)
        review = await self.judged(session, row)
        if review.code.tree is None and review.code.file is not None and not review.code.shipped:
            raise CodeUnpinned(file=review.code.file)
        if any(author.principal == by.principal for author in review.authors):
            raise OwnCode(caller=by.name, digest=digest)
        await store.decide(session, row, ReviewState.APPROVED, by=by, note=note)
        return await self.judged(session, row)

    async def reject(self, session: AsyncSession, digest: str, *, by: Caller, note: str) -> Review:
        """Reject code that waits; its author may do so as well."""
        row = await self._locked(session, digest, ReviewState.REJECTED)
        await store.decide(session, row, ReviewState.REJECTED, by=by, note=note)
        return await self.judged(session, row)

    async def withdraw(self, session: AsyncSession, digest: str, *, by: Caller, note: str) -> Review:
        """Take an approval back: no job that has not been launched starts this code."""
        row = await self._locked(session, digest, ReviewState.WITHDRAWN)
        await store.decide(session, row, ReviewState.WITHDRAWN, by=by, note=note)
        return await self.judged(session, row)

    async def unapproved(
        self, session: AsyncSession, codes: Mapping[str, Code], *, lock: bool = False
    ) -> Mapping[str, ReviewState]:
        """Return the keys of what may not start, and the state of its review."""
        own = await asyncio.to_thread(self._not_shipped, codes)
        states = await store.states(session, {code.digest for code in own.values()}, lock=lock)
        found = {name: states.get(code.digest, ReviewState.WAITING) for name, code in own.items()}
        return {name: state for name, state in found.items() if state is not ReviewState.APPROVED}

    async def authors(
        self, session: AsyncSession, codes: Mapping[str, Code], method: Method | None, *, write: bool
    ) -> Mapping[str, frozenset[Author]]:
        """Return who changed code that is not approved, by stage or parameter; with `write` it waits for a review."""
        rows = await _new_reviews(session, codes, method)
        if write:
            await store.add(session, rows)
        return {row.stage: (await self.judged(session, row)).authors for row in rows}

    async def version_made(self, session: AsyncSession, before: Method | None, after: Method) -> None:
        """Note who changed what the stages of a method run; what needs a review waits for one."""
        known = codes_of(before) if before is not None else {}
        codes = {stage: code for stage, code in codes_of(after).items() if known.get(stage) != code}
        if after.source is not VersionSource.DISK:  # then nobody knows: the caller submits a job
            for stage, code in codes.items():
                await store.changed(session, store.place_of_stage(after.id, stage), code.digest)
        await self._wait(session, after, codes)

    async def look_at_all(self, session: AsyncSession) -> None:
        """Let the code of all methods that is not approved wait for a review."""
        for row, version in await method_store.living_methods(session):
            method = method_of(row, version)
            await self._wait(session, method, codes_of(method))

    async def wait_for(self, session: AsyncSession, codes: Mapping[str, Code], method: Method | None) -> None:
        """Let code that is not approved wait for a review, by stage or parameter."""
        await store.add(session, await _new_reviews(session, codes, method))

    async def version_of(self, session: AsyncSession, method_id: str | None, number: int | None) -> Method | None:
        """Return a version of a method; None if there is none."""
        row = await session.get(MethodRow, method_id) if method_id is not None else None
        version = await session.get(MethodVersionRow, (method_id, number)) if row is not None and number else None
        return None if row is None or version is None else method_of(row, version)

    async def file_changed(self, session: AsyncSession, path: str, sha256: str = "") -> None:
        """Note who wrote a file of the script root, or deleted it."""
        await store.changed(session, store.place_of_file(path), sha256)

    async def _wait(self, session: AsyncSession, method: Method, codes: Mapping[Stage, Code]) -> None:
        if not codes or not await self.is_required(session):
            return
        named = {stage.value: code for stage, code in codes.items()}
        missing = await self.unapproved(session, named)
        await store.add(session, await _new_reviews(session, {stage: named[stage] for stage in missing}, method))
        if method.source in _OF_PRODUCT:
            for stage in missing:  # an earlier release shipped it
                row = await store.get(session, named[stage].digest, lock=True)
                if row.state is ReviewState.WAITING:
                    await store.decide(session, row, ReviewState.APPROVED, by=PRODUCT, note="")

    async def _locked(self, session: AsyncSession, digest: str, wanted: ReviewState) -> CodeReviewRow:
        row = await store.get(session, digest, lock=True)
        if wanted not in _MAY_FOLLOW[row.state]:
            raise ReviewStateConflict(digest=digest, state=row.state.value, wanted=wanted.value)
        return row

    async def _base(self, session: AsyncSession, row: CodeReviewRow) -> Base | None:
        stage = next((stage for stage in STAGES if stage == row.stage), None)
        method = await session.get(MethodRow, row.method_id) if row.method_id is not None else None
        if stage is None or method is None:
            return None
        versions = [method_of(method, version) for version in await store.newest_versions(session, method.id)]
        earlier = [(one, code) for one in versions if (code := codes_of(one).get(stage)) and code.digest != row.digest]
        states = await store.states(session, {code.digest for _, code in earlier})
        for one, code in earlier:
            approved = states.get(code.digest) is ReviewState.APPROVED or one.source in _OF_PRODUCT
            if approved or await asyncio.to_thread(self._is_shipped, code):
                tree = await asyncio.to_thread(self._tree, code)
                return Base(one.version, code, tree, one.version_created_at)
        return None

    def _tree(self, code: Code) -> Tree:
        if code.file is None or code.sha256 is None:
            return {}
        if code.tree is None:
            return {code.file: TreeFile(code.sha256, 0)}
        return self._files.versions.tree(code.tree)

    def _not_shipped(self, codes: Mapping[str, Code]) -> dict[str, Code]:
        return {name: code for name, code in codes.items() if not self._is_shipped(code)}

    def _is_shipped(self, code: Code) -> bool:
        """Say whether the product ships all of it: every file, and how it is called."""
        if code.call not in _shipped_calls():
            return False
        if code.file is None:
            return bool(code.call)
        if code.tree is None:
            return code.shipped
        try:
            tree = self._files.versions.tree(code.tree)
        except VersionLost:
            return False
        return all(file.sha256 in catalogue.shipped_digests() for file in tree.values())


def code_of(pinned: PinnedFile | None, call: StageCall) -> Code:
    """Return what a stage runs, or a file that a parameter names."""
    called = call.model_dump(mode="json", exclude_defaults=True)
    if pinned is None:
        return Code(call=called)
    return Code(
        file=pinned.file,
        sha256=pinned.sha256,
        tree=pinned.tree,
        module=pinned.module,
        shipped=pinned.shipped,
        call=called,
    )


def codes_of(method: Method) -> dict[Stage, Code]:
    """Return what the stages of a version run, in their order."""
    stages = [stage for stage in STAGES if stage in method.files or stage in method.definition.own_stages()]
    return {stage: code_of(method.files.get(stage), stage_call(method.definition, stage)) for stage in stages}


async def _new_reviews(
    session: AsyncSession, codes: Mapping[str, Code], method: Method | None
) -> Sequence[CodeReviewRow]:
    now = await database_now(session)
    return [
        CodeReviewRow(
            digest=code.digest,
            code=code.document(),
            state=ReviewState.WAITING,
            stage=stage,
            method_id=method.id if method is not None else None,
            method_name=method.name if method is not None else None,
            method_version=method.version if method is not None else None,
            created_at=now,
        )
        for stage, code in codes.items()
    ]


@cache
def _shipped_calls() -> tuple[Mapping[str, object], ...]:
    definitions = [MethodDefinition.model_validate(manifest.definition) for manifest in catalogue.load_manifests()]
    calls = [stage_call(one, stage) for one in definitions for stage in one.own_stages()]
    return tuple(call.model_dump(mode="json", exclude_defaults=True) for call in [StageCall(), *calls])
