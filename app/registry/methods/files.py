"""The files of a method: which stages run which, what pins them, and how they stand on disk now.

A file lies in the script root, where users put theirs, or in the product's own folder. A name means the file of the
root; only if nothing stands there does it mean the shipped script of that name.
"""

import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from app.argspec.client import Limit, Reading, shared_reader
from app.domain.definition import MethodDefinition, RunConfig
from app.domain.enums import JobKind
from app.domain.errors import Invalid, Violation
from app.domain.kinds import KINDS, METHOD_STAGES, STAGES, Member, Stage
from app.domain.pointers import pointer
from app.presets import catalogue
from app.registry.scripts.module_names import hidden
from app.registry.scripts.names import script_path, stem
from app.registry.scripts.root import FileDigest, ScriptRoot, digest_of
from app.registry.scripts.versions import VersionStore

_REMEMBERED = 10_000
_UNCHECKED: Mapping[Limit, str] = {
    "cpu_time": "unchecked_cpu_time",
    "wall_time": "unchecked_wall_time",
    "memory": "unchecked_memory",
    "output": "unchecked_output",
    "crash": "unchecked_crash",
}


@dataclass(frozen=True)
class PinnedFile:
    """A file of a method version: its path, and exactly which bytes it means.

    The path is one of the script root, or, if the file is `shipped`, the name of a script in the product's folder.
    """

    file: str
    sha256: str
    size: int
    shipped: bool = False


Pins = dict[Stage, PinnedFile]


class FileState(StrEnum):
    """State of a pinned file in the script root, or in the product's folder."""

    UNCHANGED = "unchanged"
    MODIFIED = "modified"
    MISSING = "missing"


@dataclass(frozen=True)
class FileStatus:
    """A pinned file and its current state."""

    stage: Stage
    pinned: PinnedFile
    state: FileState


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

    def check(self, definition: MethodDefinition, *, known: Collection[str] = ()) -> FileCheck:
        """Look at every file that the method's stages name; nothing is written.

        A name that hides a module is refused, unless it is `known`: the method runs that file already.
        """
        pins: Pins = {}
        found: list[Violation] = []
        contents: dict[str, bytes] = {}
        for stage, file in stage_files(definition).items():
            at = file_pointer(stage)
            try:
                path = script_path(file)
                digest = self.scripts.digest(path)
                if digest is not None and digest.sha256 not in self._kept:
                    content = self.scripts.read(path)
                    digest = None if content is None else digest_of(content)
                    if content is not None and digest is not None:
                        if problem := python_problem(self.reader.check(content), path, at):
                            found.append(problem)
                            continue
                        contents[digest.sha256] = content
            except Invalid as error:
                found.append(Violation(at, error.code, error.params))
                continue
            if digest is not None:
                pins[stage] = PinnedFile(file=path, sha256=digest.sha256, size=digest.size)
            elif (content := shipped_content(path)) is not None:
                pins[stage] = pin(path, content, shipped=True)
                contents[pins[stage].sha256] = content
            else:
                found.append(Violation(at, "file_not_found", {"file": path}))
                continue
            if not pins[stage].shipped and path not in known and (hiding := hidden(path, stem(path), pointer=at)):
                found.append(hiding)
        return FileCheck(pins=pins, violations=tuple(found), _contents=contents)

    def keep(self, check: FileCheck) -> None:
        """Put the bytes that were looked at into the version store."""
        for sha256, content in check.contents.items():
            self.versions.put(content)
            if len(self._kept) >= _REMEMBERED:
                self._kept.clear()
            self._kept[sha256] = None

    def states(self, pins: Pins) -> list[FileStatus]:
        """Compare the pinned files with what stands in their places."""
        return [FileStatus(stage, pinned, self.state(pinned)) for stage, pinned in pins.items()]

    def state(self, pinned: PinnedFile) -> FileState:
        """Compare one pinned file with what stands in its place; what cannot be used any more counts as modified."""
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
                return pin(pinned.file, content, shipped=pinned.shipped), content
        return pinned, self.versions.get(pinned.sha256)

    def place(self, pinned: PinnedFile) -> Path:
        """Return where the file is; it does not change meanwhile."""
        return catalogue.script_path(pinned.file) if pinned.shipped else self.scripts.absolute(pinned.file)

    def _digest(self, pinned: PinnedFile) -> FileDigest | None:
        if not pinned.shipped:
            return self.scripts.digest(pinned.file)
        content = shipped_content(pinned.file)
        return None if content is None else digest_of(content)


def pin(file: str, content: bytes, *, shipped: bool = False) -> PinnedFile:
    """Return what pins `content` as the bytes of `file`."""
    digest = digest_of(content)
    return PinnedFile(file=file, sha256=digest.sha256, size=digest.size, shipped=shipped)


def shipped_content(file: str) -> bytes | None:
    """Return the bytes of the shipped script of this name, `None` if the product has none."""
    try:
        return catalogue.script_path(file).read_bytes()
    except KeyError:
        return None


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


def stage_files(definition: MethodDefinition) -> dict[Stage, str]:
    """Return the file that each stage of the method names, in the order of the stages."""
    files: dict[Stage, str] = {}
    for stage in METHOD_STAGES:
        config = definition.stage_config(stage)
        if config is not None and config.file and config.file.strip():
            files[stage] = config.file
    deployment = definition.deployment
    if deployment is not None and definition.deploys_itself and deployment.file and deployment.file.strip():
        files[JobKind.DEPLOYMENT] = deployment.file
    return files


def stage_environments(definition: MethodDefinition) -> dict[Stage, str]:
    """Return the environment that each stage of the method names, in the order of the stages."""
    named: dict[Stage, RunConfig | None] = {stage: definition.stage_config(stage) for stage in METHOD_STAGES}
    if definition.deploys_itself:
        named[JobKind.DEPLOYMENT] = definition.deployment
    return {
        stage: config.conda_env
        for stage, config in named.items()
        if config is not None and config.conda_env and config.conda_env.strip()
    }


def file_pointer(stage: Stage) -> str:
    """Return where a definition names the file of `stage`."""
    return member_pointer(stage, "file")


def member_pointer(stage: Stage, member: str) -> str:
    """Return where a definition has a member of `stage`."""
    of_stage = KINDS[stage].member
    return pointer("stages", stage, member) if of_stage is Member.STAGES else pointer("deployment", member)


def pins_to_json(pins: Pins) -> dict[str, Any]:
    """Return the pins as a version keeps them."""
    return {stage.value: pin_to_json(pinned) for stage, pinned in pins.items()}


def pin_to_json(pinned: PinnedFile) -> dict[str, Any]:
    """Return one pin as a version keeps it; that a file is shipped is said only where it is."""
    document = {"file": pinned.file, "sha256": pinned.sha256, "size": pinned.size}
    return {**document, "shipped": True} if pinned.shipped else document


def pins_from_json(document: Mapping[str, Any]) -> Pins:
    """Return the pins that a version keeps, in the order of the stages."""
    return {stage: PinnedFile(**document[stage]) for stage in STAGES if stage in document}
