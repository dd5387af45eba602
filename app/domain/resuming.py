"""Does a checkpoint fit a training whose parameters were changed? Pure.

It fits when the training stays the same: the same rows at each step, the same rates, the same weights.
What only decides how often something is reported, kept or scored may differ, and how a step's rows are split into
forward passes, as long as their number stays. Everything else counts, also parameters that are not known here.
"""

from collections.abc import Mapping
from typing import Any

from app.domain.failure_suggestions import ACCUMULATION, BATCH, CHECKPOINTING

INDIFFERENT = frozenset(
    {
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "eval_samples",
        "eval_max_new_tokens",
        *CHECKPOINTING,
    }
)


def resumable(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Say whether a checkpoint of a training with the values `old` fits one with `new`; both with their defaults."""
    return _compared_values(old) == _compared_values(new)


def _compared_values(values: Mapping[str, Any]) -> dict[str, Any]:
    split = {*BATCH, *ACCUMULATION}
    compared = {name: value for name, value in values.items() if name not in INDIFFERENT and name not in split}
    counts = [values[name] for name in (*BATCH, *ACCUMULATION) if values.get(name) is not None]
    rows = 1
    for count in counts:
        if not isinstance(count, int):
            return {**compared, **{name: values.get(name) for name in split}}
        rows *= count
    return {**compared, "": rows}
