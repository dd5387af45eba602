"""The files of a method: which stages run which, what pins them, and how they stand on disk now.

A file lies in the script root, where users put theirs, or in the product's own folder. A name means the file of the
root; only if nothing stands there does it mean the shipped script of that name. A file of the root is pinned with all
that its stage runs beside it, as a tree (`app.registry.methods.trees`).
"""

import contextlib
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from app.argspec.client import Limit, Reading, shared_reader
from app.argspec.report import Imports
from app.domain.definition import MethodDefinition
from app.domain.enums import JobKind
from app.domain.errors import Invalid, Violation
from app.domain.kinds import Stage
from app.presets import catalogue
from app.registry.methods.file_sources import KeptFiles, ReadableFiles, RootFiles, commit_of, tree_file
from app.registry.methods.pins import PinnedFile, Pins, pin, shipped_content
from app.registry.methods.stage_members import file_pointer, member_pointer, stage_files, stage_modules, stage_pointer
from app.registry.methods.trees import MAX_BYTES, Collected, collect, module_file, module_paths
from app.registry.scripts.git_commits import CommitUnreadable, GitCommit
from app.registry.scripts.module_names import hidden, top_package
from app.registry.scripts.names import script_path, stem
from app.registry.scripts.root import FileDigest, ScriptRoot, digest_of
from app.registry.scripts.versions import Tree, TreeFile, VersionLost, VersionStore, manifest

_REMEMBERED = 10_000
_UNCHECKED: Mapping[Limit, str] = {
    "cpu_time": "unchecked_cpu_time",
    "wall_time": "unchecked_wall_time",
    "memory": "unchecked_memory",
    "output": "unchecked_output",
    "crash": "unchecked_crash",
}


class FileState(StrEnum):
    """State of a pinned file in the script root, or in the product's folder."""

    UNCHANGED = "unchanged"
    MODIFIED = "modified"
    MISSING = "missing"
    ADDED = "added"


@dataclass(frozen=True)
class BesideStatus:
    """A file that is pinned beside a stage's, and its current state; `added`: the next version will pin it."""

    path: str
    file: TreeFile
    state: FileState


@dataclass(frozen=True)
class FileStatus:
    """The pinned file of a stage and its current state, and the same of the files beside it."""

    stage: Stage
    pinned: PinnedFile
    state: FileState
    beside: tuple[BesideStatus, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything is not as it was pinned."""
        return self.state is not FileState.UNCHANGED or any(one.state is not FileState.UNCHANGED for one in self.beside)


@dataclass(frozen=True)
class FileCheck:
    """What the script root has for a definition: the pins, and everything that is wrong with its files."""

    pins: Pins
    violations: tuple[Violation, ...]
    _contents: Mapping[str, bytes] = field(repr=False)

    @property
    def contents(self) -> Mapping[str, bytes]:
        """Bytes, by sha256, that the version store may not have yet."""
        return self._contents


class MethodFiles:
    """Joins definitions with the script root and the version store. All methods block."""

    def __init__(self, scripts: ScriptRoot, versions: VersionStore) -> None:
        self.scripts = scripts
        self.versions = versions
        self.reader = shared_reader()
        # digests that are known to parse and to be kept, so that a file that did not change costs a stat
        self._kept: dict[str, None] = {}
        self._imports: dict[str, Imports | None] = {}

    def check(
        self,
        definition: MethodDefinition,
        *,
        known: Collection[str] = (),
        pinned: Pins | None = None,
        instead: Mapping[str, bytes] | None = None,
    ) -> FileCheck:
        """Look at every file that the method's stages name or run; nothing is written.

        A name that hides a module is refused, unless it is `known`: the method runs that file already. Of a file that
        is gone the stored bytes count if the method `pinned` it. `instead`: files that are to be written.
        """
        try:
            with contextlib.ExitStack() as stack:
                return self._check(definition, known, pinned or {}, instead or {}, stack)
        except CommitUnreadable as error:
            return FileCheck({}, (Violation("/repository", error.code, error.params),), {})

    def _check(
        self,
        definition: MethodDefinition,
        known: Collection[str],
        pinned: Pins,
        instead: Mapping[str, bytes],
        stack: contextlib.ExitStack,
    ) -> FileCheck:
        pins: Pins = {}
        found: list[Violation] = []
        contents: dict[str, bytes] = {}
        commit: GitCommit | None = None
        modules = stage_modules(definition)
        for stage, named in {**stage_files(definition), **modules}.items():
            module = modules.get(stage)
            at = file_pointer(stage) if module is None else member_pointer(stage, "module")
            before = pinned.get(stage)
            if before is not None and not before.lies_in_root and before.file not in instead:
                pins[stage] = before
                if self.state(before) is FileState.MODIFIED:
                    pins[stage], content = self.current(before)
                    contents[pins[stage].sha256] = content
                continue
            if definition.repository is not None and commit is None:
                commit = stack.enter_context(commit_of(definition.repository))
            try:
                files = commit or self._root_files(before, instead)
                if module is None:
                    path = script_path(named)
                elif (of_module := module_file(files, module)) is not None:
                    path = of_module
                elif gone := next((one for one in module_paths(module) if one in known), None):
                    found.append(Violation(at, "file_not_found", {"file": gone}))
                    continue
                else:
                    continue  # it is one of the environment
                digest = files.digest(path, most=self.scripts.max_bytes)
                if digest is not None and self._imports.get(digest.sha256) is None:
                    content = files.read(path)
                    if problem := python_problem(self.reader.check(content), path, at):
                        found.append(problem)
                        continue
            except Invalid as error:
                found.append(Violation(at, error.code, error.params))
                continue
            if digest is not None:
                collected = self._collect(files, definition, stage, path, module)
                found += collected.violations
                if path not in collected.tree:
                    continue
                pinned_now = self._pin_tree(path, collected.tree, files, contents)
                pins[stage] = replace(pinned_now, committed=commit is not None, module=module)
                if commit is not None:
                    self._put(contents)  # what reads them has no other place to look
            elif (content_of := shipped_content(path)) is not None:
                pins[stage] = pin(path, content_of, shipped=True)
                contents[pins[stage].sha256] = content_of
            else:
                found.append(Violation(at, "file_not_found", {"file": path}))
                continue
            provides = stem(path) if module is None else top_package(module)
            if not pins[stage].shipped and path not in known and (hiding := hidden(path, provides, pointer=at)):
                found.append(hiding)
        return FileCheck(pins=pins, violations=tuple(found), _contents=contents)

    def keep(self, check: FileCheck) -> None:
        """Put the bytes that were looked at into the version store."""
        self._put(check.contents)

    def keep_alone(self, file: str, content: bytes) -> PinnedFile:
        """Keep a file of the script root that runs with nothing beside it, and return what pins it."""
        alone = pin(file, content)
        tree = manifest({file: TreeFile(self.versions.put(content), alone.size)})
        return replace(alone, tree=self.versions.put(tree))

    def tree(self, pinned: PinnedFile) -> Tree:
        """Return all files that are pinned with one of the script root, it among them."""
        if pinned.tree is None:
            return {pinned.file: TreeFile(pinned.sha256, pinned.size)}
        return self.versions.tree(pinned.tree)

    def states(self, definition: MethodDefinition, pins: Pins) -> list[FileStatus]:
        """Compare what the method's stages pinned with what they would pin now."""
        return [self._status(definition, stage, pinned) for stage, pinned in pins.items()]

    def tree_now(self, definition: MethodDefinition, stage: Stage, pinned: PinnedFile) -> Collected:
        """Return what a stage would pin now; of files that are gone what it pinned."""
        files = KeptFiles(self.versions, self.tree(pinned)) if pinned.committed else self._root_files(pinned)
        return self._collect(files, definition, stage, pinned.file, pinned.module)

    def keep_on_disk(self, path: str) -> PinnedFile:
        """Pin a file of the script root that no method names with what it runs, and keep the bytes."""
        present = self.scripts.digest(path)
        assert present is not None
        alone = PinnedFile(file=path, sha256=present.sha256, size=present.size)
        return self.keep_as_it_is(MethodDefinition(), JobKind.TRAINING, alone)

    def keep_as_it_is(self, definition: MethodDefinition, stage: Stage, pinned: PinnedFile) -> PinnedFile:
        """Pin what a stage has on disk now, whatever is wrong with it, and keep the bytes."""
        files, contents = self._root_files(pinned), dict[str, bytes]()
        tree = self._collect(files, definition, stage, pinned.file, pinned.module).tree
        if pinned.file not in tree:
            return pinned
        now = self._pin_tree(pinned.file, tree, files, contents)
        self._put(contents)
        return replace(now, module=pinned.module)

    def holds(self, path: str, file: TreeFile) -> bool:
        """Say whether the script root has exactly this file there."""
        return self._state(path, file) is FileState.UNCHANGED

    def _root_files(self, pinned: PinnedFile | None, instead: Mapping[str, bytes] | None = None) -> RootFiles:
        """Return the script root; of files that are gone, what `pinned` has."""
        tree: Tree = {}
        if pinned is not None:
            with contextlib.suppress(VersionLost):
                tree = self.tree(pinned)
        return RootFiles(self.scripts, self.versions, tree, instead or {})

    def _status(self, definition: MethodDefinition, stage: Stage, pinned: PinnedFile) -> FileStatus:
        state = self.state(pinned)
        if pinned.shipped:
            return FileStatus(stage, pinned, state)
        before = self.tree(pinned)
        now = self.tree_now(definition, stage, pinned)
        beside = []
        for path in sorted(before.keys() | now.tree.keys()):
            if path != pinned.file:
                file = before.get(path)
                status = FileState.ADDED if file is None else self._state(path, file)
                if pinned.committed:
                    status = FileState.UNCHANGED
                beside.append(BesideStatus(path, file or now.tree[path], status))
        return FileStatus(stage, pinned, state, tuple(beside))

    def _state(self, path: str, pinned: TreeFile) -> FileState:
        try:
            digest = self.scripts.digest(path, most=MAX_BYTES)
        except Invalid:
            return FileState.MODIFIED
        if digest is None:
            return FileState.MISSING
        return FileState.UNCHANGED if tree_file(path, digest) == pinned else FileState.MODIFIED

    def _collect(
        self, files: ReadableFiles, definition: MethodDefinition, stage: Stage, path: str, module: str | None
    ) -> Collected:
        def imports(path: str, file: TreeFile) -> Imports | None:
            known = self._imports.get(file.sha256)
            if known is None:
                reading = self.reader.check(files.read(path))
                known = None if reading.problem or reading.stopped else reading.imports
                if reading.lasting:
                    if len(self._imports) >= _REMEMBERED:
                        self._imports.clear()
                    self._imports[file.sha256] = known
            return known

        config = definition.stage_config(stage)
        include = config.include if config is not None else None
        if include is None and definition.repository is None:
            include = []
        return collect(files, imports, path, is_module=module is not None, include=include, at=stage_pointer(stage))

    def _pin_tree(self, path: str, tree: Tree, files: ReadableFiles, contents: dict[str, bytes]) -> PinnedFile:
        """Return what pins the stage file `path` with its tree; `contents` gets what may not be kept yet."""
        exact = dict(tree)
        for one, file in tree.items():
            if file.sha256 not in self._kept and file.sha256 not in contents:
                content = files.read(one)
                digest = digest_of(content)  # it may have changed a moment ago
                exact[one] = TreeFile(digest.sha256, digest.size, file.executable)
                contents[digest.sha256] = content
        document = manifest(exact)
        digest = digest_of(document)
        if digest.sha256 not in self._kept:
            contents[digest.sha256] = document
        entry = exact[path]
        return PinnedFile(file=path, sha256=entry.sha256, size=entry.size, tree=digest.sha256)

    def _put(self, contents: Mapping[str, bytes]) -> None:
        for sha256, content in contents.items():
            if sha256 not in self._kept:
                self.versions.put(content)
            if len(self._kept) >= _REMEMBERED:
                self._kept.clear()
            self._kept[sha256] = None

    def state(self, pinned: PinnedFile) -> FileState:
        """Compare one pinned file with what stands in its place; what cannot be used any more counts as modified."""
        if pinned.committed:
            return FileState.UNCHANGED
        try:
            digest = self._digest(pinned)
        except Invalid:
            return FileState.MODIFIED
        if digest is None:
            return FileState.MISSING
        return FileState.UNCHANGED if digest.sha256 == pinned.sha256 else FileState.MODIFIED

    def current(self, pinned: PinnedFile) -> tuple[PinnedFile, bytes]:
        """Return the file as it is on disk, with its bytes; the stored bytes if it is gone from there."""
        if self.state(pinned) is not FileState.UNCHANGED:
            content = shipped_content(pinned.file) if pinned.shipped else self.scripts.read(pinned.file)
            if content is not None:
                return replace(pin(pinned.file, content, shipped=pinned.shipped), module=pinned.module), content
        return pinned, self.versions.get(pinned.sha256)

    def place(self, pinned: PinnedFile) -> Path:
        """Return where the file is; it does not change meanwhile."""
        return catalogue.script_path(pinned.file) if pinned.shipped else self.scripts.absolute(pinned.file)

    def _digest(self, pinned: PinnedFile) -> FileDigest | None:
        if not pinned.shipped:
            return self.scripts.digest(pinned.file)
        content = shipped_content(pinned.file)
        return None if content is None else digest_of(content)


def python_problem(reading: Reading, file: str, pointer: str = "") -> Violation | None:
    """Return the violation for a file that is not Python, or that could not be checked; `None` if it is Python."""
    if reading.stopped is not None:
        return Violation(pointer, _UNCHECKED[reading.stopped.limit], {"file": file, "amount": reading.stopped.amount})
    problem = reading.problem
    if problem is None:
        return None
    params = {
        "file": file,
        "line": problem.line,
        "column": problem.column,
        "problem": problem.message,
        "python": platform.python_version(),
    }
    return Violation(pointer, "invalid_python", params)
