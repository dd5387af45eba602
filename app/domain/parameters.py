"""The parameters of a stage: one JSON Schema for form, documentation and check, and the check itself.

They are what the script declares, joined with what the platform knows. The wrong type is refused; a value outside of
the typical range only draws a warning. What the platform fills in cannot be set.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from app.domain.enums import JobKind
from app.domain.errors import Violation
from app.domain.kinds import Stage
from app.domain.known_parameters import KnownParameter, known_at, reserved_at
from app.domain.library_options import DescribedOptions, FoundOption, OptionLookup, nearest, option_properties
from app.domain.plain_text import shown
from app.domain.pointers import pointer
from app.domain.rendering import ArgumentForm
from app.domain.script_parameters import ParameterKind, ScriptParameter, ScriptParameters, from_text
from app.domain.stage_calls import StageCall
from app.domain.texts import DEFAULT_LANGUAGE, Language

_NAME = re.compile(r"[^\W\d][\w.-]{0,99}")
_MAX_INTEGER = 2**63
_TYPE_KEYS = ("type", "items", "enum")
NO_OPTIONS = DescribedOptions()
PLATFORM_CALL = StageCall()
"""The call of a stage whose method says nothing of it."""
_MAX_COUNT = 100
_MAX_PAIRED = 20  # names of a group whose pairs are excluded one by one, so that a message names the pair


@dataclass(frozen=True)
class ParameterCheck:
    """What is wrong with a job's parameters, what is unusual, and what the script is given."""

    violations: tuple[Violation, ...]
    warnings: tuple[Violation, ...]
    effective: dict[str, Any]
    """The values given, and the platform's own for what the script needs and was not given; in a stable order."""


def json_schema(
    script: ScriptParameters,
    *,
    stage: Stage = JobKind.TRAINING,
    producing: bool = False,
    language: Language = DEFAULT_LANGUAGE,
    options: DescribedOptions = NO_OPTIONS,
    call: StageCall = PLATFORM_CALL,
) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a stage's parameters.

    `producing` says that a saving script makes the method's first model and gets the training's arguments as well.
    Arguments that the platform fills in are marked `x-platform`, options of libraries `x-advanced`. The script is one
    `as_called`, with the `call` of the same stage.
    """
    known, reserved = _of_platform(stage, call, producing=producing)
    properties: dict[str, Any] = {}
    required: list[str] = []
    lookup = OptionLookup(script, options, {})
    for parameter in map(lookup.completed, _listed(script, known)):
        of_platform = parameter.name in reserved
        properties[parameter.name] = _property(parameter, known, language) | (
            {"x-platform": True} if of_platform else {}
        )
        if parameter.required and not of_platform and _platform_value(parameter, known, {}) is None:
            required.append(parameter.name)
    taken = {*script.declared_names, *reserved}
    for parameter, forms, details in option_properties(script, options, taken, language):
        if parameter.name in known:
            details.pop("x-advanced")  # the platform's form has it
        properties[parameter.name] = _option_property(forms, known, language) | details
    undescribed = any(use.path not in options.classes for use in script.option_classes)
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": script.partly_read or undescribed,
    }
    rules = list(_exclusive_rules(script, reserved))
    return schema | ({"allOf": rules} if rules else {})


def check_parameters(
    values: Mapping[str, Any],
    script: ScriptParameters,
    *,
    stage: Stage = JobKind.TRAINING,
    producing: bool = False,
    false_as: str = "False",
    typical: Mapping[str, KnownParameter] = MappingProxyType({}),
    options: DescribedOptions = NO_OPTIONS,
    shipped: bool = False,
    call: StageCall = PLATFORM_CALL,
) -> ParameterCheck:
    """Judge the values of a job; null counts as not given.

    `typical` has ranges that a method knows better than the platform's table; only warnings depend on them. Of
    `shipped` scripts all parameters are known; others get what they do not declare if they tolerate it. The script is
    one `as_called`, with the `call` of the same stage.
    """
    known, reserved = _of_platform(stage, call, producing=producing)
    usual = {**known, **typical}
    given, called, violations = _by_own_names(values, script)
    lookup = OptionLookup(script, options, given)
    settable = {name: value for name, value in given.items() if name not in reserved}
    declared = script.by_name()
    warnings: list[Violation] = []
    for name, value in given.items():
        at = pointer("parameters", called[name])
        parameter = declared.get(name)
        found = FoundOption()
        if parameter is None and name not in reserved and script.option_classes and _NAME.fullmatch(name):
            found = lookup.find(name, at)
            if name in known and (found.parameter is None or found.warning is not None):
                found = FoundOption()  # the form gives the platform's parameters to every script
            parameter = found.parameter
            warnings += [found.warning] if found.warning else []
            if parameter is not None and parameter.is_list and not isinstance(value, (list, tuple)):
                settable[name] = value = [value]
        if name in reserved:
            violations.append(Violation(at, "parameter_reserved", {"name": name}))
        elif found.refusal is not None:
            violations.append(found.refusal)
        elif parameter is None and (refusal := _unknown(name, script, known, shipped=shipped)) is not None:
            params = {"name": shown(name), "known": _names(script, reserved)}
            violations.append(Violation(at, refusal, params | {"option": ", ".join(script.longer_names(name))}))
        else:
            if parameter is None and script.accepts_unknown and not script.partly_read and name not in known:
                near = ", ".join(nearest(name, script.declared_names)) or "-"
                warnings.append(Violation(at, "parameter_undeclared", {"name": name, "near": near}))
            parameter = _joined(parameter or ScriptParameter(name=name, kind=ParameterKind.ANY), known)
            parameter = lookup.completed(parameter)
            problem = _value_problem(parameter, value, at)
            violations += [problem] if problem else []
            warnings += [] if problem else _unusual(parameter, value, at, known=usual, false_as=false_as)
    warnings += _without_effect(given, known)
    effective = _effective(settable, script, known)
    warnings += _filled_in({name: value for name, value in effective.items() if name not in settable})
    violations += _missing(effective, script, reserved)
    violations += _excluding(given, script)
    return ParameterCheck(tuple(violations), tuple(warnings), effective)


def withheld_arguments(script: ScriptParameters, names: Iterable[str], at: str = "") -> list[Violation]:
    """Return which of the arguments `names` that a stage passes are kept from the script, each with the reason.

    A script that ends at unknown options gets what it declares only, and argparse never sees a name that it would take
    for the abbreviation of another.
    """
    undeclared = [name for name in names if name not in script.declared_names]
    if script.refuses_unknown:
        return [Violation(at, "arguments_undeclared", {"names": ", ".join(undeclared)})] if undeclared else []
    taken = {name: longer for name in undeclared if (longer := script.longer_names(name))}
    return [
        Violation(at, "argument_withheld", {"name": name, "option": ", ".join(longer)})
        for name, longer in taken.items()
    ]


def _of_platform(
    stage: Stage, call: StageCall, *, producing: bool
) -> tuple[Mapping[str, KnownParameter], frozenset[str]]:
    """Return the parameters that the platform knows at a stage, and the names that callers cannot set.

    A method that says every argument gets no values that neither it nor the job gives, and decides on the names.
    """
    known = {} if call.is_explicit else known_at(stage, producing=producing)
    return known, reserved_at(stage, producing=producing) - call.placed.keys()


# ---- joining script and platform ------------------------------------------------------------------------------------


def _listed(script: ScriptParameters, known: Mapping[str, KnownParameter]) -> list[ScriptParameter]:
    """Return what the schema lists: what is declared, and, if that may be only a part, what scripts usually take."""
    listed = [_joined(parameter, known) for parameter in script.parameters]
    if script.partly_read and not script.refuses_unknown:
        declared = set(script.declared_names)
        usual = [ScriptParameter(name=k.name, kind=k.kind, has_default=True) for k in known.values() if k.required]
        listed += [parameter for parameter in usual if parameter.name not in declared]
    return listed


def _joined(parameter: ScriptParameter, known: Mapping[str, KnownParameter]) -> ScriptParameter:
    """Return the parameter with the platform's kind where the script itself reads only text."""
    platform = known.get(parameter.name)
    reads_text = parameter.kind in (ParameterKind.STRING, ParameterKind.ANY)
    if platform is None or not reads_text or parameter.is_list or parameter.choices is not None:
        return parameter
    default = parameter.default
    if isinstance(default, str):
        default = from_text(default, platform.kind)
    return parameter.model_copy(update={"kind": platform.kind, "default": default})


def _platform_value(parameter: ScriptParameter, known: Mapping[str, KnownParameter], given: Mapping[str, Any]) -> Any:
    """Return the platform's own value for a parameter that has to be passed, `None` if there is none."""
    platform = known.get(parameter.name)
    if platform is None or platform.default is None or not (platform.required or parameter.required):
        return None
    if any(other.yields_to == platform.name and other.name in given for other in known.values()):
        # the user chose what has an effect only without this one
        return 0 if platform.required and platform.kind is ParameterKind.INTEGER else None
    if _value_problem(_joined(parameter, known), platform.default, "") is not None:
        return None
    return platform.default


def _effective(
    given: Mapping[str, Any], script: ScriptParameters, known: Mapping[str, KnownParameter]
) -> dict[str, Any]:
    effective: dict[str, Any] = {}
    for parameter in _listed(script, known):
        name = next((name for name in (parameter.name, *parameter.aliases) if name in given), None)
        if name is not None:
            effective[name] = given[name]
        elif _may_be_filled(parameter) and not _excluded(parameter.name, given, script):
            value = _platform_value(parameter, known, given)
            effective |= {} if value is None else {parameter.name: value}
    return effective | {name: value for name, value in given.items() if name not in effective}


def _filled_in(values: Mapping[str, Any]) -> Iterator[Violation]:
    """Tell which values come neither from the caller nor from the script."""
    if values:
        listed = ", ".join(f"{name} = {_text(value)}" for name, value in values.items())
        yield Violation("/parameters", "parameters_filled_in", {"values": listed})


def _may_be_filled(parameter: ScriptParameter) -> bool:
    """Whether the script cannot do without a value: what it has a default for, it decides itself."""
    return parameter.required or not parameter.has_default


def _excluded(name: str, given: Mapping[str, Any], script: ScriptParameters) -> bool:
    """Whether another member of the parameter's exclusive group is given."""
    return any(name in group.names and any(other in given for other in group.names) for group in script.exclusive)


def _by_own_names(
    values: Mapping[str, Any], script: ScriptParameters
) -> tuple[dict[str, Any], dict[str, str], list[Violation]]:
    """Return the values by the first name of each parameter, and by which name each was given.

    Null counts as not given. Two names of one parameter exclude each other.
    """
    declared = script.by_name()
    own: dict[str, Any] = {}
    used: dict[str, str] = {}
    violations = []
    for name, value in values.items():
        if value is None:
            continue
        key = declared[name].name if name in declared else name
        if key in own:
            names = f"{used[key]}, {name}"
            at = pointer("parameters", name)
            violations.append(Violation(at, "parameters_exclude_each_other", {"names": names}))
            continue
        own[key], used[key] = value, name
    return own, used, violations


# ---- the schema -----------------------------------------------------------------------------------------------------


def _property(parameter: ScriptParameter, known: Mapping[str, KnownParameter], language: Language) -> dict[str, Any]:
    platform = known.get(parameter.name)
    value: dict[str, Any] = {} if parameter.kind is ParameterKind.ANY else {"type": parameter.kind.value}
    if parameter.choices is not None:
        value["enum"] = list(parameter.choices)
    if parameter.form is ArgumentForm.COUNTED:
        value |= {"minimum": 0, "maximum": _MAX_COUNT}
    schema: dict[str, Any] = {"type": "array", "items": value} if parameter.is_list else value
    schema["title"] = platform.label(language) if platform else parameter.name
    default = parameter.default
    if _may_be_filled(parameter):
        filled = _platform_value(parameter, known, {})
        default = default if filled is None else filled
    details = {
        "default": default,
        "description": parameter.help or (platform.help(language) if platform else None),
        "x-default-text": parameter.default_text,
        "x-group": parameter.group,
        "x-line": parameter.line or None,
        "x-advanced": True if parameter.of_library and platform is None else None,
        "x-typical-minimum": platform.minimum if platform else None,
        "x-typical-maximum": platform.maximum if platform else None,
        "x-typical-values": list(platform.choices) if platform and platform.choices else None,
        "x-without-effect-if": platform.yields_to if platform else None,
    }
    return schema | {name: detail for name, detail in details.items() if detail is not None}


def _option_property(
    forms: Sequence[ScriptParameter], known: Mapping[str, KnownParameter], language: Language
) -> dict[str, Any]:
    """Return the schema of an option; classes that choose each other out may know it in several forms."""
    schemas = [_property(form, known, language) for form in forms]
    types = [{key: schema[key] for key in _TYPE_KEYS if key in schema} for schema in schemas]
    for type_ in types:
        if type_.get("type") == "array" and "type" in type_["items"]:
            type_["type"] = ["array", type_["items"]["type"]]  # one value is a list of it
    distinct = list({json.dumps(one, sort_keys=True): one for one in types}.values())
    rest = {key: value for key, value in schemas[0].items() if key not in _TYPE_KEYS}
    return (distinct[0] if len(distinct) == 1 else {"anyOf": distinct}) | rest


def _exclusive_rules(script: ScriptParameters, reserved: frozenset[str]) -> Iterator[dict[str, Any]]:
    for group in script.exclusive:
        names = [name for name in group.names if name not in reserved]
        required = group.required and len(names) == len(group.names)
        if len(names) > _MAX_PAIRED:
            given = [{"required": [name]} for name in names]
            yield {"oneOf": given if required else [{"not": {"anyOf": given}}, *given]}
            continue
        for position, name in enumerate(names):
            yield from ({"not": {"required": [name, other]}} for other in names[position + 1 :])
        if required:
            yield {"anyOf": [{"required": [name]} for name in names]}


# ---- the check ------------------------------------------------------------------------------------------------------


def _unknown(name: str, script: ScriptParameters, known: Mapping[str, KnownParameter], *, shipped: bool) -> str | None:
    """Return why a name that the script does not declare is refused, `None` if it is not."""
    if not _NAME.fullmatch(name):
        return "parameter_name_invalid"
    if name in known and script.accepts_unknown:
        return None
    if script.longer_names(name):
        return "parameter_abbreviates" if script.accepts_unknown or script.partly_read else "unknown_parameter"
    return None if script.partly_read or (script.accepts_unknown and not shipped) else "unknown_parameter"


def _value_problem(parameter: ScriptParameter, value: Any, at: str) -> Violation | None:
    if parameter.is_list:
        if not isinstance(value, (list, tuple)):
            return _wrong_type(parameter, "array", value, at)
        problems = (_item_problem(parameter, item, f"{at}/{n}", in_list=True) for n, item in enumerate(value))
        return next((problem for problem in problems if problem), None)
    return _item_problem(parameter, value, at)


def _item_problem(parameter: ScriptParameter, value: Any, at: str, *, in_list: bool = False) -> Violation | None:
    if not _has_kind(value, parameter.kind):
        return _wrong_type(parameter, parameter.kind, value, at)
    if not _is_sound(value):
        return Violation(at, "parameter_value_unusable", {"name": parameter.name})
    if parameter.choices is not None and not any(_same(value, choice) for choice in parameter.choices):
        known = ", ".join(shown(str(choice)) for choice in parameter.choices)
        return Violation(at, "parameter_not_a_choice", {"name": parameter.name, "value": _text(value), "known": known})
    if parameter.form is ArgumentForm.COUNTED and not 0 <= value <= _MAX_COUNT:
        return _wrong_type(parameter, f"integer (0-{_MAX_COUNT})", value, at)
    if in_list and parameter.form is ArgumentForm.WORDS and isinstance(value, str) and value.startswith("-"):
        return Violation(at, "parameter_item_like_option", {"name": parameter.name, "value": _text(value)})
    return None


def _has_kind(value: Any, kind: ParameterKind) -> bool:
    match kind:
        case ParameterKind.ANY:
            return True
        case ParameterKind.STRING:
            return isinstance(value, str)
        case ParameterKind.BOOLEAN:
            return isinstance(value, bool)
        case ParameterKind.INTEGER:
            return isinstance(value, int) and not isinstance(value, bool)
        case ParameterKind.NUMBER:
            return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_sound(value: Any) -> bool:
    """Whether a value can be passed at all: finite, not beyond 64 bits, text without NUL and half characters."""
    match value:
        case bool() | None:
            return True
        case int():
            return abs(value) < _MAX_INTEGER
        case float():
            return math.isfinite(value)
        case str():
            return "\0" not in value and value.encode("utf-8", "ignore").decode() == value
        case list() | tuple():
            return all(map(_is_sound, value))
        case dict():
            return all(_is_sound(key) and _is_sound(item) for key, item in value.items())
        case _:
            return False


def _same(value: Any, choice: Any) -> bool:
    return isinstance(value, bool) is isinstance(choice, bool) and bool(value == choice)


def _unusual(
    parameter: ScriptParameter, value: Any, at: str, *, known: Mapping[str, KnownParameter], false_as: str
) -> list[Violation]:
    warnings = []
    platform = known.get(parameter.name)
    is_number = parameter.kind in (ParameterKind.INTEGER, ParameterKind.NUMBER) and not parameter.is_list
    if platform and is_number and not platform.is_typical(value):
        params = {"name": parameter.name, "value": value, "typical": _typical(platform)}
        warnings.append(Violation(at, "parameter_unusual", params))
    if parameter.reads_false_as_true and value is False and false_as:
        warnings.append(Violation(at, "parameter_false_reads_as_true", {"name": parameter.name}))
    return warnings


def _without_effect(given: Mapping[str, Any], known: Mapping[str, KnownParameter]) -> Iterator[Violation]:
    for name in given:
        platform = known.get(name)
        if platform and platform.yields_to in given:
            params = {"name": name, "other": platform.yields_to}
            yield Violation(pointer("parameters", name), "parameter_without_effect", params)


def _missing(effective: Mapping[str, Any], script: ScriptParameters, reserved: frozenset[str]) -> Iterator[Violation]:
    for parameter in script.parameters:
        names = {parameter.name, *parameter.aliases}
        if parameter.required and not names & (effective.keys() | reserved):
            yield Violation(pointer("parameters", parameter.name), "missing_parameter", {"name": parameter.name})
    for group in script.exclusive:
        if group.required and not set(group.names) & (effective.keys() | reserved):
            yield Violation("/parameters", "missing_one_of_parameters", {"names": ", ".join(group.names)})


def _excluding(given: Mapping[str, Any], script: ScriptParameters) -> Iterator[Violation]:
    for group in script.exclusive:
        together = [name for name in group.names if name in given]
        if len(together) > 1:
            at = pointer("parameters", together[1])
            yield Violation(at, "parameters_exclude_each_other", {"names": ", ".join(together)})


def _wrong_type(parameter: ScriptParameter, wanted: str, value: Any, at: str) -> Violation:
    params = {"name": parameter.name, "wanted": str(wanted), "value": _text(value)}
    return Violation(at, "parameter_wrong_type", params)


def _typical(platform: KnownParameter) -> str:
    if platform.choices:
        return ", ".join(str(choice) for choice in platform.choices)
    low = "" if platform.minimum is None else f"{platform.minimum:g}"
    high = "" if platform.maximum is None else f"{platform.maximum:g}"
    return f"{low} – {high}" if low and high else f"≥ {low}" if low else f"≤ {high}"


def _names(script: ScriptParameters, reserved: frozenset[str]) -> str:
    return ", ".join(parameter.name for parameter in script.parameters if parameter.name not in reserved) or "-"


def _text(value: Any) -> str:
    try:
        return shown(repr(value))
    except ValueError:  # an integer with thousands of digits
        return "…"
