"""Which modules a script imports, read without running it."""

import ast
import sys
from collections.abc import Iterator

from app.domain.python_source import NotPython, parse

_OPTIONAL = frozenset({"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})


def imported_modules(source: bytes) -> frozenset[str]:
    """Return the top-level names of the modules that the script needs beside the standard library.

    Imports in functions count, too. Those that the script can do without (it catches their failure) do not, nor do
    relative ones. Of a file that is not Python nothing is said.
    """
    try:
        tree = parse(source)
    except NotPython:
        return frozenset()
    return frozenset(_needed(tree)) - sys.stdlib_module_names - {"__future__"}


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


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in _OPTIONAL for kind in kinds)
