"""Which modules a script imports, read without running it."""

import ast
import sys
from collections.abc import Iterator, Sequence

from app.argspec.report import Imports

_MAX_ATTRIBUTES = 200
_OPTIONAL = frozenset({"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})


def read_imports(tree: ast.Module) -> Imports:
    """Return the top-level names of the modules that the script needs beside the standard library.

    Imports in functions count, too. Those that the script can do without (it catches their failure) do not, nor do
    relative ones. What is imported may lie in a folder of `search_path`.
    """
    try:
        needed = frozenset(_needed(tree))
    except RecursionError:
        return Imports()
    modules = needed - sys.stdlib_module_names - {"__future__"}
    added = [node for node in ast.walk(tree) if _adds_to_search_path(node)]
    known = {id(part) for node in added for part in ast.walk(node)}
    folders = [_only_text(node) for node in added]
    if any(_is_search_path(node) and id(node) not in known for node in ast.walk(tree)):
        folders.append("")
    taken = (name for name in _attributes(tree.body) if name.partition(".")[0].partition(":")[0] in modules)
    attributes = tuple(dict.fromkeys(taken))[:_MAX_ATTRIBUTES]
    return Imports(modules=tuple(sorted(modules)), search_path=tuple(dict.fromkeys(folders)), attributes=attributes)


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


def _adds_to_search_path(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr="append" | "insert")):
            return _is_search_path(value)
    return False


def _only_text(node: ast.AST) -> str:
    """Return the only text in a piece of code, an empty one if there is none or there are several."""
    constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    texts = [value for value in constants if isinstance(value, str)]
    return texts[0] if len(texts) == 1 else ""


def _is_search_path(node: ast.AST) -> bool:
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
