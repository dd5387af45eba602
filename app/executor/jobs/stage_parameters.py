"""Check a submission's parameters and columns against the declarations of its stages' scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from app.domain.errors import Violation
from app.domain.kinds import Stage
from app.domain.known_parameters import KnownParameter, known_at
from app.domain.lifecycle import producing_stage, trains
from app.domain.parameters import ParameterCheck, check_parameters
from app.domain.pointers import pointer
from app.domain.rendering import ArgumentForm
from app.domain.script_parameters import ParameterKind, ScriptParameters
from app.presets.catalogue import DataColumns, load_manifests, script_path
from app.registry.dataset_check import Column
from app.registry.method_record import Method
from app.registry.script_reading import ScriptReader
from app.registry.scripts import digest_of

_COLUMN_PARAMETERS = ("input_train_name", "output_train_name")
_NOTHING = ScriptParameters(accepts_unknown=True)


@dataclass(frozen=True)
class CheckedParameters:
    """What each stage of a submission is given, and what is wrong or unusual."""

    scripts: Mapping[Stage, ScriptParameters] = field(default_factory=dict)
    checks: Mapping[Stage, ParameterCheck] = field(default_factory=dict)
    given_to: Mapping[Stage, Mapping[str, Any]] = field(default_factory=dict)
    violations: tuple[Violation, ...] = ()
    warnings: tuple[Violation, ...] = ()

    def given(self, stage: Stage) -> dict[str, Any]:
        """Return the caller's parameters that the stage gets."""
        return dict(self.given_to.get(stage, {}))

    def effective(self, stage: Stage) -> dict[str, Any]:
        """Return the values given and the platform's own for what the script needs."""
        check = self.checks.get(stage)
        return check.effective if check is not None else {}

    def declared(self, stage: Stage) -> tuple[str, ...] | None:
        """Return the names that the script declares; None when they could not all be read."""
        script = self.scripts.get(stage)
        return None if script is None or script.partly_read else script.declared_names

    def forms(self, stage: Stage) -> dict[str, ArgumentForm]:
        """Return how to pass the arguments that are not `--k=v`."""
        script = self.scripts.get(stage)
        return script.forms if script is not None else {}


class StageParameters:
    """Checks values against the scripts' pinned bytes."""

    def __init__(self, reader: ScriptReader) -> None:
        self._reader = reader

    def check(
        self, method: Method, stages: Sequence[Stage], values: Mapping[str, Any], columns: Sequence[Column] | None
    ) -> CheckedParameters:
        """Check `values` for these stages, and the columns of the data set (`None`: not checked). Blocks."""
        scripts = {stage: self.read(method, stage) for stage in stages}
        targets = _target_stages(method, stages)
        lifecycle = method.definition.lifecycle or ()
        producer = producing_stage(lifecycle)
        given_to = {stage: _meant_for(stage, values, scripts, targets) for stage in targets}
        checks = {
            stage: check_parameters(
                given_to.get(stage, {}),
                scripts[stage],
                stage=stage,
                producing=stage is producer,
                false_as=method.definition.arguments.false_as,
                typical=_typical(method.preset, stage, producing=stage is producer) if trains(lifecycle, stage) else {},
            )
            for stage in stages
        }
        violations = [violation for check in checks.values() for violation in check.violations]
        if columns is not None and targets:
            violations += _column_problems(method, targets[0], values, columns)
        warnings = [warning for check in checks.values() for warning in check.warnings]
        return CheckedParameters(
            scripts=scripts,
            checks=checks,
            given_to=given_to,
            violations=_distinct(violations),
            warnings=_distinct(warnings),
        )

    def read(self, method: Method, stage: Stage) -> ScriptParameters:
        """Return what the stage's script declares; blocks."""
        pinned = method.files.get(stage)
        return _NOTHING if pinned is None else self._reader.pinned(pinned)


def _distinct(found: Sequence[Violation]) -> tuple[Violation, ...]:
    """Remove duplicates: two stages may report the same violation."""
    return tuple({(violation.pointer, violation.code): violation for violation in found}.values())


def _target_stages(method: Method, stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages that the caller's parameters are for: those that train, else the single stage asked for."""
    training = [stage for stage in stages if trains(method.definition.lifecycle or (), stage)]
    return training or list(stages[:1])


def _meant_for(
    stage: Stage, values: Mapping[str, Any], scripts: Mapping[Stage, ScriptParameters], targets: Sequence[Stage]
) -> dict[str, Any]:
    """Drop parameters that only another stage declares, so that they are not refused here."""
    others = {name for other in targets if other is not stage for name in scripts[other].declared_names}
    own = set(scripts[stage].declared_names)
    return {name: value for name, value in values.items() if name in own or name not in others}


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


def _column_problems(
    method: Method, stage: Stage, values: Mapping[str, Any], columns: Sequence[Column]
) -> list[Violation]:
    """Return which columns the data set lacks, or lacks in some rows.

    Those that the parameters name are needed, else those of a shipped script.
    """
    named = {name: values[name] for name in _COLUMN_PARAMETERS if isinstance(values.get(name), str) and values[name]}
    shipped = _shipped_columns(method, stage)
    there = {column.name: column for column in columns}
    listed = ", ".join(there)
    found = []
    if shipped is not None:
        if wanted := _wanted_columns(shipped, named, there):
            found.append(Violation("/dataset", "columns_missing", {"wanted": wanted, "columns": listed}))
        elif not _all_named(shipped, named):
            found += [_incomplete("/dataset", column) for column in _incomplete_columns(shipped, there)]
    if shipped is None or _all_named(shipped, named):
        for name, column in named.items():
            at = pointer("parameters", name)
            if column not in there:
                found.append(Violation(at, "column_missing", {"column": column, "columns": listed}))
            elif there[column].first_missing is not None:
                found.append(_incomplete(at, there[column]))
    return found


def _incomplete(at: str, column: Column) -> Violation:
    params = {"column": column.name, "line": column.first_missing, "rows": column.rows}
    return Violation(at, "column_incomplete", params)


def _incomplete_columns(shipped: DataColumns, columns: Mapping[str, Column]) -> list[Column]:
    """Return the columns that have no value in some row, unless one of the alternatives is whole."""
    alternatives = [
        [columns[name] for name in names if columns[name].first_missing is not None]
        for names in shipped.any_of
        if set(names) <= columns.keys()
    ]
    return min(alternatives, key=len, default=[])


def _wanted_columns(shipped: DataColumns, named: Mapping[str, str], columns: Mapping[str, Column]) -> str:
    """Return what is missing, as alternatives; an empty text if nothing is."""
    needs = [shipped.any_of] if not _all_named(shipped, named) else []
    if shipped.pictures_in:
        needs.append(tuple((column,) for column in shipped.pictures_in))
    missing = [any_of for any_of in needs if not any(set(wanted) <= columns.keys() for wanted in any_of)]
    return "; ".join(" / ".join(" + ".join(wanted) for wanted in any_of) for any_of in missing)


def _all_named(shipped: DataColumns, named: Mapping[str, str]) -> bool:
    return bool(shipped.named_by) and all(name in named for name in shipped.named_by)


def _shipped_columns(method: Method, stage: Stage) -> DataColumns | None:
    """Return what a shipped script wants; None for any other, also for one that a user has changed."""
    pinned = method.files.get(stage)
    manifest = next((manifest for manifest in load_manifests() if manifest.name == method.preset), None)
    if pinned is None or manifest is None:
        return None
    return manifest.columns if pinned.sha256 in _shipped_digests(manifest.files) else None


@cache
def _shipped_digests(files: tuple[str, ...]) -> frozenset[str]:
    return frozenset(digest_of(script_path(file).read_bytes()).sha256 for file in files)
