"""The parsers of a script as they are built up while it is read, and what their options come down to."""

import ast
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.argspec.definitions import ClassValue, FunctionValue
from app.argspec.report import ExclusiveGroup, Form, Kind, Option, ParserClass, Positional, Remark, is_text
from app.argspec.values import UNKNOWN, Imported, LambdaValue

_SUPPRESS = "argparse.SUPPRESS"
_MAX_DEPTH = 20
_MAX_OPTIONS = 1000
_FLAGS = frozenset({"store_true", "store_false", "store_const", "append_const"})
_BOOLEAN_NAME = re.compile(r"(str|string|text)_?(to|2)_?bool|parse_?bool|^bool|bool$|boolean", re.IGNORECASE)
_INTEGER_NAME = re.compile(r"(^|_)int(eger)?$", re.IGNORECASE)
_NUMBER_NAME = re.compile(r"(^|_)float$", re.IGNORECASE)
_KINDS: dict[str, Kind] = {
    "builtins.int": "integer",
    "builtins.float": "number",
    "builtins.str": "string",
    "builtins.bool": "boolean",
    "builtins.open": "string",
    "decimal.Decimal": "number",
    "pathlib.Path": "string",
    "pathlib.PurePath": "string",
    "pathlib.PosixPath": "string",
}


@dataclass(eq=False)
class Exclusive:
    """A mutually exclusive group."""

    required: bool


@dataclass(eq=False)
class Action:
    """One `add_argument` call."""

    names: list[str]
    keywords: dict[str, object]
    default_source: str
    line: int
    group: str | None = None
    exclusive: Exclusive | None = None
    conditional: bool = False

    @property
    def positional(self) -> bool:
        return not self.names[0].startswith("-")

    @property
    def dest(self) -> str:
        given = self.keywords.get("dest")
        if isinstance(given, str):
            return given
        long = [name for name in self.names if name.startswith("--")]
        return (long or self.names)[0].lstrip("-").replace("-", "_")


@dataclass(eq=False)
class Parser:
    """One `ArgumentParser`."""

    line: int
    resolves_conflicts: bool = False
    abbreviates: bool = True
    actions: list[Action] = field(default_factory=list)
    defaults: dict[str, object] = field(default_factory=dict)
    parses: list[bool] = field(default_factory=list)
    """One entry per parse of the command line: whether it accepts unknown options."""
    classes: list[ParserClass] = field(default_factory=list)
    """Classes of libraries whose fields are options."""

    def adopt(self, other: "Parser") -> None:
        """Take over the options of one of `parents`."""
        self.actions += [replace(action, names=list(action.names)) for action in other.actions]
        self.defaults |= other.defaults
        self.classes += other.classes


@dataclass(frozen=True, eq=False)
class Group:
    """A titled or exclusive group of a parser."""

    parser: Parser
    title: str | None = None
    exclusive: Exclusive | None = None


@dataclass(frozen=True)
class Described:
    """What the options of several parsers come down to."""

    options: tuple[Option, ...]
    positionals: tuple[Positional, ...]
    exclusive: tuple[ExclusiveGroup, ...]
    notes: tuple[Remark, ...]
    left_out: int
    """The line of the first option beyond the limit; 0 if there are fewer."""


def describe(parsers: Iterable[Parser]) -> Described:
    """Return the options of all parsers; of two with one name the later wins, as it does in argparse."""
    options: dict[str, Option] = {}
    positionals: list[Positional] = []
    groups: dict[Exclusive, list[str]] = {}
    notes: list[Remark] = []
    for parser in parsers:
        for action, names in _surviving(parser, notes):
            if action.positional:
                positionals.append(_positional(action))
                notes.append(Remark(code="positional_argument", line=action.line, subject=action.names[0]))
                continue
            option = _option(parser, action, names)
            if option is None:
                notes.append(Remark(code="short_option_only", line=action.line, subject=action.names[0]))
                continue
            name = option.names[0]
            options.pop(name, None)
            options[name] = option
            if option.reads_false_as_true:
                notes.append(Remark(code="type_bool", line=action.line, subject=name))
            if action.exclusive:
                groups.setdefault(action.exclusive, []).append(name)
    kept, left_out = list(options.values())[:_MAX_OPTIONS], list(options.values())[_MAX_OPTIONS:]
    for option in left_out:
        del options[option.names[0]]
    exclusive = tuple(
        ExclusiveGroup(names=tuple(name for name in names if name in options), required=group.required)
        for group, names in groups.items()
    )
    line = left_out[0].line if left_out else 0
    return Described(tuple(kept), tuple(positionals[:_MAX_OPTIONS]), exclusive, tuple(notes[:_MAX_OPTIONS]), line)


def kind_of(value: object) -> tuple[Kind, bool]:
    """Return the kind of value that a `type=` callable makes, and whether it takes every text for true."""
    match value:
        case Imported(dotted="builtins.bool"):
            return "boolean", True
        case Imported():
            return _KINDS.get(value.dotted) or _kind_by_name(value.last), False
        case FunctionValue():
            return _kind_of_function(value.node), False
        case LambdaValue():
            return _kind_of_results([value.node.body]), False
        case ClassValue():
            return "string", False
        case _:
            return "any", False


def _surviving(parser: Parser, notes: list[Remark]) -> list[tuple[Action, list[str]]]:
    """Return the actions with the option strings that later ones did not take from them."""
    owner: dict[str, Action] = {}
    for action in parser.actions:
        for name in action.names:
            before = owner.get(name)
            if before is not None and not (parser.resolves_conflicts or action.conditional or before.conditional):
                notes.append(Remark(code="duplicate_argument", line=action.line, subject=name))
            owner[name] = action
    kept = [(action, [name for name in action.names if owner[name] is action]) for action in parser.actions]
    return [(action, names) for action, names in kept if names]


def _positional(action: Action) -> Positional:
    optional = action.keywords.get("nargs") in ("?", "*") or action.conditional
    return Positional(name=action.names[0], required=not optional, line=action.line)


def _option(parser: Parser, action: Action, names: list[str]) -> Option | None:
    """Return the option, `None` if it has no name of the form `--name` under which it could be passed."""
    long = [name.removeprefix("--") for name in names if name.startswith("--")]
    if not long:
        return None
    keywords = action.keywords
    form = _form(keywords)
    kind, reads_false_as_true = _kind(keywords, form)
    default, default_source = _default(parser, action, form)
    return Option(
        names=tuple(long),
        kind=kind,
        typed=keywords.get("type") is not None or form not in ("value", "words"),
        form=form,
        required=keywords.get("required") is True and not action.conditional,
        has_default=form == "flag" or "default" in keywords or action.dest in parser.defaults,
        default=default,
        default_source=default_source,
        choices=_choices(keywords.get("choices")),
        help=_help(keywords, action.dest, default),
        group=action.group,
        line=action.line,
        reads_false_as_true=reads_false_as_true,
    )


def _form(keywords: Mapping[str, object]) -> Form:
    action, nargs = keywords.get("action"), keywords.get("nargs")
    if isinstance(action, Imported) and action.last == "BooleanOptionalAction":
        return "negatable"
    if isinstance(action, str) and action in _FLAGS:
        return "flag"
    if action == "count":
        return "counted"
    if nargs in ("*", "+") or (isinstance(nargs, int) and nargs > 0) or _is_remainder(nargs):
        return "words"
    return "repeated" if action in ("append", "extend") else "value"


def _is_remainder(nargs: object) -> bool:
    return isinstance(nargs, Imported) and nargs.last == "REMAINDER"


def _kind(keywords: Mapping[str, object], form: Form) -> tuple[Kind, bool]:
    if form in ("flag", "negatable"):
        return "boolean", False
    if form == "counted":
        return "integer", False
    if keywords.get("type") is None:
        own_action = keywords.get("action") not in (None, "store", "append", "extend")
        return ("any" if own_action else "string"), False
    return kind_of(keywords["type"])


def _kind_by_name(name: str) -> Kind:
    if name == "strtobool" or _BOOLEAN_NAME.search(name):
        return "boolean"
    if _INTEGER_NAME.search(name):
        return "integer"
    return "number" if _NUMBER_NAME.search(name) else "any"


def _kind_of_function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Kind:
    """Judge by the annotation, else by the name, else by what is returned."""
    if isinstance(node.returns, ast.Name) and f"builtins.{node.returns.id}" in _KINDS:
        return _KINDS[f"builtins.{node.returns.id}"]
    by_name = _kind_by_name(node.name)
    if by_name != "any":
        return by_name
    return _kind_of_results([part.value for part in ast.walk(node) if isinstance(part, ast.Return)])


def _kind_of_results(results: list[ast.expr | None]) -> Kind:
    kinds = {"any" if result is None else _kind_of_result(result) for result in results}
    return kinds.pop() if len(kinds) == 1 else "any"


def _kind_of_result(node: ast.expr) -> Kind:
    match node:
        case ast.Constant(value=bool()) | ast.Compare() | ast.UnaryOp(op=ast.Not()):
            return "boolean"
        case ast.BoolOp(values=values):
            return _kind_of_results(list(values))
        case ast.Call(func=ast.Name(id=name)):
            return _KINDS.get(f"builtins.{name}", "any")
        case _:
            return "any"


def _default(parser: Parser, action: Action, form: Form) -> tuple[Any, str | None]:
    """Return the default, or the source of one that is known only at run time."""
    if action.dest in parser.defaults and form != "flag":
        value, source = parser.defaults[action.dest], "set_defaults"
    elif "default" in action.keywords and form != "flag":
        value, source = action.keywords["default"], action.default_source
    else:
        return (False if form == "flag" else None), None
    if isinstance(value, Imported) and value.dotted == _SUPPRESS:
        return None, None
    json_value = _as_json(value)
    if json_value is UNKNOWN:
        return None, source
    return json_value, None


def _as_json(value: object, depth: int = 0) -> Any:
    """Return a constant as JSON has it; unknown if JSON cannot have it (NaN, infinity, half a character)."""
    if depth > _MAX_DEPTH:
        return UNKNOWN
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else UNKNOWN
        case str():
            return value if is_text(value) else UNKNOWN
        case set() | frozenset():
            return _all_known(_as_json(item, depth + 1) for item in sorted(value, key=str))
        case list() | tuple():
            return _all_known(_as_json(item, depth + 1) for item in value)
        case dict():
            keys = _all_known(_as_json(str(key)) for key in value)
            items = _all_known(_as_json(item, depth + 1) for item in value.values())
            return UNKNOWN if UNKNOWN in (keys, items) else dict(zip(keys, items, strict=True))
        case _:
            return UNKNOWN


def _all_known(items: Iterable[Any]) -> Any:
    found = list(items)
    return UNKNOWN if UNKNOWN in found else found


def _choices(value: object) -> tuple[Any, ...] | None:
    if isinstance(value, (dict, str)):
        value = list(value)
    if not isinstance(value, (list, tuple, set, frozenset)) or not value:
        return None
    choices = _as_json(value)
    return None if choices is UNKNOWN else tuple(choices)


def _help(keywords: Mapping[str, object], dest: str, default: Any) -> str:
    value = keywords.get("help")
    if not isinstance(value, str):
        return ""
    values = {"default": default, "dest": dest, "metavar": keywords.get("metavar"), "prog": "", "const": ""}
    values["choices"] = ", ".join(map(str, _choices(keywords.get("choices")) or ()))
    expanded = re.sub(r"%\((\w+)\)[#0\- +]*\d*(?:\.\d+)?[a-zA-Z]", lambda m: str(values.get(m[1], m[0])), value)
    return " ".join(expanded.replace("%%", "%").split())
