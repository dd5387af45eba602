"""The files of a method: which stages run which, what pins them, and how they stand on disk now."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from app.argspec.client import Limit, Reading, shared_reader
from app.domain.definition import MethodDefinition, RunConfig
from app.domain.enums import JobKind
from app.domain.errors import Invalid, Violation
from app.domain.kinds import KINDS, METHOD_STAGES, STAGES, Member, Stage
from app.domain.pointers import pointer
from app.registry.script_paths import script_path
from app.registry.scripts import ScriptRoot, digest_of
from app.registry.version_store import VersionStore

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
    """A file of a method version: its path in the script root, and exactly which bytes it means."""

    file: str
    sha256: str
    size: int


Pins = dict[Stage, PinnedFile]


class FileState(StrEnum):
    """How a pinned file stands in the script root."""

    UNCHANGED = "unchanged"
    MODIFIED = "modified"
    MISSING = "missing"


@dataclass(frozen=True)
class FileStatus:
    """A pinned file and how it stands now."""

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

    def check(self, definition: MethodDefinition) -> FileCheck:
        """Look at every file that the method's stages name; nothing is written."""
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
            if digest is None:
                found.append(Violation(at, "file_not_found", {"file": path}))
            else:
                pins[stage] = PinnedFile(file=path, sha256=digest.sha256, size=digest.size)
        return FileCheck(pins=pins, violations=tuple(found), _contents=contents)

    def keep(self, check: FileCheck) -> None:
        """Put the bytes that were looked at into the version store."""
        for sha256, content in check.contents.items():
            self.versions.put(content)
            if len(self._kept) >= _REMEMBERED:
                self._kept.clear()
            self._kept[sha256] = None

    def states(self, pins: Pins) -> list[FileStatus]:
        """Compare the pinned files with the script root."""
        return [FileStatus(stage, pinned, self.state(pinned)) for stage, pinned in pins.items()]

    def state(self, pinned: PinnedFile) -> FileState:
        """Compare one pinned file with the script root; what cannot be used any more counts as modified."""
        try:
            digest = self.scripts.digest(pinned.file)
        except Invalid:
            return FileState.MODIFIED
        if digest is None:
            return FileState.MISSING
        return FileState.UNCHANGED if digest.sha256 == pinned.sha256 else FileState.MODIFIED

    def current(self, pinned: PinnedFile) -> tuple[PinnedFile, bytes]:
        """Return the file as it stands on disk, with its bytes; the stored bytes if it is gone from there."""
        if self.state(pinned) is not FileState.UNCHANGED:
            content = self.scripts.read(pinned.file)
            if content is not None:
                digest = digest_of(content)
                return PinnedFile(file=pinned.file, sha256=digest.sha256, size=digest.size), content
        return pinned, self.versions.get(pinned.sha256)


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
    return {stage.value: asdict(pinned) for stage, pinned in pins.items()}


def pins_from_json(document: Mapping[str, Any]) -> Pins:
    """Return the pins that a version keeps, in the order of the stages."""
    return {stage: PinnedFile(**document[stage]) for stage in STAGES if stage in document}
