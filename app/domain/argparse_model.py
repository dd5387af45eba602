"""The parsers of a script as they are built up while it is read, and what their options come down to."""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.domain.known_parameters import KNOWN
from app.domain.rendering import ArgumentForm
from app.domain.script_parameters import ExclusiveGroup, ParameterKind, Positional, Remark, ScriptParameter, from_text
from app.domain.script_walker import ClassValue, FunctionValue
from app.domain.static_values import UNKNOWN, Imported, LambdaValue, is_constant

_SUPPRESS = "argparse.SUPPRESS"
_FLAGS = frozenset({"store_true", "store_false", "store_const", "append_const"})
_BOOLEAN_NAME = re.compile(r"(str|string|text)_?(to|2)_?bool|parse_?bool|^bool|bool$|boolean", re.IGNORECASE)
_INTEGER_NAME = re.compile(r"(^|_)int(eger)?$", re.IGNORECASE)
_NUMBER_NAME = re.compile(r"(^|_)float$", re.IGNORECASE)
_KINDS = {
    "builtins.int": ParameterKind.INTEGER,
    "builtins.float": ParameterKind.NUMBER,
    "builtins.str": ParameterKind.STRING,
    "builtins.bool": ParameterKind.BOOLEAN,
    "builtins.open": ParameterKind.STRING,
    "decimal.Decimal": ParameterKind.NUMBER,
    "pathlib.Path": ParameterKind.STRING,
    "pathlib.PurePath": ParameterKind.STRING,
    "pathlib.PosixPath": ParameterKind.STRING,
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
    """One entry per parse of the command line: whether it takes unknown options."""

    def adopt(self, other: "Parser") -> None:
        """Take over the options of one of `parents`."""
        self.actions += [replace(action, names=list(action.names)) for action in other.actions]
        self.defaults |= other.defaults


@dataclass(frozen=True, eq=False)
class Group:
    """A titled or exclusive group of a parser."""

    parser: Parser
    title: str | None = None
    exclusive: Exclusive | None = None


@dataclass(frozen=True)
class Described:
    """What the options of several parsers come down to."""

    parameters: tuple[ScriptParameter, ...]
    positionals: tuple[Positional, ...]
    exclusive: tuple[ExclusiveGroup, ...]
    notes: tuple[Remark, ...]


def describe(parsers: Iterable[Parser]) -> Described:
    """Return the options of all parsers; of two with one name the later wins, as it does in argparse."""
    parameters: dict[str, ScriptParameter] = {}
    positionals: list[Positional] = []
    groups: dict[Exclusive, list[str]] = {}
    notes: list[Remark] = []
    for parser in parsers:
        for action, names in _surviving(parser, notes):
            if action.positional:
                positionals.append(_positional(action))
                notes.append(Remark(code="positional_argument", line=action.line, subject=action.names[0]))
                continue
            parameter = _parameter(parser, action, names)
            if parameter is None:
                notes.append(Remark(code="short_option_only", line=action.line, subject=action.names[0]))
                continue
            parameters.pop(parameter.name, None)
            parameters[parameter.name] = parameter
            if parameter.reads_false_as_true:
                notes.append(Remark(code="type_bool", line=action.line, subject=parameter.name))
            if action.exclusive:
                groups.setdefault(action.exclusive, []).append(parameter.name)
    exclusive = tuple(ExclusiveGroup(names=tuple(names), required=group.required) for group, names in groups.items())
    return Described(tuple(parameters.values()), tuple(positionals), exclusive, tuple(notes))


def kind_of(value: object) -> tuple[ParameterKind, bool]:
    """Return the kind of value that a `type=` callable makes, and whether it takes every text for true."""
    match value:
        case Imported(dotted="builtins.bool"):
            return ParameterKind.BOOLEAN, True
        case Imported():
            return _KINDS.get(value.dotted) or _kind_by_name(value.last), False
        case FunctionValue():
            return _kind_of_function(value.node), False
        case LambdaValue():
            return _kind_of_results([value.node.body]), False
        case ClassValue():
            return ParameterKind.STRING, False
        case _:
            return ParameterKind.ANY, False


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


def _parameter(parser: Parser, action: Action, names: list[str]) -> ScriptParameter | None:
    """Return the option, `None` if it has no name of the form `--name` under which it could be passed."""
    long = [name.removeprefix("--") for name in names if name.startswith("--")]
    if not long:
        return None
    name = next((candidate for candidate in long if candidate in KNOWN), long[0])
    keywords = action.keywords
    form = _form(keywords)
    kind, reads_false_as_true = _kind(keywords, form)
    default, default_text = _default(parser, action, kind, form)
    return ScriptParameter(
        name=name,
        aliases=tuple(other for other in long if other != name),
        kind=kind,
        typed=keywords.get("type") is not None or form not in (ArgumentForm.VALUE, ArgumentForm.WORDS),
        form=form,
        required=keywords.get("required") is True and not action.conditional,
        has_default=form is ArgumentForm.FLAG or "default" in keywords or action.dest in parser.defaults,
        default=default,
        default_text=default_text,
        choices=_choices(keywords.get("choices")),
        help=_help(keywords, name, default),
        group=action.group,
        line=action.line,
        reads_false_as_true=reads_false_as_true,
    )


def _form(keywords: Mapping[str, object]) -> ArgumentForm:
    action, nargs = keywords.get("action"), keywords.get("nargs")
    if isinstance(action, Imported) and action.last == "BooleanOptionalAction":
        return ArgumentForm.NEGATABLE
    if action in _FLAGS:
        return ArgumentForm.FLAG
    if action == "count":
        return ArgumentForm.COUNTED
    if nargs in ("*", "+") or (isinstance(nargs, int) and nargs > 0) or _is_remainder(nargs):
        return ArgumentForm.WORDS
    return ArgumentForm.REPEATED if action in ("append", "extend") else ArgumentForm.VALUE


def _is_remainder(nargs: object) -> bool:
    return isinstance(nargs, Imported) and nargs.last == "REMAINDER"


def _kind(keywords: Mapping[str, object], form: ArgumentForm) -> tuple[ParameterKind, bool]:
    if form in (ArgumentForm.FLAG, ArgumentForm.NEGATABLE):
        return ParameterKind.BOOLEAN, False
    if form is ArgumentForm.COUNTED:
        return ParameterKind.INTEGER, False
    if keywords.get("type") is None:
        own_action = keywords.get("action") not in (None, "store", "append", "extend")
        return (ParameterKind.ANY if own_action else ParameterKind.STRING), False
    return kind_of(keywords["type"])


def _kind_by_name(name: str) -> ParameterKind:
    if name == "strtobool" or _BOOLEAN_NAME.search(name):
        return ParameterKind.BOOLEAN
    if _INTEGER_NAME.search(name):
        return ParameterKind.INTEGER
    return ParameterKind.NUMBER if _NUMBER_NAME.search(name) else ParameterKind.ANY


def _kind_of_function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ParameterKind:
    """Judge by the annotation, else by the name, else by what is returned."""
    if isinstance(node.returns, ast.Name) and f"builtins.{node.returns.id}" in _KINDS:
        return _KINDS[f"builtins.{node.returns.id}"]
    by_name = _kind_by_name(node.name)
    if by_name is not ParameterKind.ANY:
        return by_name
    return _kind_of_results([part.value for part in ast.walk(node) if isinstance(part, ast.Return)])


def _kind_of_results(results: list[ast.expr | None]) -> ParameterKind:
    kinds = {ParameterKind.ANY if result is None else _kind_of_result(result) for result in results}
    return kinds.pop() if len(kinds) == 1 else ParameterKind.ANY


def _kind_of_result(node: ast.expr) -> ParameterKind:
    match node:
        case ast.Constant(value=bool()) | ast.Compare() | ast.UnaryOp(op=ast.Not()):
            return ParameterKind.BOOLEAN
        case ast.BoolOp(values=values):
            return _kind_of_results(list(values))
        case ast.Call(func=ast.Name(id=name)):
            return _KINDS.get(f"builtins.{name}", ParameterKind.ANY)
        case _:
            return ParameterKind.ANY


def _default(parser: Parser, action: Action, kind: ParameterKind, form: ArgumentForm) -> tuple[Any, str | None]:
    """Return the default, or the source of one that only a run could tell."""
    if action.dest in parser.defaults and form is not ArgumentForm.FLAG:
        value, source = parser.defaults[action.dest], "set_defaults"
    elif "default" in action.keywords and form is not ArgumentForm.FLAG:
        value, source = action.keywords["default"], action.default_source
    else:
        return (False if form is ArgumentForm.FLAG else None), None
    if isinstance(value, Imported) and value.dotted == _SUPPRESS:
        return None, None
    json_value = _as_json(value)
    if json_value is UNKNOWN:
        return None, source
    if isinstance(json_value, str):  # argparse reads a default that is a text as if it were given
        takes_all_for_true = kind_of(action.keywords.get("type"))[1]
        json_value = bool(json_value) if takes_all_for_true else from_text(json_value, kind)
    return json_value, None


def _as_json(value: object) -> Any:
    """Return a constant as JSON has it."""
    if not is_constant(value) or (isinstance(value, float) and (value != value or abs(value) == float("inf"))):
        return UNKNOWN
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value


def _choices(value: object) -> tuple[Any, ...] | None:
    if isinstance(value, dict):
        value = list(value)
    if not isinstance(value, (list, tuple, set, frozenset, str)) or not is_constant(value) or not value:
        return None
    return tuple(sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)


def _help(keywords: Mapping[str, object], name: str, default: Any) -> str:
    value = keywords.get("help")
    if not isinstance(value, str):
        return ""
    values = {"default": default, "dest": name, "metavar": keywords.get("metavar"), "prog": "", "const": ""}
    values["choices"] = ", ".join(map(str, _choices(keywords.get("choices")) or ()))
    expanded = re.sub(r"%\((\w+)\)[#0\- +]*\d*(?:\.\d+)?[a-zA-Z]", lambda m: str(values.get(m[1], m[0])), value)
    return " ".join(expanded.replace("%%", "%").split())
