"""From a method to the bytes that a job runs.

What was edited on disk is taken as a new version at submit: the file of a stage, or anything that it runs beside it.
The stored tree runs, so that a script sees the modules and files that its version pins, and our helpers. A shipped
script runs in place while the product has the bytes, and so does one that an earlier release pinned alone.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import VersionSource
from app.domain.errors import InvalidRequest
from app.registry.methods.files import FileState, MethodFiles
from app.registry.methods.pins import PinnedFile
from app.registry.methods.record import Method, method_of
from app.registry.methods.script_modules import ScriptModules
from app.registry.methods.service import MethodRegistry, hidden_packages
from app.registry.scripts.module_names import CONTRACT_HELPERS
from app.registry.scripts.names import SUFFIX, FileOutsideRoot, FilePathTooLong, InvalidFilePath, script_path
from app.store import methods as store

FILE_PARAMETERS = ("reward_file", "tools_file")
"""Parameters that name a Python file of the script root which the script runs."""


@dataclass(frozen=True)
class ScriptToRun:
    """Where the pinned bytes stand, and the folders that the script imports from.

    `isolated`: it is the product's, or a module, and sees nothing of the folder that it works in. `helper_copies`:
    users' own copies of helper modules in the root of the tree, where a script in a folder looks for them behind
    everything else (it appends the root to `sys.path`), and yet they come before the product's.
    """

    path: Path
    sha256: str
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
        A version of an earlier release, which has no trees, gets them here.
        """
        if newest.read_only:
            return newest
        check = self._files.check(newest.definition, known=names_of(newest), pinned=newest.files)
        if check.violations:
            # the caller submits a job: what is wrong is the method it names
            raise InvalidRequest([replace(violation, pointer="/method") for violation in check.violations])
        if check.pins == newest.files:
            return newest
        self._files.keep(check)
        return replace(newest, files={**newest.files, **check.pins})

    def pin_named(self, values: Mapping[str, Any]) -> Mapping[str, PinnedFile]:
        """Return what pins the files of the script root that parameters name, their bytes kept; blocks.

        A path that leads elsewhere is not pinned: the script reads what is there when it runs.
        """
        found = {}
        for name in FILE_PARAMETERS:
            value = values.get(name)
            if not isinstance(value, str) or not value.endswith(SUFFIX):
                continue
            with suppress(FileOutsideRoot, InvalidFilePath, FilePathTooLong):
                path = script_path(value)
                if (content := self._files.scripts.read(path)) is not None:
                    found[name] = self._files.keep_alone(path, content)
        return found

    async def record(self, session: AsyncSession, newest: Method, edited: Method) -> Method:
        """Make a version of what `as_edited` found, if that is anything new.

        A module of the environment that the script root has now as well is refused.
        """
        if edited.files == newest.files:
            return newest
        new = {stage: pinned for stage, pinned in edited.files.items() if stage not in newest.files}
        if found := await hidden_packages(session, newest.definition, new):
            raise InvalidRequest([replace(violation, pointer="/method") for violation in found])
        row = await store.get(session, newest.id, lock=True)
        return await self._registry.new_version(
            session, row, newest.definition, edited.files, source=VersionSource.DISK
        )


def names_of(method: Method) -> frozenset[str]:
    """Return the files that the stages of the method name."""
    return frozenset(pinned.file for pinned in method.files.values())


def script_to_run(files: MethodFiles, pinned: PinnedFile) -> ScriptToRun:
    """Return what to start for a pinned file; blocks, and writes the stored bytes out if they have to run."""
    if pinned.tree is not None:
        root = files.versions.materialise_tree(pinned.tree)
        path, folder = root / pinned.file, root / pinned.search_folder
    else:
        in_place = files.state(pinned) is FileState.UNCHANGED
        path = files.place(pinned) if in_place else files.versions.materialise(pinned.sha256, pinned.file)
        if pinned.shipped:
            return ScriptToRun(path=path, sha256=pinned.sha256, isolated=True)
        root, folder = files.scripts.root, files.scripts.absolute(pinned.file).parent
    copies = _helper_copies(files, root, path) if folder != root else ()
    return ScriptToRun(
        path=path,
        sha256=pinned.sha256,
        import_paths=(folder,),
        helper_copies=copies,
        isolated=pinned.module is not None,
    )


def _helper_copies(files: MethodFiles, root: Path, script: Path) -> tuple[Path, ...]:
    """Return the helper modules in the root that a script of a folder means if it looks there."""
    places = [root / f"{name}{SUFFIX}" for name in sorted(CONTRACT_HELPERS)]
    copies = tuple(place for place in places if place.is_file())
    if not copies or not files.reader.read(script.read_bytes()).imports.search_path:
        return ()
    return copies
