"""Events become curves; the curves of several attempts become one."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.executor.runs.events import (
    READ_BYTES,
    BrokenEvent,
    EvaluationEvent,
    EventPosition,
    EventReader,
    MetricsEvent,
    NoteEvent,
    ProgressEvent,
    RunEvents,
    event_document,
    parse_event,
)
from app.executor.runs.metrics import MetricSeries, Point, downsample
from app.executor.runs.progress import ProgressEstimator
from app.executor.runs.run_folder import RunFolder


def metrics_line(step: int, **values: Any) -> str:
    return json.dumps({"type": "metrics", "time": 1000.0 + step, "step": step, "values": values}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


class TestParseEvent:
    def test_nan_and_infinity_are_holes_and_other_values_are_no_metrics(self) -> None:
        line = b'{"type":"metrics","time":1,"step":2,"values":{"a":NaN,"b":1e999,"c":null,"d":3,"e":"x","f":true}}'

        assert parse_event(line) == MetricsEvent(1.0, 2, {"a": None, "b": None, "c": None, "d": 3.0})

    @pytest.mark.parametrize(
        "line",
        [
            b"not json",
            b"[1,2]",
            b'{"type":"metrics"',
            b'{"type":"metrics","time":1,"step":-1,"values":{}}',
            b'{"type":"metrics","time":1,"step":1e400,"values":{}}',
            b'{"type":"metrics","time":1,"step":1,"values":[]}',
            b'{"type":"evaluation","time":1,"name":"em","phase":"during","value":1,"samples":1}',
            b'{"type":"note","time":1}',
            b'{"type":"unheard of"}',
            b"[" * 100_000,
            b"\xff\xfe",
            b"1" * 5000,
        ],
    )
    def test_refuses_what_is_no_event(self, line: bytes) -> None:
        with pytest.raises(BrokenEvent):
            parse_event(line)

    def test_texts_can_be_stored_and_sent(self) -> None:
        event = parse_event(b'{"type":"note","time":1,"message":"\\ud800 nul \\u0000 end"}')

        assert event == NoteEvent(1.0, "\\ud800 nul \\x00 end")

    @pytest.mark.parametrize(
        "event",
        [
            MetricsEvent(1.0, 2, {"loss": 0.5, "kl": None}),
            ProgressEvent(1.0, 2, 10, "m"),
            ProgressEvent(1.0, 2, percent=20.0),
            EvaluationEvent(1.0, "em", "before", 0.1, 20),
        ],
    )
    def test_a_document_reads_back_as_the_event(self, event: MetricsEvent | ProgressEvent | EvaluationEvent) -> None:
        assert parse_event(json.dumps(event_document(event)).encode()) == event


class TestEventReader:
    def test_a_half_written_line_waits_for_its_end(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        line = metrics_line(1, loss=1.0)
        reader = EventReader(path)

        assert reader.read() == []
        for character in line[:-1]:
            append(path, character)
            assert reader.read() == []
        append(path, "\n" + line[:5])

        assert [event.step for event in reader.read() if isinstance(event, MetricsEvent)] == [1]
        assert (reader.offset, reader.skipped) == (len(line), 0)

    def test_skips_and_counts_broken_and_over_long_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        append(path, metrics_line(1, a=1) + "garbage\n\n" + '{"x": "' + "y" * 9_000_000 + '"}\n' + metrics_line(2, a=1))
        reader = EventReader(path)

        events = [event for batch in reader.batches() for event in batch]

        assert [event.step for event in events if isinstance(event, MetricsEvent)] == [1, 2]
        assert reader.skipped == 2
        assert reader.offset == path.stat().st_size


class TestRunEvents:
    def test_what_the_output_repeats_is_not_counted_twice(self, folder: RunFolder) -> None:
        append(folder.events, metrics_line(1, loss=1.0))
        append(folder.projected_events, metrics_line(1, loss=9.0))
        append(folder.projected_events, '{"type":"record","time":1,"code":200004,"level":"info","detail":""}\n')

        events = RunEvents(folder).read()

        assert [type(event).__name__ for event in events] == ["MetricsEvent", "RecordEvent"]

    def test_the_output_speaks_for_a_script_that_writes_no_metrics(self, folder: RunFolder) -> None:
        append(folder.events, '{"type":"note","time":1,"message":"hello"}\n')
        append(folder.projected_events, metrics_line(1, loss=9.0))

        assert len(list(RunEvents(folder).read())) == 2

    def test_comes_in_pieces_with_the_position_behind_each(self, folder: RunFolder) -> None:
        note = '{"type":"note","time":1,"message":"' + "x" * 9_000 + '"}\n'
        append(folder.events, note * 1_000)
        append(folder.projected_events, metrics_line(1, loss=1.0))
        events = RunEvents(folder)

        sizes, ends = zip(*((len(batch), events.position.own) for batch in events.batches()), strict=True)

        assert sum(sizes) == 1_001
        assert max(sizes) * len(note) <= READ_BYTES
        assert list(ends) == sorted(ends)
        assert ends[0] < ends[-1] == folder.events.stat().st_size

    def test_goes_on_at_a_position(self, folder: RunFolder) -> None:
        append(folder.events, metrics_line(1, loss=1.0))
        first = RunEvents(folder)
        list(first.read())
        position = EventPosition.parse(str(first.position))
        append(folder.events, metrics_line(2, loss=1.0))
        append(folder.projected_events, metrics_line(1, loss=1.0))

        events = RunEvents(folder, position).read()

        assert [event.step for event in events if isinstance(event, MetricsEvent)] == [2]


class TestMetricSeries:
    def test_reads_what_is_new(self, folder: RunFolder) -> None:
        series = MetricSeries([folder])
        append(folder.events, metrics_line(1, loss=2.0, lr=0.1))

        assert series.refresh() == 2
        assert series.refresh() == 0
        append(folder.events, metrics_line(2, loss=1.0) + metrics_line(3, loss=float("nan")))
        assert series.refresh() == 2

        assert series.names == ("loss", "lr")
        assert [(point.step, point.value) for point in series.series("loss")] == [(1, 2.0), (2, 1.0), (3, None)]
        assert series.latest["lr"].step == 1
        assert series.series("unknown") == ()

    def test_a_later_attempt_replaces_from_where_it_went_on(self, tmp_path: Path) -> None:
        one, two = RunFolder(tmp_path / "1"), RunFolder(tmp_path / "2")
        for run in (one, two):
            run.path.mkdir()
        append(one.events, "".join(metrics_line(step, loss=1.0) for step in range(1, 9)))
        append(two.events, metrics_line(5, loss=2.0) + metrics_line(6, loss=2.0) + metrics_line(6, loss=3.0))
        series = MetricSeries([one, two])

        series.refresh()

        curve = [(point.step, point.value) for point in series.series("loss")]
        assert curve == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 3.0)]

    def test_what_was_counted_in_the_output_takes_no_step_of_earlier_attempts(self, tmp_path: Path) -> None:
        one, two = RunFolder(tmp_path / "1"), RunFolder(tmp_path / "2")
        for run in (one, two):
            run.path.mkdir()
        append(one.events, "".join(metrics_line(step, loss=1.0) for step in range(1, 9)))
        series = MetricSeries([one, two])
        append(two.projected_events, metrics_line(1, loss=9.0).replace('"step"', '"source": "counted", "step"'))
        series.refresh()
        append(two.events, metrics_line(5, loss=2.0))

        series.refresh()

        assert [(point.step, point.value) for point in series.series("loss")] == [
            (1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0),
        ]  # fmt: skip

    def test_a_score_before_the_checkpoint_is_loaded_does_not_go_back(self, tmp_path: Path) -> None:
        first, second = RunFolder(tmp_path / "1"), RunFolder(tmp_path / "2")
        for run in (first, second):
            run.path.mkdir()
        series = MetricSeries([first, second])
        append(first.events, metrics_line(0, eval_loss=3.0) + "".join(metrics_line(n, loss=n) for n in range(1, 6)))
        append(second.events, metrics_line(0, eval_loss=2.5))
        series.refresh()

        append(second.events, metrics_line(4, loss=40.0))
        series.refresh()

        assert [(point.step, point.value) for point in series.series("loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
        assert [(point.step, point.value) for point in series.series("eval_loss")] == [(0, 2.5)]

    def test_the_scripts_own_metrics_take_over_from_the_output(self, folder: RunFolder) -> None:
        series = MetricSeries([folder])
        append(folder.projected_events, metrics_line(0, loss=9.0) + metrics_line(1, loss=9.0))
        series.refresh()
        append(folder.events, metrics_line(1, loss=1.0))
        append(folder.projected_events, metrics_line(2, loss=9.0))

        series.refresh()

        assert [(point.step, point.value) for point in series.series("loss")] == [(1, 1.0)]

    def test_a_hundred_thousand_points_are_reduced_to_what_is_asked_for(self) -> None:
        points = [Point(step, float(step), (step * 7919 % 1000) / 1000) for step in range(100_000)]

        reduced = downsample(points, 500)

        assert 400 <= len(reduced) <= 500


VALUES = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))


class TestDownsample:
    @given(values=st.lists(VALUES, max_size=300), limit=st.integers(min_value=0, max_value=80))
    def test_keeps_ends_and_extremes_within_the_limit(self, values: list[float | None], limit: int) -> None:
        points = [Point(step, 0.0, value) for step, value in enumerate(values)]

        reduced = downsample(points, limit)

        assert len(reduced) <= limit
        assert list(reduced) == sorted(set(reduced), key=lambda point: point.step)
        assert set(reduced) <= set(points)
        if points and limit >= 1:
            assert reduced[-1] == points[-1]
        if points and limit >= 2:
            assert reduced[0] == points[0] or limit >= len(points)
        numbers = [value for value in values if value is not None]
        if numbers and limit >= 4:
            kept = [point.value for point in reduced]
            assert min(numbers) in kept
            assert max(numbers) in kept

    def test_a_curve_that_became_nan_ends_in_a_hole(self) -> None:
        points = [Point(step, 0.0, 1.0 if step < 500 else None) for step in range(1000)]

        reduced = downsample(points, 20)

        assert [point for point in reduced if point.value is None]
        assert all(point.value is None for point in reduced if point.step > 600)


def progress_events(*steps: int, total: int | None = 100, seconds: float = 2.0, start: float = 0.0) -> list[Any]:
    return [ProgressEvent(start + seconds * index, step, total) for index, step in enumerate(steps)]


class TestProgress:
    def test_estimates_from_the_recent_rate(self) -> None:
        progress = ProgressEstimator(progress_events(0, 10, 20)).progress

        assert progress is not None
        assert (progress.percent, progress.steps_per_second) == (20.0, 5.0)
        assert progress.eta_seconds == pytest.approx(16.0)

    def test_says_nothing_that_it_cannot_know(self) -> None:
        assert ProgressEstimator().progress is None

        one = ProgressEstimator(progress_events(5)).progress
        without_total = ProgressEstimator(progress_events(1, 2, total=None)).progress

        assert one is not None
        assert (one.percent, one.steps_per_second, one.eta_seconds) == (5.0, None, None)
        assert without_total is not None
        assert (without_total.percent, without_total.steps_per_second, without_total.eta_seconds) == (None, 0.5, None)

    @pytest.mark.parametrize("leap", [3600.0, -3600.0])
    def test_a_clock_step_does_not_change_the_rate(self, leap: float) -> None:
        estimator = ProgressEstimator(progress_events(0, 10, 20, 30))
        for event in progress_events(40, 50, 60, start=8.0 + leap):
            estimator.add(event)

        progress = estimator.progress

        assert progress is not None
        assert progress.steps_per_second == pytest.approx(5.0)

    def test_a_resume_starts_the_measuring_anew(self) -> None:
        estimator = ProgressEstimator(progress_events(0, 50, 90))
        for event in progress_events(40, 41, 42, start=500.0):
            estimator.add(event)

        progress = estimator.progress

        assert progress is not None
        assert (progress.step, progress.steps_per_second) == (42, 0.5)

    def test_a_message_between_steps_does_not_stop_the_clock(self) -> None:
        events = [ProgressEvent(0, 0, 10), ProgressEvent(5, 0, 10, "saving"), ProgressEvent(10, 1, 10)]

        progress = ProgressEstimator(events).progress

        assert progress is not None
        assert (progress.message, progress.steps_per_second) == ("saving", 0.1)

    def test_a_percentage_gives_an_estimate_as_well(self) -> None:
        events = [ProgressEvent(0, 1, percent=10.0), ProgressEvent(10, 2, percent=20.0)]

        progress = ProgressEstimator(events).progress

        assert progress is not None
        assert progress.percent == 20.0
        assert progress.eta_seconds == pytest.approx(80.0)

    def test_is_done_at_the_end(self) -> None:
        progress = ProgressEstimator(progress_events(99, 100)).progress

        assert progress is not None
        assert (progress.percent, progress.eta_seconds) == (100.0, 0.0)
