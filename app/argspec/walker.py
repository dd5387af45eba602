"""Walks a script's statements as Python would, without running it.

Top-level statements in order, functions of the script where they are called, both branches of a condition that cannot
be decided. A reader of scripts subclasses `Walker` and looks at the calls.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.argspec.values import UNKNOWN, Evaluator, Imported, builtin, is_constant

_MAX_DEPTH = 25
_SHORT_BODY = 3

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


@dataclass(frozen=True, eq=False)
class InstanceValue:
    """An object of a class of the script."""

    kind: ClassValue
    names: dict[str, object] = field(default_factory=dict)


class Walker(Evaluator):
    """Walks one module."""

    def __init__(self, *, budget: int) -> None:
        super().__init__(budget=budget)
        self.module = self._scope = Scope()
        self.module.names["__name__"] = "__main__"
        self.visited: set[ast.AST] = set()
        self.loops = 0
        """How many loops we are in: what happens there happens any number of times."""
        self.branches = 0
        """How many undecided conditions we are in."""
        self._stack: list[ast.AST] = []
        self._returns: list[list[object]] = []

    def is_relevant(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether the body of a longer function is worth walking."""
        raise NotImplementedError

    def cut(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """React to a function that is not walked because too many that call each other are open."""

    def choose(self, values: Sequence[object]) -> object:
        """Return the value of a name that differs between branches."""
        return UNKNOWN

    def set_attribute(self, base: object, name: str, value: object) -> None:
        """React to `x.name = value` on an object of a kind that only the subclass knows."""

    # ---- statements -------------------------------------------------------------------------------------------------

    def block(self, statements: Sequence[ast.stmt]) -> bool:
        """Walk statements; return whether the block ends by leaving its function."""
        return any(self._statement(statement) for statement in statements)

    def _statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Expr():
                value = self.evaluate(node.value)
                return value is LEAVES
            case ast.Assign():
                value = self.evaluate(node.value)
                for target in node.targets:
                    self.bind(target, value)
            case ast.AnnAssign():
                self.bind(node.target, self.evaluate(node.value) if node.value else UNKNOWN)
            case ast.AugAssign():
                self._augment(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.assign(node.name, FunctionValue(node, self._scope))
            case ast.ClassDef():
                self._define_class(node)
            case ast.Import() | ast.ImportFrom():
                self._import(node)
            case ast.Return():
                value = self.evaluate(node.value) if node.value else None
                if self._returns:
                    self._returns[-1].append(value)
                return True
            case ast.Raise() | ast.Continue() | ast.Break():
                return True
            case ast.If():
                return self._if(node)
            case ast.For() | ast.AsyncFor() | ast.While():
                self._loop(node)
            case ast.With() | ast.AsyncWith():
                return self._with(node)
            case ast.Try() | ast.TryStar():
                return self._try(node)
            case ast.Match():
                self.evaluate(node.subject)
                return self._either([*(case.body for case in node.cases), []])
            case ast.Global() | ast.Nonlocal():
                self._scope.not_local |= set(node.names)
            case ast.Delete():
                for target in node.targets:
                    self.bind(target, UNKNOWN)
            case _:
                pass
        return False

    def _if(self, node: ast.If) -> bool:
        test = self.evaluate(node.test)
        if is_constant(test):
            return self.block(node.body if test else node.orelse)
        return self._either([node.body, node.orelse])

    def _either(self, blocks: Sequence[Sequence[ast.stmt]]) -> bool:
        """Walk blocks of which one runs; afterwards a name has a value only if all agree on it."""
        scopes = self._scope.chain()
        before = [dict(scope.names) for scope in scopes]
        outcomes: list[list[dict[str, object]]] = []
        self.branches += 1
        for block in blocks:
            for scope, names in zip(scopes, before, strict=True):
                scope.names = dict(names)
            if not self.block(block):
                outcomes.append([scope.names for scope in scopes])
        self.branches -= 1
        for position, scope in enumerate(scopes):
            scope.names = self._merged([outcome[position] for outcome in outcomes]) if outcomes else before[position]
        return not outcomes

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While) -> None:
        if isinstance(node, ast.While):
            self.evaluate(node.test)
        else:
            self.evaluate(node.iter)
            self.bind(node.target, UNKNOWN)
        for part in ast.walk(node):  # what the body assigns differs from round to round
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                self.assign(part.id, UNKNOWN)
        self.loops += 1
        self._either([node.body, []])
        self.loops -= 1
        self.block(node.orelse)

    def _with(self, node: ast.With | ast.AsyncWith) -> bool:
        for item in node.items:
            value = self.evaluate(item.context_expr)
            if item.optional_vars is not None:
                self.bind(item.optional_vars, value)
        return self.block(node.body)

    def _try(self, node: ast.Try | ast.TryStar) -> bool:
        left = self.block([*node.body, *node.orelse])
        if node.handlers:
            blocks: list[Sequence[ast.stmt]] = [handler.body for handler in node.handlers]
            all_handlers_leave = self._either(blocks if left else [*blocks, []])
            left = left and all_handlers_leave
        return self.block(node.finalbody) or left

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                dotted = f"{'.' * node.level}{node.module or ''}.{alias.name}"
                self.assign(alias.asname or alias.name, Imported(dotted))
            elif alias.asname:
                self.assign(alias.asname, Imported(alias.name))
            else:
                package = alias.name.partition(".")[0]
                self.assign(package, Imported(package))

    def _define_class(self, node: ast.ClassDef) -> None:
        bases = tuple(self.evaluate(base) for base in node.bases)
        outer, body = self._scope, Scope(self._scope)
        self._scope = body
        self.block([part for part in node.body if not isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))])
        self._scope = outer
        for part in node.body:
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body.names[part.name] = FunctionValue(part, outer)
        self.assign(node.name, ClassValue(node, body.names, bases))

    # ---- names ------------------------------------------------------------------------------------------------------

    def lookup(self, name: str) -> object:
        for scope in self._scope.chain():
            if name in scope.names:
                return scope.names[name]
        return builtin(name)

    def attribute(self, node: ast.Attribute) -> object:
        return self.attribute_of(self.evaluate(node.value), node)

    def attribute_of(self, base: object, node: ast.Attribute) -> object:
        """Return the value of `x.y` when `x` is `base`."""
        if isinstance(base, InstanceValue):
            return base.names.get(node.attr, base.kind.names.get(node.attr, UNKNOWN))
        if isinstance(base, ClassValue):
            return base.names.get(node.attr, UNKNOWN)
        if isinstance(base, Imported):
            return Imported(f"{base.dotted}.{node.attr}")
        dotted = _dotted(node)
        return next((scope.names[dotted] for scope in self._scope.chain() if dotted in scope.names), UNKNOWN)

    def opaque(self, node: ast.expr) -> object:
        match node:
            case ast.Await():
                return self.evaluate(node.value)
            case ast.NamedExpr():
                value = self.evaluate(node.value)
                self.bind(node.target, value)
                return value
            case _:
                return UNKNOWN

    def assign(self, name: str, value: object) -> None:
        scope = self._scope
        if name in scope.not_local:
            scope = next((outer for outer in scope.chain()[1:] if name in outer.names), self.module)
        scope.names[name] = value

    def bind(self, target: ast.expr, value: object) -> None:
        match target:
            case ast.Name():
                self.assign(target.id, value)
            case ast.Attribute():
                self._bind_attribute(target, value)
            case ast.Tuple() | ast.List():
                items = list(value) if isinstance(value, (list, tuple)) else []
                known = len(items) == len(target.elts) and not any(isinstance(e, ast.Starred) for e in target.elts)
                for position, element in enumerate(target.elts):
                    self.bind(element, items[position] if known else UNKNOWN)
            case ast.Starred():
                self.bind(target.value, UNKNOWN)
            case ast.Subscript():  # the container is no longer what it was
                self.bind(target.value, UNKNOWN)
            case _:
                pass

    def _bind_attribute(self, target: ast.Attribute, value: object) -> None:
        base = self.evaluate(target.value)
        if isinstance(base, InstanceValue):
            base.names[target.attr] = value
        elif base is UNKNOWN or is_constant(base):
            self._scope.names[_dotted(target)] = value
        else:
            self.set_attribute(base, target.attr, value)

    def _augment(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            left = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
            self.assign(node.target.id, self.evaluate(ast.copy_location(ast.BinOp(left, node.op, node.value), node)))
        else:
            self.bind(node.target, UNKNOWN)

    def run_function(self, function: FunctionValue, arguments: list[object], keywords: dict[str, object]) -> object:
        """Walk the function's body with these arguments; return what it returns if that is clear."""
        node = function.node
        worth_it = self.is_relevant(node) or len(node.body) <= _SHORT_BODY
        if not worth_it or node in self._stack:
            return UNKNOWN
        if len(self._stack) >= _MAX_DEPTH:
            self.cut(node)
            return UNKNOWN
        self.visited.add(node)
        inner = Scope(function.scope)
        inner.names = self._bound(function, arguments, keywords)
        outer, self._scope = self._scope, inner
        self._stack.append(node)
        self._returns.append([])
        left = self.block(node.body)
        returned = self._returns.pop()
        self._stack.pop()
        self._scope = outer
        return self._agreed(returned if left else [*returned, None])

    def _bound(
        self, function: FunctionValue, arguments: list[object], keywords: dict[str, object]
    ) -> dict[str, object]:
        spec = function.node.args
        names = [argument.arg for argument in (*spec.posonlyargs, *spec.args)]
        bound: dict[str, object] = dict.fromkeys([*names, *(argument.arg for argument in spec.kwonlyargs)], UNKNOWN)
        bound |= {argument.arg: UNKNOWN for argument in (spec.vararg, spec.kwarg) if argument}
        outer, self._scope = self._scope, function.scope
        positional = zip(names[len(names) - len(spec.defaults) :], spec.defaults, strict=True)
        by_keyword = zip((argument.arg for argument in spec.kwonlyargs), spec.kw_defaults, strict=True)
        for name, default in (*positional, *by_keyword):
            if default is not None:
                bound[name] = self.evaluate(default)
        self._scope = outer
        bound |= dict(zip(names, arguments, strict=False))
        return bound | {name: value for name, value in keywords.items() if name in bound}

    def _merged(self, outcomes: list[dict[str, object]]) -> dict[str, object]:
        names = dict.fromkeys(name for outcome in outcomes for name in outcome)
        return {name: self._agreed([outcome[name] for outcome in outcomes if name in outcome]) for name in names}

    def _agreed(self, values: Sequence[object]) -> object:
        if not values:  # the function always raises
            return UNKNOWN
        first = values[0]
        same = all(value is first or (type(value) is type(first) and value == first) for value in values)
        return first if same else self.choose(values)


def _dotted(node: ast.expr) -> str:
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{_dotted(node.value)}.{node.attr}"
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
