"""Forecast the memory of a training: from what an earlier one needed, else from the figures of `deepe_memory`.

A measured peak is that of the newest successful training of the same method and base model on the same kind of device.
Where batch, lengths or number formats differ it is scaled by the ratio of the two forecasts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.domain.errors import Violation
from app.presets.catalogue import load_manifests
from app.presets.shared.helpers.deepe_memory import (
    CONTEXT,
    LARGE,
    MIB,
    Base,
    Step,
    Unforeseeable,
    cure,
    forecast,
    longest_allowed,
    read_base,
    recomputes,
    step_of,
)
from app.presets.shared.helpers.deepe_rows.lengths import Lengths
from app.store.nodes import accelerators_of
from app.store.tables import JobRow, NodeRow

PEAK_MIB: Final = "memory_peak_mib"
EXPECTED_MIB: Final = "memory_expected_mib"
"""Metrics of the shipped scripts: what a training needed at most, and what it forecast with its longest row."""

_CPU: Final = "cpu"
# what a peak depends on; without a forecast it says something only where they are the same
_DECIDING: Final = (
    *("batch_size", "chunk_size", "num_generations", "rollouts", "max_seq_length", "max_input_length"),
    *("max_content_length", "resolution", "max_image_side", "dtype", "load_in_4bit", "gradient_checkpointing"),
    *("packing", "attention", "optimizer", "adapter", "lora_rank", "fine_tune_type", "num_layers", "dataset_path"),
    *("finetuning_type", "freeze_trainable_layers", "adapter_name_or_path", "distributed_strategy"),
)


class Basis(StrEnum):
    """What a forecast rests on."""

    MEASURED = "measured"
    ESTIMATED = "estimated"


@dataclass(frozen=True)
class Device:
    """What a training runs on. Kinds are torch's: "cuda", "mps", "cpu"; `memory_mib` None: not reported."""

    kind: str
    name: str
    memory_mib: int | None
    node: str

    @classmethod
    def of(cls, node: NodeRow, leased: Sequence[str] | None = None) -> Self:
        """Return the accelerator of the node with most memory, of those `leased` if given; else its processor."""
        found = [one for one in accelerators_of(node) if one.kind is not AcceleratorKind.SIMULATED]
        if leased is not None:
            found = [one for one in found if one.id in leased]
        best = max(found, key=lambda one: one.memory_mib or 0, default=None)
        if best is None:
            memory = node.inventory.get("memory_bytes") or None
            return cls(_CPU, _CPU, None if memory is None else memory // MIB, node.name)
        return cls(_kind(best), best.name, best.memory_mib, node.name)

    @property
    def rank(self) -> tuple[bool, bool, int]:
        """Order devices by how much a training can do on them."""
        return self.kind == "cuda", self.kind == "mps", self.memory_mib or 0


@dataclass(frozen=True)
class MemoryForecast:
    """The memory that a training is expected to need on the most capable device."""

    expected_mib: int
    basis: Basis
    device: Device
    from_job: str | None = None
    """The training that was measured."""
    parts: Mapping[str, int] | None = None
    """MiB by what takes them, as estimated. None: nothing is known of how the script uses its parameters."""
    changes: Mapping[str, Any] | None = None
    """Parameters with which it fits the device, by the estimate. Empty: it fits. None: no change is known to help."""

    @property
    def too_large(self) -> bool:
        """Return whether the device has less memory than is expected to be needed."""
        most = self.device.memory_mib
        if most is None or self.device.kind == "mps":
            return False
        small = self.parts is not None and self.parts["weights"] <= LARGE // MIB
        return self.expected_mib > most and (self.device.kind == "cuda" or not small)

    def warnings(self) -> list[Violation]:
        """Return what is worth knowing about it."""
        if not self.too_large:
            return []
        params = {
            "expected": self.expected_mib,
            "most": self.device.memory_mib,
            "device": self.device.name,
            "node": self.device.node,
        }
        if self.changes:
            return [Violation("/parameters", "memory_beyond_devices_unless", params | {"changes": self.changed})]
        known = self.changes is None and self.parts is not None
        return [
            Violation("/parameters", "memory_beyond_devices" if known else "memory_measured_beyond_devices", params)
        ]

    @property
    def changed(self) -> str:
        """Return the changes as people read them."""
        return ", ".join(f"{name}={str(value).lower()}" for name, value in (self.changes or {}).items())


def forecast_memory(
    preset: str | None,
    base_model: Path | None,
    values: Mapping[str, Any],
    device: Device,
    *,
    lengths: Lengths | None = None,
    measured: Sequence[JobRow] = (),
    processes: int = 1,
) -> MemoryForecast | None:
    """Return what a training needs. None: nothing is known of it. Reads the base model's folder: blocks.

    `values` are all parameters of the script, `measured` trainings of its method and base model, newest first.
    """
    of_script = None if base_model is None else _step(preset, base_model, values, device, lengths, processes)
    total = None if of_script is None else forecast(*of_script).total / MIB
    for job in measured:
        found = job.memory or {}
        if found.get("device") != device.name:
            continue
        if total is not None and found.get("expected_mib"):
            ratio = total / found["expected_mib"]
        elif _same(job.parameters, values):
            ratio = 1.0
        else:
            continue
        # what CUDA's allocator reports is without its context
        expected = round(found["peak_mib"] * ratio + (CONTEXT / MIB if device.kind == "cuda" else 0))
        return _forecast(of_script, values, device, expected=expected, from_job=job.id)
    return None if total is None else _forecast(of_script, values, device, expected=round(total))


def expected_again(
    preset: str | None, base_model: Path, values: Mapping[str, Any], device: Device, *, reported_mib: float | None
) -> MemoryForecast | None:
    """Return what a training needed that ran out of memory, `reported_mib` by its script's own forecast. Blocks."""
    of_script = _step(preset, base_model, values, device, None)
    if of_script is None:
        return None
    return _forecast(of_script, values, device, expected=round(reported_mib or forecast(*of_script).total / MIB))


def device_for(nodes: Sequence[NodeRow], labels: Mapping[str, str]) -> Device | None:
    """Return the most capable device of the nodes that have these labels. None: there is no such node."""
    fitting = [node for node in nodes if labels.items() <= node.labels.items()]
    return max((Device.of(node) for node in fitting), key=lambda one: one.rank, default=None)


def measured_memory(metrics: Mapping[str, float], device: Device) -> dict[str, Any] | None:
    """Return what a job keeps of the memory that its training reported. None: it reported nothing."""
    peak = metrics.get(PEAK_MIB)
    if peak is None or peak <= 0:
        return None
    return {"peak_mib": peak, "expected_mib": metrics.get(EXPECTED_MIB), "device": device.name}


def _step(
    preset: str | None,
    folder: Path,
    values: Mapping[str, Any],
    device: Device,
    lengths: Lengths | None,
    processes: int = 1,
) -> tuple[Base, Step] | None:
    """Return the base model and the steps of a shipped method's training. None: they are not known."""
    method = next((manifest.memory for manifest in load_manifests() if manifest.name == preset), None)
    if method is None:
        return None
    try:
        base = read_base(folder)
        tokens = _longest(method, values, device, lengths)
        step = step_of(method, values, device=device.kind, tokens=tokens, processes=processes)
    except (Unforeseeable, KeyError, TypeError, ValueError):  # a copy of the method may have other parameters
        return None
    return base, replace(step, checkpointing=recomputes(base, step, _asked(values), _bytes_of(device)))


def _forecast(
    of_script: tuple[Base, Step] | None,
    values: Mapping[str, Any],
    device: Device,
    *,
    expected: int,
    from_job: str | None = None,
) -> MemoryForecast:
    """Return the forecast, with changes that suit `expected` although the estimate may be another."""
    basis = Basis.ESTIMATED if from_job is None else Basis.MEASURED
    if of_script is None:
        return MemoryForecast(expected_mib=expected, basis=basis, device=device, from_job=from_job)
    base, step = of_script
    memory = forecast(base, step)
    return MemoryForecast(
        expected_mib=expected,
        basis=basis,
        device=device,
        from_job=from_job,
        parts={name: round(size / MIB) for name, size in memory.parts().items()},
        changes=cure(base, step, values, _bytes_of(device) * memory.total / max(expected * MIB, 1)),
    )


def _asked(values: Mapping[str, Any]) -> str:
    return str(values.get("gradient_checkpointing", "false"))


def _bytes_of(device: Device) -> float:
    return float("inf") if device.memory_mib is None else float(device.memory_mib * MIB)


def _longest(method: str, values: Mapping[str, Any], device: Device, lengths: Lengths | None) -> int:
    """Return the tokens of the longest sequence: as measured, at most what the parameters allow."""
    allowed = longest_allowed(values)
    packed = device.kind == "cuda" and values.get("packing") == "auto"
    if lengths is None or not lengths.rows or packed or values.get("packing") == "true":
        return allowed
    if method in ("grpo", "ppo"):
        return min(allowed, max(row.longest_given for row in lengths.rows) + int(values["max_content_length"]))
    return min(allowed, max(row.longest for row in lengths.rows))


def _same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return all(old[name] == new.get(name) for name in _DECIDING if name in old)


def _kind(accelerator: Accelerator) -> str:
    return "cuda" if accelerator.kind is AcceleratorKind.CUDA else "mps"
