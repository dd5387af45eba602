"""The files of methods and of the script root over the wire."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import Field

from app.api.schemas.common import SHA256, StageName
from app.domain.values import Value
from app.registry.methods.files import FileState, FileStatus
from app.registry.methods.pins import PinnedFile
from app.registry.scripts.root import ScriptEntry
from app.registry.scripts.versions import TreeFile

_STATE = (
    "`modified`: edited on disk; the next job takes the edit up as a new version, unless the method is read-only. "
    "`missing`: the stored bytes run. `added`: the next version pins it too."
)


class PinnedFileRead(Value):
    """A file that a version of a method runs, by its exact bytes."""

    stage: StageName
    file: str = Field(description="Path in the script root; name of a shipped one.", examples=["finance_sft.py"])
    sha256: str = Field(examples=[SHA256])
    size_bytes: int = Field(examples=[4711])
    shipped: bool = Field(
        description="Whether it is a file of the product, which runs from the product's own folder; else it lies in "
        "the script root.",
    )
    committed: bool = Field(description="Whether it is taken from a commit, so that nothing on disk matters.")
    tree: str | None = Field(
        description="Digest of all files that the stage runs; null if the file was pinned alone.",
        examples=[SHA256],
    )
    module: str | None = Field(
        default=None,
        description="The stage's module, which this file of the script root or commit is; null: it runs as a file.",
    )


class BesideFileRead(Value):
    """A file that runs with a stage's file: a module that it imports, data that it names, or an included file."""

    path: str = Field(description="Path in the script root.", examples=["helper.py"])
    sha256: str = Field(examples=[SHA256])
    size_bytes: int = Field(examples=[4711])


class BesideFileState(BesideFileRead):
    """The same, and how it stands on disk."""

    state: FileState = Field(description=_STATE)


class MethodFileRead(PinnedFileRead):
    """A pinned file, and how it stands on disk."""

    state: FileState = Field(description=_STATE)
    beside: list[BesideFileState] = Field(description="Everything else that runs with it, by path.")


class PinnedTreeRead(PinnedFileRead):
    """A file that a version runs, and everything that runs with it."""

    beside: list[BesideFileRead] = Field(description="By path.")


class ScriptRead(Value):
    """A file of the script root."""

    path: str = Field(examples=["finance_sft.py"])
    sha256: str = Field(examples=[SHA256])
    size_bytes: int = Field(examples=[4711])


class ScriptSummary(Value):
    """A file of the script root in a list."""

    path: str = Field(examples=["finance_sft.py"])
    size_bytes: int = Field(examples=[4711])
    modified_at: datetime


class MethodFileList(Value):
    """The files of a method."""

    items: list[MethodFileRead]


def method_files(states: Sequence[FileStatus]) -> list[MethodFileRead]:
    """Return the files of a method as they stand on disk."""
    return [
        MethodFileRead(
            stage=status.stage,
            **_pinned(status.pinned),
            state=status.state,
            beside=[BesideFileState(**_beside(one.path, one.file), state=one.state) for one in status.beside],
        )
        for status in states
    ]


def script_read(file: PinnedFile) -> ScriptRead:
    """Return a file of the script root."""
    return ScriptRead(path=file.file, sha256=file.sha256, size_bytes=file.size)


def script_summary(entry: ScriptEntry) -> ScriptSummary:
    """Return a file of the script root as the list shows it."""
    return ScriptSummary(path=entry.path, size_bytes=entry.size, modified_at=entry.modified_at)


def _pinned(pinned: PinnedFile) -> dict[str, Any]:
    return {
        "file": pinned.file,
        "sha256": pinned.sha256,
        "size_bytes": pinned.size,
        "shipped": pinned.shipped,
        "committed": pinned.committed,
        "tree": pinned.tree,
        "module": pinned.module,
    }


def _beside(path: str, file: TreeFile) -> dict[str, Any]:
    return {"path": path, "sha256": file.sha256, "size_bytes": file.size}
