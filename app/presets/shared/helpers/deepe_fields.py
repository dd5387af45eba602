"""Fields of configuration classes (dataclasses): their names, types, defaults and help. A library and a program.

    python deepe_fields.py trl.SFTConfig peft.LoraConfig mlx_lm.lora.CONFIG_DEFAULTS

prints one line of JSON with a document for each class, or with the reason why there is none. The form of a method is
made of these documents, and scripts read their options by the same functions, so that both agree. Standard library
only; a type that is not understood is `any`, which takes JSON. A dictionary of a module's defaults counts as a class;
what its options mean is said by the parser that the module's `build_parser` returns.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import json
import math
import resource
import sys
import types
import typing
from typing import Any

MAX_HELP = 500
MAX_DEFAULT = 1000
MAX_FIELDS = 1000
MAX_OUTPUT = 4 * 2**20
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "")
NOTHING = ("none", "null")
SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field. `kind` is string, integer, number, boolean or any; `hint` the type that it is annotated with."""

    name: str
    kind: str
    is_list: bool
    choices: tuple[Any, ...] | None
    nullable: bool
    required: bool
    default: Any
    default_text: str | None
    help: str
    hint: Any

    def document(self) -> dict[str, Any]:
        """Return what is printed of it; members with their usual value are left out."""
        usual = {"is_list": False, "choices": None, "nullable": False, "required": False, "default": None}
        usual |= {"default_text": None, "help": "", "hint": self.hint}
        found = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if name not in usual or value != usual[name]}


class WrongValue(ValueError):
    """A text is not a value of a field's type."""


@functools.cache
def load(path: str) -> type:
    """Return the class of a dotted path. Raises `ImportError` if there is none, or if it has no fields."""
    named, _, name = path.rpartition(".")
    module = importlib.import_module(named)
    found = getattr(module, name, None)
    if isinstance(found, dict):
        return _class_of(name, found, module)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ImportError(f"{path} is not a dataclass")
    return found


def library_of(path: str) -> tuple[str, str]:
    """Return the name and the installed version of the library that a class comes from."""
    library = path.partition(".")[0]
    try:
        return library, importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return library, str(getattr(sys.modules.get(library), "__version__", ""))


def fields_of(cls: Any) -> dict[str, Field]:
    """Return the fields that the class takes as arguments, in their order."""
    hints = _hints(cls)
    found = [_field(one, hints.get(one.name, one.type)) for one in dataclasses.fields(cls) if one.init]
    return {one.name: one for one in found[:MAX_FIELDS]}


def describe(path: str) -> dict[str, Any]:
    """Return the document of a class."""
    fields = fields_of(load(path))
    library, version = library_of(path)
    return {
        "path": path,
        "library": library,
        "version": version,
        "fields": [field.document() for field in fields.values()],
    }


def from_text(field: Field, text: str) -> Any:
    """Return the value that a text on the command line means. Raises `WrongValue`."""
    if field.nullable and field.kind != "string" and text.strip().lower() in NOTHING:
        return None
    if field.is_list:
        return [_item(field, item) for item in _items(field, text)]
    return _item(field, text)


# --- describing -----------------------------------------------------------------------------------------------------


def _class_of(name: str, defaults: dict[str, Any], module: Any) -> type:
    """Return a dataclass of the options that a library keeps as a dictionary of their defaults."""
    parser = getattr(module, "build_parser", None)
    actions = {one.dest: one for one in parser()._actions} if callable(parser) else {}
    fields = []
    for option, value in defaults.items():
        said = actions.get(option)
        kind = type(value) if value is not None else getattr(said, "type", None)
        hint = kind if kind in SCALARS else Any
        metadata = {"help": getattr(said, "help", None), "choices": getattr(said, "choices", None)}
        made = dataclasses.field(default_factory=functools.partial(copy.deepcopy, value), metadata=metadata)
        fields.append((option, hint if value is not None else hint | None, made))
    return dataclasses.make_dataclass(name, fields)


def _field(one: Any, hint: Any) -> Field:
    nullable, rest = _without_none(hint)
    kind, is_list, choices = _type_of(rest)
    given = one.metadata.get("choices") if kind == "string" and choices is None else None
    if isinstance(given, (list, tuple)) and all(isinstance(choice, str) for choice in given):
        choices = tuple(given)
    default, text = _default(one)
    missing = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    return Field(
        name=one.name,
        kind=kind,
        is_list=is_list,
        choices=choices,
        nullable=nullable or (not missing and one.default is None),
        required=missing,
        default=default,
        default_text=text,
        help=_first_sentences(str(one.metadata.get("help") or "")),
        hint=hint,
    )


def _hints(cls: Any) -> dict[str, Any]:
    """Return the types of the fields; one that names what is not installed stays a text."""
    try:
        return typing.get_type_hints(cls)
    except Exception:  # whatever an annotation does when it is evaluated
        pass
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        names = vars(sys.modules.get(base.__module__, types))
        for name, hint in base.__dict__.get("__annotations__", {}).items():
            try:
                found |= typing.get_type_hints(types.SimpleNamespace(__annotations__={name: hint}), names)
            except Exception:
                found[name] = hint
    return found


def _without_none(hint: Any) -> tuple[bool, tuple[Any, ...]]:
    """Return whether None is allowed, and the types besides."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        several = typing.get_args(hint)
        return type(None) in several, tuple(one for one in several if one is not type(None))
    return hint is Any, (hint,)


def _type_of(several: tuple[Any, ...]) -> tuple[str, bool, tuple[Any, ...] | None]:
    """Return the kind of a value, whether it is a list of such values, and its choices."""
    enums = [one for one in several if isinstance(one, type) and issubclass(one, enum.Enum)]
    if len(enums) == 1 and set(several) <= {enums[0], str}:  # `Enum | str` takes the texts of the enum
        values = tuple(member.value for member in enums[0])
        return ("string", False, values) if all(isinstance(one, str) for one in values) else ("any", False, None)
    if set(several) == {int, float}:
        return "number", False, None
    if len(several) != 1:
        return "any", False, None
    (only,) = several
    if only in SCALARS:
        return SCALARS[only], False, None
    if typing.get_origin(only) is typing.Literal:
        choices = typing.get_args(only)
        kinds = {SCALARS.get(type(choice), "any") for choice in choices}
        return (kinds.pop(), False, choices) if len(kinds) == 1 else ("any", False, None)
    items = typing.get_args(only)
    if typing.get_origin(only) in (list, tuple) and items and items[0] in SCALARS and set(items[1:]) <= {...}:
        return SCALARS[items[0]], True, None
    return "any", False, None


def _default(one: Any) -> tuple[Any, str | None]:
    """Return the default as JSON knows it, else its text."""
    value = one.default
    if one.default_factory is not dataclasses.MISSING:
        try:
            value = one.default_factory()
        except Exception:
            return None, "…"
    if value is dataclasses.MISSING or value is None:
        return None, None
    if isinstance(value, enum.Enum):
        value = value.value
    try:
        if len(json.dumps(value, allow_nan=False)) <= MAX_DEFAULT:
            return value, None
    except (TypeError, ValueError):
        pass
    text = repr(value)
    return None, text if len(text) <= 200 else text[:199] + "…"


def _first_sentences(text: str) -> str:
    """Return whole sentences of a help text, as many as are short enough."""
    words = " ".join(text.split())
    if len(words) <= MAX_HELP:
        return words
    end = words.rfind(". ", 0, MAX_HELP)
    return words[: end + 1] if end > 0 else words[: MAX_HELP - 1] + "…"


# --- reading --------------------------------------------------------------------------------------------------------


def _items(field: Field, text: str) -> list[Any]:
    """Return the parts of a list: JSON, or texts between commas."""
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    found = _json(text)
    if not isinstance(found, list):
        raise WrongValue("a list in JSON")
    return [part if isinstance(part, str) else json.dumps(part) for part in found]


def _item(field: Field, text: str) -> Any:
    value: Any
    if field.kind == "boolean":
        if text.strip().lower() not in TRUE + FALSE:
            raise WrongValue("true or false")
        value = text.strip().lower() in TRUE
    elif field.kind == "integer":
        value = _number(int, text, "a whole number")
    elif field.kind == "number":
        value = _number(float, text, "a number")
    elif field.kind == "string":
        value = text
    else:
        value = _any(field, text)
    if field.choices is not None and value not in field.choices:
        raise WrongValue("one of " + ", ".join(str(choice) for choice in field.choices))
    return value


def _number(read: Any, text: str, wanted: str) -> Any:
    try:
        value = read(text)
    except ValueError:
        raise WrongValue(wanted) from None
    if not math.isfinite(value):
        raise WrongValue(wanted)
    return value


def _any(field: Field, text: str) -> Any:
    """Return JSON as its value, another text as itself; an object becomes the dataclass that the field wants."""
    _, several = _without_none(field.hint)
    try:
        value = _json(text)
    except WrongValue:
        if text.lstrip()[:1] in ("{", "[") or str not in several + tuple(type(x) for x in _literals(several)):
            raise
        return text
    if str in several and not isinstance(value, (dict, list, bool)) and not {int, float} & set(several):
        return text  # a number that is a text here
    if isinstance(value, dict) and dict not in {typing.get_origin(one) or one for one in several}:
        for one in several:
            if isinstance(one, type) and dataclasses.is_dataclass(one):
                try:
                    return one(**value)
                except (TypeError, ValueError) as error:
                    raise WrongValue(f"an object that {one.__name__} takes ({error})") from None
    return value


def _literals(several: tuple[Any, ...]) -> list[Any]:
    return [choice for one in several if typing.get_origin(one) is typing.Literal for choice in typing.get_args(one)]


def _json(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return json.loads(text)
    except ValueError:
        raise WrongValue("JSON") from None


def main() -> None:
    """Describe the classes that are named."""
    with contextlib.suppress(OSError, ValueError):  # whatever a library prints when it is imported
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_OUTPUT, MAX_OUTPUT))
    documents: dict[str, Any] = {}
    for path in sys.argv[1:]:
        try:
            documents[path] = describe(path)
        except Exception as error:  # whatever a library does when it is imported
            documents[path] = {"trouble": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(documents))


if __name__ == "__main__":
    main()
