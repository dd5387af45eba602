"""Other people's scripts and programs: their options by the platform's values, read from `known_options.toml`."""

import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources

from pydantic import ConfigDict, JsonValue

from app.domain.enums import JobKind
from app.domain.launchers import LauncherKind
from app.domain.values import Value


class _Row(Value):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OptionRow(_Row):
    """A value of the platform, and the options that it goes into."""

    stages: tuple[str, ...]
    role: str
    value: str
    names: tuple[str, ...]
    folder: str | None = None
    uncertain: bool = False


class ClassRow(_Row):
    """Options that an argument class of a library has."""

    path: str
    options: tuple[str, ...]
    notes: tuple[str, ...] = ()


class FixedRow(_Row):
    """What is always passed to a script that has an option."""

    stages: tuple[str, ...]
    name: str
    argument: str
    classes: tuple[str, ...] = ()


class Program(_Row):
    """What is started by a command or as a module."""

    name: str
    commands: tuple[str, ...]
    modules: tuple[str, ...]
    stage: str = JobKind.TRAINING.value
    training_type: str | None = None
    options: tuple[str, ...] = ()
    values: Mapping[str, str] = {}
    words: tuple[str, ...] = ()
    arguments: tuple[str, ...] | None = None
    config_name: str | None = None
    config: JsonValue = None
    env: Mapping[str, str] = {}
    working_directory: str | None = None
    output: str | None = None
    notes: tuple[str, ...] = ()


class LauncherRow(_Row):
    """What may stand before a script on a command line."""

    command: str
    kind: LauncherKind


class KnownTable(_Row):
    """Everything that is known."""

    platform_style: Mapping[str, tuple[tuple[str, ...], ...]]
    training_types: Mapping[str, str]
    variables: Mapping[str, tuple[str, ...]]
    options: tuple[OptionRow, ...]
    classes: tuple[ClassRow, ...]
    fixed: tuple[FixedRow, ...]
    programs: tuple[Program, ...]
    launchers: tuple[LauncherRow, ...]


def command_of(words: str) -> tuple[LauncherKind, str]:
    """Return the launcher that a command line begins with, and what it starts: a file, module or known command."""
    words = " ".join(words.split())
    launcher = LauncherKind.PYTHON
    for row in sorted(known_table().launchers, key=lambda row: -len(row.command)):
        if words.startswith(f"{row.command} "):
            launcher, words = row.kind, words.removeprefix(f"{row.command} ")
            break
    if launcher is not LauncherKind.PYTHON:  # its own options stand before what it starts
        rest = words.split()
        words = " ".join(rest[next((at for at, one in enumerate(rest) if _starts_something(one)), 0) :])
    if known := _module_of_command(words):
        return launcher, known
    first, _, rest_of = words.partition(" ")
    return launcher, (rest_of.partition(" ")[0] if first == "-m" else first)


def known_program(module: str) -> Program | None:
    """Return what is known of a module that is run."""
    return next((one for one in known_table().programs if module in one.modules), None)


def _module_of_command(words: str) -> str | None:
    """Return the module that runs what a command line starts, if the program is known."""
    for program in known_table().programs:
        for place, command in enumerate(program.commands):
            if words == command or words.startswith(f"{command} "):
                return program.modules[min(place, len(program.modules) - 1)]
    return None


def _starts_something(word: str) -> bool:
    return word == "-m" or word.endswith(".py")


def class_row(path: str) -> ClassRow | None:
    """Return what is known of a library's argument class."""
    return next((row for row in known_table().classes if fnmatchcase(path, row.path)), None)


def plain(name: str) -> str:
    """Return an option's name as names are compared: hyphens count as underscores."""
    return name.replace("-", "_").lower()


@cache
def known_table() -> KnownTable:
    """Return the table; it is read once."""
    file = resources.files("app.domain") / "known_options.toml"
    return KnownTable.model_validate(tomllib.loads(file.read_text("utf-8")))
