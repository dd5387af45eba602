"""Which files a stage runs: its own, modules beside it that it imports, data that it names, what the method includes.

They are found without running anything. A module is looked for where the script will look: in its own folder and, if
it changes its search path, in the folder above, the script root and the folders that it names. Whatever may be found is
taken; a file too many does no harm.
"""

import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol

from app.argspec.report import Imports
from app.domain.errors import Invalid, Violation
from app.domain.plain_text import shown
from app.domain.pointers import pointer
from app.registry.scripts.module_names import CONTRACT_HELPERS, PACKAGE, folder_of, hidden, provided, top_package
from app.registry.scripts.names import SUFFIX, check_tree_path
from app.registry.scripts.root import NotARegularFile, ScriptTooLarge
from app.registry.scripts.versions import TreeFile

MAX_FILES = 5000
MAX_BYTES = 64 * 2**20
MAX_LOOKED_AT = 20_000
_MAIN = f"__main__{SUFFIX}"
_MAX_NAMED_BYTES = 2**20
_NO_FILE = re.compile(r'[<>:"|?*\\]|^/|^$')


class Files(Protocol):
    """Files that a tree is taken from, by their paths in the script root."""

    def digest(self, path: str, *, most: int) -> TreeFile | None:
        """Return what pins the file, `None` if there is none; raise `ScriptTooLarge` if it is larger than `most`."""

    def below(self, folder: str) -> Iterator[tuple[str, bool]]:
        """Yield every file below a folder, and whether it is a link; hidden ones and Python's caches are left out."""


@dataclass
class Collected:
    """A tree, the folders that its modules are found in, what is wrong with it, and what reading could not see."""

    tree: dict[str, TreeFile] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    unpinned: list[Violation] = field(default_factory=list)


class ModuleWithoutMain(Invalid):
    """A module is a package of the root that cannot be run."""

    code = "module_without_main"


class ModuleWithoutInit(Invalid):
    """The package of a module has no `__init__.py`, so that one of an environment would come before it."""

    code = "module_without_init"


class _TooMuch(Exception):
    pass


def collect(
    files: Files,
    imports: Callable[[str, TreeFile], Imports | None],
    entry: str,
    *,
    is_module: bool = False,
    include: Sequence[str] | None,
    at: str,
) -> Collected:
    """Return the tree of the stage file `entry`, which is there; `at` points to the member of the stage's definition.

    `is_module`: it runs by `python -m` from the root of the tree. `imports` says what a Python file imports, `None` if
    that could not be read. `include` None: all files there are.
    """
    collector = _Collector(files, imports, entry, at)
    try:
        collector.add(entry)
        if is_module:
            collector.take_packages()
        if include is None:
            collector.follow_once(entry)
            collector.include(["/**"])
        else:
            collector.follow()
            collector.include(include)
            collector.follow()
    except _TooMuch:
        params = {"file": entry, "files": MAX_FILES, "megabytes": MAX_BYTES // 2**20}
        collector.found.violations.append(Violation(pointer_of(at, "include"), "tree_too_large", params))
    collector.refuse_same_names()
    return collector.found


def pointer_of(at: str, *members: object) -> str:
    """Return where a member of a stage stands."""
    return at + pointer(*map(str, members))


class _Collector:
    def __init__(self, files: Files, imports: Callable[[str, TreeFile], Imports | None], entry: str, at: str) -> None:
        self.found = Collected(folders=[folder_of(entry)])
        self._files = files
        self._read = imports
        self._entry = entry
        self._at = at
        self._imports: dict[str, Imports] = {}
        self._looked: set[tuple[str, ...]] = set()
        self._size = 0

    def add(self, path: str, *, most: int = MAX_BYTES) -> bool:
        """Take the file at `path`; return whether there is one."""
        if path in self.found.tree:
            return True
        if (path,) in self._looked:
            return False
        self._looked.add((path,))
        try:
            file = self._files.digest(path, most=most)
        except NotARegularFile:
            return False
        except Invalid as error:
            if isinstance(error, ScriptTooLarge) and most < MAX_BYTES:
                self.found.unpinned.append(Violation("", "unpinned_large_file", error.params))
                return False
            self.found.violations.append(Violation(pointer_of(self._at, "file"), error.code, error.params))
            return False
        if file is None:
            return False
        self._size += file.size
        self.found.tree[path] = file
        if len(self.found.tree) > MAX_FILES or self._size > MAX_BYTES:
            raise _TooMuch
        return True

    def take_packages(self) -> None:
        """Take the packages that the stage's module is in; Python looks for modules in the root only."""
        self.found.folders[:] = [""]
        self._take("", self._entry.removesuffix(SUFFIX).replace("/", "."))

    def follow(self) -> None:
        """Take what the files of the tree import and name, until nothing is new."""
        seen = (-1, -1)
        while seen != (len(self.found.tree), len(self.found.folders)):
            seen = (len(self.found.tree), len(self.found.folders))
            for path in [path for path in self.found.tree if path.endswith(SUFFIX)]:
                self.follow_once(path)

    def include(self, patterns: Sequence[str]) -> None:
        """Take the files that the patterns name: from the folder of the stage's file, or `/` for the script root."""
        for number, text in enumerate(patterns):
            at = pointer_of(self._at, "include", number)
            base = "" if text.startswith("/") else folder_of(self._entry)
            pattern = text.strip("/").split("/")
            start = "/".join([*filter(None, [base]), *_plain(pattern[:-1])])
            matched = False
            for looked, (path, link) in enumerate(self._files.below(start)):
                if looked >= MAX_LOOKED_AT:
                    params = {"pattern": shown(text), "limit": MAX_LOOKED_AT}
                    self.found.violations.append(Violation(at, "include_looks_too_far", params))
                    break
                below = path[len(base) + 1 :] if base else path
                if matches(below.split("/"), pattern):
                    matched = True
                    self._include(path, link, at)
            if not matched:
                params = {"pattern": shown(text), "folder": base or "."}
                self.found.violations.append(Violation(at, "include_matches_nothing", params))

    def refuse_same_names(self) -> None:
        """Refuse paths that are one file where names do not differ by case."""
        spelled: dict[str, str] = {}
        for path in self.found.tree:
            other = spelled.setdefault(path.casefold(), path)
            if other != path:
                params = {"file": path, "other": other}
                self.found.violations.append(Violation(pointer_of(self._at, "include"), "tree_names_collide", params))

    def _include(self, path: str, link: bool, at: str) -> None:
        if path in self.found.tree:
            return
        problem: Violation | None = None
        try:
            check_tree_path(path)
        except Invalid as error:
            problem = Violation(at, error.code, error.params)
        if link:
            problem = Violation(at, "include_is_link", {"file": shown(path)})
        elif problem is None:
            folder, module = provided(path)
            problem = hidden(path, module, pointer=at) if folder in self.found.folders else None
        if problem is not None:
            self.found.violations.append(problem)
        else:
            self.add(path)

    def follow_once(self, path: str) -> None:
        """Take what one file imports and names."""
        imports = self._imports_of(path)
        if imports.search_path:
            self._look_in(folder_of(path), imports.search_path)
        names = list(imports.names)
        if not CONTRACT_HELPERS.isdisjoint(name.split(".")[0] for name in names):
            names += CONTRACT_HELPERS  # those of the product import each other
        for name in names:
            if name.startswith("."):
                level = len(name) - len(name.lstrip("."))
                base = _above(folder_of(path), level - 1)
                if base is not None:
                    self._take(base, name.lstrip("."))
            else:
                for folder in self.found.folders:
                    self._take(folder, name)
        for text in imports.files:
            self._take_file(folder_of(path), text)
            self._take_file(_above(folder_of(path), 1), text)

    def _imports_of(self, path: str) -> Imports:
        if path not in self._imports:
            imports = self._read(path, self.found.tree[path])
            if imports is None:
                self.found.unpinned.append(Violation("", "unpinned_unread", {"file": path}))
            for line in imports.computed if imports else ():
                self.found.unpinned.append(Violation("", "unpinned_import", {"file": path, "line": line}))
            if imports and "." in imports.search_path:
                self.found.unpinned.append(Violation("", "unpinned_working_directory", {"file": path}))
            self._imports[path] = imports or Imports()
        return self._imports[path]

    def _look_in(self, folder: str, texts: Iterable[str]) -> None:
        """Look in the folders that a file adds to its search path; one that is not known is usually the one above."""
        added = [_above(folder, 1), ""]
        added += [_inside(base, text) for text in texts if text for base in (folder, "")]
        for one in added:
            if one is not None and one not in self.found.folders:
                self.found.folders.append(one)

    def _take(self, folder: str, module: str) -> None:
        """Take what Python reads to import `module` from a folder."""
        if (folder, module, "") in self._looked:
            return
        self._looked.add((folder, module, ""))
        place = folder
        for part in module.split("."):
            if part == "*":
                if _join(place, PACKAGE) in self.found.tree:
                    for path, _ in self._files.below(place):
                        if folder_of(path) == place and path.endswith(SUFFIX):
                            self.add(path)
                return
            if not part.isidentifier():
                return
            place = _join(place, part)
            if not self.add(f"{place}/{PACKAGE}") and self.add(place + SUFFIX):
                return

    def _take_file(self, folder: str | None, text: str) -> None:
        if folder is None or ("." not in text and "/" not in text) or (folder, text) in self._looked:
            return
        self._looked.add((folder, text))
        path = None if _NO_FILE.search(text) else _inside(folder, text)
        if not path:
            return
        try:
            check_tree_path(path)
        except Invalid:
            return
        self.add(path, most=_MAX_NAMED_BYTES)


def module_file(files: Files, module: str) -> str | None:
    """Return the file that `python -m` runs for a module of the root, `None` if the root has no such module.

    Raise `ModuleWithoutMain` for a package that cannot be run, and `ModuleWithoutInit` for a folder that Python would
    take for a package only if no environment has one of that name.
    """
    file, main = module_paths(module)
    if not (package := _is_there(files, f"{folder_of(main)}/{PACKAGE}")) and _is_there(files, file):
        path = file
    elif _is_there(files, main):
        path = main
    elif package:
        raise ModuleWithoutMain(module=module, file=main)
    else:
        return None
    top = f"{top_package(module)}/{PACKAGE}"
    if "/" in path and not _is_there(files, top):
        raise ModuleWithoutInit(module=module, file=top)
    return path


def module_paths(module: str) -> tuple[str, str]:
    """Return the files that a module may be: one of its name, or the one that runs a package."""
    place = module.replace(".", "/")
    return place + SUFFIX, f"{place}/{_MAIN}"


def _is_there(files: Files, path: str) -> bool:
    try:
        return files.digest(path, most=MAX_BYTES) is not None
    except NotARegularFile:
        return False


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Say whether a path matches a pattern, both in parts: `**` is any number of folders, a folder means all in it."""
    if not pattern:
        return False
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return bool(parts) and (not rest or any(matches(parts[place:], rest) for place in range(len(parts))))
    if not parts or not fnmatchcase(parts[0], first):
        return False
    if not rest:
        return len(parts) == 1 or not _is_wild(first)
    return matches(parts[1:], rest)


def _plain(parts: Sequence[str]) -> Iterator[str]:
    for part in parts:
        if _is_wild(part):
            return
        yield part


def _is_wild(part: str) -> bool:
    return any(character in part for character in "*?[")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _above(folder: str, levels: int) -> str | None:
    """Return the folder so many levels above, `None` if that is outside of the script root."""
    for _ in range(levels):
        if not folder:
            return None
        folder = folder_of(folder)
    return folder


def _inside(folder: str, text: str) -> str | None:
    """Return the path that `text` is from `folder`, `None` if that is outside of the script root."""
    path = posixpath.normpath(posixpath.join(folder, text))
    return None if path.startswith(("/", "..")) else "" if path == "." else path
