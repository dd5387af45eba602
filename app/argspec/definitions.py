"""What a walked script defines: scopes, functions, classes and objects, and the names of expressions."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field

from app.argspec.values import UNKNOWN

# What a call returns that ends the function or the script, such as `sys.exit()`.
LEAVES = object()


class Scope:
    """Names of a module, function or class body, and where to look next."""

    def __init__(self, parent: "Scope | None" = None) -> None:
        self.names: dict[str, object] = {}
        self.parent = parent
        self.not_local: set[str] = set()

    def chain(self) -> list["Scope"]:
        """Return this scope and those around it."""
        return [self] if self.parent is None else [self, *self.parent.chain()]

    @property
    def module(self) -> "Scope":
        """Return the scope of the module that this one is in."""
        return self if self.parent is None else self.parent.module


@dataclass(frozen=True, eq=False)
class FunctionValue:
    """A function of the script, with the scope it was defined in."""

    node: ast.FunctionDef | ast.AsyncFunctionDef
    scope: Scope


@dataclass(frozen=True, eq=False)
class ClassValue:
    """A class of the script: its body's names, and the values of its bases."""

    node: ast.ClassDef
    names: Mapping[str, object]
    bases: tuple[object, ...]
    scope: Scope

    def find(self, name: str) -> object:
        """Return an attribute of the class or of those that it inherits from."""
        if name in self.names:
            return self.names[name]
        inherited = (base.find(name) for base in self.bases if isinstance(base, ClassValue))
        return next((value for value in inherited if value is not UNKNOWN), UNKNOWN)


@dataclass(frozen=True, eq=False)
class InstanceValue:
    """An object of a class of the script."""

    kind: ClassValue
    names: dict[str, object] = field(default_factory=dict)


def dotted_name(node: ast.expr) -> str:
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{dotted_name(node.value)}.{node.attr}"
        case _:
            return "?"


def last_name(node: ast.expr) -> str:
    """Return the last part of a dotted name, of what is called if it is a call."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return node.attr
        case ast.Call():
            return last_name(node.func)
        case _:
            return ""
