"""What the fields of a dataclass become on a command line, as parsers made of dataclasses do it.

Knows the annotations that such parsers know; another type takes whatever text its class makes something of.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from app.argspec.definitions import ClassValue, last_name
from app.argspec.values import UNKNOWN, Imported, LambdaValue, is_constant

Evaluate = Callable[[ast.expr], object]
SCALARS = {
    "builtins.str": "builtins.str",
    "builtins.int": "builtins.int",
    "builtins.float": "builtins.float",
    "pathlib.Path": "builtins.str",
}
_LISTS = frozenset({"list", "List", "Sequence", "Iterable"})
_ENUMS = frozenset({"Enum", "StrEnum", "IntEnum", "ExplicitEnum"})
_NOT_FIELDS = frozenset({"ClassVar", "InitVar"})
_BOOLEAN = Imported("distutils.util.strtobool")


@dataclass(frozen=True)
class FieldType:
    """A type that a field is annotated with: that of a value, or of the items of a list."""

    type: object
    is_list: bool = False
    choices: tuple[object, ...] | None = None
    is_enum: bool = False
    nested: ClassValue | None = None
    """The dataclass that the field holds."""

    @property
    def is_boolean(self) -> bool:
        return self.type is _BOOLEAN


ANY = FieldType(UNKNOWN)


def is_dataclass(kind: ClassValue) -> bool:
    """Whether the class is decorated as a dataclass."""
    return any(last_name(decorator) == "dataclass" for decorator in kind.node.decorator_list)


@dataclass(frozen=True)
class Field:
    """A field: its node, its name, and how a parser declares it."""

    node: ast.AnnAssign
    name: str
    type: FieldType
    keywords: dict[str, object]
    source: str
    """The source of its default."""


def fields(kind: ClassValue, evaluate: Evaluate) -> Iterator[Field]:
    """Yield the fields that the class adds itself."""
    for node in kind.node.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if _outer_name(node.annotation) in _NOT_FIELDS:
            continue
        found = field_type(node.annotation, evaluate)
        options, source = _default(node.value, evaluate)
        if options.pop("init", True) is False:
            continue
        yield Field(node, node.target.id, found, _keywords(found, options), source)


def by_member_names(field: Field, *, flags: bool) -> dict[str, object]:
    """Return the keywords for parsers that take members of enumerations by name, and with `flags` `--x`, `--no-x`."""
    keywords = dict(field.keywords)
    if flags and field.type.is_boolean and not field.type.is_list and "default" in keywords:
        keywords["action"] = Imported("argparse.BooleanOptionalAction")
    if field.type.is_enum:
        keywords |= {"type": Imported("builtins.str"), "choices": None}
        keywords |= {"default": UNKNOWN} if "default" in keywords else {}
    return keywords


def field_type(node: ast.expr, evaluate: Evaluate) -> FieldType:
    """Return what an annotation means."""
    match node:
        case ast.Constant(value=str(text)):
            try:
                return field_type(ast.parse(text, mode="eval").body, evaluate)
            except SyntaxError:
                return ANY
        case ast.BinOp(op=ast.BitOr()) | ast.Subscript(value=ast.Name() | ast.Attribute()):
            return _composed(node, evaluate)
        case ast.Name() | ast.Attribute():
            return _named(evaluate(node), evaluate)
    return ANY


def _composed(node: ast.BinOp | ast.Subscript, evaluate: Evaluate) -> FieldType:
    name = _outer_name(node)
    parts = _parts(node)
    if name in ("Union", "Optional", "|"):
        several = {field_type(part, evaluate) for part in parts if not _is_none(part)}
        return several.pop() if len(several) == 1 else ANY
    if name in _LISTS and parts:
        item = field_type(parts[0], evaluate)
        return ANY if item.is_list else FieldType(item.type, is_list=True, choices=item.choices)
    if name == "Literal":
        return _chosen([evaluate(part) for part in parts])
    return field_type(parts[0], evaluate) if name == "Annotated" and parts else ANY


def _named(value: object, evaluate: Evaluate) -> FieldType:
    match value:
        case Imported(dotted="builtins.bool"):
            return FieldType(_BOOLEAN)
        case Imported(dotted="builtins.list" | "typing.List"):
            return FieldType(Imported("builtins.str"), is_list=True)
        case Imported(dotted=dotted) if dotted in SCALARS:
            return FieldType(Imported(SCALARS[dotted]))
        case ClassValue(bases=bases) if any(isinstance(base, Imported) and base.last in _ENUMS for base in bases):
            members = (part for part in value.node.body if isinstance(part, ast.Assign))
            return replace(_chosen([evaluate(member.value) for member in members]), is_enum=True)
        case ClassValue() if is_dataclass(value):
            return FieldType(UNKNOWN, nested=value)
    return ANY


def _chosen(values: list[object]) -> FieldType:
    if not values or not all(map(is_constant, values)):
        return ANY
    types = {type(value) for value in values}
    kind = types.pop().__name__ if len(types) == 1 else ""
    return FieldType(Imported(f"builtins.{kind}") if kind in ("str", "int", "float") else UNKNOWN, False, tuple(values))


def _default(node: ast.expr | None, evaluate: Evaluate) -> tuple[dict[str, object], str]:
    """Return the default with what a `field(...)` says besides, and the source of the default."""
    if node is None:
        return {}, ""
    if not isinstance(node, ast.Call) or last_name(node.func) not in ("field", "Field", "HfArg", "mutable_field"):
        return {"default": _value(node, evaluate)}, ast.unparse(node)
    nodes = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    known = ("default", "init", "help", "aliases")
    options = {name: _value(value, evaluate) for name, value in nodes.items() if name in known}
    metadata = evaluate(nodes["metadata"]) if "metadata" in nodes else None
    options |= _of_metadata(metadata)
    if (factory := nodes.get("default_factory")) is not None:
        options["default"] = _made(evaluate(factory), evaluate)
    written = nodes.get("default") or factory
    return options, "" if written is None else ast.unparse(written)


def _value(node: ast.expr, evaluate: Evaluate) -> object:
    """Return the value of an expression; a member of an enumeration stands for its value."""
    if isinstance(node, ast.Attribute) and node.attr == "value" and is_constant(member := evaluate(node.value)):
        return member
    return evaluate(node)


def _of_metadata(metadata: object) -> dict[str, object]:
    if not isinstance(metadata, Mapping):
        return {}
    return {name: metadata[name] for name in ("help", "choices", "aliases") if name in metadata}


def _made(factory: object, evaluate: Evaluate) -> object:
    """Return what a `default_factory` makes."""
    match factory:
        case Imported(dotted="builtins.list"):
            return []
        case Imported(dotted="builtins.dict"):
            return {}
        case LambdaValue(node=node) if not (node.args.args or node.args.posonlyargs):
            return evaluate(node.body)
    return UNKNOWN


def _keywords(found: FieldType, options: dict[str, object]) -> dict[str, object]:
    """Return how a parser made of dataclasses declares such a field."""
    keywords: dict[str, object] = {"type": found.type, **options}
    if found.choices is not None:
        keywords.setdefault("choices", found.choices)
    if found.is_list:
        keywords["nargs"] = "+"
    if "default" not in options:
        keywords |= {"default": False} if found.is_boolean and not found.is_list else {"required": True}
    return keywords


def _outer_name(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.partition("[")[0].rpartition(".")[2]
    if isinstance(node, ast.BinOp):
        return "|"
    return last_name(node.value) if isinstance(node, ast.Subscript) else last_name(node)


def _parts(node: ast.BinOp | ast.Subscript) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        both = [node.left, node.right]
        return [part for one in both for part in (_parts(one) if isinstance(one, ast.BinOp) else [one])]
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
