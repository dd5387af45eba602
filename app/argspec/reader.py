"""Reads a script's argparse calls without running it.

The reader walks the module as Python would: top-level statements in order, functions where they are called, those of
modules beside the script too, loops over what is known, both branches of a condition that it cannot decide. It follows
the parser objects, and where it loses sight of them (dataclass parsers, names that are computed, functions of
libraries) it says so with the line; options may then exist that it does not list.
"""

import ast
import re
import sys
from collections.abc import Iterable, Sequence

from app.argspec.dataclass_fields import by_member_names, fields, is_dataclass
from app.argspec.definitions import LEAVES, ClassValue, FunctionValue, InstanceValue, last_name
from app.argspec.modules import Modules
from app.argspec.parser_names import (
    BUILDS,
    DATACLASS_PARSERS,
    LENIENT_PARSES,
    PARSES,
    mentioned,
    relevant_names,
)
from app.argspec.parsers import Action, Exclusive, Group, Parser, describe
from app.argspec.report import Arguments, OptionClass, ParserClass, Remark, printable
from app.argspec.values import PURE_METHODS, UNKNOWN, Imported, TooComplex, is_constant, pure_call, pure_method
from app.argspec.walker import Walker

_BUDGET = 100_000

_ARGPARSE = "argparse.ArgumentParser"
_TYRO, _SIMPLE, _SIMPLE_PARSER = "tyro.cli", "simple_parsing.parse", "simple_parsing.ArgumentParser"
_MAX_NESTED = 10
_HARMLESS = frozenset(
    {
        *("error", "exit", "print_help", "print_usage", "format_help", "format_usage", "get_default", "register"),
        *("parse_dict", "parse_json_file", "parse_yaml_file"),
    }
)
_HARMLESS_FUNCTIONS = frozenset({"print", "vars", "isinstance", "type", "repr", "str", "hasattr", "id", "autocomplete"})
_OPTION_CLASSES = "LIBRARY_OPTIONS"
_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_MAX_CLASSES = 50
_FOREIGN_NAME = re.compile(r"parse_(known_)?args|parser", re.IGNORECASE)


def read_arguments(tree: ast.Module, modules: Modules | None = None) -> Arguments:
    """Return the options that the script declares and the places that could not be read. Runs nothing.

    What stands in `modules` is followed; those that are missing there are noted in them.
    """
    modules = modules or Modules()
    try:
        found = _Reader(tree, modules, eager=False).read()
    except (TooComplex, RecursionError):
        return Arguments(unread=(Remark(code="unread_too_complex", line=1),))
    if not found.unread:
        return found
    try:  # again, with all that is imported: it takes longer
        return _Reader(tree, modules, eager=True).read()
    except (TooComplex, RecursionError):
        return found


class _Reader(Walker):
    """Walks one script and follows its parsers."""

    def __init__(self, tree: ast.Module, modules: Modules, *, eager: bool) -> None:
        super().__init__(budget=_BUDGET, modules=modules, eager=eager)
        self._tree = tree
        self._relevant = relevant_names(tree)
        self._line = 1
        """The line of the script that is walked, or that called what is walked."""
        self._parsers: list[Parser] = []
        self._unread: list[Remark] = []

    def read(self) -> Arguments:
        """Walk the module, then, if the command line was not parsed on the way, every function by itself."""
        self.block(self._tree.body)
        if not any(parser.parses for parser in self._parsers):
            self._walk_the_rest(self.module.names.values())
        parsers = [parser for parser in self._parsers if parser.parses] or self._parsers
        if not parsers and not self._unread:
            self._lose("unread_no_parser", self._tree)
        if parsers and not any(parser.parses for parser in parsers):
            self._unread.append(Remark(code="unread_parse_not_found", line=parsers[0].line))
        parses = [lenient for parser in parsers for lenient in parser.parses]
        described = describe(parsers)
        classes, instead = self._option_classes()
        if described.left_out:
            self._unread.append(Remark(code="unread_too_complex", line=described.left_out))
        return Arguments(
            options=described.options,
            positionals=described.positionals,
            exclusive=described.exclusive,
            accepts_unknown=all(parses) if parses else True,
            abbreviates=any(parser.abbreviates for parser in parsers),
            unread=tuple(dict.fromkeys(self._unread)),
            notes=tuple(dict.fromkeys(described.notes)),
            parser_classes=tuple(dict.fromkeys(one for parser in parsers for one in parser.classes)),
            option_classes=classes,
            options_instead=instead,
        )

    def _option_classes(self) -> tuple[tuple[OptionClass, ...], dict[str, str]]:
        """Return the configuration classes that the script names in a constant for `deepe_options`."""
        if _OPTION_CLASSES not in self.module.names:
            return (), {}
        match self.module.names[_OPTION_CLASSES]:
            case {"classes": dict() as classes, **rest} if is_constant(classes) and is_constant(rest):
                instead = rest.get("instead", {})
                if (
                    len(classes) <= _MAX_CLASSES
                    and all(map(_is_class, classes.items()))
                    and isinstance(instead, dict)
                    and all(isinstance(text, str) for pair in instead.items() for text in pair)
                ):
                    return tuple(OptionClass(path=path, when=when) for path, when in classes.items()), instead
        self._unread.append(Remark(code="unread_option_classes", line=1, subject=_OPTION_CLASSES))
        return (), {}

    def _walk_the_rest(self, values: Iterable[object]) -> None:
        for value in list(values):
            if isinstance(value, FunctionValue) and self.is_relevant(value.node) and value.node not in self.visited:
                self.run_function(value, [], {})
            elif isinstance(value, ClassValue) and self.is_relevant(value.node) and value.node not in self.visited:
                made = self._make_instance(value, [], {}, value.node)
                for method in value.names.values():
                    if isinstance(method, FunctionValue) and method.node not in self.visited:
                        self.run_function(method, [made], {})

    # ---- what the walker asks ---------------------------------------------------------------------------------------

    def is_relevant(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
        return node.name in self._relevant

    def is_worth_rounds(self, node: ast.AST) -> bool:
        return self._touches_parser(mentioned(node))

    def concerns(self, values: Sequence[object]) -> bool:
        return any(isinstance(value, (Parser, Group)) for value in values)

    def enter_module(self, tree: ast.Module) -> None:
        self._relevant |= relevant_names(tree)

    def cut(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if self.is_relevant(node):
            self._lose("unread_too_complex", node)

    def choose(self, values: Sequence[object]) -> object:
        return next((value for value in values if isinstance(value, (Parser, Group))), UNKNOWN)

    def set_attribute(self, base: object, name: str, value: object) -> None:
        if isinstance(base, Action):
            base.keywords[name] = value

    def opaque(self, node: ast.expr) -> object:
        value = super().opaque(node)
        comprehension = isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp))
        if comprehension and value is UNKNOWN and self._touches_parser(mentioned(node)):
            self._lose("unread_loop", node)
        return value

    def _touches_parser(self, names: set[str]) -> bool:
        return bool(names & BUILDS) or any(isinstance(self.lookup(name), (Parser, Group)) for name in names)

    # ---- calls ------------------------------------------------------------------------------------------------------

    def call(self, node: ast.Call) -> object:
        self._line = self._line_of(node)
        if not isinstance(node.func, ast.Attribute):
            return self._call_value(self.evaluate(node.func), node)
        base, name = self.evaluate(node.func.value), node.func.attr
        match base:
            case Parser() | Group():
                with self.following(name in BUILDS):
                    return self._parser_method(base, name, node)
            case _Subcommands():
                return Parser(self._line_of(node))  # its options belong to a subcommand, which is never given
            case InstanceValue() | ClassValue() if isinstance(self.attribute_of(base, node.func), FunctionValue):
                return self._call_method(base, node.func, node)
            case str() | dict() | list() | set():
                if not isinstance(base, str) and name not in PURE_METHODS:
                    self.bind(node.func.value, UNKNOWN)  # append, update, ...: no longer what it was
                return pure_method(base, name, self.arguments(node))
        return self._call_value(self.attribute_of(base, node.func), node)

    def _call_value(self, function: object, node: ast.Call) -> object:
        with self.following(isinstance(function, Imported) and _makes_parser(function)):
            arguments, keywords = self.arguments(node), self.keywords(node)
        name = last_name(node.func)
        handed = [value for value in (*arguments, *keywords.values()) if isinstance(value, (Parser, Group))]
        if (
            isinstance(function, Imported)
            and (handed or _FOREIGN_NAME.search(name))
            and name not in _HARMLESS_FUNCTIONS
        ):
            function = self.followed(function)
        match function:
            case FunctionValue():
                return self.run_function(function, arguments, keywords)
            case ClassValue():
                return self._make_instance(function, arguments, keywords, node)
            case Imported() if _is_parser_class(function):
                return self._make_parser(function, arguments, keywords, node)
            case Imported(dotted=dotted) if dotted in (_TYRO, _SIMPLE):
                return self._parse_dataclass(function, arguments, keywords, node)
            case Imported(dotted="sys.exit" | "os._exit" | "builtins.exit" | "builtins.quit"):
                return LEAVES
        if handed:
            if name not in _HARMLESS_FUNCTIONS:
                self._lose("unread_handed_on", node, node.func)
            return handed[0]
        if name in PARSES or name == "add_argument" or (isinstance(function, Imported) and _FOREIGN_NAME.search(name)):
            self._lose("unread_foreign_parser", node, node.func)
        return pure_call(function, arguments, keywords)

    def _parse_dataclass(
        self, function: Imported, arguments: Sequence[object], keywords: dict[str, object], node: ast.Call
    ) -> object:
        """Read a call that makes a parser of a dataclass and parses the command line at once."""
        parser = Parser(line=self._line_of(node), abbreviates=function.dotted != _TYRO)
        parser.parses.append(keywords.get("return_unknown_args") is True)
        self._parsers.append(parser)
        types = next(iter(arguments), keywords.get("config_class", UNKNOWN))
        self._add_dataclass(parser, types, node, function)
        return UNKNOWN

    def _call_method(self, base: InstanceValue | ClassValue, func: ast.Attribute, node: ast.Call) -> object:
        method = self.attribute_of(base, func)
        assert isinstance(method, FunctionValue)
        decorators = {last_name(decorator) for decorator in method.node.decorator_list}
        unbound = "staticmethod" in decorators or (isinstance(base, ClassValue) and "classmethod" not in decorators)
        arguments = self.arguments(node)
        return self.run_function(method, arguments if unbound else [base, *arguments], self.keywords(node))

    def _make_instance(
        self, kind: ClassValue, arguments: list[object], keywords: dict[str, object], node: ast.AST
    ) -> object:
        self.visited.add(kind.node)
        made: object = InstanceValue(kind)
        parser_class = next(
            (base for base in kind.bases if isinstance(base, Imported) and _is_parser_class(base)), None
        )
        if parser_class is not None:
            made = self._make_parser(parser_class, arguments, keywords, node)
            if set(kind.names) & (PARSES | BUILDS):
                self._lose("unread_foreign_parser", kind.node, kind.node.name)
        initialise = kind.names.get("__init__")
        if isinstance(initialise, FunctionValue):
            self.run_function(initialise, [made, *arguments], keywords)
        return made

    # ---- parsers ----------------------------------------------------------------------------------------------------

    def _make_parser(
        self, kind: Imported, arguments: Sequence[object], keywords: dict[str, object], node: ast.AST
    ) -> Parser:
        parser = Parser(
            line=self._line_of(node),
            resolves_conflicts=keywords.get("conflict_handler") == "resolve",
            abbreviates=keywords.get("allow_abbrev") is not False,
        )
        self._parsers.append(parser)
        if kind.last in DATACLASS_PARSERS:
            types = next(iter(arguments), keywords.get("dataclass_types", ()))
            for one in types if isinstance(types, (list, tuple)) else [types]:
                self._add_dataclass(parser, one, node, kind)
        elif kind.dotted not in (_ARGPARSE, _SIMPLE_PARSER):
            self._lose("unread_foreign_parser", node, kind.dotted)
        parents = keywords.get("parents", [])
        for parent in parents if isinstance(parents, (list, tuple)) else [UNKNOWN]:
            if isinstance(parent, Parser):
                parser.adopt(parent)
            else:
                self._lose("unread_foreign_parser", node, "parents")
        if "-" not in str(keywords.get("prefix_chars", "-")):
            self._lose("unread_foreign_parser", node, "prefix_chars")
        return parser

    def _add_dataclass(self, parser: Parser, value: object, node: ast.AST, kind: Imported, prefix: str = "") -> None:
        """Declare an option for each field; those of a library's class are known where the library is installed."""
        match value := self.followed(value):
            case ClassValue():
                for base in map(self.followed, value.bases):
                    if isinstance(base, ClassValue) or (isinstance(base, Imported) and _is_of_library(base)):
                        self._add_dataclass(parser, base, node, kind, prefix)
                if is_dataclass(value):
                    self._add_fields(parser, value, kind, prefix)
            case Imported() if (
                kind.last in DATACLASS_PARSERS and _is_of_library(value) and len(parser.classes) < _MAX_CLASSES
            ):
                parser.classes.append(ParserClass(value.dotted, self._line_of(node)))
            case _:
                self._lose("unread_dataclass_parser", node, kind.last)

    def _add_fields(self, parser: Parser, value: ClassValue, kind: Imported, prefix: str) -> None:
        with self.within(value.scope), self.following(True):
            for field in fields(value, self.evaluate):
                of_transformers = kind.last in DATACLASS_PARSERS
                if field.type.nested is not None and not of_transformers and prefix.count(".") < _MAX_NESTED:
                    inner = f"{prefix}{field.name}." if kind.dotted == _TYRO else ""
                    before = list(parser.actions)
                    self._add_dataclass(parser, field.type.nested, field.node, kind, inner)
                    if field.source not in ("", field.type.nested.node.name):  # an object with values of its own
                        for action in parser.actions:
                            if action not in before:
                                action.keywords["default"], action.default_source = UNKNOWN, field.source
                    continue
                flags = kind.dotted == _TYRO
                keywords = field.keywords if of_transformers else by_member_names(field, flags=flags)
                given = keywords.pop("aliases", [])
                aliases = [given] if isinstance(given, str) else given if isinstance(given, list) else []
                hyphens = [f"--{prefix}{field.name}".replace("_", "-")] if kind.dotted != _SIMPLE else []
                names = [f"--{prefix}{field.name}", *hyphens, *(one for one in aliases if isinstance(one, str))]
                action = Action(
                    names=list(dict.fromkeys(names)),
                    keywords=keywords,
                    default_source=printable(field.source, limit=200),
                    line=self._line_of(field.node),
                    group=value.node.name,
                )
                parser.actions = [one for one in parser.actions if one.dest != action.dest]
                parser.actions.append(action)

    def _parser_method(self, base: Parser | Group, name: str, node: ast.Call) -> object:
        parser = base.parser if isinstance(base, Group) else base
        group = base if isinstance(base, Group) else Group(parser)
        match name:
            case "add_argument":
                return self._add_argument(group, node)
            case "add_argument_group":
                titles = [*self.arguments(node), self.keywords(node).get("title")]
                return Group(parser, next((title for title in titles if isinstance(title, str)), None))
            case "add_mutually_exclusive_group":
                required = self.keywords(node).get("required") is True and not self.branches
                return Group(parser, group.title, Exclusive(required))
            case "add_arguments":  # of simple_parsing
                types = next(iter(self.arguments(node)), UNKNOWN)
                self._add_dataclass(parser, types, node, Imported(_SIMPLE))
                return None
            case "add_subparsers":
                self._lose("unread_subcommands", node)
                return _Subcommands()
            case "set_defaults":
                parser.defaults |= self.keywords(node)
                return None
            case _ if name in PARSES:
                return self._parse_call(parser, name, node)
            case _ if name not in _HARMLESS:
                self._lose("unread_handed_on", node, node.func)
        return LEAVES if name in ("error", "exit") else UNKNOWN

    def _parse_call(self, parser: Parser, name: str, node: ast.Call) -> object:
        arguments, keywords = self.arguments(node), self.keywords(node)
        given = arguments[0] if arguments else keywords.get("args")
        lenient = name in LENIENT_PARSES or keywords.get("return_remaining_strings") is True
        if not isinstance(given, (list, tuple)) or not is_constant(given):  # a fixed list is not the command line
            parser.parses.append(lenient)
        return (UNKNOWN, UNKNOWN) if name in LENIENT_PARSES else UNKNOWN

    def _add_argument(self, group: Group, node: ast.Call) -> object:
        names, keywords = self.arguments(node), self.keywords(node)
        if any(keyword.arg is None and not isinstance(self.evaluate(keyword.value), dict) for keyword in node.keywords):
            self._lose("unread_star_arguments", node, node)
        if self.loops:
            self._lose("unread_loop", node)
            return UNKNOWN
        known = [name for name in names if isinstance(name, str) and name.strip("-")]
        if not known or len(known) != len(names):
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            self._lose("unread_star_arguments" if starred else "unread_dynamic_name", node, node)
            return UNKNOWN
        if keywords.get("action") in ("help", "version"):
            return UNKNOWN
        default = next((keyword.value for keyword in node.keywords if keyword.arg == "default"), None)
        action = Action(
            names=known,
            keywords=keywords,
            default_source=printable(ast.unparse(default), limit=200) if default else "",
            line=self._line_of(node),
            group=group.title,
            exclusive=group.exclusive,
            conditional=self.branches > 0,
        )
        group.parser.actions.append(action)
        return action

    def _lose(self, code: str, node: ast.AST, subject: ast.AST | str = "") -> None:
        """Note where the reading broke off."""
        source = subject if isinstance(subject, str) else printable(" ".join(ast.unparse(subject).split()), limit=80)
        if not self._in_script:
            source = f"{self._scope.module.names['__name__']}:{_line(node)} {source}".rstrip()
        self._unread.append(Remark(code=code, line=self._line_of(node), subject=source))

    @property
    def _in_script(self) -> bool:
        return self._scope.module is self.module

    def _line_of(self, node: ast.AST) -> int:
        """Return the line of the script: that of the call that led into another module."""
        return _line(node) if self._in_script else self._line


class _Subcommands:
    """What `add_subparsers` returns."""


def _is_class(named: tuple[object, object]) -> bool:
    """Whether it is the path of a class, with the values of options that it depends on."""
    match named:
        case (str(path), dict(when)) if _CLASS_PATH.fullmatch(path):
            return all(isinstance(name, str) and isinstance(values, list) for name, values in when.items())
    return False


def _is_of_library(value: Imported) -> bool:
    """Whether it may be a class that an installed library has."""
    top = value.dotted.partition(".")[0]
    is_path = _CLASS_PATH.fullmatch(value.dotted) is not None and value.dotted.isascii()
    return is_path and top != "builtins" and top not in sys.stdlib_module_names


def _is_parser_class(value: Imported) -> bool:
    return value.last.endswith("ArgumentParser") or value.last in DATACLASS_PARSERS


def _makes_parser(value: Imported) -> bool:
    return _is_parser_class(value) or value.dotted in (_TYRO, _SIMPLE)


def _line(node: ast.AST) -> int:
    return int(getattr(node, "lineno", 1))
