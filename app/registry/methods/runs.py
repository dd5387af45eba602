"""From a method to the bytes that a job runs.

A file that was edited on disk is taken as a new version at submit. While the pinned bytes stand in their place they run
there, beside their neighbours; else the stored bytes run. A script sees the modules of its own folder and our helpers.
"""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import VersionSource
from app.domain.errors import InvalidRequest
from app.registry.methods.files import FileState, MethodFiles, PinnedFile
from app.registry.methods.record import Method, method_of
from app.registry.methods.script_modules import ScriptModules
from app.registry.methods.service import MethodRegistry
from app.registry.scripts.module_names import CONTRACT_HELPERS
from app.registry.scripts.names import SUFFIX
from app.store import methods as store


@dataclass(frozen=True)
class ScriptToRun:
    """Where the pinned bytes stand, and the folders of the script root that the script imports from.

    `isolated`: it is the product's, and sees nothing of the folder that it works in. `helper_copies`: users' own copies
    of helper modules in the script root, where a script in a folder looks for them behind everything else (it appends
    the root to `sys.path`), and yet they come before the product's.
    """

    path: Path
    sha256: str
    in_place: bool
    import_paths: tuple[Path, ...] = ()
    helper_copies: tuple[Path, ...] = ()
    isolated: bool = False


class MethodRuns:
    """Pins methods for jobs."""

    def __init__(self, *, registry: MethodRegistry, files: MethodFiles) -> None:
        self._registry = registry
        self._files = files
        self.modules = ScriptModules(files)

    async def pin_for_run(self, session: AsyncSession, method: str) -> Method:
        """Return the version of the method that a job of this moment runs; a new one if its files were edited.

        The method is locked until the transaction ends.
        """
        row = await store.get(session, method, lock=True)
        newest = method_of(row, await store.get_version(session, row))
        return await self.record(session, newest, await asyncio.to_thread(self.as_edited, newest))

    def as_edited(self, newest: Method) -> Method:
        """Return the method with the files that the script root has now, their bytes kept; blocks.

        A file that is gone from disk is no edit: its stored bytes run; of a read-only example nothing else ever runs.
        """
        if newest.read_only:
            return newest
        states = self._files.states(newest.files)
        modified = [status for status in states if status.state is FileState.MODIFIED]
        if not modified:
            return newest
        check = self._files.check(newest.definition, known=_names(newest))
        found = [violation for violation in check.violations if violation.code != "file_not_found"]
        if found:
            # the caller submits a job: what is wrong is the method it names
            raise InvalidRequest([replace(violation, pointer="/method") for violation in found])
        self._files.keep(check)
        return replace(newest, files={**newest.files, **check.pins})

    async def record(self, session: AsyncSession, newest: Method, edited: Method) -> Method:
        """Make a version of what `as_edited` found, if that is anything new."""
        if edited.files == newest.files:
            return newest
        row = await store.get(session, newest.id, lock=True)
        return await self._registry.new_version(
            session, row, newest.definition, edited.files, source=VersionSource.DISK
        )


def _names(method: Method) -> frozenset[str]:
    return frozenset(pinned.file for pinned in method.files.values())


def script_to_run(files: MethodFiles, pinned: PinnedFile) -> ScriptToRun:
    """Return what to start for a pinned file; blocks, and writes the stored bytes out if they have to run."""
    in_place = files.state(pinned) is FileState.UNCHANGED
    path = files.place(pinned) if in_place else files.versions.materialise(pinned.sha256, pinned.file)
    if pinned.shipped:
        return ScriptToRun(path=path, sha256=pinned.sha256, in_place=in_place, isolated=True)
    folder = files.scripts.absolute(pinned.file).parent
    copies = _helper_copies(files, path) if folder != files.scripts.root else ()
    return ScriptToRun(path=path, sha256=pinned.sha256, in_place=in_place, import_paths=(folder,), helper_copies=copies)


def _helper_copies(files: MethodFiles, script: Path) -> tuple[Path, ...]:
    """Return the helper modules in the script root that a script of a folder means if it looks there."""
    places = [files.scripts.root / f"{name}{SUFFIX}" for name in sorted(CONTRACT_HELPERS)]
    copies = tuple(place for place in places if place.is_file())
    if not copies or not files.reader.read(script.read_bytes()).imports.search_path:
        return ()
    return copies
