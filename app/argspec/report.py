"""What a script says about its command line and its imports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["string", "integer", "number", "boolean", "any"]
"""Type of an option's value; `any` where the script's own function reads the text."""

Form = Literal["value", "flag", "negatable", "repeated", "words", "counted"]
"""How an option wants its value: `--k=v`, `--k`, `--k` or `--no-k`, `--k=a --k=b`, `--k a b`, `--k --k`."""


@dataclass(frozen=True)
class Remark:
    """Something at a line of the script: a part that could not be read, or one that will fail when it runs."""

    code: str
    line: int
    subject: str = ""


@dataclass(frozen=True)
class Option:
    """One option of a script."""

    names: Sequence[str]
    """What follows the two hyphens, in the order of the declaration; at least one."""
    kind: Kind
    typed: bool
    """The script says itself what type the value has."""
    form: Form
    required: bool
    has_default: bool
    """The script says what happens without a value; an explicit `default=None` counts."""
    default: Any
    """A JSON value, as the script writes it: a text still goes through the option's type."""
    default_source: str | None
    """The source of a default that is known only at run time."""
    choices: Sequence[Any] | None
    help: str
    group: str | None
    line: int
    reads_false_as_true: bool
    """`type=bool`: every text but the empty one is true."""


@dataclass(frozen=True)
class Positional:
    """An argument without a name."""

    name: str
    required: bool
    line: int


@dataclass(frozen=True)
class ExclusiveGroup:
    """Options of which one at most may be given, by their first names."""

    names: Sequence[str]
    required: bool


@dataclass(frozen=True)
class OptionClass:
    """A configuration class of a library whose fields the script takes as options, if its arguments are these."""

    path: str
    when: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class ParserClass:
    """A dataclass of a library whose fields a script's parser takes as options."""

    path: str
    line: int


@dataclass(frozen=True)
class Arguments:
    """All options of a script, and how far they could be read."""

    options: Sequence[Option] = ()
    positionals: Sequence[Positional] = ()
    exclusive: Sequence[ExclusiveGroup] = ()
    accepts_unknown: bool = True
    """The script ignores options that it does not know (`parse_known_args`)."""
    abbreviates: bool = True
    """argparse takes `--seq` for `--seq_length` if the script declares only that."""
    unread: Sequence[Remark] = ()
    """Places that could not be read; there may be options that are not listed."""
    notes: Sequence[Remark] = ()
    parser_classes: Sequence[ParserClass] = ()
    """Where there are any, more options are known only in the environment that has the library."""
    option_classes: Sequence[OptionClass] = ()
    options_instead: Mapping[str, str] = field(default_factory=dict)
    """Fields of these classes that are refused, with the option to use instead of each."""


@dataclass(frozen=True)
class Imports:
    """Modules that a script needs beside the standard library."""

    modules: Sequence[str] = ()
    search_path: Sequence[str] = ()
    """Folders that the script adds to `sys.path`; an empty text for what is unknown."""
    folders: Sequence[str] = ()
    """The same as paths: `{file}/../lib` from the script's own, anything else from where it runs."""
    unknown_folders: Sequence[int] = ()
    """Lines that change `sys.path` by what is known only at run time."""
    attributes: Sequence[str] = ()
    """What the script takes from modules as soon as it starts, as `module:name`; without it, it ends there."""
    names: Sequence[str] = ()
    """Everything that may be imported, by dotted names: `a.b.c` for `from a.b import c`, `..c` for relative ones."""
    computed: Sequence[int] = ()
    """Lines that import or run what is known only at run time."""
    files: Sequence[str] = ()
    """Texts that may name files beside the script, if it looks for files there at all."""


@dataclass(frozen=True)
class SyntaxProblem:
    """Where Python stops understanding a file (both counted from 1), and what it says."""

    line: int
    column: int
    message: str


def printable(text: str, *, limit: int) -> str:
    """Return `text` as one line of at most `limit` characters, control characters and half characters escaped."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def is_text(value: str) -> bool:
    """Whether `value` can be written as UTF-8: it has no half characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
