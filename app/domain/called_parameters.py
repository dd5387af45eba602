"""The parameters of a stage whose method says how it is called: what a job can set, and what would reach nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

from app.domain.errors import Violation
from app.domain.pointers import pointer
from app.domain.script_parameters import ParameterKind, ScriptParameter, ScriptParameters
from app.domain.stage_calls import CallValues, StageCall, expand


def as_called(script: ScriptParameters, call: StageCall) -> ScriptParameters:
    """Return the script with the parameters that a job can set: those that the method places, and, if it passes on
    all others, those of the script that it does not set itself.

    A parameter that the method writes behind an option of the script is of the option's kind.
    """
    if not call.is_explicit and not call.placed:
        return script
    declared, options = script.by_name(), call.option_of
    own: dict[str, ScriptParameter] = {}
    for name, is_flag in call.placed.items():
        known = declared.get(options.get(name, name)) or declared.get(name)
        if known is None:
            known = ScriptParameter(name=name, kind=ParameterKind.ANY, has_default=True)
        given_as = {"name": name, "aliases": known.aliases if name == known.name else ()}
        own[name] = known.model_copy(
            update=given_as | ({"kind": ParameterKind.BOOLEAN, "choices": None} if is_flag else {})
        )
    if not call.is_explicit:
        more = tuple(one for name, one in own.items() if name not in declared)
        return script.model_copy(update={"parameters": (*script.parameters, *more)})
    if not call.takes_others:
        others: list[ScriptParameter] = []
    else:
        others = [
            one for one in script.parameters if not call.options.intersection(_plain(one)) and one.name not in own
        ]
    listed = [*own.values(), *others]
    if call.config is not None:  # the file may hold what the script requires
        listed = [one.model_copy(update={"required": False, "has_default": True}) for one in listed]
    names = {name for one in listed for name in (one.name, *one.aliases)}
    return script.model_copy(
        update={
            "parameters": tuple(listed),
            "exclusive": tuple(group for group in script.exclusive if names.issuperset(group.names)),
            **({} if call.takes_others else {"unread": (), "parser_classes": (), "option_classes": ()}),
        }
    )


def call_refusals(call: StageCall, given: Mapping[str, Any]) -> Iterator[Violation]:
    """Yield the parameters of a job that the method leaves no place for."""
    if not call.is_explicit:
        return
    given = {name: value for name, value in given.items() if value is not None}
    refused = set()
    for name in given:
        at = pointer("parameters", name)
        if name in call.placed:
            continue
        if not call.takes_others:
            places = ", ".join(call.placed) or "-"
            yield Violation(at, "parameter_without_place", {"name": name, "places": places})
        elif name.replace("-", "_") in call.options:
            yield Violation(at, "parameter_set_by_method", {"name": name})
        else:
            continue
        refused.add(name)
    platform = dict.fromkeys(call.platform_values, "-")  # what is missing of it is told at the launch
    rest = {name: value for name, value in given.items() if name not in refused}
    for name in expand(call, CallValues(platform, rest)).unplaced:
        others = ", ".join(sorted(call.partners(name) - rest.keys()))
        yield Violation(pointer("parameters", name), "parameter_partner_missing", {"name": name, "others": others})


def _plain(parameter: ScriptParameter) -> set[str]:
    return {name.replace("-", "_") for name in (parameter.name, *parameter.aliases)}
