"""Values of Python expressions, as far as they follow from the source alone. Nothing is executed.

What is not static is `UNKNOWN`; a container may hold unknown items. Whatever could take long or grow large
(powers, repetition, wide formats) is unknown beyond small limits.
"""

import ast
import builtins
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

_MAX_ITEMS = 1_000
_MAX_TEXT = 20_000
_MAX_SEPARATOR = 100
_MAX_BITS = 256
_MAX_DIGITS = 100


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = _Unknown()


@dataclass(frozen=True)
class Imported:
    """A name of another module, or a builtin: `argparse.ArgumentParser`, `builtins.int`."""

    dotted: str

    @property
    def last(self) -> str:
        return self.dotted.rpartition(".")[2]


@dataclass(frozen=True)
class LambdaValue:
    """An anonymous function; only its shape is looked at."""

    node: ast.Lambda


class TooComplex(Exception):
    """The budget of steps is used up."""


def is_constant(value: object) -> bool:
    """Whether `value` is known through and through."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(is_constant(item) for item in value)
    if isinstance(value, dict):
        return all(is_constant(key) and is_constant(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def builtin(name: str) -> object:
    """Return the builtin called `name`, unknown if there is none."""
    return Imported(f"builtins.{name}") if hasattr(builtins, name) else UNKNOWN


class Evaluator:
    """Evaluates expressions. Subclasses say what names, attributes and calls mean."""

    def __init__(self, *, budget: int) -> None:
        self._budget = budget

    def lookup(self, name: str) -> object:
        """Return the value of a name."""
        return builtin(name)

    def attribute(self, node: ast.Attribute) -> object:
        """Return the value of `x.y`."""
        base = self.evaluate(node.value)
        return Imported(f"{base.dotted}.{node.attr}") if isinstance(base, Imported) else UNKNOWN

    def call(self, node: ast.Call) -> object:
        """Return the value of a call."""
        return pure_call(self.evaluate(node.func), self.arguments(node), self.keywords(node))

    def opaque(self, node: ast.expr) -> object:
        """Return the value of an expression of another kind (comprehensions, await, ...)."""
        return UNKNOWN

    def evaluate(self, node: ast.expr) -> object:
        """Return the value of an expression."""
        self._budget -= 1
        if self._budget < 0:
            raise TooComplex
        match node:
            case ast.Constant():
                return node.value if is_constant(node.value) else UNKNOWN
            case ast.Name():
                return self.lookup(node.id)
            case ast.Attribute():
                return self.attribute(node)
            case ast.Call():
                return self.call(node)
            case ast.Tuple():
                return _small(tuple(self._items(node.elts)))
            case ast.List():
                return _small(self._items(node.elts))
            case ast.Set():
                return _small(_guarded(set, self._items(node.elts)))
            case ast.Dict():
                return self._dict(node)
            case ast.UnaryOp():
                return _unary(node.op, self.evaluate(node.operand))
            case ast.BinOp():
                return _binary(node.op, self.evaluate(node.left), self.evaluate(node.right))
            case ast.BoolOp():
                return self._boolean(node)
            case ast.Compare():
                return self._compare(node)
            case ast.IfExp():
                return self._conditional(node)
            case ast.JoinedStr():
                return self._joined(node)
            case ast.Subscript():
                return _subscript(self.evaluate(node.value), self.evaluate(node.slice))
            case ast.Lambda():
                return LambdaValue(node)
            case _:
                return self.opaque(node)

    def arguments(self, node: ast.Call) -> list[object]:
        """Return the values of a call's positional arguments; a star that is not constant is one unknown."""
        return self._items(node.args)

    def keywords(self, node: ast.Call) -> dict[str, object]:
        """Return the values of a call's keyword arguments, `**` of a constant dict included."""
        found: dict[str, object] = {}
        for keyword in node.keywords:
            value = self.evaluate(keyword.value)
            if keyword.arg is not None:
                found[keyword.arg] = value
            elif isinstance(value, dict):
                found |= {str(name): item for name, item in value.items()}
        return found

    def _items(self, nodes: list[ast.expr]) -> list[object]:
        items: list[object] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                value = self.evaluate(node.value)
                items += list(value) if isinstance(value, (list, tuple)) else [UNKNOWN]
            else:
                items.append(self.evaluate(node))
        return items

    def _dict(self, node: ast.Dict) -> object:
        found: dict[object, object] = {}
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            value = self.evaluate(value_node)
            if key_node is None:
                if not isinstance(value, dict):
                    return UNKNOWN
                found |= value
                continue
            key = self.evaluate(key_node)
            if not is_constant(key) or isinstance(key, (list, dict, set)):
                return UNKNOWN
            found[key] = value
        return _small(found)

    def _boolean(self, node: ast.BoolOp) -> object:
        value: object = UNKNOWN
        for operand in node.values:
            value = self.evaluate(operand)
            if not is_constant(value):
                return UNKNOWN
            if bool(value) is isinstance(node.op, ast.Or):
                return value
        return value

    def _compare(self, node: ast.Compare) -> object:
        left = self.evaluate(node.left)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.evaluate(right_node)
            compare = _COMPARISONS.get(type(op))
            if compare is None or not is_constant(left) or not is_constant(right):
                return UNKNOWN
            holds = _guarded(compare, left, right)
            if holds is not True:
                return holds
            left = right
        return True

    def _conditional(self, node: ast.IfExp) -> object:
        test = self.evaluate(node.test)
        then, otherwise = self.evaluate(node.body), self.evaluate(node.orelse)
        if not is_constant(test):
            return UNKNOWN
        return then if test else otherwise

    def _joined(self, node: ast.JoinedStr) -> object:
        parts: list[str] = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                value = self.evaluate(part.value)
                spec = self.evaluate(part.format_spec) if part.format_spec else ""
                if not is_constant(value) or not isinstance(spec, str) or re.search(r"\d{3}", spec):
                    return UNKNOWN
                shown = repr(value) if part.conversion == ord("r") else value
                text = _guarded(format, shown, spec)
            else:
                text = self.evaluate(part)
            if not isinstance(text, str):
                return UNKNOWN
            parts.append(text)
        return _small("".join(parts))


def pure_call(function: object, arguments: list[object], keywords: dict[str, object]) -> object:
    """Return the result of a harmless builtin or path function on constants."""
    if not isinstance(function, Imported):
        return UNKNOWN
    if function.dotted == "builtins.dict" and not arguments:
        return keywords
    if function.dotted != "builtins.dict":  # all others see only the keys of a dict, whatever its values are
        arguments = [list(argument) if isinstance(argument, dict) else argument for argument in arguments]
    if not all(map(is_constant, [*arguments, *keywords.values()])):
        return UNKNOWN
    if function.dotted in _PATHS and arguments and not keywords:
        return "/".join(str(argument) for argument in arguments)
    pure = _PURE.get(function.dotted)
    return UNKNOWN if pure is None else _small(_guarded(pure, *arguments, **keywords))


def pure_method(base: object, name: str, arguments: list[object]) -> object:
    """Return the result of a method that changes nothing, such as `", ".join(...)` or `CHOICES.keys()`."""
    if isinstance(base, dict) and name in ("keys", "values", "items") and not arguments:
        return [*getattr(base, name)()]
    if not is_constant(base) or not all(map(is_constant, arguments)):
        return UNKNOWN
    if isinstance(base, dict) and name == "get":
        return _guarded(base.get, *arguments)
    if isinstance(base, str) and name in _STRING_METHODS and (name != "join" or len(base) <= _MAX_SEPARATOR):
        return _small(_guarded(getattr(base, name), *arguments))
    return UNKNOWN


def _range(*arguments: int) -> list[int]:
    numbers = range(*arguments)
    if len(numbers) > _MAX_ITEMS:
        raise ValueError("too long")
    return list(numbers)


def _enumerate(items: Any, start: int = 0) -> list[Any]:
    return list(enumerate(items, start))


def _zip(*iterables: Any) -> list[Any]:
    return list(zip(*iterables, strict=False))


def _round(number: float, ndigits: int | None = None) -> float:
    if ndigits is not None and abs(ndigits) > _MAX_DIGITS:
        raise ValueError("a power of ten that is too large")
    return round(number, ndigits)


PURE_METHODS = frozenset({"keys", "values", "items", "get", "copy", "index", "count"})
_PATHS = frozenset({"pathlib.Path", "pathlib.PurePath", "pathlib.PurePosixPath", "os.path.join"})
_STRING_METHODS = frozenset({"join", "lower", "upper", "strip", "lstrip", "rstrip", "split", "title", "capitalize"})
_PURE: dict[str, Callable[..., Any]] = {
    "builtins.range": _range,
    "builtins.enumerate": _enumerate,
    "builtins.zip": _zip,
    **{
        f"builtins.{function.__name__}": function
        for function in (list, tuple, set, sorted, len, str, int, float, bool, min, max, sum, abs, dict)
    },
    "builtins.round": _round,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}


def _guarded(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call a harmless function; what it refuses is unknown."""
    try:
        return function(*arguments, **keywords)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
        return UNKNOWN


def _unary(op: ast.unaryop, operand: object) -> object:
    return _guarded(_UNARY[type(op)], operand) if is_constant(operand) else UNKNOWN


def _binary(op: ast.operator, left: object, right: object) -> object:
    if isinstance(op, ast.Add) and isinstance(left, list) and isinstance(right, list):
        return _small([*left, *right])
    function = _BINARY.get(type(op))
    if function is None or not is_constant(left) or not is_constant(right) or _explodes(op, left, right):
        return UNKNOWN
    return _small(_guarded(function, left, right))


def _explodes(op: ast.operator, left: Any, right: Any) -> bool:
    """Whether the result may be huge."""
    match op:
        case ast.Mult():
            sizes = [len(value) for value in (left, right) if isinstance(value, (str, list, tuple))]
            counts = [value for value in (left, right) if isinstance(value, int)]
            return any(size * count > _MAX_ITEMS for size in sizes for count in counts)
        case ast.Pow():
            small = isinstance(right, (int, float)) and abs(right) <= 64
            return not (small and isinstance(left, (int, float)) and abs(left) <= 2**16)
        case ast.LShift():
            return not (isinstance(right, int) and right <= _MAX_BITS)
        case ast.Mod():
            return isinstance(left, str) and re.search(r"\d{3}|\*", left) is not None
        case _:
            return False


def _subscript(base: object, key: object) -> object:
    if isinstance(base, (list, tuple, dict, str)) and is_constant(key):
        return _guarded(operator.getitem, base, key)
    return UNKNOWN


def _small(value: Any) -> Any:
    """Return `value` unless it has grown large, so that everything that is kept is quick to look at."""
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else UNKNOWN
    if isinstance(value, (list, tuple, set, dict)):
        return value if _weight(value) <= _MAX_ITEMS else UNKNOWN
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return UNKNOWN
    return value


def _weight(value: object) -> int:
    """Count the items of a container and of those in it; stops soon after the limit."""
    weight, open_items = 0, [value]
    while open_items and weight <= _MAX_ITEMS:
        item = open_items.pop()
        weight += 1 + (len(item) // 20 if isinstance(item, str) else 0)
        if isinstance(item, dict):
            open_items += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            open_items += item
    return weight
