"""Records in the output become events exactly once, whatever dies in between."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.executor.attempts import log_projection
from app.executor.attempts.log_projection import LogProjector
from app.executor.runs.events import EventReader, MetricsEvent, ProgressEvent, RecordEvent, StageEvent
from app.executor.runs.run_folder import RunFolder


def record(code: int = 200009, **fields: Any) -> str:
    document = {
        "level": "info",
        "time": "2026-01-01T00:00:00Z",
        "taskUuid": "t",
        "seq": 1,
        "msgDetail": "",
        "msg": code,
        "details": None,
    }
    return "[log_data]: " + json.dumps(document | fields)


def step(number: int, percent: str = "") -> str:
    return record(msgDetail=percent, details={"step": number, "loss": 1.0 / (number + 1), "kl": None})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def project(folder: RunFolder, text: str, *, final: bool = True) -> list[StageEvent]:
    folder.output_log.write_text(text, "utf-8")
    projector = LogProjector(folder.output_log, folder.projected_events, clock=lambda: 5.0)
    while projector.advance(final=final):
        pass
    return projected(folder)


def projected(folder: RunFolder) -> list[StageEvent]:
    return [event for batch in EventReader(folder.projected_events).batches() for event in batch]


class TestTranslation:
    def test_a_training_record_becomes_metrics_without_nulls_and_progress(self, folder: RunFolder) -> None:
        events = project(folder, "noise\n" + step(3, "30.0") + "\nmore\n")

        assert events == [
            MetricsEvent(1767225600.0, 3, {"loss": 0.25}),
            ProgressEvent(1767225600.0, 3, percent=30.0),
        ]

    def test_bare_nan_is_left_out(self, folder: RunFolder) -> None:
        events = project(folder, '[log_data]: {"msg": 200009, "details": {"step": 1, "loss": NaN, "epoch": 0.5}}\n')

        assert events == [MetricsEvent(5.0, 1, {"epoch": 0.5})]

    def test_other_codes_are_records(self, folder: RunFolder) -> None:
        events = project(folder, record(200002, msgDetail="../datasets/a", seq="1") + "\n")

        assert events == [RecordEvent(1767225600.0, 200002, "info", "../datasets/a")]

    def test_the_error_text_in_the_task_id_is_found(self, folder: RunFolder) -> None:
        events = project(folder, record(200006, level="error", taskUuid="no such column", msgDetail="t", details=0))

        assert events == [RecordEvent(1767225600.0, 200006, "error", "no such column")]

    @pytest.mark.parametrize(
        "text",
        [
            "[log_data]: {broken\n",
            "[log_data]: 5\n",
            "[log_data]: [1]\n",
            "[log_data]:\n",
            '[log_data]: {"msg": "text"}\n',
            '[log_data]: {"msg": 200009, "details": 0}\n',
            "[log_data]: " + "[" * 50_000 + "\n",
            '[log_data]: {"x": "' + "y" * 3_000_000 + '"}\n',
            "half [log_da",
        ],
    )
    def test_what_is_no_record_is_passed_over(self, folder: RunFolder, text: str) -> None:
        events = project(folder, text + "\n" + step(1) + "\n")

        assert [event.step for event in events if isinstance(event, MetricsEvent)] == [1]
        assert len(events) == 1

    def test_records_stand_behind_progress_bars_and_beside_other_output(self, folder: RunFolder) -> None:
        text = f"\r 10%|█ | 1/10{step(1)}WARNING x\n{step(2)}{step(3)}\n"

        events = project(folder, text)

        assert [event.step for event in events if isinstance(event, MetricsEvent)] == [1, 2, 3]

    def test_invalid_bytes_do_not_shift_what_follows(self, folder: RunFolder) -> None:
        data = b'[log_data]: {"msg": 1, "level": "info", "msgDetail": "\xff\xfe \xc3\xa9"}' + step(1).encode() + b"\n"
        folder.output_log.write_bytes(data)

        LogProjector(folder.output_log, folder.projected_events, clock=lambda: 5.0).advance()

        events = projected(folder)
        assert events[0] == RecordEvent(5.0, 1, "info", "\\xff\\xfe é")
        assert isinstance(events[1], MetricsEvent)


class TestProgress:
    def test_a_record_that_is_being_written_waits_for_its_end(self, folder: RunFolder) -> None:
        line = step(1, "10") + "\n"
        projector = LogProjector(folder.output_log, folder.projected_events)

        assert projector.advance() == 0
        for character in line:
            with folder.output_log.open("a") as file:
                file.write(character)
            projector.advance()

        assert len(projected(folder)) == 2
        assert projector.offset == len(line)

    def test_a_long_silence_is_not_searched_again(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(log_projection, "_BOOKMARK_BYTES", 1000)
        folder.output_log.write_text("x" * 5000)
        LogProjector(folder.output_log, folder.projected_events).advance()
        reader = EventReader(folder.projected_events)

        assert LogProjector(folder.output_log, folder.projected_events).offset == 5000
        assert list(reader.batches()) == [[]]
        assert reader.skipped == 0

    def test_a_full_disk_is_survived(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.output_log.write_text("".join(step(n, str(n)) + "\n" for n in range(10)))
        projector = LogProjector(folder.output_log, folder.projected_events)
        append = LogProjector._append

        def fill_up(self: LogProjector, data: bytes) -> None:
            append(self, data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(LogProjector, "_append", fill_up)
        with pytest.raises(OSError, match="space"):
            projector.advance()
        monkeypatch.setattr(LogProjector, "_append", append)
        projector.advance()

        events = projected(folder)
        assert [event.step for event in events if isinstance(event, MetricsEvent)] == list(range(10))
        assert [event.step for event in events if isinstance(event, ProgressEvent)] == list(range(10))


class TestCrash:
    def test_a_restart_at_any_byte_neither_loses_nor_doubles(self, folder: RunFolder) -> None:
        text = "start\n" + "".join(step(n, str(n * 10)) + f"\nnoise {n}\n" + record(200004) + "\n" for n in range(4))
        expected = project(folder, text)
        whole = folder.projected_events.read_bytes()

        for cut in range(len(whole)):
            folder.projected_events.write_bytes(whole[:cut])

            events = project(folder, text)

            assert events == expected, cut
        assert len(expected) == 12

    def test_complete_lines_are_never_rewritten(self, folder: RunFolder) -> None:
        text = "".join(step(n, str(n)) + "\n" for n in range(5))
        project(folder, text)
        whole = folder.projected_events.read_bytes()
        cut = len(whole) - 10
        folder.projected_events.write_bytes(whole[:cut])
        complete = whole[:cut].rpartition(b"\n")[0]

        project(folder, text)

        assert folder.projected_events.read_bytes().startswith(complete)

    @pytest.mark.parametrize("garbage", [b"\x00" * 4096, b"\x00\x00\n\x00", b"garbage\n{}\n"])
    def test_garbage_of_a_power_cut_is_dropped(self, folder: RunFolder, garbage: bytes) -> None:
        text = "".join(step(n) + "\n" for n in range(5))
        expected = project(folder, text)
        with folder.projected_events.open("ab") as file:
            file.write(garbage)

        assert project(folder, text + step(5) + "\n")[:-1] == expected

    @given(sizes=st.lists(st.integers(min_value=1, max_value=400), max_size=30))
    def test_growth_in_any_pieces_with_a_restart_after_each_gives_the_same(
        self, tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
    ) -> None:
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        text = "".join(f"größe {n}\r" + step(n, str(n)) + "\n" for n in range(8)).encode()
        position = 0
        for size in [*sizes, len(text)]:
            with folder.output_log.open("ab") as file:
                file.write(text[position : position + size])
            position += size
            LogProjector(folder.output_log, folder.projected_events).advance()

        events = projected(folder)

        assert [event.step for event in events if isinstance(event, MetricsEvent)] == list(range(8))
        assert [event.step for event in events if isinstance(event, ProgressEvent)] == list(range(8))
