"""From a method to the bytes that a job runs.

A file that was edited on disk is taken as a new version at submit; of a read-only example it is refused. While the
script root still holds the pinned bytes they run in place, beside their neighbours; else the stored bytes run.
"""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import VersionSource
from app.domain.errors import Conflict, InvalidRequest
from app.registry.method_files import FileState, MethodFiles, PinnedFile
from app.registry.method_record import Method, method_of
from app.registry.methods import MethodRegistry
from app.registry.script_modules import ScriptModules
from app.store import methods as store


class FileModified(Conflict):
    """A file of a read-only example is not what was shipped."""

    code = "file_modified"


@dataclass(frozen=True)
class ScriptToRun:
    """Where the pinned bytes stand, and the folders that scripts expect to import from, in order."""

    path: Path
    sha256: str
    in_place: bool
    import_paths: tuple[Path, ...]


class MethodRuns:
    """Pins methods for jobs, and puts pinned bytes back."""

    def __init__(self, *, registry: MethodRegistry, files: MethodFiles) -> None:
        self._registry = registry
        self._files = files
        self.modules = ScriptModules(files)

    async def pin_for_run(self, session: AsyncSession, method: str) -> Method:
        """Return the version of the method that a job of this moment runs.

        Until the transaction ends nobody deletes or changes the method. A file that is gone from disk is no edit: its
        stored bytes run.
        """
        row = await store.get(session, method, lock=True)
        newest = method_of(row, await store.get_version(session, row))
        states = await asyncio.to_thread(self._files.states, newest.files)
        modified = [status for status in states if status.state is FileState.MODIFIED]
        if not modified:
            return newest
        if row.read_only:
            raise FileModified(method=row.name, file=modified[0].pinned.file)
        check = await asyncio.to_thread(self._files.check, newest.definition)
        found = [violation for violation in check.violations if violation.code != "file_not_found"]
        if found:
            # the caller submits a job: what is wrong is the method it names
            raise InvalidRequest([replace(violation, pointer="/method") for violation in found])
        await asyncio.to_thread(self._files.keep, check)
        pins = {**newest.files, **check.pins}
        return await self._registry.new_version(session, row, newest.definition, pins, source=VersionSource.DISK)

    async def restore(self, session: AsyncSession, method: str) -> Method:
        """Write the pinned bytes of the method's newest version back to the script root."""
        await store.lock_scripts(session)
        row = await store.get(session, method, lock=True)
        newest = method_of(row, await store.get_version(session, row))
        await asyncio.to_thread(self._write_back, newest)
        return newest

    def _write_back(self, method: Method) -> None:
        for status in self._files.states(method.files):
            if status.state is not FileState.UNCHANGED:
                content = self._files.versions.get(status.pinned.sha256)
                self._files.scripts.write(status.pinned.file, content)


def script_to_run(files: MethodFiles, pinned: PinnedFile) -> ScriptToRun:
    """Return what to start for a pinned file; blocks, and writes the stored bytes out if they have to run."""
    in_root = files.scripts.absolute(pinned.file)
    in_place = files.state(pinned) is FileState.UNCHANGED
    return ScriptToRun(
        path=in_root if in_place else files.versions.materialise(pinned.sha256, pinned.file),
        sha256=pinned.sha256,
        in_place=in_place,
        import_paths=tuple(dict.fromkeys([in_root.parent, files.scripts.root])),
    )
