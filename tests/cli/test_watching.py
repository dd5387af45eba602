"""Watching a job: what is told, how a broken stream is resumed, how the chain is followed."""

import io
import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from app.cli import app
from app.cli.client import Api, ServiceFailed, StreamEvent
from app.cli.command import typed
from app.cli.watch import LiveScreen, WatchedJob, draw, ending_lines, follow
from tests.cli.standin import Answer, Request, document, problem, stand_in, stream


def job(identity: str, status: str, **more: Any) -> dict[str, Any]:
    return {
        "id": identity, "name": "a name", "stage": "training", "status": status, "reason": None, "reason_detail": None,
        "log_tail": [], "chain": [], "waiting_for": None, "started_at": None, "finished_at": None, **more,
    }  # fmt: skip


def watched(*events: tuple[str, Any]) -> tuple[WatchedJob, list[str]]:
    """Return a job after these events, and what was told of them."""
    known = WatchedJob(id="1", stage="training")
    return known, [line for name, data in events for line in known.apply(StreamEvent(name, data))]


def progress(step: int, total: int = 1000) -> tuple[str, Any]:
    return "progress", {
        "percent": 100 * step / total,
        "step": step,
        "total": total,
        "eta_seconds": None,
        "message": None,
    }


class TestWatchedJob:
    def test_tells_a_thousand_steps_in_a_dozen_lines(self) -> None:
        _, told = watched(*(progress(step) for step in range(1001)))

        assert len(told) == 11
        assert told[-1] == "training: 100 %, step 1000 of 1000"

    def test_tells_each_state_once(self) -> None:
        states = ["queued", "launching", "running", "running", "succeeded"]
        _, told = watched(*(("state", {"job": "1", "status": status}) for status in states))

        assert told == [f"training: {status}" for status in ["launching", "running", "succeeded"]]

    def test_does_not_tell_the_output(self) -> None:
        known, told = watched(("log", {"text": "one\ntw"}), ("log", {"text": "o\nthree\n"}))

        assert told == []
        assert known.log_lines() == ["one", "two", "three"]

    def test_keeps_records_of_the_platform_out_of_the_output(self) -> None:
        known, _ = watched(("log", {"text": '[log_data]: {"msg": 200009}\nhello\n'}))

        assert known.log_lines() == ["hello"]

    def test_lets_a_progress_bar_replace_its_line(self) -> None:
        known, _ = watched(("log", {"text": "start\n10 %"}), ("log", {"text": "\r20 %"}), ("log", {"text": "\n"}))

        assert known.log_lines() == ["start", "20 %"]

    def test_takes_points_that_come_again_once(self) -> None:
        points = [("metrics", {"step": step, "values": {"loss": 1.0 / step}}) for step in (1, 2, 3, 2, 3)]
        known, _ = watched(*points)

        assert known.curve is not None
        assert known.curve[1] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]

    def test_forgets_the_curve_of_an_earlier_attempt(self) -> None:
        known, _ = watched(
            ("state", {"job": "1", "status": "running", "attempt": 1}),
            ("metrics", {"step": 9, "values": {"loss": 1.0}}),
            ("state", {"job": "1", "status": "running", "attempt": 2}),
        )

        assert known.curve is None

    def test_joins_the_scores_before_and_after(self) -> None:
        _, told = watched(
            ("evaluation", {"name": "exact_match", "phase": "before", "value": 0.05, "samples": 40}),
            ("evaluation", {"name": "exact_match", "phase": "after", "value": 0.975, "samples": 40}),
        )

        assert told[-1] == "training: exact_match 0.05 → 0.975 (held-out samples: 40)"

    def test_is_drawn_with_bar_curve_and_output(self) -> None:
        known, _ = watched(
            ("state", {"job": "1", "status": "running"}),
            progress(500),
            ("metrics", {"step": 1, "values": {"loss": 2.0}}),
            ("metrics", {"step": 2, "values": {"loss": 0.25}}),
            ("log", {"text": "hello [bold]world\n"}),
        )
        page = io.StringIO()

        Console(file=page, width=120).print(draw(known))

        text = page.getvalue()
        assert "training running" in text
        assert "step 500 of 1000" in text
        assert "█▁" in text
        assert "hello [bold]world" in text


class TestFollow:
    def test_resumes_behind_the_last_event_when_the_connection_breaks(self) -> None:
        answers = iter(
            [
                stream(("1", "log", {"text": "a"}), ("2", "log", {"text": "b"}), cut=True),
                problem(503, "database_busy", "Later."),
                stream(("3", "log", {"text": "c"})),
                stream(("4", "end", {"status": "succeeded"})),
            ]
        )
        with stand_in(lambda _: next(answers)) as (url, asked), Api(url) as api:
            events = list(follow(api, "/jobs/1/events", sleep=lambda _: None))

        assert [event.event for event in events] == ["log", "log", "log", "end"]
        assert [request.headers.get("last-event-id") for request in asked] == [None, "2", "2", "3"]

    def test_gives_up_when_the_service_stays_away(self) -> None:
        now = 0.0

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds

        with (
            stand_in(lambda _: problem(503, "database_busy", "Later.")) as (url, _asked),
            Api(url) as api,
            pytest.raises(ServiceFailed, match="Later"),
        ):
            list(follow(api, "/jobs/1/events", clock=lambda: now, sleep=sleep))

        assert 60 < now < 120


class TestWatchCommand:
    def test_follows_the_chain_and_ends_with_1_at_the_first_failure(self) -> None:
        chain = [
            {"id": "1", "stage": "training", "status": "queued"},
            {"id": "2", "stage": "saving", "status": "queued"},
        ]
        failed = job("2", "failed", stage="saving", reason="exit_code", reason_detail="Mend it.", log_tail=["boom"])

        def script(request: Request) -> Answer:
            match request.path:
                case "/api/v1/jobs/1":
                    return document(job("1", "succeeded", chain=chain))
                case "/api/v1/jobs/2":
                    return document(failed)
                case "/api/v1/jobs/1/events":
                    return stream(("1", "end", {"status": "succeeded"}))
                case _:
                    return stream(("1", "end", {"status": "failed"}))

        with stand_in(script) as (url, _asked):
            result = CliRunner().invoke(app, ["jobs", "watch", "1", "--url", url])

        assert result.exit_code == 1
        assert result.stdout.splitlines() == [
            "saving: failed (exit_code)",
            "Mend it.",
            "Last lines of its output:",
            "  boom",
            f"The whole output: {typed('jobs logs 2')}",
        ]

    def test_prints_every_event_as_a_json_line(self) -> None:
        def script(request: Request) -> Answer:
            if request.path.endswith("/events"):
                return stream(("7", "log", {"text": "ä"}), ("8", "end", {"status": "succeeded"}))
            return document(job("1", "succeeded"))

        with stand_in(script) as (url, _asked):
            result = CliRunner().invoke(app, ["jobs", "watch", "1", "--url", url, "--json"])

        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.exit_code == 0
        assert [line["event"] for line in lines] == ["log", "end", "job"]
        assert lines[0] == {"job": "1", "event": "log", "id": "7", "data": {"text": "ä"}}


def test_the_live_screen_leaves_one_line_of_a_job_that_succeeded() -> None:
    page = io.StringIO()
    known, _ = watched(("metrics", {"step": 1, "values": {"loss": 0.5}}))
    with LiveScreen(Console(file=page, width=100)) as screen:
        screen.begin(known)
        screen.finish(known, job("1", "succeeded"))

    assert [line.rstrip() for line in page.getvalue().splitlines() if line.strip()] == [
        "training succeeded  loss ▄ 0.5"
    ]


def test_a_success_needs_no_more_words() -> None:
    assert ending_lines(job("1", "succeeded")) == []


class TestLogs:
    def test_follows_until_the_end(self) -> None:
        pages = iter(
            [
                {"text": "one\n", "offset": 0, "next_offset": 4, "size": 4, "end": False},
                {"text": "", "offset": 4, "next_offset": 4, "size": 4, "end": False},
                {"text": "two\n", "offset": 4, "next_offset": 8, "size": 8, "end": True},
            ]
        )
        with stand_in(lambda _: document(next(pages))) as (url, asked):
            result = CliRunner().invoke(app, ["jobs", "logs", "1", "-f", "--url", url])

        assert result.stdout == "one\ntwo\n"
        assert "offset=4" in asked[-1].path

    def test_stops_at_the_present_end_without_follow(self) -> None:
        pages = iter(
            [
                {"text": "one\n", "offset": 0, "next_offset": 4, "size": 4, "end": False},
                {"text": "", "offset": 4, "next_offset": 4, "size": 4, "end": False},
            ]
        )
        with stand_in(lambda _: document(next(pages))) as (url, _asked):
            result = CliRunner().invoke(app, ["jobs", "logs", "1", "--url", url])

        assert result.exit_code == 0
        assert result.stdout == "one\n"
