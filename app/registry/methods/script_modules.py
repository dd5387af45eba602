"""Which modules the stages of methods take from their environments, and which from the script root or from us."""

import contextlib
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.argspec.client import ModuleFinder
from app.argspec.imports import OWN
from app.argspec.modules import Source
from app.argspec.report import Imports
from app.domain.definition import RunConfig
from app.domain.errors import AppError, Violation
from app.domain.kinds import Stage
from app.domain.stage_calls import stage_call
from app.presets.catalogue import helpers_dir
from app.registry.methods.files import MethodFiles
from app.registry.methods.pins import PinnedFile
from app.registry.methods.record import Method
from app.registry.scripts.module_names import PACKAGE, top_package
from app.registry.scripts.names import SUFFIX
from app.registry.scripts.root import MAX_SCRIPT_BYTES, FileDigest
from app.registry.scripts.versions import Tree

_REMEMBERED = 1000
_NAMES_MODEL = re.compile(rb"(?<![A-Za-z0-9_])(model_path|DEEPE_MODEL_PATH|DEEPE_PARAMS|deepe_ask)\b|sys\.argv")
_NAMES_ID = re.compile(rb"(?<![A-Za-z0-9_])model_id\b")
_NAMES_BASE = re.compile(rb"(?<![A-Za-z0-9_])base_model_path\b")


class ModulesBeside:
    """Finds the sources of the modules that a stage imports from where it runs; a package's come with its name.

    They are looked for as the stage does: in its own folder, among our helpers, then in folders that it adds itself,
    which is usually the script root. With a `tree` that is kept, only what it holds is there. Blocks.
    """

    def __init__(self, files: MethodFiles, pinned: PinnedFile, imports: Imports) -> None:
        self._scripts = files.scripts
        self._versions = files.versions
        self._tree = None if pinned.tree is None else files.tree(pinned)
        own = [] if pinned.shipped else [pinned.search_folder]
        added = [""] if own not in ([], [""]) and imports.search_path else []
        self._folders: Sequence[str | Path] = (*own, helpers_dir(), *added)
        self._found: dict[str, FileDigest | None] = {}

    def find(self, module: str) -> Source | None:
        """Return the source of a module, `None` if it stands in none of these folders."""
        self._found[module] = None if self._tree is not None else self._digest(module)
        for folder, path, is_package in self._places(module):
            content = self._read(folder, path)
            if content is not None:
                return Source(content, is_package)
        return None

    def unchanged(self) -> bool:
        """Return whether everything that was looked for in the script root is as it was; all else does not change."""
        return self._tree is not None or all(self._digest(module) == digest for module, digest in self._found.items())

    def _places(self, module: str) -> Iterator[tuple[str | Path, str, bool]]:
        path = module.replace(".", "/")
        if module.isascii() and all(part.isidentifier() for part in module.split(".")):
            for folder in self._folders:
                yield folder, f"{path}/{PACKAGE}", True
                yield folder, f"{path}{SUFFIX}", False

    def _read(self, folder: str | Path, path: str) -> bytes | None:
        try:
            if isinstance(folder, Path):
                return (folder / path).read_bytes() if (folder / path).is_file() else None
            at = f"{folder}/{path}".lstrip("/")
            if self._tree is not None:
                return self._versions.get(self._tree[at].sha256) if at in self._tree else None
            return self._scripts.read(at)
        except (AppError, OSError):
            return None  # a stage could not read it either

    def _digest(self, module: str) -> FileDigest | None:
        """Return the digest of the file in the script root that the module is."""
        for folder, path, _ in self._places(module):
            if isinstance(folder, Path):
                if (folder / path).is_file():
                    return None
                continue
            with contextlib.suppress(AppError, OSError):
                if digest := self._scripts.digest(f"{folder}/{path}".lstrip("/")):
                    return digest
        return None


class ScriptModules:
    """Reads the imports of pinned scripts; the same bytes are read once. All methods block."""

    def __init__(self, files: MethodFiles) -> None:
        self._files = files
        self._read: dict[str, Imports] = {}

    def needed(self, pinned: PinnedFile) -> frozenset[str]:
        """Return what the environment must have: modules, and `module:name` for what users' scripts take from them.

        Modules of the script root and our helpers are not among them, nor is anything where the script looks in folders
        that are known only when it runs.
        """
        imports = self._imports(pinned)
        if imports is None or imports.unknown_folders:
            return frozenset()
        folders, inside = [helpers_dir()], [pinned.search_folder]
        for folder in imports.folders:
            place = posixpath.normpath(folder.replace(OWN, pinned.file))
            if place.startswith("..") or pinned.shipped:
                folders.append(self._files.scripts.root / place)  # a folder beside the script root, if it is there
            else:
                inside.append("" if place == "." else place)
        beside = frozenset[str]()
        if pinned.tree is not None:
            with contextlib.suppress(AppError, OSError):
                tree = self._files.tree(pinned)
                beside = frozenset().union(*(_modules_in(tree, folder) for folder in inside))
        elif not pinned.shipped:
            folders += [self._files.scripts.root / folder for folder in inside]
        found = frozenset(
            module
            for module in frozenset(imports.modules) - beside
            if not any(_is_there(folder, module) for folder in folders)
        )
        if pinned.shipped:
            return found
        return found.union(name for name in imports.attributes if name.partition(":")[0].partition(".")[0] in found)

    def unjudged(self, pinned: PinnedFile) -> Violation | None:
        """Return that nobody can say what the script lacks: it looks in folders that are known only when it runs."""
        imports = None if pinned.shipped else self._imports(pinned)
        if imports is None or not imports.unknown_folders or not imports.modules:
            return None
        params = {"file": pinned.file, "line": imports.unknown_folders[0], "modules": ", ".join(imports.modules)}
        return Violation("", "modules_not_judged", params)

    def _imports(self, pinned: PinnedFile) -> Imports | None:
        """Return what a script imports; None where its bytes are missing, which is not the environment's fault."""
        known = self._read.get(pinned.sha256)
        if known is not None:
            return known
        try:
            reading = self._files.reader.read(self._files.versions.get(pinned.sha256))
        except (AppError, OSError):
            return None
        if len(self._read) >= _REMEMBERED:
            self._read.clear()
        if reading.lasting:
            self._read[pinned.sha256] = reading.imports
        return reading.imports

    def model_unread(self, pinned: PinnedFile, config: RunConfig | None) -> Violation | None:
        """Return that the script, which asks a customized model, names nothing that says where the model lies.

        An id says that to a script which has a table of its own; one that loads the base model has none. A method that
        says itself how the script is called knows where it puts the model.
        """
        if config is not None and (config.arguments is not None or config.config or config.env):
            return None
        if pinned.shipped:
            return None
        try:
            scripts = [file.sha256 for path, file in self._files.tree(pinned).items() if path.endswith(SUFFIX)]
            sources = [self._files.versions.get(sha256) for sha256 in scripts]
        except (AppError, OSError):
            return None

        def names(what: re.Pattern[bytes]) -> bool:
            return any(what.search(source) for source in sources)

        if names(_NAMES_MODEL) or (names(_NAMES_ID) and not names(_NAMES_BASE)):
            return None
        code = "inference_by_id" if names(_NAMES_ID) else "inference_ignores_model"
        return Violation("", code, {"file": pinned.file})

    def needed_at(self, method: Method, stage: Stage) -> frozenset[str]:
        """Return what the environment of a stage must have."""
        pinned, module = method.files.get(stage), stage_call(method.definition, stage).module
        if pinned is not None:
            return self.needed(pinned)
        return frozenset() if module is None else frozenset([top_package(module)])


def _modules_in(tree: Tree, folder: str) -> frozenset[str]:
    start = f"{folder}/" if folder else ""
    first = [path.removeprefix(start).split("/") for path in tree if path.startswith(start) and path.endswith(SUFFIX)]
    return frozenset(parts[0].removesuffix(SUFFIX) for parts in first)


def _is_there(folder: Path, module: str) -> bool:
    return (folder / f"{module}.py").is_file() or (folder / module).is_dir()


def module_source(prefix: Path, module: str) -> Source | None:
    """Return the source of what `python -m` runs in an environment of this machine, `None` if it is not found."""
    path = module.replace(".", "/")
    for packages in sorted(prefix.glob("lib/python3*/site-packages")):
        for place in (f"{path}{SUFFIX}", f"{path}/__main__{SUFFIX}"):
            with contextlib.suppress(OSError):
                if (packages / place).stat().st_size <= MAX_SCRIPT_BYTES:
                    return Source((packages / place).read_bytes())
    return None


def package_finder(prefix: Path, module: str) -> ModuleFinder:
    """Return what finds modules in the package of `module`; the packages above have nothing to say of arguments."""
    package = module.rpartition(".")[0]

    def find(name: str) -> Source | None:
        if package == name or package.startswith(f"{name}."):
            return Source(b"", is_package=True)
        return module_source(prefix, name) if package and name.startswith(f"{package}.") else None

    return find
