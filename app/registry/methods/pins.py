"""Pins: exactly which bytes a stage of a method version runs, and how a version keeps them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.domain.kinds import STAGES, Stage
from app.presets import catalogue
from app.registry.scripts.module_names import folder_of
from app.registry.scripts.root import digest_of


@dataclass(frozen=True)
class PinnedFile:
    """A file of a method version: its path, and exactly which bytes it means.

    The path is one of the script root, or, if the file is `shipped`, the name of a script in the product's folder.
    `tree`: digest of all files that the stage runs, this one among them. None for shipped files, which have no
    neighbours, and in versions of earlier releases, which pinned nothing else. `committed`: the path is one of the
    commit that the method names, and nothing on disk matters. `module`: what `python -m` is given to run the file; then
    modules are looked for in the root of its tree, else in the folder of the file.
    """

    file: str
    sha256: str
    size: int
    shipped: bool = False
    tree: str | None = None
    committed: bool = False
    module: str | None = None

    @property
    def search_folder(self) -> str:
        """The folder that Python looks for its modules in first."""
        return folder_of(self.file) if self.module is None else ""

    @property
    def lies_in_root(self) -> bool:
        """Whether the script root has the file, or had it."""
        return not self.shipped and not self.committed


Pins = dict[Stage, PinnedFile]


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


def pins_to_json(pins: Pins) -> dict[str, Any]:
    """Return the pins as a version keeps them."""
    return {stage.value: pin_to_json(pinned) for stage, pinned in pins.items()}


def pin_to_json(pinned: PinnedFile) -> dict[str, Any]:
    """Return one pin as a version keeps it; what is false or absent is left out."""
    return {name: value for name, value in asdict(pinned).items() if value or name == "size"}


def pins_from_json(document: Mapping[str, Any]) -> Pins:
    """Return the pins that a version keeps, in the order of the stages."""
    return {stage: pin_from_json(document[stage]) for stage in STAGES if stage in document}


def pin_from_json(document: Mapping[str, Any]) -> PinnedFile:
    """Return one pin that a version keeps."""
    return PinnedFile(**document)
