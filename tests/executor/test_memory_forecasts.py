"""What a training is expected to need: estimated, and as an earlier training measured it."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.domain.enums import JobStatus, Platform
from app.executor.runs.memory_forecasts import (
    Basis,
    Device,
    MemoryForecast,
    device_for,
    expected_again,
    forecast_memory,
    measured_memory,
)
from app.presets.shared.helpers.deepe_rows.lengths import Lengths, RowLength
from app.store import job_attempts
from app.store.job_queries import measured_trainings
from app.store.job_status import End
from app.store.session import Database
from app.store.tables import JobRow, NodeRow
from tests import job_rows

H200 = Device("cuda", "NVIDIA H200", 143_000, "gpu-1")
L4 = Device("cuda", "NVIDIA L4", 23_000, "gpu-2")
PROCESSOR = Device("cpu", "cpu", 16_000, "node-1")
VALUES: dict[str, Any] = {
    "batch_size": 8,
    "grad_accum_steps": 2,
    "max_seq_length": 4096,
    "lora_rank": 16,
    "dtype": "auto",
    "load_in_4bit": False,
    "gradient_checkpointing": "auto",
    "packing": "false",
    "optimizer": "adamw_torch_fused",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a folder with the configuration of a model of eight billion weights."""
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
              "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def forecast(base: Path | None, device: Device = H200, *, preset: str = "SFT-Demo", **more: Any) -> MemoryForecast:
    found = forecast_memory(preset, base, {**VALUES, **more.pop("values", {})}, device, **more)
    assert found is not None
    return found


def past(device: Device = H200, *, peak: float, expected: float | None, **parameters: Any) -> JobRow:
    memory = {"peak_mib": peak, "expected_mib": expected, "device": device.name}
    return job_rows.new_job(status=JobStatus.SUCCEEDED, memory=memory, parameters=parameters)


class TestEstimated:
    def test_parts_make_up_what_is_expected(self, base: Path) -> None:
        found = forecast(base)

        assert found.basis is Basis.ESTIMATED
        assert found.parts is not None
        assert found.parts["weights"] == pytest.approx(15_316, abs=20)
        assert found.expected_mib == pytest.approx(sum(found.parts.values()), abs=5)
        assert found.warnings() == []

    def test_longest_measured_row_counts_instead_of_the_limit(self, base: Path) -> None:
        rows = [RowLength(1, 90, 100, 90, 10, 100), RowLength(1, 400, 500, 400, 100, 500)]
        lengths = Lengths(rows=rows, measured=2, total=2, refused=0, refused_lines=(), pictures=0)

        recomputed = {"gradient_checkpointing": "true"}
        short = forecast(base, values=recomputed, lengths=lengths).expected_mib

        assert short == forecast(base, values={**recomputed, "max_seq_length": 500}).expected_mib
        assert short < forecast(base, values=recomputed).expected_mib

    def test_device_that_is_too_small_is_told_with_the_cure(self, base: Path) -> None:
        (warning,) = forecast(base, L4).warnings()

        assert warning.code == "memory_beyond_devices_unless"
        assert warning.params["changes"] == "batch_size=2, grad_accum_steps=8"
        assert (warning.params["most"], warning.params["node"]) == (23_000, "gpu-2")

    def test_device_that_no_change_suits_is_told_as_well(self, base: Path) -> None:
        tiny = Device("cuda", "NVIDIA T1000", 4000, "gpu-3")

        assert [one.code for one in forecast(base, tiny).warnings()] == ["memory_beyond_devices"]

    def test_script_without_a_forecast_has_none(self, base: Path) -> None:
        assert forecast_memory("Custom01", base, VALUES, H200) is None
        assert forecast_memory(None, base, VALUES, H200) is None
        assert forecast_memory("SFT-Demo", base / "gone", VALUES, H200) is None


class TestMeasured:
    def test_other_batch_scales_the_peak_by_the_estimates(self, base: Path) -> None:
        small = forecast(base, values={"batch_size": 2})
        job = past(peak=30_000, expected=small.expected_mib)

        found = forecast(base, measured=[job])

        assert (found.basis, found.from_job) == (Basis.MEASURED, job.id)
        ratio = forecast(base).expected_mib / small.expected_mib
        assert found.expected_mib == pytest.approx(30_000 * ratio + 600, rel=0.001)
        assert found.parts == forecast(base).parts

    def test_newest_on_the_same_kind_of_device_counts(self, base: Path) -> None:
        whole = forecast(base).expected_mib
        jobs = [past(L4, peak=1, expected=whole), past(peak=20_000, expected=whole), past(peak=2, expected=whole)]

        assert forecast(base, measured=jobs).from_job == jobs[1].id

    def test_cure_is_by_what_was_measured(self, base: Path) -> None:
        estimated = forecast(base, H200)
        job = past(peak=200_000, expected=estimated.expected_mib)

        (warning,) = forecast(base, H200, measured=[job]).warnings()

        assert estimated.warnings() == []
        assert (warning.code, warning.params["expected"]) == (
            "memory_beyond_devices_unless",
            pytest.approx(200_600, abs=10),
        )
        assert warning.params["changes"].startswith("batch_size=")

    def test_without_an_estimate_only_the_same_parameters_count(self) -> None:
        same, other = past(peak=900, expected=None, batch_size=8), past(peak=900, expected=None, batch_size=4)

        found = forecast(None, preset="Custom01", measured=[other, same])

        assert (found.from_job, found.expected_mib, found.parts) == (same.id, 1500, None)
        assert forecast_memory("Custom01", None, VALUES, H200, measured=[other]) is None

    def test_what_a_script_does_not_report_is_not_kept(self) -> None:
        assert measured_memory({"loss": 1.0}, H200) is None
        assert measured_memory({"memory_peak_mib": 812.5}, PROCESSOR) == {
            "peak_mib": 812.5, "expected_mib": None, "device": "cpu",
        }  # fmt: skip


def test_after_running_out_the_script_s_own_forecast_counts(base: Path) -> None:
    found = expected_again("SFT-Demo", base, VALUES, L4, reported_mib=60_000)

    assert found is not None
    assert found.expected_mib == 60_000
    assert found.changes is not None
    assert found.changes["batch_size"] * found.changes["grad_accum_steps"] == 16


class TestDevices:
    def node(self, name: str, *accelerators: Accelerator, **labels: str) -> NodeRow:
        return NodeRow(
            id=name, name=name, platform=Platform.CUDA, accelerators=[one.document() for one in accelerators],
            inventory={"memory_bytes": 64 * 2**30}, labels=labels, environments=[], slots=1, boot_id="boot",
        )  # fmt: skip

    def card(self, name: str, memory: int, index: int = 0) -> Accelerator:
        return Accelerator(f"{name}-{index}", index, AcceleratorKind.CUDA, name, memory)

    def test_most_capable_device_with_the_labels_is_taken(self) -> None:
        nodes = [self.node("a"), self.node("b", self.card("L4", 23_000)), self.node("c", self.card("H200", 143_000))]
        nodes[1].labels = {"room": "1"}

        whole, labelled = device_for(nodes, {}), device_for(nodes, {"room": "1"})

        assert (whole, labelled) == (Device("cuda", "H200", 143_000, "c"), Device("cuda", "L4", 23_000, "b"))
        assert device_for(nodes[:1], {}) == Device("cpu", "cpu", 65_536, "a")
        assert device_for(nodes, {"room": "2"}) is None

    def test_leased_accelerator_is_the_one_that_was_measured(self) -> None:
        node = self.node("a", self.card("H200", 143_000), self.card("L4", 23_000, 1))

        assert Device.of(node, ["L4-1"]).name == "L4"
        assert Device.of(node, []).name == "cpu"


async def test_ended_trainings_are_found_newest_first(database: Database) -> None:
    method_id = await job_rows.add_method(database)
    node_id = await job_rows.add_node(database, slots=4)
    ended = []
    for peak in (100.0, None, 300.0):
        await job_rows.add_job(database, method_id=method_id, method_version=1, base_model_id="base")
        claim = await job_rows.claim(database, node_id)
        assert claim is not None
        memory = None if peak is None else {"peak_mib": peak, "expected_mib": None, "device": "cpu"}
        async with database.writing() as session:
            success = End(status=JobStatus.SUCCEEDED, reason=job_rows.SUCCESS.reason, params={}, memory=memory)
            assert await job_attempts.finish(session, claim, success, now=job_rows.START)
        ended.append(claim.job.id)

    async with database.reading() as session:
        found = await measured_trainings(session, method_id=method_id, base_model_id="base", limit=5)
        none = await measured_trainings(session, method_id=method_id, base_model_id="another", limit=5)

    assert {(job.id, (job.memory or {})["peak_mib"]) for job in found} == {(ended[0], 100.0), (ended[2], 300.0)}
    assert none == []
