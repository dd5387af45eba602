"""Which modules the stages of methods take from their environments."""

from collections.abc import Iterator
from pathlib import Path

from app.argspec.report import Imports
from app.domain.errors import AppError
from app.presets.catalogue import helpers_dir
from app.registry.method_files import MethodFiles, PinnedFile

_REMEMBERED = 1000
_KNOWN_FOLDERS = frozenset({"helpers", "shared/helpers"})  # added by the shipped scripts and their copies


class ScriptModules:
    """Reads the imports of pinned scripts; the same bytes are read once. All methods block."""

    def __init__(self, files: MethodFiles) -> None:
        self._files = files
        self._read: dict[str, frozenset[str]] = {}

    def needed(self, pinned: PinnedFile) -> frozenset[str]:
        """Return what the environment must have: without modules of the script root and our helpers."""
        modules = self._read.get(pinned.sha256)
        if modules is None:
            try:
                reading = self._files.reader.read(self._files.versions.get(pinned.sha256))
            except (AppError, OSError):
                return frozenset()  # bytes that nobody has are not the environment's fault
            modules = _needed(reading.imports)
            if len(self._read) >= _REMEMBERED:
                self._read.clear()
            if reading.lasting:
                self._read[pinned.sha256] = modules
        folders = [helpers_dir(), *_folders(self._files.scripts.root, pinned.file)]
        return frozenset(module for module in modules if not any(_is_there(folder, module) for folder in folders))


def _needed(imports: Imports) -> frozenset[str]:
    """Return what a script imports; nothing if it looks in folders that we do not know."""
    return frozenset(imports.modules) if set(imports.search_path) <= _KNOWN_FOLDERS else frozenset()


def _folders(root: Path, file: str) -> Iterator[Path]:
    yield (root / file).parent
    yield root


def _is_there(folder: Path, module: str) -> bool:
    return (folder / f"{module}.py").is_file() or (folder / module).is_dir()
