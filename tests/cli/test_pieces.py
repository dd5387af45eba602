"""Pure parts of the command line: charts, streams of events, times, languages, parameters, ports, locks, Redis."""

import json
import os
import pty
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.text import Text

from app.cli.client import StreamEvent, accept_language, parse_events
from app.cli.command import Misused
from app.cli.embedded import HomeInUse, HomeLock
from app.cli.jobs import parameters
from app.cli.methods import print_parameters
from app.cli.output import ago, console, duration, plot, print_fields, print_table, sparkline, write
from app.cli.private_redis import RedisKind, choices, wheel_executable
from app.cli.processes import is_free, next_free


class TestSparkline:
    def test_falls_with_its_values(self) -> None:
        assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"

    def test_is_as_wide_as_asked_however_many_values(self) -> None:
        assert len(sparkline([float(n) for n in range(10_000)], width=24)) == 24

    def test_leaves_out_what_is_no_number(self) -> None:
        assert len(sparkline([1.0, None, float("nan"), float("inf"), 2.0])) == 2

    @pytest.mark.parametrize("values", [[], [None], [float("nan")]])
    def test_is_empty_without_values(self, values: list[float | None]) -> None:
        assert sparkline(values) == ""

    def test_is_flat_for_equal_values(self) -> None:
        assert len(set(sparkline([2.0] * 5))) == 1


class TestPlot:
    def test_has_the_highest_value_at_the_top_left_and_the_lowest_at_the_bottom_right(self) -> None:
        lines = plot([(1, 2.0), (2, 1.0), (3, 0.1)], height=4)

        assert lines[0].startswith("2 ┤█")
        assert lines[0].endswith("  ")
        assert lines[3].startswith("0 ┤█")
        assert "step 1" in lines[-1]
        assert lines[-1].endswith("3")

    def test_draws_every_bucket_at_least_a_little(self) -> None:
        lines = plot([(step, 5.0 - 5.0 * step / 99) for step in range(100)], width=20, height=3)

        assert " " not in lines[2].partition("┤")[2]

    def test_is_empty_without_values(self) -> None:
        assert plot([(1, None)]) == []


class TestEventStream:
    def test_reads_names_ids_and_data_across_chunk_borders(self) -> None:
        wire = b'retry: 2000\n\n: heartbeat\n\nid: 7\nevent: log\ndata: {"text":"a"}\n\ndata: plain\n\n'
        chunks = [wire[index : index + 3] for index in range(0, len(wire), 3)]

        events = list(parse_events(chunks))

        assert events == [StreamEvent("log", {"text": "a"}, "7"), StreamEvent("message", "plain", "7")]

    def test_splits_at_line_feeds_only(self) -> None:
        text = "one\u2028two\x85three"
        wire = f"data: {json.dumps(text, ensure_ascii=False)}\n\n".encode()

        assert [event.data for event in parse_events([wire])] == [text]

    def test_drops_an_event_that_was_cut_off(self) -> None:
        assert list(parse_events([b"event: log\ndata: {}\n"])) == []


class TestTimes:
    @pytest.mark.parametrize(
        ("moment", "words"),
        [
            ("2026-01-02T11:59:58Z", "now"),
            ("2026-01-02T11:59:20Z", "40 s ago"),
            ("2026-01-02T11:30:00+00:00", "30 min ago"),
            ("2026-01-02T02:00:00Z", "10 h ago"),
            ("2025-12-30T12:00:00Z", "3 d ago"),
            (None, ""),
        ],
    )
    def test_says_how_long_ago(self, moment: str | None, words: str) -> None:
        assert ago(moment, now=datetime(2026, 1, 2, 12, tzinfo=UTC)) == words

    @pytest.mark.parametrize(
        ("seconds", "words"), [(None, ""), (4.04, "4.0 s"), (123.9, "2:03"), (3723.0, "1:02:03"), (-1.0, "")]
    )
    def test_says_how_long(self, seconds: float | None, words: str) -> None:
        assert duration(seconds) == words


@pytest.mark.parametrize(
    ("environ", "language"),
    [
        ({"LANG": "de_DE.UTF-8"}, "de"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LC_MESSAGES": "zh-TW", "LANG": "de"}, "zh"),
        ({"LANG": "fr_FR"}, "en"),
        ({}, "en"),
    ],
)
def test_asks_for_the_persons_language(environ: Mapping[str, str], language: str) -> None:
    assert accept_language(environ) == language


class TestParameters:
    def test_takes_json_where_it_is_json_and_text_elsewhere(self) -> None:
        given = parameters(["steps=120", "rate=1e-3", "four_bit=true", "name=my run", "eq=a=b"], None)

        assert given == {"steps": 120, "rate": 0.001, "four_bit": True, "name": "my run", "eq": "a=b"}

    def test_lets_single_ones_win_over_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "params.json"
        file.write_text('{"steps": 1, "seed": 7}')

        assert parameters(["steps=2"], file) == {"steps": 2, "seed": 7}

    @pytest.mark.parametrize("assignment", ["steps", "=3"])
    def test_refuses_what_is_no_assignment(self, assignment: str) -> None:
        with pytest.raises(Misused, match="NAME=VALUE"):
            parameters([assignment], None)

    @pytest.mark.parametrize("content", ["[1]", "{"])
    def test_refuses_a_file_without_an_object(self, tmp_path: Path, content: str) -> None:
        file = tmp_path / "params.json"
        file.write_text(content)

        with pytest.raises(Misused, match=r"params\.json"):
            parameters([], file)


class TestPorts:
    def test_sees_a_listener_and_proposes_the_next_port(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]

            assert not is_free("127.0.0.1", port)
            assert next_free("127.0.0.1", port) != port
            assert is_free("127.0.0.1", next_free("127.0.0.1", port))


class TestHomeLock:
    def test_says_who_holds_the_home(self, tmp_path: Path) -> None:
        first, second = HomeLock(tmp_path), HomeLock(tmp_path)
        first.take(command="deepe dev")
        first.note(url="http://127.0.0.1:8123")

        with pytest.raises(HomeInUse, match=r"deepe dev \(process \d+\), which answers at http://127\.0\.0\.1:8123"):
            second.take(command="deepe demo")

    def test_can_be_taken_after_it_was_given_back(self, tmp_path: Path) -> None:
        first, second = HomeLock(tmp_path), HomeLock(tmp_path)
        first.take(command="deepe dev")
        first.release()

        second.take(command="deepe demo")

        second.release()


class TestRedisChoices:
    def test_takes_the_configured_one_and_no_other(self) -> None:
        found = list(choices("redis://:secret@cache:6379/1", which=lambda _: "/usr/bin/redis-server"))

        assert [choice.kind for choice in found] == [RedisKind.CONFIGURED]
        assert "secret" not in found[0].describe()

    def test_prefers_the_one_on_path_to_the_wheel(self) -> None:
        found = list(choices(None, which=lambda _: "/usr/bin/redis-server", wheel=lambda: Path("/wheel/redis")))

        assert [choice.kind for choice in found] == [RedisKind.ON_PATH, RedisKind.WHEEL, RedisKind.NONE]

    def test_knows_when_there_is_none(self) -> None:
        found = list(choices(None, which=lambda _: None, wheel=lambda: None))

        assert [choice.kind for choice in found] == [RedisKind.NONE]

    def test_finds_the_wheels_executable_without_importing_it(self) -> None:
        executable = wheel_executable()

        assert executable is None or executable.name == "valkey-server"


class TestTerminal:
    NAME = "a\x1b[2J\x07\x9b1m"

    def test_gets_no_control_characters_of_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ours, theirs = pty.openpty()
        with os.fdopen(ours, "rb", buffering=0) as terminal, os.fdopen(theirs, "w") as stdout:
            monkeypatch.setattr("sys.stdout", stdout)
            monkeypatch.setenv("TERM", "xterm")
            print_table(("name",), [(self.NAME,)], nothing="")
            print_fields({"name": self.NAME})
            console().print(Text("\x1b[2J", style="bold"))
            write(f"{self.NAME} end\n")
            stdout.flush()
            arrived = ""
            while " end" not in arrived:
                arrived += terminal.read(65536).decode()

        assert arrived.count("a\\x1b[2J\\x07\\x9b1m") == 3
        assert "\x1b[1m\\x1b[2J" in arrived  # our own colours are left
        assert set(arrived).isdisjoint("\x07\x9b")

    def test_files_get_the_bytes_as_they_are(self, capsys: pytest.CaptureFixture[str]) -> None:
        write(self.NAME)

        assert capsys.readouterr().out == self.NAME


class TestTables:
    ROW = (
        "5b0e4c1e-9f3d-4a59-8f5e-0d6f3f8f2a11",
        "a name of several words that is rather long",
        "deployment",
        "succeeded",
    )

    def test_files_get_one_line_for_each_row(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("COLUMNS", raising=False)

        print_table(("id", "name", "stage", "status"), [(*self.ROW[:1], self.ROW[1] * 5, *self.ROW[2:])], nothing="")

        assert any(self.ROW[1] * 5 in line and "succeeded" in line for line in capsys.readouterr().out.splitlines())

    def test_terminals_get_what_is_copied_in_one_piece(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")

        print_table(("id", "name", "stage", "status"), [self.ROW], nothing="")

        lines = capsys.readouterr().out.splitlines()
        assert any(all(word in line for word in (self.ROW[0], "deployment", "succeeded")) for line in lines)
        assert max(map(len, lines)) <= 80


class TestParametersOfAMethod:
    DOCUMENT: ClassVar[dict[str, Any]] = {
        "stages": [
            {
                "stage": "training",
                "file": "train.py",
                "schema": {
                    "properties": {
                        "learning_rate": {"type": "number", "default": 0.1},
                        "loss_type": {"type": ["array", "string"], "x-classes": ["lib.Pairs"], "x-advanced": True},
                        "save_strategy": {"type": "string", "x-classes": ["lib.Pairs"], "x-default-text": "chosen"},
                    }
                },
                "option_classes": [
                    {"path": "lib.Pairs", "when": {"objective": ["dpo"]}, "library": "lib", "version": "1.2"},
                    {"path": "lib.Later", "when": {}, "library": None, "version": None},
                ],
                "remarks": [],
            }
        ]
    }

    def test_are_the_scripts_own_with_a_word_about_the_libraries(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_parameters(self.DOCUMENT)

        printed = " ".join(capsys.readouterr().out.split())
        assert "learning_rate" in printed
        assert "loss_type" not in printed
        assert "and 2 options of lib.Pairs (lib 1.2), with objective=dpo: see them with --advanced" in printed
        assert "lib.Later" not in printed

    def test_are_all_with_advanced(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_parameters(self.DOCUMENT, advanced=True)

        printed = " ".join(capsys.readouterr().out.split())
        assert "options of lib.Pairs (lib 1.2), with objective=dpo" in printed
        assert "loss_type" in printed
        assert "array or string" in printed
        assert "chosen" in printed
