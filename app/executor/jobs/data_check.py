"""Whether a method can learn from a data set: its rows are read as the script will read them, before it is queued."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from app.domain.errors import Violation
from app.domain.kinds import Stage
from app.domain.pointers import pointer
from app.presets.catalogue import DataRules, PresetManifest, load_manifests, script_path
from app.registry.datasets.check import Column
from app.registry.datasets.row_surveys import RowSurvey, RowSurveys, RowsWanted
from app.registry.methods.record import Method
from app.registry.scripts.root import digest_of

_COLUMN_PARAMETERS: Final = ("input_train_name", "output_train_name")
_TOOLS_PARAMETER: Final = "tools_file"
"""Names the functions that a model may call while it trains: with it, rows may name them as well."""
_DATASET: Final = "/dataset"


@dataclass(frozen=True)
class Data:
    """The file of a data set, and the columns of its rows."""

    jsonl: Path
    digest: str
    columns: Sequence[Column]
    pictures: str | None = None
    """Folder `images` of a data set with pictures, relative to the script root."""
    held_out: "HeldOut | None" = None
    """Validation rows in the data set's folder."""
    parts: tuple["Data", ...] = ()
    """What it was mixed of for this submission."""


@dataclass(frozen=True)
class HeldOut:
    """The validation rows of a split data set; `problems`: why they are no rows."""

    argument: str
    """Their file, relative to the script root."""
    data: Data | None = None
    problems: Sequence[Violation] = ()

    def marked(self, found: Sequence[Violation]) -> list[Violation]:
        """Return what is wrong with them, which says of what file the lines are."""
        file = self.argument.rpartition("/")[2]
        return [Violation(_DATASET, "held_out_rows_wrong", {"file": file}), *found] if found else []


@dataclass(frozen=True)
class CheckedData:
    """What the rows become; `survey` is None where nothing is known of what the method learns from."""

    violations: Sequence[Violation] = ()
    warnings: Sequence[Violation] = ()
    survey: RowSurvey | None = None
    validation_survey: RowSurvey | None = None


def check_data(
    surveys: RowSurveys,
    method: Method,
    stage: Stage,
    values: Mapping[str, Any],
    data: Data,
    validation: Data | None = None,
    held_out: HeldOut | None = None,
) -> CheckedData:
    """Check the rows for the stage that trains with these parameters, and those for the score. Blocks.

    `held_out`: those of the data set itself, where the stage gets them.
    """
    rules = data_rules(method, stage)
    wanted = rows_wanted(rules, values)
    checked = _check_rows(surveys, rules, wanted, values, data, "/datasets" if data.parts else _DATASET)
    if checked.violations:
        checked = replace(checked, violations=_of_parts(surveys, rules, wanted, values, data) or checked.violations)
    if held_out is not None and held_out.data is not None:
        scored = _check_rows(surveys, rules, replace(wanted, limit=-1), values, held_out.data, _DATASET)
        wrong = held_out.marked([*held_out.problems] or scored.violations)
        warnings = [*checked.warnings, *scored.warnings]
        return CheckedData([*checked.violations, *wrong], warnings, checked.survey, scored.survey)
    if held_out is not None:
        return replace(checked, violations=[*checked.violations, *held_out.marked(held_out.problems)])
    if validation is None:
        return checked
    scored = _check_rows(surveys, rules, replace(wanted, limit=-1), values, validation, "/validation_dataset")
    violations = [*checked.violations, *scored.violations]
    warnings = [*checked.warnings, *scored.warnings]
    if not violations:
        shared, total = surveys.shared(data.jsonl, data.digest, validation.jsonl, validation.digest, wanted)
        if shared:
            params = {"rows": shared, "total": total}
            warnings.append(Violation("/validation_dataset", "validation_rows_learned", params))
    return CheckedData(violations, warnings, checked.survey, scored.survey)


def _of_parts(
    surveys: RowSurveys, rules: DataRules | None, wanted: RowsWanted, values: Mapping[str, Any], data: Data
) -> list[Violation]:
    """Return what is wrong with the parts of a mix, by their own lines."""
    return [
        violation
        for number, part in enumerate(data.parts)
        for violation in _check_rows(
            surveys, rules, replace(wanted, limit=-1), values, part, f"/datasets/{number}/dataset"
        ).violations
    ]


def rows_wanted(rules: DataRules | None, values: Mapping[str, Any]) -> RowsWanted:
    """Return how the script will read the rows."""
    limit = values.get("max_samples")
    limit = limit if isinstance(limit, int) and limit > 0 else -1
    if rules is None:
        return RowsWanted(kinds=(), limit=limit)
    given = _given_columns(values)
    columns = [
        given.get(name) or own for name, own in zip(_COLUMN_PARAMETERS, rules.columns or (None, None), strict=True)
    ]
    form = values.get("data_form")
    return RowsWanted(
        kinds=tuple(sorted(rules.kinds(values))),
        tools=rules.tools or bool(values.get(_TOOLS_PARAMETER)),
        pictures=rules.pictures,
        columns=(columns[0], columns[1]) if columns[0] and columns[1] else None,
        form=form if isinstance(form, str) and form not in ("", "auto") else None,
        limit=limit,
    )


def _check_rows(
    surveys: RowSurveys,
    rules: DataRules | None,
    wanted: RowsWanted,
    values: Mapping[str, Any],
    data: Data,
    at: str,
) -> CheckedData:
    """Check the rows of one data set; `at` points to what names it."""
    given = _given_columns(values)
    missing = _missing_columns(given, data.columns, every_row=rules is None, at=at)
    if missing or rules is None:
        return CheckedData(violations=missing)
    there = [column.name for column in data.columns]
    if rules.columns is not None and not given and not set(rules.columns) <= set(there):
        params = {"wanted": " + ".join(rules.columns), "columns": ", ".join(there)}
        return CheckedData(violations=[Violation(at, "columns_missing", params)])
    found = surveys.of(data.jsonl, data.digest, wanted)
    violations = found.violations(there, at)
    return CheckedData(violations=violations, warnings=() if violations else found.warnings(at), survey=found)


def _given_columns(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: values[name] for name in _COLUMN_PARAMETERS if isinstance(values.get(name), str) and values[name]}


def data_rules(method: Method, stage: Stage) -> DataRules | None:
    """Return what the method itself says it learns from, else what a shipped script does.

    None for any other script, also for a shipped one that a user has changed.
    """
    declared = method.definition.data
    if declared is not None and declared.learns_from:
        return DataRules(learns_from=tuple(declared.learns_from), tools=declared.tools, pictures=declared.pictures)
    manifest = shipped_manifest(method, stage)
    return None if manifest is None else manifest.data


def shipped_manifest(method: Method, stage: Stage) -> PresetManifest | None:
    """Return the manifest of a method whose stage runs a shipped script as it is; None for a script of its own."""
    pinned = method.files.get(stage)
    manifest = next((manifest for manifest in load_manifests() if manifest.name == method.preset), None)
    if pinned is None or manifest is None or pinned.sha256 not in _shipped_digests(manifest.files):
        return None
    return manifest


@cache
def _shipped_digests(files: tuple[str, ...]) -> frozenset[str]:
    return frozenset(digest_of(script_path(file).read_bytes()).sha256 for file in files)


def _missing_columns(
    named: Mapping[str, str], columns: Sequence[Column], *, every_row: bool, at: str
) -> list[Violation]:
    """Return which of the columns that the parameters name are missing; `every_row`: or have no value in some row."""
    there = {column.name: column for column in columns}
    found = []
    for name, column in named.items():
        place = pointer("parameters", name) if at == _DATASET else at
        if column not in there:
            found.append(Violation(place, "column_missing", {"column": column, "columns": ", ".join(there)}))
        elif every_row and there[column].first_missing is not None:
            params = {"column": column, "line": there[column].first_missing, "rows": there[column].rows}
            found.append(Violation(place, "column_incomplete", params))
    return found
