"""Suggest parameters for a failed job so that its retry may succeed ("retry with fix"). Pure.

Only parameters that the stage's script declares are changed, to values of the kind that it declares. What costs
nothing comes first: half the batch with twice the accumulation is the same training in less memory, recomputing
activations the same in more time. Shorter rows and four bits change what is learned, so they come last.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.domain.enums import EndReason
from app.domain.script_parameters import ParameterKind, ScriptParameter
from app.domain.texts import DEFAULT_LANGUAGE, Language, text

SHORTEST_SEQUENCE = 128  # halved no further: hardly a row is that short
CLOSE_ENOUGH = 0.5
BATCH = ("batch_size", "per_device_train_batch_size", "train_batch_size")
ACCUMULATION = ("grad_accum_steps", "gradient_accumulation_steps")
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing", "grad_checkpoint")
_LENGTH = ("max_seq_length", "max_length", "max_seq_len")
_FOUR_BIT = ("load_in_4bit",)
_COMPARED = {"objective": ("kto",)}  # parameters whose values compare the rows of a batch with each other
_WHOLE = {"finetuning_type": ("full", "freeze")}  # the weights themselves learn: 4 bits are too few
_COLUMNS = ("input_train_name", "output_train_name")
OUT_OF_MEMORY = frozenset({EndReason.OUT_OF_MEMORY, EndReason.CUDA_OUT_OF_MEMORY})
_YES = frozenset({"true", "1", "yes", "on"})


@dataclass(frozen=True)
class FailureSuggestion:
    """Parameters to use instead, and why (code and values of a sentence)."""

    changes: Mapping[str, Any]
    code: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def detail(self, language: Language = DEFAULT_LANGUAGE) -> str:
        """Return what changes and what that costs, as a sentence."""
        return text(self.code, language, **self.params)


@dataclass(frozen=True)
class TunableParameters:
    """The parameters that the script declares, and what the job gave; defaults stand in for what it did not."""

    declared: Mapping[str, ScriptParameter]
    given: Mapping[str, Any]

    def first(self, names: Sequence[str]) -> str | None:
        """Return the first of these names that the script declares."""
        return next((name for name in names if name in self.declared), None)

    def value(self, name: str) -> Any:
        """Return what the script works with."""
        return self.given.get(name, self.declared[name].default)

    def is_one_of(self, values: Mapping[str, Sequence[Any]]) -> bool:
        """Say whether the script works with one of the values of a parameter."""
        return any(name in self.declared and self.value(name) in some for name, some in values.items())

    def count(self, name: str | None) -> int | None:
        """Return a whole number of at least 1; None for anything else."""
        value = None if name is None else self.value(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


@dataclass(frozen=True)
class ExpectedMemory:
    """A forecast of what the job needed, and the parameters with which it is expected to fit its device."""

    expected_mib: int
    available_mib: int
    device: str
    changes: Mapping[str, Any]


def suggestion_for(
    reason: EndReason,
    params: Mapping[str, Any],
    tunable: TunableParameters,
    *,
    columns: Sequence[str] = (),
    memory: ExpectedMemory | None = None,
) -> FailureSuggestion | None:
    """Return what to change after an end with this reason. `None` if no concrete change is known."""
    if reason in OUT_OF_MEMORY and memory is not None and (fitting := _fitting_memory(tunable, memory)):
        return fitting
    match reason:
        case EndReason.CUDA_OUT_OF_MEMORY:
            return _smaller_batch(tunable) or _recompute(tunable) or _shorter_rows(tunable) or _four_bit(tunable)
        case EndReason.OUT_OF_MEMORY | EndReason.METAL_WATCHDOG:
            return _smaller_batch(tunable) or _shorter_rows(tunable)
        case EndReason.COLUMN_MISSING:
            return _closest_column(str(params.get("column", "")), tunable, columns)
        case _:
            return None


def _fitting_memory(tunable: TunableParameters, memory: ExpectedMemory) -> FailureSuggestion | None:
    """Take what the forecast says, if the script declares all of it and it is a change."""
    changes = memory.changes
    if not changes or any(name not in tunable.declared for name in changes):
        return None
    params = {
        "changes": ", ".join(f"{name} {str(value).lower()}" for name, value in changes.items()),
        "expected": memory.expected_mib,
        "available": memory.available_mib,
        "device": memory.device,
    }
    return FailureSuggestion(dict(changes), "fix_memory", params)


def _smaller_batch(tunable: TunableParameters) -> FailureSuggestion | None:
    """Halve the batch; the accumulation makes up for it, so that a step sees the same rows."""
    batch_name, accumulation_name = tunable.first(BATCH), tunable.first(ACCUMULATION)
    batch, accumulation = tunable.count(batch_name), tunable.count(accumulation_name)
    smallest = 2 if tunable.is_one_of(_COMPARED) else 1
    if batch_name is None or batch is None or batch < 2 * smallest:
        return None
    if accumulation_name is None or accumulation is None:
        new = batch // 2
        return FailureSuggestion(
            {batch_name: new}, "fix_smaller_batch_only", {"name": batch_name, "old": batch, "new": new}
        )
    effective = batch * accumulation
    sizes = [size for size in range(batch // 2, smallest - 1, -1) if effective % size == 0]
    if not sizes:
        return None
    new = sizes[0]
    changes = {batch_name: new, accumulation_name: effective // new}
    params = {
        "name": batch_name,
        "old": batch,
        "new": new,
        "accumulation": accumulation_name,
        "steps": effective // new,
        "effective": effective,
    }
    return FailureSuggestion(changes, "fix_smaller_batch", params)


def _recompute(tunable: TunableParameters) -> FailureSuggestion | None:
    name = tunable.first(CHECKPOINTING)
    return None if name is None or _is_on(tunable, name) else _switched_on(tunable, name, "fix_recompute")


def _four_bit(tunable: TunableParameters) -> FailureSuggestion | None:
    name = tunable.first(_FOUR_BIT)
    if name is None or _is_on(tunable, name) or tunable.is_one_of(_WHOLE):
        return None
    return _switched_on(tunable, name, "fix_four_bit")


def _switched_on(tunable: TunableParameters, name: str, code: str) -> FailureSuggestion | None:
    parameter = tunable.declared[name]
    if parameter.choices is not None:
        yes: Any = next((choice for choice in parameter.choices if str(choice).lower() in _YES), None)
    else:
        yes = True if parameter.kind in (ParameterKind.BOOLEAN, ParameterKind.ANY) else None
    return None if yes is None else FailureSuggestion({name: yes}, code, {"name": name})


def _is_on(tunable: TunableParameters, name: str) -> bool:
    return str(tunable.value(name)).lower() in _YES


def _shorter_rows(tunable: TunableParameters) -> FailureSuggestion | None:
    name = tunable.first(_LENGTH)
    length = tunable.count(name)
    if name is None or length is None or length // 2 < SHORTEST_SEQUENCE:
        return None
    return FailureSuggestion({name: length // 2}, "fix_shorter_rows", {"name": name, "old": length, "new": length // 2})


def _closest_column(missing: str, tunable: TunableParameters, columns: Sequence[str]) -> FailureSuggestion | None:
    """Name the column that looks most like the missing one, in the parameter that named it."""
    name = next((name for name in _COLUMNS if name in tunable.declared and tunable.value(name) == missing), None)
    if name is None:
        return None
    taken = {tunable.value(other) for other in _COLUMNS if other in tunable.declared and other != name}
    by_lower = {column.lower(): column for column in columns if column not in taken}
    close = difflib.get_close_matches(missing.lower(), by_lower, n=1, cutoff=CLOSE_ENOUGH)
    if not close:
        return None
    column = by_lower[close[0]]
    return FailureSuggestion({name: column}, "fix_column", {"name": name, "missing": missing, "column": column})
