"""Whether a method can learn from a data set: its rows are read as the script will read them, before it is queued."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from app.domain.errors import Violation
from app.domain.kinds import Stage
from app.domain.pointers import pointer
from app.presets.catalogue import DataRules, load_manifests, script_path
from app.registry.dataset_check import Column
from app.registry.method_record import Method
from app.registry.row_surveys import RowSurvey, RowSurveys, RowsWanted
from app.registry.scripts import digest_of

_COLUMN_PARAMETERS: Final = ("input_train_name", "output_train_name")


@dataclass(frozen=True)
class Data:
    """The file of a data set, and the columns of its rows."""

    jsonl: Path
    digest: str
    columns: Sequence[Column]


@dataclass(frozen=True)
class CheckedData:
    """What the rows become; `survey` is None where nothing is known of what the method learns from."""

    violations: Sequence[Violation] = ()
    warnings: Sequence[Violation] = ()
    survey: RowSurvey | None = None


def check_data(surveys: RowSurveys, method: Method, stage: Stage, values: Mapping[str, Any], data: Data) -> CheckedData:
    """Check the rows for the stage that trains with these parameters. Blocks."""
    rules = _rules(method, stage)
    named = {name: values[name] for name in _COLUMN_PARAMETERS if isinstance(values.get(name), str) and values[name]}
    missing = _named_columns(named, data.columns, every_row=rules is None)
    if missing or rules is None:
        return CheckedData(violations=missing)
    there = [column.name for column in data.columns]
    if rules.columns is not None and not named and not set(rules.columns) <= set(there):
        params = {"wanted": " + ".join(rules.columns), "columns": ", ".join(there)}
        return CheckedData(violations=[Violation("/dataset", "columns_missing", params)])
    given = [named.get(name) for name in _COLUMN_PARAMETERS]
    columns = tuple(name or own for name, own in zip(given, rules.columns or (None, None), strict=True))
    form = values.get("data_form")
    limit = values.get("max_samples")
    wanted = RowsWanted(
        kinds=tuple(sorted(rules.kinds(values))),
        tools=rules.tools,
        pictures=rules.pictures,
        columns=(columns[0], columns[1]) if columns[0] and columns[1] else None,
        form=form if isinstance(form, str) and form not in ("", "auto") else None,
        limit=limit if isinstance(limit, int) and limit > 0 else -1,
    )
    found = surveys.of(data.jsonl, data.digest, wanted)
    violations = found.violations(there)
    return CheckedData(violations=violations, warnings=() if violations else found.warnings(), survey=found)


def _rules(method: Method, stage: Stage) -> DataRules | None:
    """Return what the method itself says it learns from, else what a shipped script does.

    None for any other script, also for a shipped one that a user has changed.
    """
    declared = method.definition.data
    if declared is not None and declared.learns_from:
        return DataRules(learns_from=tuple(declared.learns_from), tools=declared.tools, pictures=declared.pictures)
    pinned = method.files.get(stage)
    manifest = next((manifest for manifest in load_manifests() if manifest.name == method.preset), None)
    if pinned is None or manifest is None or pinned.sha256 not in _shipped_digests(manifest.files):
        return None
    return manifest.data


@cache
def _shipped_digests(files: tuple[str, ...]) -> frozenset[str]:
    return frozenset(digest_of(script_path(file).read_bytes()).sha256 for file in files)


def _named_columns(named: Mapping[str, str], columns: Sequence[Column], *, every_row: bool) -> list[Violation]:
    """Return which of the columns that the parameters name are missing; `every_row`: or have no value in some row."""
    there = {column.name: column for column in columns}
    found = []
    for name, column in named.items():
        at = pointer("parameters", name)
        if column not in there:
            found.append(Violation(at, "column_missing", {"column": column, "columns": ", ".join(there)}))
        elif every_row and there[column].first_missing is not None:
            params = {"column": column, "line": there[column].first_missing, "rows": there[column].rows}
            found.append(Violation(at, "column_incomplete", params))
    return found
