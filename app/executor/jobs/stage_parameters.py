"""Check a submission's parameters and rows against what its stages' scripts declare and learn from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from app.domain.called_parameters import as_called, call_refusals
from app.domain.enums import JobKind
from app.domain.errors import Violation
from app.domain.kinds import Stage
from app.domain.known_parameters import KNOWN, KnownParameter, known_at
from app.domain.library_options import UNREAD_CLASS, with_parser_classes
from app.domain.lifecycle import producing_stage, trains
from app.domain.names import BASE_ENVIRONMENT
from app.domain.parameters import ParameterCheck, check_parameters
from app.domain.pointers import pointer
from app.domain.rendering import ArgumentForm
from app.domain.script_parameters import ParameterKind, ScriptParameters
from app.domain.stage_calls import DATASET_FOLDER, StageCall, stage_call
from app.executor.jobs.data_check import CheckedData, Data, check_data
from app.presets.catalogue import load_manifests
from app.presets.shared.helpers.deepe_needs import Need, needs_of
from app.registry.datasets.files import IMAGES_FOLDER
from app.registry.datasets.row_surveys import RowSurvey, RowSurveys
from app.registry.environments.described_options import Described, described_options, prefix_of
from app.registry.methods.guide import withheld
from app.registry.methods.record import Method
from app.registry.methods.script_reading import ScriptReader

VALIDATION_PATH = "validation_path"
"""What a script declares that takes rows for the score."""
PICTURES_PATH = "pic_relative_path"
"""What a script declares that wants the folder of the data set's pictures."""
VALIDATION_DATASET = "/validation_dataset"
START_PATH = "adapter_name_or_path"
"""What a script declares whose training can go on from an adapter."""
START = "/adapter_name_or_path"
REWARD_PATH = "reward_model_path"
"""What a script declares that lets a reward model judge."""
REWARD_MODEL = "/reward_model"
_NAMED_MODELS = {
    START_PATH: (START, "adapter_not_taken", "adapter_named_twice"),
    REWARD_PATH: (REWARD_MODEL, "reward_model_not_taken", "reward_model_named_twice"),
}
"""Arguments that name the folder of a model: the field of the request that the model comes from, and its codes."""
_HOLDS_OUT = frozenset({VALIDATION_PATH, "eval_fraction", "eval_samples"})
"""Parameters by which a caller says which rows the score is of."""
_NOTHING = ScriptParameters(accepts_unknown=True)


@dataclass(frozen=True)
class Validation:
    """Rows for the score, and the argument that names their file: relative to the script root."""

    data: Data
    argument: str


@dataclass(frozen=True)
class Asked:
    """A value of a parameter, and what it needs of the node."""

    value: Any
    need: Need

    @property
    def text(self) -> str:
        """Return the value as a request writes it."""
        return json.dumps(self.value) if isinstance(self.value, bool) else str(self.value)


@dataclass(frozen=True)
class CheckedParameters:
    """What each stage of a submission is given, and what is wrong or unusual."""

    scripts: Mapping[Stage, ScriptParameters] = field(default_factory=dict)
    checks: Mapping[Stage, ParameterCheck] = field(default_factory=dict)
    given_to: Mapping[Stage, Mapping[str, Any]] = field(default_factory=dict)
    violations: tuple[Violation, ...] = ()
    warnings: tuple[Violation, ...] = ()
    withheld_from: Mapping[Stage, tuple[str, ...]] = field(default_factory=dict)
    named_paths: Mapping[Stage, tuple[str, ...]] = field(default_factory=dict)
    """Parameters whose values are paths that the platform made of a data set or a model."""
    survey: RowSurvey | None = None
    validation_survey: RowSurvey | None = None

    def declares(self, stage: Stage, name: str) -> bool:
        """Say whether the stage's script declares the parameter."""
        script = self.scripts.get(stage)
        return script is not None and name in script.declared_names

    def needs(self, stage: Stage) -> Mapping[str, Asked]:
        """Return what the caller's values need beyond the packages of the method, by the names that were given.

        Known is what options of libraries need, and parameters of scripts that take such options.
        """
        script = self.scripts.get(stage)
        if script is None or not script.option_classes:
            return {}
        unheeded = KNOWN.keys() - set(script.declared_names)  # a form gives all of the platform's to every script
        given = {name: value for name, value in self.given(stage).items() if name not in unheeded}
        return {name: Asked(given[name], need) for name, need in needs_of(given).items()}

    def needed_of_node(self, stage: Stage) -> dict[str, Any]:
        """Return the fields of a job's specification that say what its node must have for the caller's values."""
        needs = [asked.need for asked in self.needs(stage).values()]
        return {"modules": tuple(sorted({need.module for need in needs})), "cuda": any(need.cuda for need in needs)}

    def withheld(self, stage: Stage) -> tuple[str, ...]:
        """Return the platform's arguments that the script would take for others of its own."""
        return self.withheld_from.get(stage, ())

    def given(self, stage: Stage) -> dict[str, Any]:
        """Return the caller's parameters that the stage gets."""
        return dict(self.given_to.get(stage, {}))

    def effective(self, stage: Stage) -> dict[str, Any]:
        """Return the values given and the platform's own for what the script needs."""
        check = self.checks.get(stage)
        return check.effective if check is not None else {}

    def values(self, stage: Stage) -> dict[str, Any]:
        """Return the value of each parameter, the script's own default where none is given."""
        script = self.scripts.get(stage)
        defaults = {one.name: one.default for one in script.parameters if one.has_default} if script is not None else {}
        return {**defaults, **self.effective(stage)}

    def declared(self, stage: Stage) -> tuple[str, ...] | None:
        """Return the names that the script declares, and those that it is given because the caller said so."""
        script = self.scripts.get(stage)
        return None if script is None else tuple(dict.fromkeys((*script.declared_names, *self.effective(stage))))

    def refuses_unknown(self, stage: Stage) -> bool:
        """Return whether the script would end at an argument that it does not declare."""
        script = self.scripts.get(stage)
        return script is not None and script.refuses_unknown

    def forms(self, stage: Stage) -> dict[str, ArgumentForm]:
        """Return how to pass the arguments that are not `--k=v`.

        A parser made of dataclasses takes a list as words, also for an option that is not known yet.
        """
        script = self.scripts.get(stage)
        if script is None:
            return {}
        words: dict[str, ArgumentForm] = {}
        if any(remark.code == UNREAD_CLASS for remark in script.unread):
            given = self.given(stage).items()
            words = {name: ArgumentForm.WORDS for name, value in given if isinstance(value, (list, tuple))}
        return {**words, **script.forms}


class StageParameters:
    """Checks values against the scripts' pinned bytes."""

    def __init__(self, reader: ScriptReader) -> None:
        self._reader = reader
        self._surveys = RowSurveys()

    def check(
        self,
        method: Method,
        stages: Sequence[Stage],
        values: Mapping[str, Any],
        data: Data | None,
        validation: Validation | None = None,
        described: Described = MappingProxyType({}),
        named: Mapping[str, Any] = MappingProxyType({}),
    ) -> CheckedParameters:
        """Check `values` for these stages, and the rows of the data sets (`None`: not checked). Blocks.

        `named` are the arguments that name folders of models (`_NAMED_MODELS`), as far as there are any.
        `described` has what is known of the libraries in the environments; without it, options are not judged yet.
        """
        options = {
            stage: described_options(described, method.environment(stage) or BASE_ENVIRONMENT) for stage in stages
        }
        calls = {stage: stage_call(method.definition, stage) for stage in stages}
        read = {stage: with_parser_classes(self.read(method, stage, described), options[stage]) for stage in stages}
        scripts = {stage: as_called(script, calls[stage]) for stage, script in read.items()}
        targets = _target_stages(method, stages)
        lifecycle = method.definition.lifecycle or ()
        producer = producing_stage(lifecycle)
        given_to = {stage: _meant_for(stage, values, scripts, targets, calls) for stage in targets}
        refused = {stage: list(call_refusals(calls[stage], given_to.get(stage, {}))) for stage in stages}
        own = {} if validation is None else _scoring(validation.argument, targets, scripts)
        folders: dict[Stage, Mapping[str, Any]] = {stage: named for stage in targets if stage is JobKind.TRAINING}
        pictures = _pictures(method, data, values, targets, scripts)
        by_folder = any(DATASET_FOLDER in calls[stage].platform_values for stage in targets)
        held_out = data.held_out if data is not None and validation is None else None
        if validation is None and data is not None and data.held_out is not None and not values.keys() & _HOLDS_OUT:
            own = _scoring(data.held_out.argument, targets, scripts)
        by_platform = {
            stage: {**own.get(stage, {}), **folders.get(stage, {}), **pictures.get(stage, {})} for stage in stages
        }
        checks = {
            stage: check_parameters(
                {**_without(given_to.get(stage, {}), refused[stage]), **by_platform[stage]},
                scripts[stage],
                stage=stage,
                producing=stage is producer,
                false_as=method.definition.arguments.false_as,
                typical=_typical(method.preset, stage, producing=stage is producer) if trains(lifecycle, stage) else {},
                options=options[stage],
                shipped=method.preset is not None or (stage in method.files and method.files[stage].shipped),
                call=calls[stage],
            )
            for stage in stages
        }
        violations = [one for found in refused.values() for one in found]
        violations += [violation for check in checks.values() for violation in check.violations]
        warnings = [warning for check in checks.values() for warning in check.warnings]
        if validation is not None and targets:
            beside_pictures = data is not None and (data.jsonl.parent / IMAGES_FOLDER).is_dir()
            violations += _validation_violations(values, taken=bool(own) or (by_folder and not beside_pictures))
        if targets:
            declared = {name for stage in folders for name in scripts[stage].declared_names}
            violations += [one for name in named for one in _named_violations(name, values, taken=name in declared)]
        withheld_from = {}
        for stage, script in scripts.items():
            notes = withheld(method.definition, stage, script, "/method")
            warnings += notes
            names = [*(note.params["name"] for note in notes if note.code == "argument_withheld")]
            for name in given_to.get(stage, {}):
                if name not in script.declared_names and (longer := script.longer_names(name)):
                    params = {"name": name, "option": ", ".join(longer)}
                    warnings.append(Violation(pointer("parameters", name), "argument_withheld", params))
                    names.append(name)
            if not calls[stage].is_explicit:  # these reach the script another way, and it knows no option for them
                names += [name for name in calls[stage].placed if name not in read[stage].declared_names]
            withheld_from[stage] = tuple(names)
        rows = CheckedData()
        if data is not None and targets:
            rows = check_data(
                self._surveys,
                method,
                targets[0],
                values,
                data,
                validation.data if validation is not None else None,
                held_out if own or by_folder else None,
            )
        return CheckedParameters(
            scripts=scripts,
            checks=checks,
            given_to=given_to,
            violations=(*_distinct(violations), *rows.violations),
            warnings=(*_distinct(warnings), *rows.warnings),
            withheld_from=withheld_from,
            named_paths={stage: tuple(values) for stage, values in by_platform.items()},
            survey=rows.survey,
            validation_survey=rows.validation_survey,
        )

    def read(self, method: Method, stage: Stage, described: Described = MappingProxyType({})) -> ScriptParameters:
        """Return what the stage's script declares; blocks."""
        pinned, module = method.files.get(stage), stage_call(method.definition, stage).module
        if pinned is not None:
            return self._reader.pinned(pinned)
        if module is None:
            return _NOTHING
        return self._reader.module(module, prefix_of(described, method.environment(stage) or BASE_ENVIRONMENT))


def _distinct(found: Sequence[Violation]) -> tuple[Violation, ...]:
    """Remove duplicates: two stages may report the same violation."""
    return tuple({(one.pointer, one.code, *map(str, one.params.values())): one for one in found}.values())


def _target_stages(method: Method, stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages that the caller's parameters are for: those that train, else the single stage asked for."""
    training = [stage for stage in stages if trains(method.definition.lifecycle or (), stage)]
    return training or list(stages[:1])


def _scoring(
    rows: str, targets: Sequence[Stage], scripts: Mapping[Stage, ScriptParameters]
) -> dict[Stage, dict[str, Any]]:
    """Return what the stages that score with these rows are given for it."""
    given = {VALIDATION_PATH: rows}
    return {stage: given for stage in targets if VALIDATION_PATH in scripts[stage].declared_names}


def _pictures(
    method: Method,
    data: Data | None,
    values: Mapping[str, Any],
    targets: Sequence[Stage],
    scripts: Mapping[Stage, ScriptParameters],
) -> dict[Stage, dict[str, Any]]:
    """Return the folder of pictures for users' scripts that declare it: DeepExtension's fail without one."""
    if data is None or data.pictures is None or values.get(PICTURES_PATH) is not None:
        return {}
    own = [stage for stage in targets if stage in method.files and not method.files[stage].shipped]
    return {stage: {PICTURES_PATH: data.pictures} for stage in own if PICTURES_PATH in scripts[stage].declared_names}


def _validation_violations(values: Mapping[str, Any], *, taken: bool) -> list[Violation]:
    """Return why rows for the score cannot be handed to the script."""
    if not taken:
        return [Violation(VALIDATION_DATASET, "validation_not_taken", {"name": VALIDATION_PATH})]
    if values.get(VALIDATION_PATH) is not None:
        return [Violation(VALIDATION_DATASET, "validation_named_twice", {"name": VALIDATION_PATH})]
    return []


def _named_violations(name: str, values: Mapping[str, Any], *, taken: bool) -> list[Violation]:
    """Return why the folder of a model cannot be handed to the script."""
    field_of_model, not_taken, named_twice = _NAMED_MODELS[name]
    if not taken:
        return [Violation(field_of_model, not_taken, {"name": name})]
    if values.get(name) is not None:
        return [Violation(field_of_model, named_twice, {"name": name})]
    return []


def _meant_for(
    stage: Stage,
    values: Mapping[str, Any],
    scripts: Mapping[Stage, ScriptParameters],
    targets: Sequence[Stage],
    calls: Mapping[Stage, StageCall],
) -> dict[str, Any]:
    """Drop parameters that only another stage takes, so that they are not refused here.

    What no stage declares is an option for those that take options of libraries, if one does.
    """
    others = {name for other in targets if other is not stage for name in scripts[other].declared_names}
    own = set(scripts[stage].declared_names)
    if not calls[stage].takes_others and any(calls[other].takes_others for other in targets):
        others |= values.keys()
    for_options = [other for other in targets if scripts[other].option_classes]
    if for_options and stage not in for_options:
        others |= values.keys() - KNOWN.keys()
    return {name: value for name, value in values.items() if name in own or name not in others}


def _without(values: Mapping[str, Any], refused: Sequence[Violation]) -> dict[str, Any]:
    names = {one.params["name"] for one in refused}
    return {name: value for name, value in values.items() if name not in names}


@cache
def _typical(preset: str | None, stage: Stage, *, producing: bool) -> Mapping[str, KnownParameter]:
    """Return the ranges that the form of a shipped method shows, where they differ from the platform's."""
    manifest = next((manifest for manifest in load_manifests() if manifest.name == preset), None)
    if manifest is None:
        return {}
    known = known_at(stage, producing=producing)
    typical = {}
    for info in manifest.parameters:
        platform = known.get(info.name) or KnownParameter(info.name, ParameterKind.NUMBER)
        low = platform.minimum if info.minimum is None else info.minimum
        high = platform.maximum if info.maximum is None else info.maximum
        typical[info.name] = replace(platform, minimum=low, maximum=high)
    return typical
