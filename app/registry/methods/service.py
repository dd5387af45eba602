"""Methods: created, changed, copied and deleted under the rules, with everything that is wrong said at once.

A change makes a new immutable version that pins the bytes of every file it runs. It names the version it was made
from (`precondition`); a later one of two concurrent changes is refused. Adding and deleting need a licence, adapting
what is there does not.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol
from uuid import uuid4

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.definition import MethodDefinition
from app.domain.enums import VersionSource
from app.domain.errors import Conflict, InvalidRequest, NotAllowed, PreconditionFailed, Violation
from app.domain.lifecycle import PATHS, find_path, violations
from app.domain.names import BASE_ENVIRONMENT
from app.domain.plain_text import shown
from app.domain.pointers import merge_patch
from app.registry.environments.on_nodes import modules_found
from app.registry.methods.code_reviews import CodeReviews
from app.registry.methods.files import FileCheck, MethodFiles
from app.registry.methods.pins import Pins, pins_to_json
from app.registry.methods.record import Method, lifecycle_text, method_of, row_values, version_tag
from app.registry.methods.script_reading import ScriptReader, unreadable
from app.registry.methods.stage_members import member_pointer, stage_environments
from app.registry.scripts.module_names import modules_of, top_package
from app.store import methods as store
from app.store import presets, registry_facts
from app.store.job_status import request_cancel_of_method
from app.store.jobs import count_unfinished_of_method
from app.store.methods import MethodFilter, NameTaken
from app.store.nodes import all_nodes
from app.store.paging import PageRequest, Position
from app.store.registry_facts import RegistryFacts
from app.store.tables import MethodRow

Clock = Callable[[], datetime]
Precondition = Callable[[str], None]
"""Raises unless the caller read the version with this tag."""


class MethodHasLiveJobs(Conflict):
    """Jobs of the method are queued or running, and the caller did not say what to do with them."""

    code = "method_has_live_jobs"


class PresetReadOnly(NotAllowed):
    """The method is an example that is copied, not changed."""

    code = "preset_read_only"


class MethodMoved(PreconditionFailed):
    """The method was changed between being read and being written."""

    code = "method_moved"


class JobsChoice(StrEnum):
    """What deleting a method does to its jobs that are queued or running."""

    CANCEL = "cancel"
    KEEP = "keep"


class LicenceGate(Protocol):
    """Says whether methods may be added and deleted here."""

    def require(self) -> None:
        """Raise the error that names the way out unless a licence allows it."""


class MethodRegistry:
    """The methods of this installation."""

    def __init__(
        self, *, files: MethodFiles, reader: ScriptReader, reviews: CodeReviews, licence: LicenceGate, clock: Clock
    ) -> None:
        self._files = files
        self._reviews = reviews
        self._reader = reader
        self._licence = licence
        self._clock = clock

    # ---- read -------------------------------------------------------------------------------------------------------

    async def get(self, session: AsyncSession, method: str) -> Method:
        """Return the newest version of the method with this id or name."""
        row = await store.get(session, method)
        return method_of(row, await store.get_version(session, row))

    async def page(
        self, session: AsyncSession, wanted: MethodFilter, paging: PageRequest
    ) -> tuple[list[Method], Position | None]:
        """Return one page of the methods, and the position of the next one."""
        if wanted.lifecycle is not None and find_path(wanted.lifecycle.split(",")) is None:
            known = " | ".join(map(lifecycle_text, PATHS))
            params = {"value": shown(wanted.lifecycle), "known": known}
            raise InvalidRequest([Violation("?lifecycle", "unknown_lifecycle", params)])
        rows = await store.page(session, wanted, paging)
        newest = await store.newest_versions(session, rows.rows)
        return [method_of(row, newest[row.id]) for row in rows.rows], rows.next_position

    async def version(self, session: AsyncSession, method: str, number: int) -> Method:
        """Return an older version; of a deleted method too, by its id."""
        row = await store.get_even_deleted(session, method)
        return method_of(row, await store.get_version(session, row, number))

    async def versions(
        self, session: AsyncSession, method: str, paging: PageRequest
    ) -> tuple[list[Method], Position | None]:
        """Return one page of the method's versions; of a deleted method too, by its id."""
        row = await store.get_even_deleted(session, method)
        found = await store.version_page(session, row.id, paging)
        return [method_of(row, version) for version in found.rows], found.next_position

    async def validate(
        self, session: AsyncSession, definition: MethodDefinition, *, instead_of: str | None = None
    ) -> tuple[list[Violation], FileCheck, RegistryFacts]:
        """Say everything that a create would say, or a change of the method `instead_of`; nothing is changed."""
        row = await store.get(session, instead_of) if instead_of is not None else None
        facts = await registry_facts.load(session)
        definition = _with_script_of_target(definition, facts)
        check, of_files = await asyncio.to_thread(self._look, definition, await _files_of(session, row))
        found = _judge(definition, of_files, facts)
        found += await hidden_packages(session, definition, check.pins)
        if await _name_is_taken(session, definition, row):
            found.append(_name_taken(definition))
        return found, check, facts

    async def read_commit(self, definition: MethodDefinition) -> None:
        """Put the files of a method's commit into the version store, so that no transaction waits for git.

        What is wrong with them is said by the change itself.
        """
        if definition.repository is not None:
            await asyncio.to_thread(self._files.check, definition)

    async def merged(self, session: AsyncSession, method: str, changes: Mapping[str, Any]) -> MethodDefinition:
        """Return what `patch` would make of the method; nothing is changed."""
        newest = await store.get_version(session, await store.get(session, method))
        return MethodDefinition.model_validate(merge_patch(newest.definition, changes))

    # ---- change -----------------------------------------------------------------------------------------------------

    async def create(self, session: AsyncSession, definition: MethodDefinition) -> Method:
        """Add a method."""
        self._licence.require()
        return await self.add(session, definition, source=VersionSource.CREATE)

    async def add(self, session: AsyncSession, definition: MethodDefinition, *, source: VersionSource) -> Method:
        """Add a method. The caller has checked the licence."""
        definition, check = await self._checked(session, definition, None)
        return await self.insert(session, definition, check.pins, source=source)

    async def insert(
        self,
        session: AsyncSession,
        definition: MethodDefinition,
        pins: Pins,
        *,
        source: VersionSource,
        preset: str | None = None,
        preset_version: int | None = None,
        read_only: bool = False,
    ) -> Method:
        """Insert a definition that is known to be right, with pins that are known to be kept."""
        now = self._clock()
        row = MethodRow(
            id=str(uuid4()),
            version=1,
            preset=preset,
            preset_version=preset_version,
            read_only=read_only,
            created_at=now,
            updated_at=now,
            deleted_at=None,
            **row_values(definition),
        )
        version = store.new_version(
            row, number=1, definition=definition.canonical(), files=pins_to_json(pins), source=source, now=now
        )
        await store.insert(session, row, version)
        made = method_of(row, version)
        await self._reviews.version_made(session, None, made)
        return made

    async def replace(
        self, session: AsyncSession, method: str, definition: MethodDefinition, *, precondition: Precondition
    ) -> Method:
        """Put `definition` in the place of the method's newest version."""
        row = await self._editable(session, method, precondition)
        return await self._edit(session, row, definition)

    async def patch(
        self, session: AsyncSession, method: str, changes: Mapping[str, Any], *, precondition: Precondition
    ) -> Method:
        """Merge `changes` into the method's newest version (RFC 7396)."""
        row = await self._editable(session, method, precondition)
        before = (await store.get_version(session, row)).definition
        return await self._edit(session, row, MethodDefinition.model_validate(merge_patch(before, changes)))

    async def new_version(
        self,
        session: AsyncSession,
        row: MethodRow,
        definition: MethodDefinition,
        pins: Pins,
        *,
        source: VersionSource,
        values: Mapping[str, Any] | None = None,
    ) -> Method:
        """Make a new version, unless it would say the same as the newest; return the newest."""
        newest = await store.get_version(session, row)
        canonical, files = definition.canonical(), pins_to_json(pins)
        if (newest.definition, newest.files) == (canonical, files) and not values:
            return method_of(row, newest)
        now = self._clock()
        version = store.new_version(
            row, number=row.version + 1, definition=canonical, files=files, source=source, now=now
        )
        columns = {**row_values(definition), **(values or {})}
        if not await store.replace(session, row, version, values=columns, now=now):
            raise MethodMoved(method=row.name)
        made = method_of(row, version)
        await self._reviews.version_made(session, method_of(row, newest), made)
        return made

    async def delete(
        self, session: AsyncSession, method: str, *, precondition: Precondition, jobs: JobsChoice | None
    ) -> Sequence[str]:
        """Delete the method and return the jobs that shall stop; what its jobs and models say of it stays."""
        self._licence.require()
        row = await store.get(session, method, lock=True)
        precondition(version_tag(row.id, row.version))
        now = self._clock()
        if not await store.delete(session, row, version=row.version, now=now):
            raise MethodMoved(method=row.name)
        # counted after the row is locked: a submit of this moment has either been counted or finds no method
        count = await count_unfinished_of_method(session, row.id)
        if count and jobs is None:
            raise MethodHasLiveJobs(method=row.name, count=count)
        if row.preset is not None:
            await presets.mark_removed(session, row.id, now=now)
        if count and jobs is JobsChoice.CANCEL:
            return await request_cancel_of_method(session, row.id, now=now)
        return ()

    async def require_valid(self, session: AsyncSession, definition: MethodDefinition) -> None:
        """Raise everything that is wrong with a definition whose files are known to be kept."""
        found = _judge(definition, (), await registry_facts.load(session))
        if found:
            raise InvalidRequest(found)

    async def _editable(self, session: AsyncSession, method: str, precondition: Precondition) -> MethodRow:
        row = await store.get(session, method, lock=True)
        if row.read_only:
            raise PresetReadOnly(method=row.name)
        precondition(version_tag(row.id, row.version))
        return row

    async def _edit(self, session: AsyncSession, row: MethodRow, definition: MethodDefinition) -> Method:
        definition, check = await self._checked(session, definition, row)
        return await self.new_version(session, row, definition, check.pins, source=VersionSource.EDIT)

    async def _checked(
        self, session: AsyncSession, definition: MethodDefinition, row: MethodRow | None
    ) -> tuple[MethodDefinition, FileCheck]:
        """Raise everything that is wrong with the definition; keep the bytes it will run, and return it in full."""
        facts = await registry_facts.load(session)
        definition = _with_script_of_target(definition, facts)
        check, of_files = await asyncio.to_thread(self._look, definition, await _files_of(session, row))
        found = _judge(definition, of_files, facts)
        found += await hidden_packages(session, definition, check.pins)
        if await _name_is_taken(session, definition, row):
            if not found:
                raise NameTaken(name=definition.name, pointer="/name")
            found.append(_name_taken(definition))
        if found:
            raise InvalidRequest(found)
        await asyncio.to_thread(self._files.keep, check)
        return definition, check

    def _look(self, definition: MethodDefinition, known: Collection[str]) -> tuple[FileCheck, list[Violation]]:
        """Look at the files of the stages, and say everything that is wrong with them. Blocks."""
        check = self._files.check(definition, known=known)
        return check, [*check.violations, *unreadable(self._reader, definition, check)]


async def hidden_packages(session: AsyncSession, definition: MethodDefinition, pins: Pins) -> list[Violation]:
    """Return which modules of the stages are in a package that their environments have too."""
    modules = {stage: pinned.module for stage, pinned in pins.items() if pinned.module is not None}
    if not modules:
        return []
    facts, nodes, environments = (
        await registry_facts.load(session),
        await all_nodes(session),
        stage_environments(definition),
    )
    found = []
    for stage, module in modules.items():
        name, package = environments.get(stage, BASE_ENVIRONMENT), top_package(module)
        specified = modules_of([facts.specs[name]] if name in facts.specs else [])
        if package in specified | modules_found(nodes, [name]):
            params = {"file": pins[stage].file, "module": package, "environment": name}
            found.append(Violation(member_pointer(stage, "module"), "module_hides_package", params))
    return found


def _with_script_of_target(definition: MethodDefinition, facts: RegistryFacts) -> MethodDefinition:
    """Return the definition with the script of its custom target, where it names neither file nor environment."""
    deployment = definition.deployment
    target = facts.deploy_targets.get(deployment.target or "") if deployment is not None else None
    if deployment is None or target is None or target.file is None or deployment.file or deployment.module:
        return definition
    own = {"file": target.file, "conda_env": deployment.conda_env or target.conda_env}
    return definition.model_copy(update={"deployment": deployment.model_copy(update=own)})


def _judge(definition: MethodDefinition, of_files: Sequence[Violation], facts: RegistryFacts) -> list[Violation]:
    """Join the rules with what the script root and the database say."""
    return [
        *violations(definition, deploy_targets=facts.deploy_targets, custom_targets=facts.custom_targets),
        *of_files,
        *_unknown_environments(definition, facts),
    ]


def _unknown_environments(definition: MethodDefinition, facts: RegistryFacts) -> list[Violation]:
    known = facts.environments
    return [
        Violation(
            member_pointer(stage, "conda_env"),
            "unknown_environment",
            {"environment": environment, "known": ", ".join(sorted(known))},
        )
        for stage, environment in stage_environments(definition).items()
        if environment not in known
    ]


async def _files_of(session: AsyncSession, row: MethodRow | None) -> frozenset[str]:
    """Return the files that the method's newest version runs."""
    if row is None:
        return frozenset()
    return frozenset(pinned.file for pinned in method_of(row, await store.get_version(session, row)).files.values())


async def _name_is_taken(session: AsyncSession, definition: MethodDefinition, row: MethodRow | None) -> bool:
    if definition.name is None:
        return False
    return await store.name_is_taken(session, definition.name, by_other_than=row.id if row else None)


def _name_taken(definition: MethodDefinition) -> Violation:
    return Violation("/name", "name_taken", {"name": definition.name})
