"""What a script reads besides its options: variables, places of its command line, and what it names itself.

Answers for scripts without a parser: where could a base model or a data set be handed over, and where not. Nothing is
run; what is found rests on names and constants, so that it is for a person to confirm.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from app.argspec.definitions import dotted_name, last_name
from app.argspec.report import printable

Subject = Literal["model", "data", "output"]

_MAX_FOUND = 50
_MAX_TEXT = 200
_VARIABLES = frozenset({"os.environ", "environ"})
_GETS = frozenset({"os.environ.get", "environ.get", "os.getenv", "getenv"})
_ARGV = frozenset({"sys.argv", "argv"})
_LOADS: dict[str, Subject] = {
    "from_pretrained": "model",
    "SentenceTransformer": "model",
    "CrossEncoder": "model",
    "SparseEncoder": "model",
    "load_dataset": "data",
    "load_from_disk": "data",
    "read_csv": "data",
    "read_json": "data",
    "save_pretrained": "output",
    "save_model": "output",
}
"""Functions whose first argument names something."""
_KEYWORDS: dict[str, Subject] = {
    "pretrained_model_name_or_path": "model",
    "model_name_or_path": "model",
    "model_name": "model",
    "data_files": "data",
    "output_dir": "output",
    "save_directory": "output",
}


@dataclass(frozen=True)
class Variable:
    """An environment variable that the script reads."""

    name: str
    required: bool
    """The script ends without it (`os.environ["X"]`)."""
    line: int


@dataclass(frozen=True)
class Word:
    """A place of the command line that the script reads itself (`sys.argv[1]`), and the name that it gives it."""

    position: int
    name: str
    line: int


@dataclass(frozen=True)
class Named:
    """A model, data set or folder that the script names itself."""

    subject: Subject
    value: str
    line: int


@dataclass(frozen=True)
class Inputs:
    """What a script reads besides its options."""

    variables: Sequence[Variable] = ()
    words: Sequence[Word] = ()
    named: Sequence[Named] = ()


def read_inputs(tree: ast.Module) -> Inputs:
    """Return what the script reads besides its options. Runs nothing."""
    nodes = list(ast.walk(tree))
    constants = _constants(nodes)
    variables = {one.name: one for one in sorted(_variables(nodes), key=lambda one: one.required)}
    words = {one.position: one for one in _words(nodes)}
    named = dict.fromkeys(_named(nodes, constants))
    return Inputs(
        variables=tuple(sorted(variables.values(), key=lambda one: one.line))[:_MAX_FOUND],
        words=tuple(words[position] for position in sorted(words))[:_MAX_FOUND],
        named=tuple(sorted(named, key=lambda one: one.line))[:_MAX_FOUND],
    )


def _constants(nodes: Sequence[ast.AST]) -> dict[str, str]:
    """Return the names that stand for one text wherever they are assigned."""
    found: dict[str, set[str | None]] = {}
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, set()).add(_text(node.value))
    texts = {name: next(iter(values)) for name, values in found.items() if len(values) == 1}
    return {name: value for name, value in texts.items() if value is not None}


def _variables(nodes: Sequence[ast.AST]) -> Iterator[Variable]:
    for node in nodes:
        match node:
            case ast.Subscript(value=value, slice=ast.Constant(value=str(name)), ctx=ast.Load()) if (
                dotted_name(value) in _VARIABLES
            ):
                yield Variable(printable(name, limit=_MAX_TEXT), True, node.lineno)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if dotted_name(func) in _GETS:
                yield Variable(printable(name, limit=_MAX_TEXT), False, node.lineno)


def _words(nodes: Sequence[ast.AST]) -> Iterator[Word]:
    for node in nodes:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        for part in ast.walk(node.value):
            match part:
                case ast.Subscript(value=value, slice=ast.Constant(value=int(position))) if (
                    position > 0 and dotted_name(value) in _ARGV
                ):
                    yield Word(position, node.targets[0].id, node.lineno)


def _named(nodes: Sequence[ast.AST], constants: dict[str, str]) -> Iterator[Named]:
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        subject = _LOADS.get(last_name(node.func))
        given = [(subject, argument) for argument in node.args[:1] if subject]
        given += [(_KEYWORDS[one.arg], one.value) for one in node.keywords if one.arg in _KEYWORDS]
        for of, value in given:
            text = constants.get(value.id) if isinstance(value, ast.Name) else _text(value)
            if text and of is not None:
                yield Named(of, printable(text, limit=_MAX_TEXT), node.lineno)


def _text(node: ast.expr | None) -> str | None:
    """Return the text that an expression is, or begins with (with an ellipsis behind)."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(left=left, op=ast.Add()):
            start = _text(left)
            return f"{start.removesuffix('…')}…" if start else None
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            return f"{text}…"
    return None
