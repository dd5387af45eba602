"""How a stage of a method is called: module, arguments, configuration file, variables, working directory.

A stage that says nothing of it is called as DeepExtension calls scripts (`app.domain.rendering`). `expand` puts values
into what a method says. A parameter that it finds no place for is named, never dropped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any, Self

from pydantic import ConfigDict

from app.domain.definition import MethodDefinition, RunConfig
from app.domain.enums import JobKind
from app.domain.kinds import Stage
from app.domain.placeholders import Placeholder, PlaceholderKind, only_placeholder, parse, placeholders
from app.domain.rendering import ArgumentForm, checked_words, filled_arguments, render_equals, value_text
from app.domain.training_types import inference_form
from app.domain.values import Value

MERGE_KEY = "<<"
"""YAML's merge key: with the value `{parameters}` they become entries of the object that it stands in."""
CONFIG = "config"
"""Placeholder of the configuration file's path."""
FOLDERS = ("script_root", "run_dir")
"""Placeholders that every stage has beside the arguments that the platform fills in."""
DATASET, DATASET_FOLDER = "dataset_path", "dataset_dir"
"""Placeholders of the file of rows, and of the folder that it lies in."""


class WorkingDirectory(StrEnum):
    """Where the process of a stage starts."""

    SCRIPTS = "scripts"
    METHOD = "method"
    RUN = "run"


class _Frozen(Value):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ConfigFile(_Frozen):
    """A configuration file: its name, whose suffix says the format, and its content with placeholders."""

    name: str
    content: dict[str, Any] | list[dict[str, Any]]


class StageCall(_Frozen):
    """How a stage is called. `arguments` None: as DeepExtension calls scripts, with paths relative to where it runs."""

    module: str | None = None
    arguments: tuple[str | tuple[str, ...], ...] | None = None
    config: ConfigFile | None = None
    env: dict[str, str] = {}
    working_directory: WorkingDirectory = WorkingDirectory.SCRIPTS

    @classmethod
    def of(cls, config: RunConfig | None) -> Self:
        """Return how a stage of a valid method is called."""
        if config is None:
            return cls()
        return cls(
            module=config.module,
            arguments=None
            if config.arguments is None
            else tuple(item if isinstance(item, str) else tuple(item) for item in config.arguments),
            config=None
            if config.config is None
            else ConfigFile(
                name=config.config.name or "", content={} if config.config.content is None else config.config.content
            ),
            env=dict(config.env or {}),
            working_directory=WorkingDirectory(config.working_directory or WorkingDirectory.SCRIPTS),
        )

    @property
    def is_explicit(self) -> bool:
        """Whether the method says every argument itself."""
        return self.arguments is not None

    @property
    def placed(self) -> Mapping[str, bool]:
        """Return the parameters that have a place of their own, and whether it is one of an option without value."""
        found: dict[str, bool] = {}
        for one in self._placeholders():
            if one.kind in (PlaceholderKind.PARAMETER, PlaceholderKind.FLAG):
                found[one.name] = found.get(one.name, False) or one.kind is PlaceholderKind.FLAG
        return found

    @property
    def takes_others(self) -> bool:
        """Whether a parameter without a place of its own reaches the script nevertheless."""
        return not self.is_explicit or any(one.kind is PlaceholderKind.OTHERS for one in self._placeholders())

    @property
    def options(self) -> frozenset[str]:
        """Return the options that the method writes itself: no parameter of that name may come beside them."""
        words = [word for item in self.arguments or () for word in ([item] if isinstance(item, str) else item)]
        named = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--") and word != "--"}
        named |= set(_merged_into(self.config.content)) if self.config is not None else set()
        return frozenset(one.replace("-", "_") for one in named if "{" not in one)

    def passes(self, name: str) -> bool:
        """Return whether a parameter of this name has a place."""
        return name in self.placed or (self.takes_others and name.replace("-", "_") not in self.options)

    @property
    def platform_values(self) -> frozenset[str]:
        """Return the names of the platform's values that the method passes on."""
        return frozenset(one.name for one in self._placeholders() if one.kind is PlaceholderKind.PLATFORM)

    @property
    def option_of(self) -> Mapping[str, str]:
        """Return the option that a parameter is the value of, where the method writes one before it."""
        found: dict[str, str] = {}
        for item in self.arguments or ():
            for before, text in _pairs(item):
                whole = only_placeholder(text)
                if whole is not None and whole.kind is PlaceholderKind.PARAMETER and before.startswith("--"):
                    found.setdefault(whole.name, before.removeprefix("--"))
        return found

    def partners(self, name: str) -> frozenset[str]:
        """Return the parameters that `name` is passed together with only."""
        found: set[str] = set()
        for texts in self._parts():
            names = {one.name for text in texts for one in placeholders(text) if one.kind is PlaceholderKind.PARAMETER}
            found |= names if name in names else set()
        return frozenset(found - {name})

    def _parts(self) -> Iterator[tuple[str, ...]]:
        """Yield the texts that are given or left out together."""
        yield from ((item,) if isinstance(item, str) else item for item in self.arguments or ())
        if self.config is not None:
            yield from ((text,) for _, text in document_texts(self.config.content))
        yield from ((text,) for text in self.env.values())

    def _placeholders(self) -> Iterator[Placeholder]:
        for texts in self._parts():
            for text in texts:
                yield from placeholders(text)


def _pairs(item: str | tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield each text that follows an option in an item, with the option."""
    if isinstance(item, str):
        before, equals, text = item.partition("=")
        yield from [(before, text)] if equals else []
    else:
        yield from pairwise(item)


def _merged_into(document: Any) -> Iterator[str]:
    """Yield the names of members beside which all other parameters become members."""
    if isinstance(document, dict) and document.get(MERGE_KEY) == str(Placeholder(PlaceholderKind.OTHERS)):
        yield from (key for key in document if key != MERGE_KEY)
    for value in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from _merged_into(value)


def stage_call(definition: MethodDefinition, stage: Stage) -> StageCall:
    """Return how `stage` of a valid method is called."""
    return StageCall.of(definition.stage_config(stage))


def platform_placeholders(stage: Stage, training_type: str | None, *, producing: bool) -> tuple[str, ...]:
    """Return the names of the platform's values at `stage`, without the configuration file.

    `producing` says that the stage makes the method's first model: saving gets what a training gets as well.
    """
    names = dict.fromkeys(filled_arguments(stage, inference_form(training_type)))
    if producing:
        names |= dict.fromkeys(filled_arguments(JobKind.TRAINING))
    return (*names, *([DATASET_FOLDER] if DATASET in names else []), *FOLDERS)


def document_texts(document: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield each text of a JSON document, names of members apart, with the path to it."""
    match document:
        case str():
            yield at, document
        case dict():
            for key, value in document.items():
                yield from document_texts(value, (*at, str(key)))
        case list():
            for place, value in enumerate(document):
                yield from document_texts(value, (*at, str(place)))


@dataclass(frozen=True)
class CallValues:
    """What placeholders stand for. `forms`: how options want their values that are not `--k=v`."""

    platform: Mapping[str, Any]
    parameters: Mapping[str, Any]
    forms: Mapping[str, ArgumentForm] = field(default_factory=dict)
    false_as: str = "False"


@dataclass(frozen=True)
class ExpandedCall:
    """A call with its values. `arguments` None: the platform's.

    `left_out` are parts whose placeholders have no value, `unplaced` parameters with a value that reach nothing.
    """

    arguments: Sequence[str] | None
    config: Mapping[str, Any] | Sequence[Any] | None
    env: Mapping[str, str]
    left_out: Sequence[str] = ()
    unplaced: Sequence[str] = ()


def expand(call: StageCall, values: CallValues) -> ExpandedCall:
    """Put values into a call. A part with a placeholder that has no value is left out as a whole.

    Null is no value, and neither is an empty text of the platform. Raises `ArgumentTooLong`, `ArgumentNotText`.
    """
    return _Expansion(call, values).expanded()


class _Nothing:
    """Stands for a part that is left out."""


_NOTHING = _Nothing()


class _Expansion:
    """Puts values into one call and notes which parameters found a place."""

    def __init__(self, call: StageCall, values: CallValues) -> None:
        self._call, self._values = call, values
        self._given = {name: value for name, value in values.parameters.items() if value is not None}
        self._others = {name: value for name, value in self._given.items() if name not in call.placed}
        self._used: set[str] = set()
        self._left_out: list[str] = []

    def expanded(self) -> ExpandedCall:
        arguments = None
        if self._call.arguments is not None:
            arguments = checked_words((self._name(item), self._words(item)) for item in self._call.arguments)
        config = None if self._call.config is None else self._document(self._call.config.content)
        env = {name: value for name, text in self._call.env.items() if isinstance(value := self._text(text), str)}
        checked_words((name, [value]) for name, value in env.items())
        unplaced = () if arguments is None else tuple(name for name in self._given if name not in self._used)
        return ExpandedCall(arguments, config, env, self._left_out, unplaced)

    def _name(self, item: str | tuple[str, ...]) -> str:
        return item if isinstance(item, str) else " ".join(item)

    def _words(self, item: str | tuple[str, ...]) -> list[str]:
        """Return what an item of the arguments becomes: any number of words."""
        if isinstance(item, str) and (whole := only_placeholder(item)) is not None and whole.stands_alone:
            return self._other_words() if whole.kind is PlaceholderKind.OTHERS else self._flag(whole.name)
        texts = (item,) if isinstance(item, str) else item
        used = set(self._used)
        words: list[str] = []
        for text in texts:
            more = self._several(text)
            if more is None:
                self._used = used  # what stands beside it is left out too
                self._left_out.append(self._name(item))
                return []
            words += more
        return words

    def _several(self, text: str) -> list[str] | None:
        """Return the words of a text: a list that stands alone is several, unless the script reads it as JSON."""
        whole = only_placeholder(text)
        value = self._value(whole) if whole is not None else None
        if whole is not None and isinstance(value, (list, tuple)):
            as_json = whole.kind is PlaceholderKind.PLATFORM
            if not as_json and self._values.forms.get(whole.name) is not ArgumentForm.LIST:
                self._used.add(whole.name)
                return [value_text(one, false_as=self._values.false_as) for one in value]
        filled = self._text(text, note=False)
        return None if isinstance(filled, _Nothing) else [filled]

    def _flag(self, name: str) -> list[str]:
        if name not in self._given:
            return []
        self._used.add(name)
        return [f"--{name}"] if self._given[name] else []

    def _other_words(self) -> list[str]:
        self._used |= self._others.keys()
        undeclared = {
            name: ArgumentForm.WORDS
            for name, value in self._others.items()
            if name not in self._values.forms and isinstance(value, (list, tuple))
        }
        return render_equals(self._others, false_as=self._values.false_as, forms={**self._values.forms, **undeclared})

    def _document(self, document: Any) -> Any:
        match document:
            case str():
                return self._document_text(document)
            case dict():
                return self._object(document)
            case list():
                filled = (self._document(one) for one in document)
                return [one for one in filled if not isinstance(one, _Nothing)]
            case _:
                return document

    def _object(self, document: Mapping[str, Any]) -> dict[str, Any]:
        filled: dict[str, Any] = {}
        for key, value in document.items():
            one = self._document(value)
            if key == MERGE_KEY and isinstance(one, dict):
                filled |= {name: item for name, item in one.items() if name not in filled}
                self._used -= one.keys() & document.keys()  # what the method says itself stays
            elif not isinstance(one, _Nothing):
                filled[key] = one
        return filled

    def _document_text(self, text: str) -> Any:
        whole = only_placeholder(text)
        if whole is None:
            return self._text(text)
        if whole.kind is PlaceholderKind.OTHERS:
            self._used |= self._others.keys()
            return dict(self._others)
        value = self._value(whole)
        if isinstance(value, _Nothing):
            self._left_out.append(text)
        elif whole.kind is PlaceholderKind.PARAMETER:
            self._used.add(whole.name)
        return value

    def _text(self, text: str, *, note: bool = True) -> str | _Nothing:
        """Return a text with its values, nothing if one of them is missing; `note` that it is left out."""
        filled, used = "", set[str]()
        for part in parse(text):
            if isinstance(part, str):
                filled += part
                continue
            value = self._value(part)
            if isinstance(value, _Nothing):
                if note:
                    self._left_out.append(text)
                return _NOTHING
            filled += value_text(value, false_as=self._values.false_as)
            used |= {part.name} if part.kind is PlaceholderKind.PARAMETER else set()
        self._used |= used
        return filled

    def _value(self, placeholder: Placeholder) -> Any:
        if placeholder.kind is PlaceholderKind.PLATFORM:
            value = self._values.platform.get(placeholder.name)
            return _NOTHING if value is None or value == "" else value
        return self._given.get(placeholder.name, _NOTHING)
