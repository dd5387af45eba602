"""Curves from the files that trainers write, at the steps that stand there."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.executor.attempts.metric_files import MetricFiles
from app.executor.attempts.projections import Projection, project_whole_log
from app.executor.runs.metrics import MetricSeries
from app.executor.runs.observe import RunObserver
from app.executor.runs.run_folder import RunFolder
from app.store.home import Home


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(Home(tmp_path).run_folder("j", 1))
    folder.output.mkdir(parents=True)
    return folder


def curves(run: RunFolder) -> dict[str, list[tuple[int, float | None]]]:
    series = MetricSeries([run])
    series.refresh()
    return {name: [(point.step, point.value) for point in series.series(name)] for name in series.names}


def message(*fields: tuple[int, float | int | str | bytes]) -> bytes:
    """Return a protocol buffer: numbers as varints, floats as 4 bytes, the rest with its length."""
    parts = b""
    for number, content in fields:
        if isinstance(content, int):
            parts += varint(number << 3) + varint(content)
        elif isinstance(content, float):
            parts += varint(number << 3 | 5) + struct.pack("<f", content)
        else:
            data = content.encode() if isinstance(content, str) else content
            parts += varint(number << 3 | 2) + varint(len(data)) + data
    return parts


def varint(value: int) -> bytes:
    parts = b""
    while value > 0x7F:
        parts, value = parts + bytes([value & 0x7F | 0x80]), value >> 7
    return parts + bytes([value])


def record(step: int, *values: bytes) -> bytes:
    """Return a record of TensorBoard with these values; checksums are not looked at."""
    event = (
        varint(1 << 3 | 1) + struct.pack("<d", 5.0) + message((2, step), (5, message(*((1, one) for one in values))))
    )
    return struct.pack("<QI", len(event), 0) + event + bytes(4)


def scalar(tag: str, value: float) -> bytes:
    return message((1, tag), (2, float(value)))


def write_lines(path: Path, *documents: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)


def test_lines_of_llama_factory_bring_curves_progress_and_the_total(run: RunFolder, tmp_path: Path) -> None:
    log = run.output / "trainer_log.jsonl"
    projection = Projection(run)
    write_lines(log, {"current_steps": 5, "total_steps": 20, "loss": 2.5, "lr": 1e-05, "elapsed_time": "0:00:05"})
    projection.advance()
    with log.open("a") as file:
        file.write('{"current_steps": 10, "total_st')
    Projection(run).advance()  # a restarted worker, in the middle of a line
    with log.open("a") as file:
        file.write('eps": 20, "loss": NaN}\n{"broken\n')
    project_whole_log(run)

    assert curves(run) == {"loss": [(5, 2.5), (10, None)], "learning_rate": [(5, 1e-05)]}
    progress = RunObserver(Home(tmp_path)).digest("j", 1).progress
    assert progress is not None
    assert (progress.step, progress.total) == (10, 20)
    assert run.projected_events.read_bytes().count(b'"metrics"') == 2


def test_lines_of_swift_name_step_and_total_in_one(run: RunFolder) -> None:
    write_lines(run.output / "v0-2026" / "logging.jsonl", {"loss": 1.5, "global_step/max_steps": "5/50"}, {"time": 3})
    project_whole_log(run)

    assert curves(run) == {"loss": [(5, 1.5)]}


def test_files_say_more_than_what_is_printed_and_less_than_the_script(run: RunFolder) -> None:
    run.output_log.write_text("{'loss': '2.512', 'grad_norm': '1.5', 'epoch': '0.5', 'step': 5}\n")
    write_lines(run.output / "trainer_log.jsonl", {"current_steps": 5, "total_steps": 20, "loss": 2.5123})
    project_whole_log(run)
    printed = curves(run)
    write_lines(run.events, {"type": "metrics", "time": 1.0, "step": 6, "values": {"loss": 2.0}})

    assert (printed["loss"], printed["grad_norm"]) == ([(5, 2.5123)], [(5, 1.5)])
    assert curves(run) == {"loss": [(6, 2.0)]}


def test_file_that_is_begun_anew_is_read_anew(run: RunFolder) -> None:
    path = run.output / "trainer_log.jsonl"
    write_lines(path, {"current_steps": 5, "loss": 2.5, "note": "x" * 100})
    project_whole_log(run)
    path.unlink()
    write_lines(path, {"current_steps": 6, "loss": 1.5})
    project_whole_log(run)

    assert curves(run)["loss"] == [(5, 2.5), (6, 1.5)]


def test_state_of_transformers_corrects_steps_that_were_counted(run: RunFolder) -> None:
    run.output_log.write_text("{'loss': '2.512', 'epoch': '0.5'}\n{'loss': '1.5', 'epoch': '1'}\n")
    history = [{"step": 10, "loss": 2.5123, "epoch": 0.5}, {"step": 20, "loss": 1.5, "epoch": 1.0}]
    write_lines(run.output / "checkpoint-20" / "trainer_state.json", {"global_step": 20, "log_history": history})
    project_whole_log(run)
    project_whole_log(run)

    assert curves(run)["loss"] == [(10, 2.5123), (20, 1.5)]
    assert run.projected_events.read_bytes().count(b"2.5123") == 1


class TestTensorBoard:
    def test_scalars_of_both_styles_are_read_as_they_come(self, run: RunFolder) -> None:
        tensor = message((1, 1), (8 - 3, struct.pack("<f", 0.5)))
        data = record(0, message((1, "text"), (8, message((1, 7)))))
        data += record(10, scalar("train/loss", 2.5), scalar("eval/loss", 3.5), scalar("loss", 9.0))
        data += record(20, message((1, "train/loss"), (8, tensor))) + record(30, scalar("train/loss", float("nan")))
        path = run.output / "runs" / "a" / "events.out.tfevents.1.host"
        path.parent.mkdir(parents=True)
        for cut in (5, 60, len(data)):
            path.write_bytes(data[:cut])
            Projection(run).advance()

        found = curves(run)
        assert found["loss"] == [(10, 2.5), (20, 0.5), (30, None)]
        assert found["eval_loss"] == [(10, 3.5)]
        assert found["tensorboard/loss"] == [(10, 9.0)]

    def test_a_picture_is_looked_past(self, run: RunFolder) -> None:
        picture = record(1, message((1, "image"), (4, bytes(3 * 1024 * 1024))))
        (run.output / "events.out.tfevents.1").write_bytes(picture + record(2, scalar("loss", 1.0)))
        project_whole_log(run)

        assert curves(run) == {"loss": [(2, 1.0)]}

    @settings(deadline=None)
    @given(data=st.binary(max_size=300), step=st.integers(0, 2**70))
    def test_nothing_that_stands_in_a_file_raises(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes, step: int
    ) -> None:
        folder = tmp_path_factory.mktemp("output")
        framed = struct.pack("<QI", len(data), 0) + data + bytes(4)
        (folder / "events.out.tfevents.1").write_bytes(framed + record(step, data, scalar("a", 1.0)) + data)

        for reading in MetricFiles(folder, {}).read(now=1.0):
            assert reading.position <= len(framed) * 3 + 200


@pytest.mark.parametrize("name", ["trainer_log.jsonl", "trainer_state.json", "events.out.tfevents.1"])
def test_what_would_block_or_leads_elsewhere_is_no_file(run: RunFolder, tmp_path: Path, name: str) -> None:
    os.mkfifo(run.output / name)
    (run.output / "link").mkdir()
    write_lines(tmp_path / "elsewhere", {"current_steps": 5, "loss": 2.5})
    (run.output / "link" / name).symlink_to(tmp_path / "elsewhere")

    project_whole_log(run)

    assert curves(run) == {}
