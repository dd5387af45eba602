"""Walks a script's statements as Python would, without running it.

Top-level statements in order, functions of the script where they are called, both branches of a condition that cannot
be decided. A reader of scripts subclasses `Walker` and looks at the calls.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from app.argspec.definitions import (
    LEAVES,
    ClassValue,
    FunctionValue,
    InstanceValue,
    Scope,
    dotted_name,
)
from app.argspec.modules import Modules
from app.argspec.values import UNKNOWN, Evaluator, Imported, builtin, is_constant

_MAX_DEPTH = 25
_MAX_ROUNDS = 500
_SHORT_BODY = 3
_NOT_BESIDE = sys.stdlib_module_names | {"builtins", ""}


class Walker(Evaluator):
    """Walks one script, and the modules beside it where it uses them."""

    def __init__(self, *, budget: int, modules: Modules, eager: bool) -> None:
        super().__init__(budget=budget)
        self.module = self._scope = Scope()
        self.module.names |= {"__name__": "__main__", "__package__": modules.package}
        self.follows = self._eager = eager
        """Whether imported names are looked up in the modules beside the script, which takes time."""
        self._modules = modules
        self._loaded: dict[str, Scope | None] = {}
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

    def is_worth_rounds(self, node: ast.AST) -> bool:
        """Whether a loop is worth walking once for each of its items."""
        return False

    def concerns(self, values: Sequence[object]) -> bool:
        """Whether a function that gets these values is worth walking, whatever is in it."""
        return False

    def enter_module(self, tree: ast.Module) -> None:
        """React to a module that is about to be walked."""

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
            items = _rounds(self.evaluate(node.iter))
            if items is not None and self.is_worth_rounds(node) and not any(map(_leaves_loop, node.body)):
                for item in items:
                    self.bind(node.target, item)
                    self.block(node.body)
                self.block(node.orelse)
                return
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
            if isinstance(node, ast.ImportFrom) and alias.name == "*":
                self._import_all(self._origin(node))
            elif isinstance(node, ast.ImportFrom):
                self.assign(alias.asname or alias.name, Imported(f"{self._origin(node)}.{alias.name}"))
            elif alias.asname:
                self.assign(alias.asname, Imported(alias.name))
            else:
                package = alias.name.partition(".")[0]
                self.assign(package, Imported(package))

    def _import_all(self, name: str) -> None:
        module = self._load(name)
        for public in module.names if module is not None else ():
            if not public.startswith("_"):
                self.assign(public, Imported(f"{name}.{public}"))

    def _origin(self, node: ast.ImportFrom) -> str:
        """Return the module that names are imported from."""
        if not node.level:
            return node.module or ""
        parts = str(self._scope.module.names["__package__"]).split(".")
        above = parts[: len(parts) - node.level + 1]
        return ".".join([*above, node.module] if node.module else above)

    def _define_class(self, node: ast.ClassDef) -> None:
        bases = tuple(self.evaluate(base) for base in node.bases)
        outer, body = self._scope, Scope(self._scope)
        self._scope = body
        self.block([part for part in node.body if not isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))])
        self._scope = outer
        for part in node.body:
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body.names[part.name] = FunctionValue(part, outer)
        self.assign(node.name, ClassValue(node, body.names, bases, body))

    # ---- names ------------------------------------------------------------------------------------------------------

    def lookup(self, name: str) -> object:
        for scope in self._scope.chain():
            if name in scope.names:
                return self.followed(scope.names[name]) if self.follows else scope.names[name]
        return builtin(name)

    def followed(self, value: object) -> object:
        """Return what an imported name stands for in a module beside the script; other values as they are."""
        seen: set[object] = set()
        while isinstance(value, Imported) and value not in seen:
            seen.add(value)
            value = self._in_module(value)
        return value

    def _in_module(self, value: Imported) -> object:
        module, _, name = value.dotted.rpartition(".")
        if not module or (scope := self._load(module)) is None:
            return value
        return scope.names.get(name, value)

    def _load(self, name: str) -> Scope | None:
        """Return the scope of a module beside the script, walked; `None` if there is none."""
        if name in self._loaded:
            return self._loaded[name]
        package, _, _ = name.rpartition(".")
        if name.partition(".")[0] in _NOT_BESIDE or (package and self._load(package) is None):
            return None
        self._loaded[name] = None
        if (source := self._modules.find(name)) is None:
            return None
        module = self._loaded[name] = Scope()
        module.names |= {"__name__": name, "__package__": name if source.is_package else package}
        self.enter_module(source.tree)
        before = self._scope, self.loops, self.branches
        self._scope, self.loops, self.branches = module, 0, 0  # it runs once, wherever it is imported
        with self.following(self._eager):
            self.block(source.tree.body)
        self._scope, self.loops, self.branches = before
        return module

    @contextmanager
    def within(self, scope: Scope) -> Iterator[None]:
        """Look names up in another scope meanwhile."""
        before, self._scope = self._scope, scope
        yield
        self._scope = before

    @contextmanager
    def following(self, follows: bool) -> Iterator[None]:
        """Look imported names up meanwhile, or do not."""
        before, self.follows = self.follows, follows or self._eager
        yield
        self.follows = before

    def attribute(self, node: ast.Attribute) -> object:
        return self.attribute_of(self.evaluate(node.value), node)

    def attribute_of(self, base: object, node: ast.Attribute) -> object:
        """Return the value of `x.y` when `x` is `base`."""
        if isinstance(base, InstanceValue):
            return base.names[node.attr] if node.attr in base.names else base.kind.find(node.attr)
        if isinstance(base, ClassValue):
            return base.find(node.attr)
        if isinstance(base, Imported):
            imported = Imported(f"{base.dotted}.{node.attr}")
            return self.followed(imported) if self.follows else imported
        dotted = dotted_name(node)
        return next((scope.names[dotted] for scope in self._scope.chain() if dotted in scope.names), UNKNOWN)

    def opaque(self, node: ast.expr) -> object:
        match node:
            case ast.Await():
                return self.evaluate(node.value)
            case ast.NamedExpr():
                value = self.evaluate(node.value)
                self.bind(node.target, value)
                return value
            case ast.ListComp(generators=[ast.comprehension(ifs=[], is_async=0) as only]):
                items = _rounds(self.evaluate(only.iter)) if self.is_worth_rounds(node) else None
                return UNKNOWN if items is None else [self._item(node.elt, only.target, item) for item in items]
            case _:
                return UNKNOWN

    def _item(self, node: ast.expr, target: ast.expr, item: object) -> object:
        """Return one item of a comprehension, whose names are its own."""
        outer, self._scope = self._scope, Scope(self._scope)
        self.bind(target, item)
        value = self.evaluate(node)
        self._scope = outer
        return value

    def assign(self, name: str, value: object) -> None:
        scope = self._scope
        if name in scope.not_local:
            scope = next((outer for outer in scope.chain()[1:] if name in outer.names), scope.module)
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
            self._scope.names[dotted_name(target)] = value
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
        handed = [*arguments, *keywords.values()]
        worth_it = self.is_relevant(node) or len(node.body) <= _SHORT_BODY or self.concerns(handed)
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


def _rounds(items: object) -> Sequence[object] | None:
    """Return the items that a loop goes through, `None` if they are unknown or many."""
    if isinstance(items, (set, frozenset)):
        items = sorted(items, key=str)
    return list(items) if isinstance(items, (list, tuple, dict, str)) and len(items) <= _MAX_ROUNDS else None


def _leaves_loop(node: ast.AST) -> bool:
    """Whether a statement may end the loop that it is in, or the function."""
    if isinstance(node, (ast.Break, ast.Return)):
        return True
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
        return False
    return any(map(_leaves_loop, ast.iter_child_nodes(node)))
