"""Which modules a script imports and which files beside it it names, read without running it."""

import ast
import posixpath
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TypeGuard

from app.argspec.report import Imports

_MAX_ATTRIBUTES = 200
_MAX_NAMES = 2000
_MAX_TEXT = 255
_MAX_DEPTH = 20
OWN = "{file}"
"""The script's own path in `Imports.folders`."""
_SAME = frozenset({"str", "Path", "abspath", "realpath", "normpath", "fspath", "resolve", "absolute", "as_posix"})
"""What makes the same path of a path."""
_IMPORTERS = frozenset({"import_module", "__import__"})
_RUNNERS = frozenset({"run_path", "run_module", "spec_from_file_location", "SourceFileLoader", "load_module"})
_PLACES = frozenset({"__file__", "__path__", "files", "get_data"})
"""Names by which a script finds files beside itself: its own, and those of importlib.resources and pkgutil."""

_OPTIONAL = frozenset({"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})


def read_imports(tree: ast.Module) -> Imports:
    """Return what the script imports.

    `modules` are those that it needs beside the standard library. Imports in functions count, too. Those that it can
    do without (it catches their failure) do not, nor do relative ones; `names` has them all. What is imported may lie
    in a folder of `search_path`.
    """
    nodes = list(ast.walk(tree))
    try:
        needed = frozenset(_needed(tree))
    except RecursionError:
        needed = frozenset()
    modules = needed - sys.stdlib_module_names - {"__future__"}
    added = [node for node in nodes if _adds_to_search_path(node)]
    known = {id(part) for node in added for part in ast.walk(node)}
    folders = [_only_text(node) for node in added]
    changes = [node for node in nodes if _is_search_path(node) and id(node) not in known]
    if changes:
        folders.append("")
    places = _Places(nodes)
    found = [(node, places.folder(node.args[-1]) if node.args else None) for node in added]
    taken = (name for name in _attributes(tree.body) if name.partition(".")[0].partition(":")[0] in modules)
    return Imports(
        modules=tuple(sorted(modules)),
        search_path=tuple(dict.fromkeys(folders)),
        folders=tuple(dict.fromkeys(folder for _, folder in found if folder is not None)),
        unknown_folders=tuple(
            sorted({*(node.lineno for node in changes), *(node.lineno for node, folder in found if folder is None)})
        ),
        attributes=tuple(dict.fromkeys(taken))[:_MAX_ATTRIBUTES],
        names=tuple(dict.fromkeys(_names(nodes)))[:_MAX_NAMES],
        computed=tuple(sorted({node.lineno for node in nodes if _is_computed_import(node)})),
        files=tuple(dict.fromkeys(_texts(nodes)))[:_MAX_NAMES] if any(map(_looks_beside, nodes)) else (),
    )


def _names(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Yield every module that may be imported: dots before relative ones, `.*` after those of which all is taken."""
    for node in nodes:
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = "." * level + (module or "")
                join = "" if base.endswith(".") or not base else "."
                yield from (f"{base}{join}{alias.name}" for alias in names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if _called(node) in _IMPORTERS:
                yield name


def _is_computed_import(node: ast.AST) -> TypeGuard[ast.Call]:
    """Say whether a module or file is run whose name is known only at run time."""
    if not isinstance(node, ast.Call):
        return False
    if _called(node) in _IMPORTERS:
        return not (node.args and isinstance(node.args[0], ast.Constant))
    return _called(node) in _RUNNERS


def _called(call: ast.Call) -> str:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _looks_beside(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in _PLACES
    return False


def _texts(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Yield texts that may be names of files: alone, and as the parts of a path that are joined."""
    for node in nodes:
        match node:
            case ast.Constant(value=str(text)) if 0 < len(text) <= _MAX_TEXT and "\n" not in text:
                yield text
            case ast.Call(args=[_, *_] as parts):
                yield from _joined(parts)
            case ast.BinOp(op=ast.Div()):
                yield from _joined(_divided(node))


def _divided(node: ast.expr) -> list[ast.expr]:
    parts: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        parts.insert(0, node.right)
        node = node.left
    return [node, *parts]


def _joined(parts: list[ast.expr]) -> Iterator[str]:
    """Yield the path that the texts at the end of `parts` make."""
    texts = [part.value for part in takewhile(_is_text, reversed(parts)) if isinstance(part, ast.Constant)]
    path = "/".join(str(text) for text in reversed(texts))
    if len(texts) > 1 and len(path) <= _MAX_TEXT:
        yield path


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _attributes(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield what is imported from modules at top level and unguarded: a condition or `try` may avoid it."""
    for node in body:
        match node:
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield from (f"{module}:{alias.name}" for alias in names if alias.name != "*")


def _needed(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name.partition(".")[0] for alias in names)
        case ast.ImportFrom(module=str(module), level=0):
            yield module.partition(".")[0]
        case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=finalbody):
            tried = () if any(_catches_imports(handler) for handler in handlers) else body
            for child in (*tried, *handlers, *orelse, *finalbody):
                yield from _needed(child)
        case ast.If(test=test, orelse=orelse) if "TYPE_CHECKING" in ast.dump(test):
            for child in orelse:
                yield from _needed(child)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _needed(child)


def _adds_to_search_path(node: ast.AST) -> TypeGuard[ast.Call]:
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr="append" | "insert")):
            return _is_search_path(value)
    return False


class _Places:
    """Follows expressions that make a path of texts, of the script's own path and of names that are assigned once."""

    def __init__(self, nodes: Sequence[ast.AST]) -> None:
        values: dict[str, list[ast.expr]] = {}
        for node in nodes:
            match node:
                case ast.Assign(targets=targets, value=value):
                    for name in (
                        part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)
                    ):
                        values.setdefault(name, []).append(value)
                case ast.Name(id=name, ctx=ast.Store()):
                    values.setdefault(name, [])
        stored = Counter(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        self._values = {name: of[0] for name, of in values.items() if len(of) == 1 and stored[name] == 1}

    def folder(self, node: ast.expr, depth: int = 0) -> str | None:
        """Return the path that an expression is; None if it is known only at run time."""
        if depth > _MAX_DEPTH:
            return None

        def within(inner: ast.expr) -> str | None:
            return self.folder(inner, depth + 1)

        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.Name(id="__file__"):
                return OWN
            case ast.Name(id=name) if name in self._values:
                return within(self._values[name])
            case ast.Call(args=[]) if _called(node) in ("getcwd", "cwd"):
                return "."
            case ast.Call(func=ast.Attribute(value=inner), args=[]) if _called(node) in _SAME:
                return within(inner)
            case ast.Call(args=[inner]) if _called(node) in _SAME:
                return within(inner)
            case ast.Call(args=[inner]) if _called(node) == "dirname":
                return _below(within(inner), "..")
            case ast.Call(args=[first, *rest]) if _called(node) in ("join", "joinpath", "Path"):
                parts = [first, *rest] if _called(node) != "joinpath" else [node.func.value, first, *rest]  # type: ignore[attr-defined]
                return _below(*map(within, parts))
            case ast.BinOp(op=ast.Div(), left=left, right=right):
                return _below(within(left), within(right))
            case ast.Attribute(value=inner, attr="parent"):
                return _below(within(inner), "..")
            case ast.Subscript(value=ast.Attribute(value=inner, attr="parents"), slice=ast.Constant(value=int(number))):
                return _below(within(inner), *[".."] * (number + 1)) if 0 <= number < _MAX_DEPTH else None
        return None


def _below(*parts: str | None) -> str | None:
    """Return the joined path; None if a part is not known."""
    known = [part for part in parts if part is not None]
    return posixpath.join(*known) if len(known) == len(parts) else None


def _only_text(node: ast.AST) -> str:
    """Return the only text in a piece of code, an empty one if there is none or there are several.

    A dot is the working directory.
    """
    if any(isinstance(part, ast.Attribute) and part.attr in ("getcwd", "cwd") for part in ast.walk(node)):
        return "."
    constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    texts = [value for value in constants if isinstance(value, str)]
    return texts[0] if len(texts) == 1 else ""


def _is_search_path(node: ast.AST) -> TypeGuard[ast.Attribute | ast.ImportFrom]:
    match node:
        case ast.Attribute(value=ast.Name(id="sys"), attr="path"):
            return True
        case ast.ImportFrom(module="sys", names=names):
            return any(alias.name == "path" for alias in names)
    return False


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in _OPTIONAL for kind in kinds)
