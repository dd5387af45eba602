"""What a submission would do: its stages, the rows it learns from, and roughly how many steps and tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.domain.kinds import Stage, as_stage
from app.executor.jobs.stage_parameters import CheckedParameters
from app.presets.shared.helpers.deepe_rows.lengths import Lengths
from app.registry.datasets.row_surveys import RowSurvey
from app.store.tables import JobRow


@dataclass(frozen=True)
class PlannedStage:
    """A job that would be made."""

    stage: Stage
    environment: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class PlannedRows:
    """What becomes of the rows of the data set."""

    read: int
    used: int
    held_out: int | None
    sequences: int
    forms: Mapping[str, int]
    features: Mapping[str, int]


@dataclass(frozen=True)
class Estimate:
    """What a submission would do. None where it cannot be known before the script runs."""

    stages: Sequence[PlannedStage]
    rows: PlannedRows | None = None
    steps: int | None = None
    tokens: int | None = None
    lengths: Lengths | None = None
    """What `steps` and `tokens` are made of, if it was measured."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of the stage that learns, with its defaults."""


def estimate(jobs: Sequence[JobRow], checked: CheckedParameters, lengths: Lengths | None) -> Estimate:
    """Return what these jobs would do; `lengths` of the rows, if they were measured."""
    stages = [PlannedStage(as_stage(job.kind), job.environment, job.parameters) for job in jobs]
    if checked.survey is None or not stages:
        return Estimate(stages=stages)
    values = checked.values(stages[0].stage)
    survey = checked.survey
    validation = checked.validation_survey
    held_out = _held_out(values, survey) if validation is None else _scored(values, validation)
    learned = survey.sequences
    if held_out and survey.examples and validation is None:
        learned = round(learned * (1 - held_out / survey.examples))
    per_sequence = survey.tokens_per_sequence
    measured = None if lengths is None else lengths.learned_from(values)
    if measured is not None:
        share, per_sequence = measured
        learned = round(learned * share)
    steps, epochs = _steps(values, learned)
    seen = None if epochs is None else learned * epochs
    return Estimate(
        stages=stages,
        rows=PlannedRows(
            read=survey.rows,
            used=survey.examples,
            held_out=held_out,
            sequences=survey.sequences,
            forms=survey.found["forms"],
            features=survey.found["features"],
        ),
        steps=steps,
        tokens=None if seen is None or per_sequence is None else round(seen * per_sequence),
        lengths=lengths if measured is not None else None,
        parameters=values,
    )


def _held_out(values: Mapping[str, Any], survey: RowSurvey) -> int | None:
    fraction, most = _number(values, "eval_fraction"), _number(values, "eval_samples")
    if fraction is None or values.get("validation_path"):
        return None
    count = int(survey.examples * fraction)
    return count if most is None else min(count, int(most))


def _scored(values: Mapping[str, Any], validation: RowSurvey) -> int:
    most = _number(values, "eval_samples")
    return validation.examples if most is None else min(validation.examples, int(most))


def _steps(values: Mapping[str, Any], sequences: int) -> tuple[int | None, float | None]:
    """Return the steps of one process, and the passes over the sequences."""
    size = _number(values, "batch_size")
    if size is None or size < 1 or not sequences:
        return None, None
    together = size * (_number(values, "grad_accum_steps") or 1)
    per_epoch = math.ceil(sequences / together)
    steps = _number(values, "max_steps")
    if steps is not None and steps > 0:
        return int(steps), steps / per_epoch
    epochs = _number(values, "epochs")
    return (None, None) if epochs is None else (math.ceil(epochs * per_epoch), epochs)


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
