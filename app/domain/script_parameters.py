"""What a script says about its command line: the values that the platform works with."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import ConfigDict

from app.domain.errors import Violation
from app.domain.rendering import ArgumentForm
from app.domain.values import Value


class _Frozen(Value):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParameterKind(StrEnum):
    """Type of a parameter's value; `any` where the script's own function reads the text."""

    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    ANY = "any"


_TRUE_WORDS = frozenset({"true", "1", "yes", "y", "t", "on"})


def from_text(text: str, kind: ParameterKind) -> Any:
    """Return the value that a script reads from `text`; the text itself if it is no value of that kind."""
    try:
        match kind:
            case ParameterKind.INTEGER:
                return int(text)
            case ParameterKind.NUMBER:
                return float(text)
            case ParameterKind.BOOLEAN:
                return text.strip().lower() in _TRUE_WORDS
            case _:
                return text
    except ValueError:
        return text


class ScriptParameter(_Frozen):
    """One option of a script."""

    name: str
    """What follows the two hyphens; the key under which a job gives the value."""
    aliases: tuple[str, ...] = ()
    kind: ParameterKind = ParameterKind.STRING
    typed: bool = False
    """The script says itself what type the value has."""
    form: ArgumentForm = ArgumentForm.VALUE
    required: bool = False
    has_default: bool = False
    """The script says what happens without a value; an explicit `default=None` counts."""
    default: Any = None
    default_text: str | None = None
    """The source of a default that is known only at run time."""
    choices: tuple[Any, ...] | None = None
    help: str = ""
    group: str | None = None
    line: int = 0
    reads_false_as_true: bool = False
    """`type=bool`: every text but the empty one is true."""
    of_library: bool = False
    """A field of a library's class, one of hundreds."""

    @property
    def is_list(self) -> bool:
        """Whether the value is a list of what `kind` says."""
        return self.form in (ArgumentForm.REPEATED, ArgumentForm.WORDS, ArgumentForm.LIST)

    @property
    def is_plain_text(self) -> bool:
        """Whether it is a text of the script's own, which a server that wants an object would refuse."""
        return self.kind is ParameterKind.STRING and self.typed and "json" not in self.help.lower()


class Positional(_Frozen):
    """An argument without a name, which the platform never passes."""

    name: str
    required: bool
    line: int


class ExclusiveGroup(_Frozen):
    """Options of which one at most may be given."""

    names: tuple[str, ...]
    required: bool = False


class Remark(_Frozen):
    """Something at a line of the script: a part that could not be read, or one that will fail when it runs."""

    code: str
    line: int
    subject: str = ""

    def violation(self, pointer: str = "") -> Violation:
        """Return the remark as a sentence in three languages."""
        return Violation(pointer, self.code, {"line": self.line, "subject": self.subject})


class OptionUse(_Frozen):
    """A configuration class of a library that a script takes options of, if its parameters have these values."""

    path: str
    when: Mapping[str, tuple[Any, ...]] = {}


_NAMES_UNKNOWN = frozenset(
    {
        *("unread_loop", "unread_star_arguments", "unread_dynamic_name", "unread_parse_not_found"),
        *("unread_too_complex", "unread_option_classes"),
    }
)
"""Remarks on places that may declare options of any name; functions of libraries declare none of the platform's."""


class ParserClass(_Frozen):
    """A dataclass of a library whose fields a script's parser takes (`HfArgumentParser(TrainingArguments)`)."""

    path: str
    line: int


class ScriptParameters(_Frozen):
    """All options of a script, and how far they could be read without running it."""

    filename: str = ""
    parameters: tuple[ScriptParameter, ...] = ()
    positionals: tuple[Positional, ...] = ()
    exclusive: tuple[ExclusiveGroup, ...] = ()
    accepts_unknown: bool = False
    """The script ignores options that it does not know (`parse_known_args`)."""
    abbreviates: bool = True
    """argparse takes `--seq` for `--seq_length` if the script declares only that."""
    unread: tuple[Remark, ...] = ()
    notes: tuple[Remark, ...] = ()
    parser_classes: tuple[ParserClass, ...] = ()
    """Classes whose fields are further parameters, which an environment has yet to say."""
    option_classes: tuple[OptionUse, ...] = ()
    """Classes whose fields the script takes beyond its own parameters; of a field in several, the first has it."""
    options_instead: Mapping[str, str] = {}
    """Fields of these classes that the script has another name for."""

    @property
    def partly_read(self) -> bool:
        """Whether there may be options that are not listed."""
        return bool(self.unread or self.parser_classes)

    @property
    def hides_names(self) -> bool:
        """Whether an option that is not listed may be declared nevertheless, whatever its name."""
        return any(remark.code in _NAMES_UNKNOWN for remark in self.unread)

    @property
    def refuses_unknown(self) -> bool:
        """Whether the script is known to end at an option that it does not declare."""
        return not self.accepts_unknown and not self.hides_names

    @property
    def declared_names(self) -> tuple[str, ...]:
        """Every name that the script accepts, aliases included."""
        return tuple(name for parameter in self.parameters for name in (parameter.name, *parameter.aliases))

    def longer_names(self, name: str) -> tuple[str, ...]:
        """Return the options for whose abbreviation argparse would take `name`; with several it ends the script."""
        declared = self.declared_names
        if not self.abbreviates or self.hides_names or name in declared:
            return ()
        return tuple(option for option in declared if option.startswith(name))

    @property
    def forms(self) -> dict[str, ArgumentForm]:
        """How to render the options that are not taken as `--k=v`."""
        return {
            name: parameter.form
            for parameter in self.parameters
            if parameter.form is not ArgumentForm.VALUE
            for name in (parameter.name, *parameter.aliases)
        }

    def by_name(self) -> Mapping[str, ScriptParameter]:
        """Return the options by each of their names."""
        return {name: p for p in self.parameters for name in (p.name, *p.aliases)}


class Variable(_Frozen):
    """An environment variable that the script reads."""

    name: str
    required: bool
    line: int


class Word(_Frozen):
    """A place of the command line that the script reads itself, and the name that it gives it."""

    position: int
    name: str
    line: int


class Named(_Frozen):
    """A model, data set or folder that the script names itself; `subject` is model, data or output."""

    subject: str
    value: str
    line: int


class OtherInputs(_Frozen):
    """What a script reads besides its options."""

    variables: tuple[Variable, ...] = ()
    words: tuple[Word, ...] = ()
    named: tuple[Named, ...] = ()
