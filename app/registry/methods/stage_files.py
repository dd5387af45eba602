"""Scripts over HTTP: those of a method's stages, and all of the script root.

Nothing is overwritten or deleted unread: a change names the bytes it replaces, and they are kept. A name that would
hide a module from the scripts beside it is refused.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import VersionSource
from app.domain.errors import Conflict, InvalidRequest, NotFound
from app.domain.kinds import Stage
from app.registry.environments.on_nodes import modules_found
from app.registry.methods.code_reviews import CodeReviews
from app.registry.methods.files import FileStatus, MethodFiles, python_problem
from app.registry.methods.pins import PinnedFile, Pins, pin, pin_from_json
from app.registry.methods.record import Method, method_of
from app.registry.methods.restoring import FileInTheWay
from app.registry.methods.runs import names_of
from app.registry.methods.service import MethodRegistry, Precondition, PresetReadOnly
from app.registry.methods.stage_members import stage_pointer
from app.registry.scripts.module_names import hidden, modules_of, provided
from app.registry.scripts.names import SUFFIX, file_path
from app.registry.scripts.root import ScriptEntry, ScriptTooLarge, digest_of
from app.registry.scripts.versions import Tree
from app.store import methods as store
from app.store import registry_facts
from app.store.nodes import all_nodes


class ScriptNotFound(NotFound):
    """The script root has no such file."""

    code = "script_not_found"


class StageWithoutFile(NotFound):
    """The stage is not configured, or its deploy target brings its own program."""

    code = "stage_without_file"


class FileOfCommit(Conflict):
    """The method takes the file from a commit."""

    code = "file_of_commit"


class ScriptInUse(Conflict):
    """Methods run the file or import it."""

    code = "script_in_use"


@dataclass(frozen=True)
class ScriptContent:
    """A file and its bytes."""

    file: PinnedFile
    content: bytes


class StageFiles:
    """Lists, reads, replaces and deletes scripts."""

    def __init__(self, *, registry: MethodRegistry, files: MethodFiles, reviews: CodeReviews) -> None:
        self._registry = registry
        self._reviews = reviews
        self._files = files

    async def states(self, method: Method) -> list[FileStatus]:
        """Return the files of the method, and how they stand on disk."""
        return await asyncio.to_thread(self._files.states, method.definition, method.files)

    async def trees(self, method: Method) -> Mapping[Stage, Tree]:
        """Return what the stages of a version run, file by file."""
        return await asyncio.to_thread(
            lambda: {stage: self._files.tree(pinned) for stage, pinned in method.files.items()}
        )

    async def read(self, session: AsyncSession, method: str, stage: Stage) -> ScriptContent:
        """Return the stage's file as it is on disk; the stored bytes if it is gone from there."""
        pinned = _pinned(await self._registry.get(session, method), stage)
        return ScriptContent(*await asyncio.to_thread(self._files.current, pinned))

    async def read_version(
        self, session: AsyncSession, method: str, number: int, stage: Stage, path: str | None = None
    ) -> ScriptContent:
        """Return the bytes that a version of the method pins: of the stage's file, or of one that runs beside it."""
        pinned = _pinned(await self._registry.version(session, method, number), stage)
        if path is not None and path != pinned.file:
            tree = await asyncio.to_thread(self._files.tree, pinned)
            if path not in tree:
                raise ScriptNotFound(file=path)
            pinned = PinnedFile(file=path, sha256=tree[path].sha256, size=tree[path].size)
        return ScriptContent(pinned, await asyncio.to_thread(self._files.versions.get, pinned.sha256))

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
        if pinned.committed:
            raise FileOfCommit(file=pinned.file)
        if pinned.shipped and await asyncio.to_thread(self._files.scripts.digest, pinned.file) is not None:
            raise FileInTheWay(file=pinned.file)  # the upload would become a file of the script root
        present, _ = await asyncio.to_thread(self._files.current, pinned)
        precondition(present.sha256)
        pins = await asyncio.to_thread(self._replace, newest, pinned.file, content)
        await self._reviews.file_changed(session, pinned.file, digest_of(content).sha256)
        return await self._registry.new_version(session, row, newest.definition, pins, source=VersionSource.UPLOAD)

    async def entries(self, *, every_type: bool = False) -> list[ScriptEntry]:
        """Return all scripts of the root, by path, or all files."""
        return await asyncio.to_thread(self._files.scripts.entries, every_type=every_type)

    async def read_script(self, path: str) -> ScriptContent:
        """Return a file of the script root."""
        path = file_path(path)
        content = await asyncio.to_thread(self._files.scripts.read, path)
        if content is None:
            raise ScriptNotFound(file=path)
        return ScriptContent(pin(path, content), content)

    async def write_script(
        self, session: AsyncSession, path: str, content: bytes, *, precondition: Callable[[str | None], None]
    ) -> tuple[PinnedFile, bool]:
        """Write a file of the script root; return it and whether it is new.

        `precondition` gets the sha256 of what stands there, `None` if nothing does. Methods that run the file notice
        the change at their next read and take it up at their next job.
        """
        path = file_path(path)
        await asyncio.to_thread(self._check, content, path, python=path.endswith(SUFFIX))
        await store.lock_scripts(session)
        await self._refuse_hiding(session, path)
        present = await asyncio.to_thread(self._files.scripts.digest, path)
        precondition(present.sha256 if present else None)
        written = await asyncio.to_thread(self._write, path, content)
        await self._reviews.file_changed(session, path, written.sha256)
        return written, present is None

    async def delete_script(self, session: AsyncSession, path: str, *, precondition: Precondition) -> None:
        """Delete a file of the script root that no method uses; `precondition` gets its sha256."""
        path = file_path(path)
        await store.lock_scripts(session)
        present = await asyncio.to_thread(self._files.scripts.digest, path)
        if present is None:
            raise ScriptNotFound(file=path)
        precondition(present.sha256)
        methods = [method_of(row, version) for row, version in await store.living_methods(session)]
        users = await asyncio.to_thread(self._users, methods, path)
        if users:
            raise ScriptInUse(file=path, methods=", ".join(users))
        await asyncio.to_thread(self._delete, path)
        await self._reviews.file_changed(session, path)

    def _check(self, content: bytes, name: str, *, python: bool = True) -> None:
        limit = self._files.scripts.max_bytes
        if len(content) > limit:
            raise ScriptTooLarge(file=name, size=len(content), limit=limit, pointer="")
        if not python:
            return
        problem = python_problem(self._files.reader.check(content), name)
        if problem is not None:
            raise InvalidRequest([problem])

    def _replace(self, method: Method, file: str, content: bytes) -> Pins:
        """Write a stage's file; return what the method pins then. Stages that run other files stay as they are."""
        check = self._files.check(
            method.definition, known=names_of(method), pinned=method.files, instead={file: content}
        )
        stages = {stage for stage, pinned in method.files.items() if pinned.file == file}
        places = tuple(map(stage_pointer, stages))
        if found := [one for one in check.violations if one.pointer.startswith(places)]:
            raise InvalidRequest(found)
        self._write(file, content)
        self._files.keep(check)
        return {**method.files, **{stage: pinned for stage, pinned in check.pins.items() if stage in stages}}

    def _write(self, path: str, content: bytes) -> PinnedFile:
        # kept first, on disk last: after a crash in between the file counts as edited on disk, and nothing is lost
        replaced = self._files.scripts.read(path)
        if replaced is not None:
            self._files.versions.put(replaced)
        self._files.versions.put(content)
        self._files.scripts.write(path, content)
        return pin(path, content)

    def _delete(self, path: str) -> None:
        content = self._files.scripts.read(path)
        if content is not None:
            self._files.versions.put(content)
        self._files.scripts.remove(path)

    def _users(self, methods: Sequence[Method], path: str) -> list[str]:
        """Return the names of the methods that run the file or import it."""
        return [
            method.name
            for method in methods
            if any(
                self._runs(pinned, path) or self._reads(method, stage, pinned, path)
                for stage, pinned in method.files.items()
            )
        ]

    def _reads(self, method: Method, stage: Stage, pinned: PinnedFile, path: str) -> bool:
        return pinned.lies_in_root and path in self._files.tree_now(method.definition, stage, pinned).tree

    def _runs(self, pinned: PinnedFile, path: str) -> bool:
        if not pinned.lies_in_root or self._files.scripts.absolute(path).is_symlink():
            return pinned.lies_in_root and pinned.file == path  # what a link leads to stays
        return self._files.scripts.same(pinned.file, path)

    async def _refuse_hiding(self, session: AsyncSession, path: str) -> None:
        folder, module = provided(path)
        environments = {
            environment
            for environment, files in (await store.stages_by_environment(session)).items()
            if any(
                not (file.get("shipped") or file.get("committed")) and pin_from_json(file).search_folder == folder
                for file in files
            )
        }
        if not folder:  # a module is looked for here first
            environments |= (await store.modules_by_environment(session)).keys()
        if folder and not environments:
            return  # no script looks for modules there
        specs = (await registry_facts.load(session)).specs
        specified = modules_of(specs[name] for name in environments & specs.keys())
        found = modules_found(await all_nodes(session), environments)
        problem = hidden(path, module, packages=specified | found)
        if problem is not None:
            raise InvalidRequest([problem])


def _pinned(method: Method, stage: Stage) -> PinnedFile:
    if stage not in method.files:
        raise StageWithoutFile(method=method.name, stage=stage)
    return method.files[stage]
