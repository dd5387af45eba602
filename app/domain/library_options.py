"""Options of libraries' configuration classes: how an environment describes them, and how a script's use is checked.

A script names the classes whose fields it takes (`ScriptParameters.option_classes`), or makes its parser of them
(`parser_classes`). A node describes them with the environment's own Python; until it did, an option is accepted with a
warning, and the script checks it when it starts.
"""

import difflib
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, Field

from app.domain.errors import Violation
from app.domain.plain_text import shown
from app.domain.rendering import ArgumentForm
from app.domain.script_parameters import OptionUse, ParameterKind, Remark, ScriptParameter, ScriptParameters
from app.domain.texts import Language, text
from app.domain.values import Value

MAX_NEAR = 3
UNREAD_CLASS = "unread_parser_class"
"""Code of a remark on a class that a parser is made of and no environment described yet."""


class _Frozen(Value):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OptionField(_Frozen):
    """A field of a configuration class, as `deepe_fields` prints it."""

    name: str = Field(max_length=200)
    kind: ParameterKind
    is_list: bool = False
    choices: tuple[Any, ...] | None = None
    nullable: bool = False
    required: bool = False
    default: Any = None
    default_text: str | None = None
    help: str = ""

    def parameter(self) -> ScriptParameter:
        """Return the field as a parameter: a list is passed as JSON."""
        return ScriptParameter(
            name=self.name,
            kind=self.kind,
            form=ArgumentForm.LIST if self.is_list else ArgumentForm.VALUE,
            typed=True,
            has_default=True,
            default=self.default,
            default_text=self.default_text,
            choices=self.choices,
            help=self.help,
        )

    def argument(self, group: str) -> ScriptParameter:
        """Return the field as a parser made of dataclasses declares it: a list is several words."""
        form = ArgumentForm.WORDS if self.is_list else ArgumentForm.VALUE
        with_hyphens = self.name.replace("_", "-")
        named = {"aliases": (with_hyphens,) if with_hyphens != self.name else (), "group": group}
        how = {"form": form, "required": self.required, "has_default": not self.required, "of_library": True}
        return self.parameter().model_copy(update=named | how)


class OptionClass(_Frozen):
    """A configuration class of an installed library."""

    path: str = Field(max_length=300)
    library: str = Field(max_length=200)
    version: str = Field(max_length=100)
    fields: tuple[OptionField, ...] = Field(max_length=1000)

    @property
    def names(self) -> Collection[str]:
        """Return the names of the fields."""
        return {one.name for one in self.fields}

    def find(self, name: str) -> OptionField | None:
        """Return the field of this name."""
        return next((one for one in self.fields if one.name == name), None)

    def document(self) -> dict[str, Any]:
        """Return what the database keeps."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def digest(self) -> str:
        """Return the sha256 of the document: equal for equal classes, on whatever node."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class OptionTable:
    """What no method takes, or chooses itself, whatever the library says of it."""

    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Field → code of the reason, and the name to use instead (empty: none)."""
    chosen: Collection[str] = ()
    """Fields whose default is the method's, not the library's."""


@dataclass(frozen=True)
class DescribedOptions:
    """What is known of the classes that a stage's script names: those that its environment was asked for."""

    classes: Mapping[str, OptionClass] = field(default_factory=dict)
    environment: str = ""
    table: OptionTable = field(default_factory=OptionTable)
    trouble: Mapping[str, str] = field(default_factory=dict)
    """Path → why the class could not be described there."""


@dataclass(frozen=True)
class FoundOption:
    """An option of a submission: the field that it is, or why it is refused, or why it cannot be judged yet."""

    parameter: ScriptParameter | None = None
    refusal: Violation | None = None
    warning: Violation | None = None


class OptionLookup:
    """Finds what a submission's parameters are that the script does not declare."""

    def __init__(self, script: ScriptParameters, described: DescribedOptions, given: Mapping[str, Any]) -> None:
        self._script = script
        self._described = described
        self._uses = [use for use in script.option_classes if _holds(use, script, given)]

    def find(self, name: str, at: str) -> FoundOption:
        """Return what the parameter `name` is that the request has at the pointer `at`."""
        table = self._described.table
        if (instead := self._script.options_instead.get(name)) is not None:
            return FoundOption(refusal=_refusal(at, name, "option_of_script", instead))
        if name in table.refused:
            return FoundOption(refusal=_refusal(at, name, *table.refused[name]))
        for use in self._uses:
            described = self._described.classes.get(use.path)
            if described is not None and (found := described.find(name)) is not None:
                return FoundOption(parameter=found.parameter())
        if undescribed := [use.path for use in self._uses if use.path not in self._described.classes]:
            params = {"name": name, "classes": ", ".join(undescribed), "environment": self._described.environment}
            unread = ScriptParameter(name=name, kind=ParameterKind.ANY)
            return FoundOption(parameter=unread, warning=Violation(at, "option_checked_at_start", params))
        return FoundOption(refusal=self._unknown(name, at))

    def completed(self, parameter: ScriptParameter) -> ScriptParameter:
        """Return the script's own parameter with the choices that a library gives for one of its names."""
        if parameter.choices is not None or parameter.is_list or parameter.kind is not ParameterKind.STRING:
            return parameter
        for use in self._uses:
            if (described := self._described.classes.get(use.path)) is None:
                continue
            for name in (parameter.name, *parameter.aliases):
                found = described.find(name)
                if found is not None and found.choices is not None and found.kind is ParameterKind.STRING:
                    return parameter.model_copy(update={"choices": found.choices})
        return parameter

    def _unknown(self, name: str, at: str) -> Violation:
        active = {use.path for use in self._uses}
        for use in self._script.option_classes:
            described = self._described.classes.get(use.path)
            if use.path not in active and described is not None and name in described.names:
                when = " ".join(f"{other}={'|'.join(map(str, values))}" for other, values in use.when.items())
                return Violation(at, "option_of_other_choice", {"name": name, "path": use.path, "when": when})
        classes = [described for use in self._uses if (described := self._described.classes.get(use.path))]
        own = [one.name for one in self._script.parameters]
        near = nearest(name, [*own, *(field for described in classes for field in described.names)])
        known = ", ".join(f"{one.path} ({one.library} {one.version})" for one in classes)
        params = {"name": shown(name), "classes": known, "near": ", ".join(near) or "-"}
        return Violation(at, "unknown_option", params)


def with_parser_classes(script: ScriptParameters, described: DescribedOptions) -> ScriptParameters:
    """Return the script with what its parser takes from classes of libraries, as far as they are described.

    What the script declares itself comes before fields of the same name.
    """
    own = set(script.declared_names)
    fields: dict[str, ScriptParameter] = {}
    unread: list[Remark] = []
    for use in script.parser_classes:
        if (one := described.classes.get(use.path)) is None:
            unread.append(Remark(code=UNREAD_CLASS, line=use.line, subject=use.path))
            continue
        fields |= {field.name: field.argument(use.path) for field in one.fields if field.name not in own}
    joined = {"parameters": (*script.parameters, *fields.values()), "unread": (*script.unread, *unread)}
    return script.model_copy(update=joined | {"parser_classes": ()}) if script.parser_classes else script


def nearest(name: str, known: Iterable[str]) -> Sequence[str]:
    """Return the names that are most like `name`."""
    names = list(dict.fromkeys(known))
    parts = sorted(one for one in names if name in one) if len(name) > 2 else []
    return list(dict.fromkeys([*difflib.get_close_matches(name, names, n=MAX_NEAR), *parts]))[:MAX_NEAR]


def option_properties(
    script: ScriptParameters, described: DescribedOptions, taken: Collection[str], language: Language
) -> Iterator[tuple[ScriptParameter, Sequence[ScriptParameter], dict[str, Any]]]:
    """Yield each option that can be set: its first form, all its forms, and what the schema says beside its type.

    `taken` are names that the script or the platform has.
    """
    entries: dict[str, list[tuple[OptionUse, OptionField]]] = {}
    for use in script.option_classes:
        if one := described.classes.get(use.path):
            for found in one.fields:
                entries.setdefault(found.name, []).append((use, found))
    table = described.table
    for name, uses in entries.items():
        if name in taken or name in table.refused or name in script.options_instead:
            continue
        forms = [found.parameter() for _, found in uses]
        if name in table.chosen:
            chosen = {"default": None, "default_text": text("option_chosen_by_method", language)}
            forms = [form.model_copy(update=chosen) for form in forms]
        always = any(not use.when for use, _ in uses)
        details = {
            "x-advanced": True,
            "x-classes": [use.path for use, _ in uses],
            "x-when": None if always else [{k: list(v) for k, v in use.when.items()} for use, _ in uses],
        }
        yield forms[0], forms, {key: value for key, value in details.items() if value is not None}


def _refusal(at: str, name: str, code: str, instead: str) -> Violation:
    if instead:
        code += "_instead"
    return Violation(at, code, {"name": name, "instead": instead})


def _holds(use: OptionUse, script: ScriptParameters, given: Mapping[str, Any]) -> bool:
    declared = script.by_name()
    for name, values in use.when.items():
        parameter = declared.get(name)
        default = parameter.default if parameter is not None else None
        if given.get(name, default) not in values:
            return False
    return True
