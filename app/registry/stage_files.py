"""Scripts over HTTP: those of a method's stages, and all of the script root.

Nothing is overwritten unread: a write names the bytes it replaces. The bytes of a read-only example cannot be replaced
through any door.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import VersionSource
from app.domain.errors import InvalidRequest, NotAllowed, NotFound
from app.domain.kinds import Stage
from app.registry.method_files import FileStatus, MethodFiles, PinnedFile, python_problem
from app.registry.method_record import Method, method_of
from app.registry.methods import MethodRegistry, Precondition, PresetReadOnly
from app.registry.script_paths import script_path
from app.registry.scripts import ScriptEntry, ScriptTooLarge, digest_of
from app.store import methods as store


class ScriptNotFound(NotFound):
    """The script root has no such file."""

    code = "script_not_found"


class StageWithoutFile(NotFound):
    """The stage is not configured, or its deploy target brings its own program."""

    code = "stage_without_file"


class ScriptOfPreset(NotAllowed):
    """A read-only example runs this file."""

    code = "script_of_preset"


@dataclass(frozen=True)
class ScriptContent:
    """A file and its bytes."""

    file: PinnedFile
    content: bytes


class StageFiles:
    """Lists, reads and replaces scripts."""

    def __init__(self, *, registry: MethodRegistry, files: MethodFiles) -> None:
        self._registry = registry
        self._files = files

    async def states(self, method: Method) -> list[FileStatus]:
        """Return the files of the method, and how they stand on disk."""
        return await asyncio.to_thread(self._files.states, method.files)

    async def read(self, session: AsyncSession, method: str, stage: Stage) -> ScriptContent:
        """Return the stage's file as it stands on disk; the stored bytes if it is gone from there."""
        pinned = _pinned(await self._registry.get(session, method), stage)
        return ScriptContent(*await asyncio.to_thread(self._files.current, pinned))

    async def write(
        self, session: AsyncSession, method: str, stage: Stage, content: bytes, *, precondition: Precondition
    ) -> Method:
        """Replace the stage's file, which makes a new version of the method; `precondition` gets its sha256."""
        await asyncio.to_thread(self._check, content, stage)
        await store.lock_scripts(session)
        row = await store.get(session, method, lock=True)
        if row.read_only:
            raise PresetReadOnly(method=row.name)
        newest = method_of(row, await store.get_version(session, row))
        pinned = _pinned(newest, stage)
        await self._refuse_files_of_presets(session, pinned.file)
        present, _ = await asyncio.to_thread(self._files.current, pinned)
        precondition(present.sha256)
        written = await asyncio.to_thread(self._write, pinned.file, content)
        pins = {at: written if pin.file == pinned.file else pin for at, pin in newest.files.items()}
        return await self._registry.new_version(session, row, newest.definition, pins, source=VersionSource.UPLOAD)

    async def entries(self) -> list[ScriptEntry]:
        """Return all scripts of the root, by path."""
        return await asyncio.to_thread(self._files.scripts.entries)

    async def read_script(self, path: str) -> ScriptContent:
        """Return a file of the script root."""
        path = script_path(path)
        content = await asyncio.to_thread(self._files.scripts.read, path)
        if content is None:
            raise ScriptNotFound(file=path)
        return _content(path, content)

    async def write_script(
        self, session: AsyncSession, path: str, content: bytes, *, precondition: Callable[[str | None], None]
    ) -> tuple[PinnedFile, bool]:
        """Write a file of the script root; return it and whether it is new.

        `precondition` gets the sha256 of what stands there, `None` if nothing does. Methods that run the file notice
        the change at their next read and take it up at their next job.
        """
        path = script_path(path)
        await asyncio.to_thread(self._check, content, path)
        await store.lock_scripts(session)
        await self._refuse_files_of_presets(session, path)
        present = await asyncio.to_thread(self._files.scripts.digest, path)
        precondition(present.sha256 if present else None)
        return await asyncio.to_thread(self._write, path, content), present is None

    def _check(self, content: bytes, name: str) -> None:
        limit = self._files.scripts.max_bytes
        if len(content) > limit:
            raise ScriptTooLarge(file=name, size=len(content), limit=limit, pointer="")
        problem = python_problem(self._files.reader.check(content), name)
        if problem is not None:
            raise InvalidRequest([problem])

    def _write(self, path: str, content: bytes) -> PinnedFile:
        # kept first, on disk last: after a crash in between the file counts as edited on disk, and nothing is lost
        self._files.versions.put(content)
        self._files.scripts.write(path, content)
        return _content(path, content).file

    async def _refuse_files_of_presets(self, session: AsyncSession, path: str) -> None:
        presets = await store.read_only_methods(session)
        newest = await store.newest_versions(session, presets)
        for row in presets:
            files = method_of(row, newest[row.id]).files.values()
            if any(self._files.scripts.same(pinned.file, path) for pinned in files):
                raise ScriptOfPreset(file=path, method=row.name)


def _pinned(method: Method, stage: Stage) -> PinnedFile:
    if stage not in method.files:
        raise StageWithoutFile(method=method.name, stage=stage)
    return method.files[stage]


def _content(path: str, content: bytes) -> ScriptContent:
    digest = digest_of(content)
    return ScriptContent(PinnedFile(file=path, sha256=digest.sha256, size=digest.size), content)
